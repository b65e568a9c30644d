"""Select the candidates of a search's next round, and show all of them."""

from typing import NamedTuple, Optional

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def select(
    planned: Input[Artifact],
    selected: Output[Artifact],
    report: Output[HTML],
    document: dict = {},
    results: list = [],
    rest: list = [],
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
) -> NamedTuple("Selection", [("Output", list), ("rest", list), ("settings", dict)]):  # type: ignore[valid-type]
    """Select the candidates of a search's next round, and show all of them.

    `Output` is the list of candidates: kfp.local finds an output to loop over by this name only. Settings:
    minitron.config.shapes.SearchSettings.
    """
    import shutil
    from collections import namedtuple

    from minitron.runtime.entry import launch

    # fmt: off
    outputs = launch(
        "select", output=selected.path, planned=planned.path, document=document, results=results, rest=rest,
        workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=pipeline_run_id,
    )["outputs"]
    # fmt: on
    shutil.copyfile(f"{selected.path}/search.html", report.path)
    return namedtuple("Selection", outputs)(**outputs)
