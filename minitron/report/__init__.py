"""What people read of a compression: page, card, tables, figures, charts, TensorBoard's events.

Everything here turns records into text and pictures. It imports config, storage and registry.
"""
