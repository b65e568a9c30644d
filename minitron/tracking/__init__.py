"""MLflow while stages run: the client, a stage's run, a pipeline's run, the outbox.

No module here knows the work of a stage. This room imports config and storage.
"""
