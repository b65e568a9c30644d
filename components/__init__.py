"""Kubeflow's view of the stages, one component each, in the order of the flow."""
