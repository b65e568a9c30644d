"""The `minitron` command: a pipeline on this machine or on a cluster, and questions to the registry.

app.py is the entry point; the commands stand in kubeflow.py, registry.py and run.py. It imports every room but data and
stages.
"""
