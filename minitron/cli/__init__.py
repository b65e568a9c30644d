"""The `minitron` command: runs a pipeline on this machine or on a cluster, and reads and changes the registry.

app.py is the entry point; the commands stand in kubeflow.py, registry.py, run.py and gc.py. This room imports every
room but data and stages.
"""
