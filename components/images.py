"""The only place that names images; their tag is the package's version."""

from minitron import __version__

TRAINER = f"minitron-pipelines/trainer:{__version__}"
"""Built from images/trainer.Dockerfile: the NeMo image and this package. Push it where the cluster pulls from."""

TOOLS = f"minitron-pipelines/tools:{__version__}"
"""Built from images/tools.Dockerfile, without torch and CUDA, for tasks that only move files and call servers."""
