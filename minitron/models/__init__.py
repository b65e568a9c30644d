"""Models on disk and in memory: checkpoints, importance, surgery, losses, scores, generated text.

What computes on a model lives here, whichever stage or engine asks for it. It imports config, storage and data.
"""
