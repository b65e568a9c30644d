"""The APIs of Kubeflow Pipelines and of Kubernetes: access, retries, errors in one line.

Only this room uses their clients (and cli/local.py kfp's local runner). This room imports no other room.
"""
