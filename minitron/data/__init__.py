"""From text to tokens to packed batches.

Corpora are read here, documents selected, and tokens written and read as Megatron's .bin/.idx. It imports config and
storage.
"""
