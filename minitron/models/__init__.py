"""Models on disk and in memory: checkpoints, pruning, losses, scores, downstream tasks, generated text.

All code that computes with a model is here; stages and engines call it. This room imports config, storage and data.
"""
