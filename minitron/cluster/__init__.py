"""The APIs of Kubeflow Pipelines and Kubernetes: access, retries, errors in one line.

Only this room uses their clients; cli/local.py alone uses kfp's local runner. This room imports no other room.
"""
