"""Scheduled retraining: resolve → compress, if there is anything new → promote, if the gates are met → conclude.

Rewrite the compiled pipeline beside this file: `python -m minitron.pipelines.retrain`.
"""

import inspect
from pathlib import Path
from typing import Any, get_args

from kfp import compiler, dsl

from minitron.components import conclude, promote, resolve
from minitron.pipelines.compress import CLUSTER, compress, connect, give, protect

COMPILED = Path(__file__).with_suffix(".yaml")

_UNSET: dict[Any, Any] = {int: 0, str: "", list: [], dict: {}}
"""Inside a condition Kubeflow cannot leave a parameter out; these stand for that. See minitron.config.given."""


def _parameters() -> list[inspect.Parameter]:
    """Return compress's parameters: the champion is looked up, so not among them; there must be an MLflow server."""
    of_compress = inspect.signature(compress.pipeline_func).parameters
    given = {name: _with_a_value(entry) for name, entry in of_compress.items() if name != "evaluate_champion"}
    given["tracking_uri"] = given["tracking_uri"].replace(default=inspect.Parameter.empty)
    # The name of a secret cannot be empty; one that is not there is passed over.
    given["image_pull_secret"] = given["image_pull_secret"].replace(default="minitron-pull")
    return sorted(given.values(), key=lambda entry: entry.default is not inspect.Parameter.empty)


def _with_a_value(entry: inspect.Parameter) -> inspect.Parameter:
    """Give an optional parameter without a value the one that stands for that."""
    if entry.default is not None:
        return entry
    (kind,) = (kind for kind in get_args(entry.annotation) if kind is not type(None))
    return entry.replace(annotation=kind, default=_UNSET[getattr(kind, "__origin__", kind)])


_PARAMETERS = _parameters()


def _retrain(*values: Any) -> None:
    given = dict(zip((entry.name for entry in _PARAMETERS), values, strict=True))
    common = {name: given[name] for name in ("tracking_uri", "experiment", "workspace")}
    common |= {"pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    tasks = {"conclude": conclude(**common)}
    with dsl.ExitHandler(tasks["conclude"]):
        settings = {name: given[name] for name in resolve.component_spec.inputs if name in given}
        tasks["resolve"] = resolve(name=given["register_name"], **settings | common)
        with dsl.If(tasks["resolve"].outputs["Output"] == True):  # noqa: E712  (KFP's condition)
            compress_task = compress(**given, evaluate_champion=tasks["resolve"].outputs["champion"])
            tasks["promote"] = promote(name=given["register_name"], version=compress_task.output, **common)
    for name, task in tasks.items():
        give(task, gpus=0, cpu="2", memory="8Gi")
        protect(task)
        image, secrets = given["tools_image"], (given["image_pull_secret"], given["secret"])
        connect(task, name, image, *secrets, given["workspace_claim"])


_retrain.__name__ = "retrain"
_retrain.__doc__ = (compress.pipeline_func.__doc__ or "").partition("Returns:")[0]
_retrain.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]

retrain = dsl.pipeline(
    name="retrain",
    description="Compress again when data, teacher or settings changed; promote the student if it meets the gates.",
    pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=CLUSTER.ttl_hours * 3600),
)(_retrain)


if __name__ == "__main__":
    compiler.Compiler().compile(retrain, str(COMPILED))
