"""The pipelines, each beside its compiled YAML."""
