"""MLflow while stages run: the client, a stage's run, a pipeline's run, the outbox.

Nothing here knows what a stage does. It imports config and storage.
"""
