"""The command `minitron gc`: list and delete items that are not needed."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from minitron.cli.local import RUN_DATABASE
from minitron.cli.options import Debug, app, example, one_line_errors
from minitron.cli.tables import print_table
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.runtime.cleanup import Item

_SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}


@app.command(
    "gc", epilog=example("minitron gc gs://bucket/minitron --older-than 30d --tracking-uri http://mlflow:5000")
)
def collect_garbage(
    place: Annotated[
        str | None,
        typer.Argument(
            help="Workspace (a directory, gs://bucket/path), or --work-dir of minitron run; none: the cache."
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(help="Only items unused for this time: 12h, 30d, 8w; none: 30d, or any time with --pipeline-run."),
    ] = None,
    pipeline_run: Annotated[str | None, typer.Option(help="Only results of this pipeline run.")] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server; results behind its registered versions stay."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the items; otherwise they are only listed.")] = False,
    debug: Debug = False,
) -> None:
    """List the items that may be deleted, and why the others stay; delete them with --delete."""
    with one_line_errors(debug):
        from minitron.runtime import cleanup
        from minitron.storage.files import disk_errors

        root, seconds = _find_root(place), _parse_span(older_than or ("0h" if pipeline_run else "30d"))
        if tracking_uri is None and (Path(root) / RUN_DATABASE).is_file():
            tracking_uri = f"sqlite:///{Path(root).absolute() / RUN_DATABASE}"
        if tracking_uri is None and delete:
            raise ConfigError("--delete: the inputs of registered versions are not known; give --tracking-uri")
        with disk_errors(Path(root)):
            items = list(cleanup.list_items(root))
            rules = cleanup.Rules(seconds, cleanup.find_users(tracking_uri) if tracking_uri else None, pipeline_run)
            judged = sorted(((*rules.judge(item), item) for item in items), key=lambda entry: not entry[0])
            _print_items(root, judged)
            may_go = [item for goes, _, item in judged if goes]
            if not delete:
                print(f"{len(may_go)} of {len(items)} may be deleted, {_sum_sizes(may_go)}; --delete deletes them")
                return
            gone = [item for item in may_go if cleanup.delete_item(item)]
        print(f"deleted: {len(gone)} of {len(may_go)}, {_sum_sizes(gone)} freed")


def _find_root(place: str | None) -> str:
    """Return the address to clean up.

    Raises:
        ConfigError: there is no such directory.
    """
    from minitron.storage.bucket import is_bucket
    from minitron.storage.cache import cache_directory

    root = place.rstrip("/") if place else str(cache_directory())
    if not is_bucket(root) and not Path(root).is_dir():
        raise ConfigError(f"{root}: no such directory; give a workspace, or set MINITRON_CACHE")
    return root


def _parse_span(text: str) -> float:
    if not (match := re.fullmatch(r"(\d+)([hdw])", text)):
        raise ConfigError(f"--older-than {text}: not a time; give hours, days or weeks, such as 12h, 30d or 8w")
    return int(match[1]) * _SECONDS[match[2]]


def _print_items(root: str, judged: list[tuple[bool, str, "Item"]]) -> None:
    from minitron.runtime.cleanup import format_age

    rows = [
        [
            "goes" if goes else "stays",
            item.address.removeprefix(f"{root}/"),
            item.kind,
            decimal(item.size),
            format_age(time.time() - item.used),
            why,
        ]
        for goes, why, item in judged
    ]
    print_table(["", "what", "kind", "size", "unused", "why"], rows)


def _sum_sizes(items: list["Item"]) -> str:
    return decimal(sum(item.size for item in items))
