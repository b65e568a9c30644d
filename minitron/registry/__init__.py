"""Registered models: versions, lineage, gates, promotion, serving, and the training lock.

This room runs in the tools image, which has no torch. It imports config, storage, data and tracking.
"""
