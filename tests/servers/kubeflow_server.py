"""A stateful server that speaks the v2beta1 API of Kubeflow Pipelines over HTTP, as far as `minitron` uses it.

What it is sent is parsed with the models of kfp-server-api, and a field that they do not know is refused.
"""

import json
import re
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from email.parser import BytesParser
from typing import Any

import kfp_server_api
import yaml

from tests.servers.http_server import Refused, State, http_server

Entry = dict[str, Any]


class KubeflowServer(State):
    """The state, and what a test does to it."""

    def __init__(self, multi_user: bool, token: str | None) -> None:
        super().__init__()
        self.multi_user, self.token = multi_user, token
        self.pipelines: dict[str, Entry] = {}
        self.versions: dict[str, Entry] = {}
        self.experiments: dict[str, Entry] = {}
        self.runs: dict[str, Entry] = {}
        self.schedules: dict[str, Entry] = {}
        self.after_run: Callable[[Entry], None] = lambda run: None
        """Called whenever a run is asked for: it may go on."""

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            raise Refused(401, "unauthorized")
        body = _parse_body(data, headers.get("Content-Type", ""))
        for pattern, handler in self._routes():
            if match := re.fullmatch(f"{method} /apis/v2beta1/{pattern}", f"{method} {path}"):
                return handler(query, body, *match.groups())
        raise Refused(404, f"no route {method} {path}")

    def _routes(self) -> list[tuple[str, Callable[..., Any]]]:
        return [
            (r"healthz", self._healthz),
            (r"pipelines/upload", self._upload),
            (r"pipelines/upload_version", self._upload_version),
            (r"pipelines", lambda query, body: {"pipelines": self._listed(self.pipelines, query)}),
            (r"pipelines/([^/]+)/versions", self._list_versions),
            (r"experiments", self._experiments),
            (r"runs", self._runs),
            (r"runs/([^/]+)", self._run),
            (r"recurringruns", self._schedules),
            (r"recurringruns/([^/]+)", self._delete_schedule),
        ]

    def _healthz(self, query: Entry, body: Any) -> Entry:
        return {"multi_user": self.multi_user, "tag_name": "2.15.0"}

    def _upload(self, query: Entry, body: bytes) -> Entry:
        if any(entry["display_name"] == query["name"] for entry in self.pipelines.values()):
            raise Refused(409, f"pipeline {query['name']} exists")
        pipeline = self._new(self.pipelines, "pipeline_id", {"display_name": query["name"], **_get_namespace(query)})
        self._add_version(pipeline["pipeline_id"], query["name"], body)
        return pipeline

    def _upload_version(self, query: Entry, body: bytes) -> Entry:
        return self._add_version(query["pipelineid"], query["name"], body)

    def _add_version(self, pipeline_id: str, name: str, package: bytes) -> Entry:
        if pipeline_id not in self.pipelines:
            raise Refused(404, f"pipeline {pipeline_id} not found")
        specification, platform = yaml.safe_load_all(package)
        assert specification["schemaVersion"] and platform["platforms"]
        entry = {"pipeline_id": pipeline_id, "display_name": name, "pipeline_spec": {"pipeline_spec": specification}}
        return self._new(self.versions, "pipeline_version_id", entry)

    def _list_versions(self, query: Entry, body: Any, pipeline_id: str) -> Entry:
        own = {key: entry for key, entry in self.versions.items() if entry["pipeline_id"] == pipeline_id}
        return {"pipeline_versions": self._listed(own, query)}

    def _experiments(self, query: Entry, body: Any) -> Entry:
        if body is None:
            self._check_namespace(query.get("namespace"))
            return {"experiments": self._listed(self.experiments, query)}
        check_body(body, "V2beta1Experiment")
        self._check_namespace(body.get("namespace"))
        return self._new(self.experiments, "experiment_id", body)

    def _runs(self, query: Entry, body: Any) -> Entry:
        if body is None:
            self._check_namespace(query.get("namespace"))
            assert query.get("sort_by") == "created_at desc"
            newest = list(reversed(self.runs.values()))
            return {"runs": newest[: int(query["page_size"])]}
        self._check_job(body, "V2beta1Run")
        return self._new(self.runs, "run_id", body | {"state": "PENDING"})

    def _run(self, query: Entry, body: Any, run_id: str) -> Entry:
        if run_id not in self.runs:
            raise Refused(404, f"run {run_id} not found")
        self.after_run(self.runs[run_id])
        check_body(self.runs[run_id], "V2beta1Run")
        return self.runs[run_id]

    def _schedules(self, query: Entry, body: Any) -> Entry:
        if body is None:
            self._check_namespace(query.get("namespace"))
            return {"recurringRuns": self._listed(self.schedules, query)}
        self._check_job(body, "V2beta1RecurringRun")
        return self._new(self.schedules, "recurring_run_id", body)

    def _delete_schedule(self, query: Entry, body: Any, schedule_id: str) -> Entry:
        if self.schedules.pop(schedule_id, None) is None:
            raise Refused(404, f"recurring run {schedule_id} not found")
        return {}

    def _check_job(self, body: Entry, model: str) -> None:
        check_body(body, model)
        reference = body["pipeline_version_reference"]
        version = self.versions[reference["pipeline_version_id"]]
        assert version["pipeline_id"] == reference["pipeline_id"]
        if body["experiment_id"] not in self.experiments:
            raise Refused(404, "experiment not found")
        known = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        for name, entry in known.items():
            if not entry.get("isOptional") and name not in body["runtime_config"]["parameters"]:
                raise Refused(400, f"Invalid input error: parameter {name} is required")
        if unknown := body["runtime_config"]["parameters"].keys() - known.keys():
            raise Refused(400, f"Invalid input error: unknown parameters {sorted(unknown)}")

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Refused(400, "Invalid input error: namespace is empty in multi-user mode")
        if not self.multi_user and namespace:
            raise Refused(400, "Invalid input error: in single-user mode no namespace is taken")
        if namespace == "foreign":
            raise Refused(403, "User 'ann' is not authorized with reason: no role in namespace foreign")

    def _new(self, table: dict[str, Entry], key: str, entry: Entry) -> Entry:
        identifier = str(uuid.uuid4())
        table[identifier] = entry | {key: identifier, "created_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        return table[identifier]

    def _listed(self, table: dict[str, Entry], query: Entry) -> list[Entry]:
        found = list(table.values())
        for predicate in json.loads(query.get("filter") or '{"predicates": []}')["predicates"]:
            assert predicate["operation"] in ("EQUALS", 1), predicate
            found = [entry for entry in found if entry[predicate["key"]] == predicate["stringValue"]]
        return found


def _get_namespace(query: Entry) -> Entry:
    return {"namespace": query["namespace"]} if query.get("namespace") else {}


def check_body(body: Any, model: str) -> None:
    """Refuse what a model of kfp-server-api does not know, at any depth."""
    types = getattr(kfp_server_api, model)
    names = {types.attribute_map[attribute]: kind for attribute, kind in types.openapi_types.items()}
    for key, value in body.items():
        if key not in names:
            raise Refused(400, f"unknown field {key} in {model}")
        kind = names[key].removeprefix("list[").removesuffix("]")
        for part in value if isinstance(value, list) else [value]:
            if hasattr(getattr(kfp_server_api, kind, None), "attribute_map") and isinstance(part, dict):
                check_body(part, kind)


def _parse_body(data: bytes, kind: str) -> Any:
    """Return the JSON of a body, or the file of an upload."""
    if not kind.startswith("multipart/"):
        return json.loads(data) if data else None
    message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + data)
    return message.get_payload()[0].get_payload(decode=True)  # type: ignore[union-attr]


def kubeflow_server(multi_user: bool = False, token: str | None = None) -> AbstractContextManager[KubeflowServer]:
    """Serve until the block ends."""
    return http_server(KubeflowServer(multi_user, token))
