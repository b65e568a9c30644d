"""Measure teacher, pruned model and student, and write the report."""

from typing import Optional

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from minitron.components.images import TRAINER


@dsl.component(base_image=TRAINER, packages_to_install=[], install_kfp_package=False)
def evaluate(
    dataset: Input[Dataset],
    teacher: Input[Model],
    pruned: Input[Model],
    student: Input[Model],
    teacher_before: str,
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    seed: int = 1234,
    sequence_length: int = 8192,
    micro_batch_size: int = 4,
    evaluation_sequences: int = 640,
    tasks: list[str] = [],
    task_directory: Optional[str] = None,
    task_limit: Optional[int] = None,
    prompts: list[str] = ["The history of the city began", "In physics, energy is"],
    generation_tokens: int = 48,
    out_of_domain: Optional[str] = None,
    champion: Optional[str] = None,
    gates: list[dict] = [],
    workspace: Optional[str] = None,
    tracking_uri: Optional[str] = None,
    experiment: str = "minitron",
    pipeline_run_id: Optional[str] = None,
    caching: bool = True,
    gpus: int = 0,
):
    """Measure teacher, pruned model and student, and write the report. Settings: minitron.config.EvaluateConfig."""
    import shutil

    from minitron.stage import launch

    # fmt: off
    launch(
        "evaluate", metrics, dataset=dataset.path, teacher=teacher.path, pruned=pruned.path,
        student=student.path, output=evaluation.path, teacher_before=teacher_before, seed=seed,
        sequence_length=sequence_length, micro_batch_size=micro_batch_size,
        evaluation_sequences=evaluation_sequences, tasks=tasks, task_directory=task_directory,
        task_limit=task_limit, prompts=prompts, generation_tokens=generation_tokens,
        out_of_domain=out_of_domain, champion=champion, gates=gates, workspace=workspace,
        tracking_uri=tracking_uri, experiment=experiment, pipeline_run_id=pipeline_run_id, caching=caching, gpus=gpus,
    )
    # fmt: on
    shutil.copyfile(f"{evaluation.path}/report.html", report.path)
