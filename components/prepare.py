"""Turn a corpus into a deduplicated, split, tokenised dataset."""

from typing import Optional

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output

from minitron.components.images import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def prepare(
    corpus: str,
    teacher: str,
    dataset: Output[Dataset],
    metrics: Output[Metrics],
    seed: int = 1234,
    text_field: str = "text",
    validation_fraction: float = 0.01,
    test_fraction: float = 0.01,
    licence: str = "unknown",
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
    caching: bool = True,
    gpus: int = 0,
):
    """Turn a corpus into a deduplicated, split, tokenised dataset. Settings: minitron.config.PrepareConfig."""
    from minitron.stage import launch

    # fmt: off
    launch(
        "prepare", metrics, output=dataset.path, corpus=corpus, teacher=teacher, seed=seed,
        text_field=text_field, validation_fraction=validation_fraction, test_fraction=test_fraction,
        licence=licence, workspace=workspace, tracking_uri=tracking_uri, experiment=experiment,
        pipeline_run_id=pipeline_run_id, caching=caching, gpus=gpus,
    )
    # fmt: on
