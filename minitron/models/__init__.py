"""Models on disk and in memory: checkpoints, importance, surgery, losses, scores, generated text.

Code that computes on a model lives here; stages and engines call it. The room imports config, storage and data.
"""
