"""Every setting: its type, its default, its check.

Stages, tasks and clusters have a frozen model each; presets and the parameters that Kubeflow knows are read into them.
This room imports no other, so that compiling a pipeline stays light.
"""
