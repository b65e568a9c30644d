"""Downstream tasks: lm-eval's names, its runs, and a model in which answers to one question share the question."""
