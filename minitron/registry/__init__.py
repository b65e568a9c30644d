"""Registered models: versions, lineage, gates, promotion, and which pipeline run trains what.

This room runs in the tools image, which has no torch. It imports config, storage, data and tracking.
"""
