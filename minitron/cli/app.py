"""The `minitron` command.

Run a compiled pipeline on this machine: `minitron run compress --preset demo --work-dir runs/demo`. On a cluster:
`minitron submit compress --preset llama-3.1-minitron-4b-width --set corpus=gs://bucket/text --host URL --wait`.
"""

from typing import Annotated

import typer

from minitron import __version__
from minitron.cli import gc, kubeflow, registry, run  # noqa: F401  # each adds its commands
from minitron.cli.options import app, example


def main() -> None:
    """Run the command: the entry point of `minitron`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(epilog=example("minitron run compress --preset demo --work-dir runs/demo"))
def global_options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Compress a large language model: prepare → finetune → prune → distill → evaluate → register."""
