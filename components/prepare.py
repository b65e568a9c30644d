"""Turn a corpus into a deduplicated, split, tokenized dataset."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output

from minitron.config.pipelines import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def prepare(
    corpus: str,
    teacher: str,
    dataset: Output[Dataset],
    metrics: Output[Metrics],
    settings: dict = {},
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
):
    """Turn a corpus into a deduplicated, split, tokenized dataset.

    Settings: minitron.config.PrepareSettings.
    """
    from minitron.runtime.entry import launch

    # fmt: off
    launch(
        "prepare", metrics, settings, output=dataset.path, corpus=corpus, teacher=teacher, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )
    # fmt: on
