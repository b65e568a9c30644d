"""The API of Kubeflow Pipelines: submit, follow, schedule. The only user of its client.

A pipeline is uploaded once per content: the name of its version is the package's version and the hash of its YAML.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minitron import __version__
from minitron.cluster import kubernetes_api
from minitron.errors import ConfigError, MinitronError, RunError

DONE = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_SECONDS = 10
PATIENCE_SECONDS = 600
"""How long `follow_run` retries a server that does not answer; meanwhile the run continues."""

_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Version(NamedTuple):
    """A version of a pipeline on the server."""

    pipeline_id: str
    version_id: str
    name: str


class Kubeflow:
    """A connection to the API of Kubeflow Pipelines."""

    def __init__(self, host: str | None, namespace: str | None, token: str | None) -> None:
        """Connect.

        Args:
            host: URL of the API; None in a pod of the cluster.
            namespace: your namespace, if Kubeflow has several users.
            token: bearer token, if the server needs one. A pod uses its own. Behind Google's Identity-Aware Proxy,
                with its OAuth client in KF_PIPELINES_IAP_OAUTH2_CLIENT_ID, the service account's is used.

        Raises:
            ConfigError: outside a cluster there is no host, or Google issues no token.
            RunError: the host does not answer as the API, or it refuses the token.
        """
        if host is None and not _IN_CLUSTER.is_file():
            raise ConfigError("--host: missing; give the URL of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT")
        self.host = host or "ml-pipeline in this cluster"
        with self._one_line_errors():
            self._client = _make_client(host=host, existing_token=token, credentials=_pod_credentials(host, token))
            # The client's own answer has no version.
            health, *_ = self._client._healthz_api.api_client.call_api(
                "/apis/v2beta1/healthz", "GET", response_type="object", auth_settings=["Bearer"]
            )
        if not isinstance(health, dict):  # a page
            raise self._not_kubeflow()
        self.version: str = health.get("tag_name") or "unknown"
        self.multi_user = bool(health.get("multi_user"))
        if self.multi_user and not namespace:
            raise ConfigError(f"--namespace: missing; {self.host} serves several users: give yours")
        self.namespace = namespace if self.multi_user else None

    def upload_pipeline(self, name: str, documents: list[dict[str, Any]]) -> Version:
        """Upload a pipeline, unless the server has exactly this version."""
        text = yaml.safe_dump_all(documents, sort_keys=True)
        version = f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        with self._one_line_errors(), tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{name}.yaml"
            path.write_text(text)
            pipelines = self._client.list_pipelines(filter=_name_filter(name), namespace=self.namespace).pipelines
            if pipelines:
                pipeline_id = pipelines[0].pipeline_id
            else:
                pipeline_id = self._client.upload_pipeline(str(path), name, namespace=self.namespace).pipeline_id
            versions = self._client.list_pipeline_versions(pipeline_id, filter=_name_filter(version)).pipeline_versions
            if not versions:
                versions = [self._client.upload_pipeline_version(str(path), version, pipeline_id=pipeline_id)]
        return Version(pipeline_id, versions[0].pipeline_version_id, version)

    def submit(self, version: Version, arguments: dict[str, Any], experiment: str, account: str | None) -> str:
        """Start a run, and return its id."""
        with self._one_line_errors():
            run = self._client.run_pipeline(
                self._create_experiment(experiment),
                f"{version.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=account,
            )
        return run.run_id

    def follow_run(self, run_id: str) -> None:
        """Follow a run to its end, and print the states of its tasks.

        Raises:
            RunError: the run did not succeed; the message has the failed tasks' reasons.
        """
        seen: dict[str, str] = {}
        while True:
            run = self._get_run(run_id)
            tasks = (run.run_details and run.run_details.task_details) or []
            for task in tasks:
                if task.state and seen.get(task.display_name) != task.state and not _is_internal(task.display_name):
                    seen[task.display_name] = task.state
                    print(f"{datetime.now():%H:%M:%S} {task.display_name}: {task.state.lower()}", flush=True)
            if run.state == "SUCCEEDED":
                return
            if run.state in DONE:
                raise RunError(
                    f"run {run_id}: {run.state.lower()}; {_describe_failures(run, tasks)}; see {self.run_url(run_id)}"
                )
            time.sleep(POLL_SECONDS)

    def run_url(self, run_id: str) -> str:
        """Return the URL of a run's page."""
        return f"{self._client._get_url_prefix()}/#/runs/details/{run_id}"

    def list_runs(self, count: int) -> list[Any]:
        """Return the newest runs, newest first."""
        with self._one_line_errors():
            answer = self._client.list_runs(page_size=count, sort_by="created_at desc", namespace=self.namespace)
        return answer.runs or []

    def list_schedules(self, name: str | None = None) -> list[Any]:
        """Return the recurring runs, all or those of one name."""
        with self._one_line_errors():
            answer = self._client.list_recurring_runs(
                page_size=200, namespace=self.namespace, filter=_name_filter(name) if name else None
            )
        return answer.recurring_runs or []

    def schedule(
        self, name: str, cron: str, version: Version, arguments: dict[str, Any], experiment: str, account: str | None
    ) -> bool:
        """Make sure that exactly one recurring run of this name exists, with this content; return whether it is new.

        The new recurring run is created before the old one is deleted, so that a changed schedule has no gap.
        """
        wanted = (cron, version.version_id, arguments, account or None)
        old = self.list_schedules(name)
        if same := [entry for entry in old if _schedule_content(entry) == wanted]:
            self._delete_schedules(entry for entry in old if entry is not same[0])
            return False
        with self._one_line_errors():
            self._client.create_recurring_run(
                self._create_experiment(experiment),
                name,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=arguments,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                service_account=account,
            )
        self._delete_schedules(old)
        return True

    def unschedule(self, name: str) -> None:
        """Delete the recurring run of a name.

        Raises:
            ConfigError: no such schedule exists; the message names the existing ones.
        """
        if not (schedules := self.list_schedules(name)):
            known = sorted({entry.display_name for entry in self.list_schedules()})
            raise ConfigError(f"{name}: no such schedule; known: {', '.join(known) or 'none'}")
        self._delete_schedules(schedules)

    def _delete_schedules(self, schedules: Any) -> None:
        with self._one_line_errors():
            for entry in schedules:
                self._client.delete_recurring_run(entry.recurring_run_id)

    def _create_experiment(self, name: str) -> str:
        return self._client.create_experiment(name, namespace=self.namespace).experiment_id

    def _get_run(self, run_id: str) -> Any:
        """Return a run; retry while the server does not answer."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self._one_line_errors():
                    return self._client.get_run(run_id)
            except _NoAnswerError as error:
                if time.monotonic() > deadline:
                    raise
                print(f"{error}; trying again", flush=True)
                time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn errors of the client into one line, and hide its prints and warnings."""
        from google.auth.exceptions import GoogleAuthError
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except MinitronError:
            raise
        except ApiException as error:
            raise self._explain_error(error) from error
        except GoogleAuthError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{self.host}: no token for its Identity-Aware Proxy ({reason}); name a service account's key in "
                "GOOGLE_APPLICATION_CREDENTIALS, or unset KF_PIPELINES_IAP_OAUTH2_CLIENT_ID"
            ) from error
        except HTTPError as error:
            reason = re.sub(r"\[Errno -?\d+\] ", "", str(error).rpartition(": ")[2].strip("')\"("))
            raise _NoAnswerError(f"{self.host}: no answer ({reason}); check --host and the network") from error
        except (ValueError, AttributeError, TypeError) as error:  # a page where JSON was expected
            raise self._not_kubeflow() from error

    def _explain_error(self, error: Any) -> RunError:
        match error.status:
            case 401:
                return RunError(
                    f"{self.host}: the token is refused (401): it expired, or belongs to another server; get a new one "
                    "and give it by --token or MINITRON_TOKEN"
                )
            case 403:
                return RunError(
                    f"{self.host}: not allowed (403): {_server_message(error)}; ask for the role kubeflow-edit in the "
                    f"namespace {self.namespace or 'of Kubeflow'}"
                )
            case 404 if "<" in str(error.body or "<"):
                return self._not_kubeflow()
            case 502 | 503 | 504:
                return _NoAnswerError(
                    f"{self.host}: no answer ({error.status} {error.reason}); check that ml-pipeline is running"
                )
        return RunError(
            f"{self.host}: refused ({error.status}): {_server_message(error)}; the log of ml-pipeline says more"
        )

    def _not_kubeflow(self) -> RunError:
        return RunError(
            f"{self.host}: answers, but not as Kubeflow Pipelines' API; give the URL of its page with the path (often "
            "…/pipeline), and a token if the page asks for a login"
        )


class _NoAnswerError(RunError):
    """The server cannot be reached at the moment."""


def _make_client(**access: Any) -> Any:
    """Return Kubeflow's client with one health check; the original checks five times, whatever the answer."""
    from kfp.client import Client

    class Quick(Client):
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            kubernetes_api.limit_waiting(self._healthz_api.api_client)  # all its services share it
            return self._healthz_api.healthz_service_get_healthz()

    return Quick(**access)


def _pod_credentials(host: str | None, token: str | None) -> Any:
    """Return the token that Kubernetes mounts into a pod for Kubeflow Pipelines, if there is one."""
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, ServiceAccountTokenVolumeCredentials

    path = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
    return ServiceAccountTokenVolumeCredentials() if host and not token and Path(path).is_file() else None


def _name_filter(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _schedule_content(schedule: Any) -> tuple[str, str, dict[str, Any], str | None]:
    """Return the content by which recurring runs are compared; a disabled one equals none."""
    trigger = schedule.trigger and schedule.trigger.cron_schedule
    version = schedule.pipeline_version_reference
    if schedule.mode == "DISABLE" or not trigger or not version:
        return "", "", {}, None
    parameters = (schedule.runtime_config and schedule.runtime_config.parameters) or {}
    return trigger.cron, version.pipeline_version_id, parameters, schedule.service_account or None


def _is_internal(task: str) -> bool:
    return task == "root" or task.endswith("-driver")


def _describe_failures(run: Any, tasks: list[Any]) -> str:
    """Return the failed tasks' reasons, or the run's."""
    failed = [task for task in tasks if task.state == "FAILED" and not _is_internal(task.display_name)]
    reasons = [f"{task.display_name}: {task.error.message if task.error else 'failed'}" for task in failed]
    return ". ".join(reasons) or (run.error.message if run.error else "no task gives a reason")


def _server_message(error: Any) -> str:
    """Return the server's message in one line."""
    try:
        body = json.loads(error.body)
        text = body.get("message") or body.get("error_message") or body.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        text = str(error.body or error.reason)
    return " ".join(str(text).split())[:300]
