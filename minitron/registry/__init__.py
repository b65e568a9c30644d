"""Registered models: versions, lineage, gates, promotion, and which pipeline run trains what.

The image of the tools, which has no torch, runs this room. It imports config, storage, data and tracking.
"""
