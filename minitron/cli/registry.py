"""The commands that ask and change the registry: lineage, reproduce, promote, rollback."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minitron.cli.options import Debug, RegisteredModel, TrackingUri, Version, Why, app, one_line_errors
from minitron.cli.tables import gates_table, make_console, print_table
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.registry.promotion import Promotion


@app.command("lineage")
def show_lineage(version: Version, tracking_uri: TrackingUri, debug: Debug = False) -> None:
    """Show where a registered model comes from: data, models, settings, versions, cost, from MLflow alone."""
    with one_line_errors(debug):
        from minitron.cli import lineage_tree
        from minitron.registry import lineage

        make_console().print(lineage_tree.tree(lineage.read_lineage(tracking_uri, version)))


@app.command()
def reproduce(
    version: Version,
    tracking_uri: TrackingUri,
    output: Annotated[Path | None, typer.Option(help="Preset to write; none: print it.")] = None,
    debug: Debug = False,
) -> None:
    """Write the preset that runs a registered model's pipeline again, with all its settings."""
    with one_line_errors(debug):
        from minitron.registry import lineage, reproduce

        text = reproduce.write_preset(lineage.read_lineage(tracking_uri, version))
        if output is None:
            print(text, end="")
            return
        try:
            output.write_text(text)
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}; give a file in an existing directory") from error
        print(f"written: {output}; run it: minitron run {reproduce.PIPELINE} --preset {output}")


@app.command()
def promote(
    name: RegisteredModel,
    tracking_uri: TrackingUri,
    version: Annotated[int | None, typer.Option(min=1, help="Its number; none: the challenger's.")] = None,
    why: Why = None,
    debug: Debug = False,
) -> None:
    """Make a version the champion, if it meets its gates; the present champion becomes the previous one."""
    with one_line_errors(debug):
        from minitron.registry import promotion

        _print_promotion(promotion.promote(tracking_uri, name, version, why))


@app.command()
def rollback(name: RegisteredModel, tracking_uri: TrackingUri, why: Why = None, debug: Debug = False) -> None:
    """Make the previous version the champion again; the present champion becomes the previous one."""
    with one_line_errors(debug):
        from minitron.registry import promotion

        _print_promotion(promotion.rollback(tracking_uri, name, why))


def _print_promotion(done: "Promotion") -> None:
    if (move := done.move) is None:
        print(f"nothing moved: version {done.version} of {done.name} is the champion already")
        return
    moved = [["champion", move.source or "none", move.to], ["previous", "", move.source or "none"]]
    print_table([done.name, "from version", "to version"], moved)
    print(f"by {move.who} at {move.when}" + (f": {move.why}" if move.why else ""))
    if done.gates:
        make_console().print(gates_table(done.gates))
