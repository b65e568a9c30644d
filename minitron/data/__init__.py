"""Turn text into tokens and tokens into packed batches.

This room reads corpora, selects documents, and writes and reads tokens as Megatron's .bin/.idx. It imports config and
storage.
"""
