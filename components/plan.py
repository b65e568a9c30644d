"""Check a run's settings before you pay for a GPU, and give each stage its section."""

from typing import NamedTuple, Optional

from kfp import dsl
from kfp.dsl import HTML, Artifact, Output

from minitron.config.pipelines import TOOLS


@dsl.component(base_image=TOOLS, packages_to_install=[], install_kfp_package=False)
def plan(
    planned: Output[Artifact],
    report: Output[HTML],
    teacher: str = "",
    corpus: str = "",
    model_name: str = "",
    champion: str = "",
    preset: str = "",
    settings: dict = {},
    needs_budget: bool = False,
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
) -> NamedTuple(  # type: ignore[valid-type]
    "Plan",
    [
        *((name, str) for name in ("teacher", "corpus")),
        *((name, dict) for name in ("prepare", "finetune", "prune", "distill", "evaluate", "register")),
        *(
            (f"{stage}_{resource}", str)
            for stage in ("prepare", "finetune", "prune", "distill", "evaluate", "register")
            for resource in ("cpu", "memory")
        ),
        *((f"{stage}_gpus", str) for stage in ("finetune", "prune", "distill", "evaluate")),
        ("search", dict),
        *((name, str) for name in ("trial_cpu", "trial_memory", "trial_gpus", "select_gpus")),
        ("gpu_tolerations", list),
        ("gpu_node_selector", dict),
    ],
):
    """Check a run's settings before you pay for a GPU, and give each stage its section.

    Settings: minitron.config.document.PipelineSettings.
    """
    import shutil
    from collections import namedtuple

    from minitron.runtime.entry import launch

    # fmt: off
    outputs = launch(
        "plan", output=planned.path, teacher=teacher, corpus=corpus, model_name=model_name,
        champion=champion, preset=preset, document=settings, needs_budget=needs_budget, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id,
    )["outputs"]
    # fmt: on
    shutil.copyfile(f"{planned.path}/plan.html", report.path)
    return namedtuple("Plan", outputs)(**outputs)
