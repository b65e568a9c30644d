"""Options that commands share, the example of a help text, and errors in one line."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from minitron.errors import MinitronError

COMMANDS = (
    "run", "plan", "doctor", "submit", "schedule", "unschedule", "runs",
    "lineage", "reproduce", "serve-manifest", "promote", "rollback", "gc",
)  # fmt: skip
"""All commands in the order of their first use."""


class _OrderedGroup(TyperGroup):
    """Lists the commands in that order, whichever module is imported first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)


app = typer.Typer(
    cls=_OrderedGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts have brackets of their own: gs://bucket[/prefix]
)

Pipeline = Annotated[str, typer.Argument(help="Pipeline: compress, retrain, search or promote.")]
Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", help="Shipped preset or a YAML file; repeatable, later ones win."),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value; wins over the presets; repeatable.")]
Host = Annotated[
    str | None,
    typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="URL of Kubeflow Pipelines; not needed in a pod of its cluster."),
]
Namespace = Annotated[str | None, typer.Option(envvar="MINITRON_NAMESPACE", help="Namespace of the tasks.")]
Token = Annotated[str | None, typer.Option(envvar="MINITRON_TOKEN", help="Bearer token, if the server needs one.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="Start without confirmation; in a script, more than one GPU needs it.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Version = Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@alias in MLflow's registry.")]
RegisteredModel = Annotated[str, typer.Argument(help="Registered model.")]
Why = Annotated[str | None, typer.Option(help="Reason for the promotion log.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server of the registry.")]


def example(command: str) -> str:
    """Return a command as the end of a help text, in a paragraph that click does not rewrap."""
    return f"\b\nExample:\n  {command}"


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """If the command fails, end it with one line and the error's exit status."""
    try:
        yield
    except MinitronError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
