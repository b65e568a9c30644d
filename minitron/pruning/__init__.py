"""Pruning: importance (what each part contributes) and surgery (the smaller model)."""
