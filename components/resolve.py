"""Decide whether there is anything new to train."""

from typing import NamedTuple, Optional

from kfp import dsl
from kfp.dsl import Artifact, Metrics, Output

from minitron.config.pipelines import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def resolve(
    tracking_uri: str,
    pipeline_run_id: str,
    resolved: Output[Artifact],
    metrics: Output[Metrics],
    teacher: str = "",
    corpus: str = "",
    model_name: str = "",
    preset: str = "",
    settings: dict = {},
    workspace: Optional[str] = None,
    experiment: str = "minitron",
) -> NamedTuple("Decision", [("Output", bool), ("champion", str), ("model_name", str)]):  # type: ignore[valid-type]
    """Decide whether there is anything new to train. Settings: minitron.config.document.PipelineSettings.

    `Output` is the answer: kfp.local finds an output in a condition by this name only.
    """
    from collections import namedtuple

    from minitron.runtime.entry import launch

    # fmt: off
    record = launch(
        "resolve", metrics, output=resolved.path, teacher=teacher, corpus=corpus, model_name=model_name,
        preset=preset, document=settings, workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
    decision = namedtuple("Decision", ["Output", "champion", "model_name"])
    return decision(record["train"], record["champion"] or "", record["model_name"])
