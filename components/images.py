"""The only place that names images; their tag is the package's version.

MINITRON_REGISTRY, such as registry.example/path, is read when this module is imported: when a pipeline is compiled.
"""

from minitron import __version__
from minitron.config.pipelines import locate_image

TRAINER = locate_image(f"minitron-pipelines/trainer:{__version__}")
"""Built from images/trainer.Dockerfile: the NeMo image and this package."""

TOOLS = locate_image(f"minitron-pipelines/tools:{__version__}")
"""Built from images/tools.Dockerfile, without torch and CUDA, for tasks that only move files and call servers."""
