"""The commands for the registry: lineage, reproduce, serve-manifest, promote, rollback."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minitron.cli.options import Debug, RegisteredModel, TrackingUri, Version, Why, app, example, one_line_errors
from minitron.cli.tables import gates_table, make_console, print_table
from minitron.errors import ConfigError

if TYPE_CHECKING:
    from minitron.registry.promotion import Promotion


@app.command("lineage", epilog=example("minitron lineage models:/minitron@champion --tracking-uri http://mlflow:5000"))
def show_lineage(version: Version, tracking_uri: TrackingUri, debug: Debug = False) -> None:
    """Show the origin of a registered model, from MLflow alone: data, models, settings, versions, cost."""
    with one_line_errors(debug):
        from minitron.cli import lineage_tree
        from minitron.registry import lineage

        make_console().print(lineage_tree.make_tree(lineage.read_lineage(tracking_uri, version)))


@app.command(
    epilog=example("minitron reproduce models:/minitron/3 --output again.yaml --tracking-uri http://mlflow:5000")
)
def reproduce(
    version: Version,
    tracking_uri: TrackingUri,
    output: Annotated[Path | None, typer.Option(help="Preset file to write; none: print the preset.")] = None,
    debug: Debug = False,
) -> None:
    """Write a preset with all settings of a registered model's run, to run it again."""
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
        print(f"written: {output}; run it with minitron run {reproduce.PIPELINE} --preset {output}")
        print(f"Its version gets the alias {reproduce.ALIAS}; changed inputs are refused.")


@app.command(
    "serve-manifest",
    epilog=example("minitron serve-manifest models:/minitron@champion --tracking-uri http://mlflow:5000"),
)
def print_service(
    version: Version,
    tracking_uri: TrackingUri,
    claim: Annotated[
        str | None,
        typer.Option(help="Volume claim of the workspace, if the model is on a volume; none: the pipeline's default."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the manifest of the KServe InferenceService that serves a registered model."""
    with one_line_errors(debug):
        from minitron.config.pipelines import default_argument
        from minitron.registry import serving

        print(serving.render_service(tracking_uri, version, claim or default_argument("workspace_claim")), end="")


@app.command(
    epilog=example("minitron promote minitron --version 3 --why 'smaller, as good' --tracking-uri http://mlflow:5000")
)
def promote(
    name: RegisteredModel,
    tracking_uri: TrackingUri,
    version: Annotated[int | None, typer.Option(min=1, help="Number of the version; none: the challenger.")] = None,
    why: Why = None,
    force: Annotated[bool, typer.Option("--force", help="Overrule its gates; --why is required.")] = False,
    debug: Debug = False,
) -> None:
    """Make a version the champion if it meets its gates; the old champion becomes `previous`."""
    with one_line_errors(debug):
        from minitron.registry import promotion

        _print_promotion(promotion.promote(tracking_uri, name, version, why, force=force))


@app.command(
    epilog=example("minitron rollback minitron --why 'too slow in production' --tracking-uri http://mlflow:5000")
)
def rollback(name: RegisteredModel, tracking_uri: TrackingUri, why: Why = None, debug: Debug = False) -> None:
    """Make the previous version the champion again; the champion becomes `previous`."""
    with one_line_errors(debug):
        from minitron.registry import promotion

        _print_promotion(promotion.rollback(tracking_uri, name, why))


def _print_promotion(promotion: "Promotion") -> None:
    if (move := promotion.move) is None:
        print(f"unchanged: version {promotion.version} of {promotion.name} already is the champion")
        return
    rows = [["champion", move.source or "none", move.to], ["previous", "", move.source or "none"]]
    print_table([promotion.name, "from version", "to version"], rows)
    print(f"by {move.who} at {move.when}" + (f": {move.why}" if move.why else ""))
    if move.forced:
        print(f"overruled gates: {move.forced}")
    if promotion.gates:
        make_console().print(gates_table(promotion.gates))
