"""Turn text into tokens and tokens into packed batches.

This room reads corpora, selects documents, and writes and reads tokens in Megatron's .bin/.idx format. It imports
config and storage.
"""
