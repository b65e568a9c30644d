"""The API of Kubeflow Pipelines: upload, submit, schedule, list.

A pipeline is uploaded once per content: its version's name is the package's version and the hash of the YAML.
"""

import hashlib
import json
import re
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from minitron import __version__
from minitron.cluster.pipelines_client import Connection, NoAnswerError
from minitron.errors import ConfigError, RunError, without_password

POLL_SECONDS = 10
PATIENCE_SECONDS = 600
"""How long `wait_for_run` retries a server that does not answer; the run itself continues."""

LONGEST_NAME = 255
"""Longest name of a schedule, in characters, that the server's database accepts."""


def check_schedule_name(name: str) -> None:
    """Check that a schedule's name fits the server's database, and can name an object in Kubernetes.

    Raises:
        ConfigError: the name is too long, or Kubernetes does not accept it.
    """
    if not 0 < len(name) <= LONGEST_NAME:
        raise ConfigError(f"--name: {len(name)} characters, but a schedule's name has 1 to {LONGEST_NAME}; change it")
    if re.sub(r"[^a-z0-9-]+", "", name.lower()).startswith("-"):
        raise ConfigError(
            f"--name {name}: Kubernetes refuses names that begin with '-'; begin it with a letter or digit"
        )


class Version(NamedTuple):
    """A version of a pipeline on the server."""

    pipeline_id: str
    version_id: str
    name: str


class Kubeflow(Connection):
    """The operations on the API of Kubeflow Pipelines."""

    def upload_pipeline(self, name: str, documents: list[dict[str, Any]]) -> Version:
        """Upload a pipeline, unless the server has this version."""
        text = yaml.safe_dump_all(documents, sort_keys=True)
        version = f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        with self.one_line_errors(), tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{name}.yaml"
            path.write_text(text)
            pipelines = self._client.list_pipelines(
                filter=_name_filter(name, "name"), namespace=self.namespace
            ).pipelines
            if pipelines:
                pipeline_id = pipelines[0].pipeline_id
            else:
                pipeline_id = self._client.upload_pipeline(str(path), name, namespace=self.namespace).pipeline_id
            versions = self._client.list_pipeline_versions(
                pipeline_id, filter=_name_filter(version, "name")
            ).pipeline_versions
            if not versions:
                text = _describe_parameters(documents[0])
                versions = [self._client.upload_pipeline_version(str(path), version, pipeline_id, description=text)]
        return Version(pipeline_id, versions[0].pipeline_version_id, version)

    def submit(self, version: Version, arguments: dict[str, Any], experiment: str, account: str | None) -> str:
        """Start a run and return its id."""
        with self.one_line_errors():
            run = self._client.run_pipeline(
                self._find_or_create_experiment(experiment),
                f"{version.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=account,
            )
        return run.run_id

    def wait_for_run(self, run_id: str) -> Any:
        """Return a run; retry while the server does not answer or is overloaded.

        Raises:
            RunError: the server did not answer for PATIENCE_SECONDS, or it refuses the request.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self.one_line_errors():
                    return self._client.get_run(run_id)
            except NoAnswerError as error:
                if time.monotonic() > deadline:
                    raise
                print(f"{error}; trying again", flush=True)
                time.sleep(POLL_SECONDS)

    def run_url(self, run_id: str) -> str:
        """Return the URL of a run's page."""
        return f"{without_password(self._client._get_url_prefix())}/#/runs/details/{run_id}"

    def list_runs(self, count: int) -> list[Any]:
        """Return the newest runs, newest first."""
        with self.one_line_errors():
            answer = self._client.list_runs(page_size=count, sort_by="created_at desc", namespace=self.namespace)
        return answer.runs or []

    def list_schedules(self, name: str | None = None) -> list[Any]:
        """Return all recurring runs, or those with a name; the server's comparison ignores accents and case."""
        schedules: list[Any] = []
        options = {"page_size": 200, "namespace": self.namespace, "filter": _name_filter(name) if name else None}
        token: str | None = ""
        with self.one_line_errors():
            while token is not None:
                page = self._client.list_recurring_runs(page_token=token, **options)
                schedules += page.recurring_runs or []
                token = page.next_page_token or None
        return [entry for entry in schedules if name in (None, entry.display_name)]

    def schedule(
        self, name: str, cron: str, version: Version, arguments: dict[str, Any], experiment: str, account: str | None
    ) -> bool:
        """Ensure that exactly one recurring run with this name and content exists; return whether it is new.

        The description has a hash of the content, because the server adds defaults to the content itself. The new
        recurring run is created before the old one is deleted, so that a changed schedule has no gap.

        Raises:
            RunError: the server is older than 2.17, and gives schedules only its own service account.
        """
        description = _describe_content(cron, version.version_id, arguments, account)
        old = self.list_schedules(name)
        if same := [entry for entry in old if entry.mode == "ENABLE" and entry.description == description]:
            self._delete_schedules(entry for entry in old if entry is not same[0])
            return False
        with self.one_line_errors():
            new = self._client.create_recurring_run(
                self._find_or_create_experiment(experiment),
                name,
                description,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=account,
            )
        self._check_account(new, account)
        self._delete_schedules(old)
        return True

    def _check_account(self, schedule: Any, account: str | None) -> None:
        """Delete a schedule again if its runs would not have the requested service account."""
        if account and schedule.service_account != account:
            self._delete_schedules([schedule])
            raise RunError(
                f"schedule {schedule.display_name}: Kubeflow Pipelines {self.version} gives it the service account "
                f"{schedule.service_account}, not {account}; upgrade to 2.17, or set "
                f"DEFAULTPIPELINERUNNERSERVICEACCOUNT={account} in its deployment ml-pipeline"
            )

    def unschedule(self, name: str) -> None:
        """Delete the recurring run with a name.

        Raises:
            ConfigError: no such schedule exists; the message names the existing ones.
        """
        if not (schedules := self.list_schedules(name)):
            known = sorted({entry.display_name for entry in self.list_schedules() if entry.display_name})
            raise ConfigError(f"{name}: no such schedule; known: {', '.join(known) or 'none'}")
        self._delete_schedules(schedules)

    def _delete_schedules(self, schedules: Any) -> None:
        with self.one_line_errors():
            for entry in schedules:
                self._client.delete_recurring_run(entry.recurring_run_id)

    def _find_or_create_experiment(self, name: str) -> str:
        """Return the id of an experiment; the client's own search does not find names with % or +."""
        from kfp_server_api import V2beta1Experiment

        found = self._client.list_experiments(filter=_name_filter(name), namespace=self.namespace).experiments
        if found:
            return found[0].experiment_id
        experiment = V2beta1Experiment(display_name=name, namespace=self.namespace)
        return self._client._experiment_api.experiment_service_create_experiment(experiment=experiment).experiment_id


def _name_filter(name: str, key: str = "display_name") -> str:
    """Return an escaped filter: the server unescapes it once more than the URL around it."""
    predicate = {"operation": "EQUALS", "key": key, "stringValue": name}
    return quote(json.dumps({"predicates": [predicate]}), safe="")


def _describe_parameters(specification: dict[str, Any]) -> str:
    """Return the description of a version: Kubeflow's run form has names and types alone, in alphabetical order."""
    parameters = specification["root"]["inputDefinitions"]["parameters"].items()
    needed_first = sorted(parameters, key=lambda item: item[1].get("isOptional", False))
    return "\n".join(
        f"- `{name}`{'' if entry.get('isOptional') else ' (required)'}: {' '.join(entry['description'].split())}"
        for name, entry in needed_first
    )


def _describe_content(*content: Any) -> str:
    """Return the description of a schedule; it identifies the content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"made by minitron schedule; content {digest[:16]}"
