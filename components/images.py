"""The only place an image is named; its tag is the package's version."""

from minitron import __version__

TRAINER = f"minitron-pipelines/trainer:{__version__}"
"""Built from images/trainer.Dockerfile: the NeMo image and this package. Push it where the cluster pulls from."""
