"""The tiny pipeline, stage by stage through the door of a task; each attempt is a process group that can be killed.

An attempt is forked from a process that has imported everything, so that it starts in a fraction of a second.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from minitron.config.document import read_preset
from minitron.config.stages import PlanConfig
from minitron.stages import plan
from tests.faults import injector
from tests.servers import forks

STAGES = ("prepare", "finetune", "prune", "distill", "evaluate", "register")

# Three checkpoints, and a best state as often.
_TRAINING = {"max_steps": 6, "validation_interval": 2, "validation_sequences": 8, "checkpoint_interval": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": _TRAINING,
    "prune": {"calibration_sequences": 8},
    "distill": _TRAINING,
    "evaluate": {"evaluation_sequences": 8, "generation_tokens": 2, "task_limit": 8},
}
"""What is smaller than in the preset tiny."""

ATTEMPT = "from tests.faults.pipeline import run_attempt; run_attempt()"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline run: its name is that of its directory, of its experiment and of the registered model."""

    root: Path
    inputs: dict[str, Path]
    uri: str

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def beside(self, name: str) -> "Pipeline":
        """Return another run with the same inputs, on the same server."""
        return replace(self, root=self.root.with_name(name))

    def output(self, stage: str) -> Path:
        return self.root / "outputs" / stage

    def start(self, stages: tuple[str, ...], labels: list[str] | None = None) -> BaseProcess:
        """Start an attempt at stages, which is killed at the first site with one of the labels."""
        self.root.mkdir(exist_ok=True)
        values = {"stages": [[stage, self._values(stage)] for stage in stages], "root": str(self.root)}
        values["fault"] = [labels, "cut", str(self.root.with_suffix(".events"))]
        log = self.root.with_suffix(".log")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MINITRON"))
        }
        environment |= {"MINITRON_CACHE": str(self.root / "cache"), "TQDM_DISABLE": "1"}
        return forks.start_python(["-c", ATTEMPT, json.dumps(values)], log, log, environment, self.root)

    def read_labels(self) -> list[str]:
        """Return the labels of all sites that the latest attempt came to."""
        path = self.root.with_suffix(".events")
        sites = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return [injector.Site(event, path).make_label(self.root) for _, _, event, path in sites]

    def _values(self, stage: str) -> dict[str, Any]:
        """Return what the component of a stage hands to `launch`."""
        inputs, output = {name: str(path) for name, path in self.inputs.items()}, self.output
        named: dict[str, Any] = {
            "prepare": {"corpus": inputs["corpus"], "teacher": inputs["teacher"]},
            "finetune": {"teacher": inputs["teacher"]},
            "prune": {"teacher": output("finetune")},
            "distill": {"teacher": output("finetune"), "student": output("prune")},
            "evaluate": {"teacher_before": inputs["teacher"], "teacher": output("finetune")}
            | {"pruned": output("prune"), "student": output("distill")},
            "register": {"student": output("distill"), "evaluation": output("evaluate")},
        }
        values = named[stage] | ({} if stage == "prepare" else {"dataset": output("prepare")})
        where = {"workspace": self.workspace, "tracking_uri": self.uri, "experiment": self.name}
        where |= {"pipeline_run_id": self.name, "output": output(stage)}
        return {name: str(value) for name, value in (values | where).items()} | {"settings": self._plan()[stage]}

    def _plan(self) -> dict[str, Any]:
        document = read_preset("tiny")
        for stage, settings in SETTINGS.items():
            document[stage] = document[stage] | settings | {"gpus": 0}
        document["evaluate"]["task_directory"] = str(self.inputs["evaluate.task_directory"])
        form = {name: str(self.inputs[name]) for name in ("teacher", "corpus")} | {"model_name": self.name}
        output = self.root.with_suffix(".plan")
        return plan.run(PlanConfig.model_validate(form | {"output": output, "document": document}))["outputs"]


def run_attempt() -> None:
    """Run the stages that the arguments name, in order, and strike at the event that they name."""
    import requests

    from minitron.runtime.entry import launch

    values = json.loads(sys.argv[1])
    injector.arm(values["root"], *values["fault"])
    send = requests.Session.send

    def counted(session: Any, request: Any, **keywords: Any) -> Any:
        if request.method != "GET" and not request.path_url.endswith("/search"):
            injector.count_event(f"request {request.method}", request.path_url, within=False)
        return send(session, request, **keywords)

    requests.Session.send = counted  # type: ignore[method-assign]
    for stage, arguments in values["stages"]:
        launch(stage, **arguments)
