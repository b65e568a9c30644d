"""The settings of a cluster: what each task asks for, and what Kubeflow reads only from the compiled pipeline."""

import re
from typing import Annotated

from pydantic import Field, PositiveInt, field_validator

from minitron.config.settings.base import Settings


class Resources(Settings):
    """Resources of a stage's task on a cluster; in a preset they are in the stage's section."""

    cpu: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        pattern=r"^\d+(\.\d+)?m?$",
        description="CPU cores of the task; none: 8 per GPU, at least 8, and 2 for register.",
    )
    memory: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        pattern=r"^\d+(\.\d+)?([kMGTP]|[KMGTP]i)?$",
        description="Memory of the task, including /dev/shm; none: the sum on plan's page.",
    )


class GpuResources(Resources):
    """Resources of a task that uses GPUs."""

    gpus: Annotated[int, Field(ge=0)] = Field(1, description="GPUs of the task.")


QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Kueue's label for a pod or a TrainJob that waits in a LocalQueue."""

TRAIN_JOB_QUEUE_LABEL = "minitron.io/train-job-queue"
"""Label of a task's pod that does not queue itself: the queue of the TrainJob that it starts."""

RETRIES = "MINITRON_RETRIES"
"""Environment variable of a trial's pod: the setting `cluster.retries`."""

_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
"""Pattern of an object's name in Kubernetes."""

_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
"""Pattern of a label's value in Kubernetes, and of its key after the prefix."""

_QUEUE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""Pattern of Kueue's LocalQueueName (apis/kueue/v1beta2/localqueue_types.go); a label has at most 63 characters."""


class ClusterConfig(Settings):
    """Settings that Kubeflow reads only from the compiled pipeline; `minitron submit` and `schedule` write them there.

    They are the section `cluster` of a preset.
    """

    service_account: str | None = Field(
        None, pattern=_NAME, description="Service account of the tasks; none: Kubeflow's default."
    )
    shared_memory: str = Field(
        "16Gi", pattern=r"^\d+[KMGT]i$", description="Limit of /dev/shm in every task; it counts toward memory."
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        3, description="Further attempts after one fails or is lost (spot nodes)."
    )
    timeout_hours: PositiveInt = Field(168, description="Most hours that one attempt at a task may take.")
    ttl_hours: PositiveInt = Field(
        168,
        description="Hours that a run's pods and their logs are kept after its end. It needs Kubeflow Pipelines 2.17; "
        "an older one uses Argo's own settings.",
    )
    labels: dict[str, Annotated[str, Field(pattern=rf"^({_LABEL})?$")]] = Field(
        {}, description="Labels of the tasks' pods, for example for cost accounting."
    )
    queue: str | None = Field(
        None,
        description="LocalQueue of Kueue in which every pod and TrainJob with GPUs waits; none: nothing waits. The "
        "wait of a TrainJob counts toward timeout_hours.",
    )

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key in labels:
            if not re.fullmatch(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL}", key):
                raise ValueError(f"{key!r} cannot be a label; give at most 63 letters, digits, '-', '_' and '.'")
        return labels

    @field_validator("queue")
    @classmethod
    def _check_queue(cls, queue: str | None) -> str | None:
        if queue is not None and not (_QUEUE.fullmatch(queue) and len(queue) <= 63):
            raise ValueError(
                f"{queue!r} cannot be the name of a LocalQueue; give at most 63 lowercase letters, digits, '-' and "
                "'.', with a letter or digit first and last"
            )
        return queue


RESOURCES: dict[str, Resources] = {
    "prepare": Resources(),
    **dict.fromkeys(("finetune", "prune", "distill", "evaluate"), GpuResources()),
    "register": Resources(),
}
"""Default resources of every stage's task; only stages that use GPUs get one."""
