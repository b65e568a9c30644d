"""A stateful server that speaks the v2beta1 API of Kubeflow Pipelines over HTTP, as far as `minitron` uses it.

Its answers are those of kubeflow/pipelines 2.15.0, 2.16.1 and 2.17.0; paths below are of 2.15.0's backend/src/apiserver
where no version is named. Requests are parsed with the models of kfp-server-api: an unknown field is refused, as the
server's protojson does (common/utils.go, CustomMarshaler; it leaves unset fields out of answers, too).
"""

import base64
import json
import re
import unicodedata
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from email.parser import BytesParser
from typing import Any
from urllib.parse import unquote_plus

import kfp_server_api
import yaml

from tests.servers.argo_workflow import Workflow
from tests.servers.http_server import Refused, State, http_server

Entry = dict[str, Any]

_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 429: 8, 500: 13, 503: 14}
"""gRPC's code of an HTTP status (grpc-gateway v2.27.1, runtime/errors.go)."""

_LONGEST = {"pipeline": 128, "version": 127, "experiment": 128, "schedule": 255}
"""Characters of a name: validation/length.go; a schedule's is a VARCHAR(255) (client_manager.go, DefaultStringSize)."""

_TTLS = {"resourceTtlOnCompletion", "resourceTtlOnSuccess", "resourceTtlOnFailure"}
"""Fields that only 2.17.0 knows: api/v2alpha1/pipeline_spec.proto, PipelineConfig."""

_TYPES: dict[str, Any] = {
    "NUMBER_DOUBLE": (int, float), "NUMBER_INTEGER": (int, float), "STRING": str, "BOOLEAN": bool, "LIST": list,
    "STRUCT": dict,
}  # fmt: skip


class KubeflowServer(State):
    """The state, and what a test does to it."""

    def __init__(self, multi_user: bool, token: str | None, version: str) -> None:
        super().__init__()
        self.multi_user, self.token, self.version = multi_user, token, version
        self.pipelines: dict[str, Entry] = {}
        self.versions: dict[str, Entry] = {}
        self.experiments: dict[str, Entry] = {}
        self.runs: dict[str, Entry] = {}
        self.schedules: dict[str, Entry] = {}
        self.workflows: dict[str, Workflow] = {}
        self.steps: list[Callable[[Workflow], None]] = []
        """What happens to a run's workflow, one step whenever the run is asked for."""
        self.default_account = "default-editor" if multi_user else "pipeline-runner"
        """DEFAULTPIPELINERUNNERSERVICEACCOUNT: manifests/kustomize/base/installs/multi-user/api-service/params.env, and
        common/const.go without it."""

    def answer(self, method: str, path: str, query: dict[str, str], data: bytes, headers: Any) -> Any:
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            raise Refused(401, "Request header error: there is no user identity header.")
        body = _parse_body(data, headers.get("Content-Type", ""))
        for pattern, handler in self._routes():
            if match := re.fullmatch(f"{method} /apis/v2beta1/{pattern}", f"{method} {path}"):
                return handler(query, body, *match.groups())
        raise Refused(404, "Not Found")

    def error(self, status: int, message: str) -> Entry:
        """Return grpc-gateway's error, or an upload's (server/pipeline_upload_server.go, writeErrorToResponse)."""
        if "/upload" in self.requests[-1]:
            return {"error_message": message, "error_details": message}
        code = _CODES.get(status, 2)
        detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": code, "message": message}
        return {"code": code, "message": message, "details": [detail]}

    def _routes(self) -> list[tuple[str, Callable[..., Any]]]:
        return [
            (r"healthz", self._healthz),
            (r"pipelines/upload", self._upload),
            (r"pipelines/upload_version", self._upload_version),
            (r"pipelines", self._list_pipelines),
            (r"pipelines/([^/]+)/versions", self._list_versions),
            (r"experiments", self._experiments),
            (r"runs", self._runs),
            (r"runs/([^/]+)", self._run),
            (r"recurringruns", self._schedules),
            (r"recurringruns/([^/]+)", self._delete_schedule),
        ]

    def _healthz(self, query: Entry, body: Any) -> Entry:
        """Answer as main.go does: the image's build argument TAG_NAME is "unknown" if nobody set it."""
        tags = {"commit_sha": "unknown", "tag_name": self.version}
        return tags | {"multi_user": self.multi_user, "pipeline_store": "database"}

    def _upload(self, query: Entry, body: bytes) -> Entry:
        self._check_namespace(query.get("namespace"), "Namespace is required for pipeline operations")
        name = query.get("name") or query["display_name"]
        _check_length("pipeline", name)
        if any(_collate(entry["name"]) == _collate(name) for entry in self.pipelines.values()):
            raise Refused(409, "Failed to create a pipeline and a pipeline version")
        names = {"name": name, "display_name": query.get("display_name") or name}
        pipeline = self._new(self.pipelines, "pipeline_id", names | _get_namespace(query))
        self._add_version(pipeline["pipeline_id"], names, body)
        return pipeline

    def _upload_version(self, query: Entry, body: bytes) -> Entry:
        name = query.get("name") or query["display_name"]
        _check_length("version", name)
        if query["pipelineid"] not in self.pipelines:
            raise Refused(400, "Failed to create a pipeline version")
        names = {"name": name, "display_name": query.get("display_name") or name}
        names |= {"description": query.get("description", "")}  # pipeline_upload_server.go, UploadPipelineVersion
        return self._add_version(query["pipelineid"], names, body)

    def _add_version(self, pipeline_id: str, names: Entry, package: bytes) -> Entry:
        """Keep a version; its platform document is dropped without a word if a field is unknown.

        template/template.go: IsPlatformSpecWithKubernetesConfig parses strictly, and template/v2_template.go
        (NewV2SpecTemplate) passes over a document that is neither kind.
        """
        specification, *rest = yaml.safe_load_all(package)
        assert specification["schemaVersion"] == "2.1.0" and specification["pipelineInfo"]["name"]
        for platform in rest:
            if self._knows_ttls() or not platform["platforms"]["kubernetes"].get("pipelineConfig", {}).keys() & _TTLS:
                specification = {"pipeline_spec": specification, "platform_spec": platform}
        entry = {"pipeline_id": pipeline_id, "pipeline_spec": specification} | names
        return self._new(self.versions, "pipeline_version_id", entry)

    def _knows_ttls(self) -> bool:
        return not re.match(r"2\.1[0-6]\.", self.version)

    def _list_pipelines(self, query: Entry, body: Any) -> Entry:
        self._check_namespace(query.get("namespace"), "Namespace is required for pipeline operations")
        return self._listed("pipelines", self.pipelines, query)

    def _list_versions(self, query: Entry, body: Any, pipeline_id: str) -> Entry:
        own = {key: entry for key, entry in self.versions.items() if entry["pipeline_id"] == pipeline_id}
        return self._listed("pipeline_versions", own, query)

    def _experiments(self, query: Entry, body: Any) -> Entry:
        problem = "An experiment cannot have an empty namespace in multi-user mode"
        if body is None:
            self._check_namespace(query.get("namespace"), problem)
            return self._listed("experiments", self.experiments, query)
        check_body(body, "V2beta1Experiment")
        self._check_namespace(body.get("namespace"), problem)
        if not body.get("display_name"):  # server/api_converter.go, toModelExperiment
            raise Refused(500, "InternalServerError: Invalid input error: Experiment must have a non-empty name")
        _check_length("experiment", body["display_name"])
        return self._new(self.experiments, "experiment_id", body)

    def _runs(self, query: Entry, body: Any) -> Entry:
        if body is None:
            self._check_namespace(query.get("namespace"), "A run cannot have an empty namespace in multi-user mode")
            assert query.get("sort_by") == "created_at desc"
            return self._listed("runs", dict(reversed(self.runs.items())), query)
        specification = self._check_job(body, "V2beta1Run")
        # resource/resource_manager.go, CreateRun: the workflow's account, which template/template.go
        # (setDefaultServiceAccount) sets to the request's or the default; no state but PENDING, no end but 1970.
        body |= {"service_account": body.get("service_account") or self.default_account, "state": "PENDING"}
        body |= {"scheduled_at": _now(), "finished_at": "1970-01-01T00:00:00Z", "storage_state": "AVAILABLE"}
        run = self._new(self.runs, "run_id", body)
        self.workflows[run["run_id"]] = Workflow(specification, retry_templates=self._knows_ttls())
        return run

    def _run(self, query: Entry, body: Any, run_id: str) -> Entry:
        if run_id not in self.runs:
            raise Refused(404, f"Failed to get a run: ResourceNotFoundError: Run {run_id} not found")
        run, workflow = self.runs[run_id], self.workflows[run_id]
        if self.steps:
            self.steps.pop(0)(workflow)
        run["state"] = workflow.state()
        if details := workflow.task_details(run_id):
            run["run_details"] = {"task_details": details}
        check_body(run, "V2beta1Run")
        return run

    def _schedules(self, query: Entry, body: Any) -> Entry:
        problem = "a recurring run cannot have an empty namespace in multi-user mode"
        if body is None:
            self._check_namespace(query.get("namespace"), problem)
            return self._listed("recurringRuns", self.schedules, query)
        self._check_job(body, "V2beta1RecurringRun")
        _check_length("schedule", body["display_name"])
        # template/template.go, toSWFCRDResourceGeneratedName; Kubernetes refuses an object whose name begins with "-".
        if re.sub(r"[^a-z0-9-]+", "", body["display_name"].lower()).startswith("-"):
            raise Refused(500, "Failed to create a recurring run: Failed to create a scheduled workflow: is invalid")
        return self._new(self.schedules, "recurring_run_id", body | self._schedule_defaults(body))

    def _schedule_defaults(self, body: Entry) -> Entry:
        """Return what the server fills in (server/api_converter.go, toApiRecurringRun).

        The account is the default's, whatever was asked for, up to 2.16.1: template/v2_template.go (ScheduledWorkflow)
        sets the request's only if the workflow has none, and argocompiler/argo.go gives it the default. 2.17.0 sets it.
        """
        asked = body.get("service_account") if self._knows_ttls() else None
        namespace = self.experiments[body["experiment_id"]].get("namespace") or "kubeflow"
        filled = {"service_account": asked or self.default_account, "namespace": namespace, "updated_at": _now()}
        return filled | {"status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"}

    def add_schedule(self, name: str, **values: Any) -> Entry:
        """Add a schedule that somebody else made: without a trigger, if none is given (toApiTrigger: `{}`)."""
        entry = {"display_name": name, "mode": "ENABLE", "status": "ENABLED", "trigger": {}, "namespace": "kubeflow"}
        return self._new(self.schedules, "recurring_run_id", entry | values)

    def _delete_schedule(self, query: Entry, body: Any, schedule_id: str) -> Entry:
        if self.schedules.pop(schedule_id, None) is None:
            raise Refused(404, f"Failed to delete a recurring run: ResourceNotFoundError: Job {schedule_id} not found")
        return {}

    def _check_job(self, body: Entry, model: str) -> Entry:
        """Refuse what template/v2_template.go (validatePipelineJobInputs) refuses; return the specification."""
        check_body(body, model)
        reference = body["pipeline_version_reference"]
        version = self.versions[reference["pipeline_version_id"]]
        assert version["pipeline_id"] == reference["pipeline_id"]
        if body["experiment_id"] not in self.experiments:
            raise Refused(404, f"ResourceNotFoundError: Experiment {body['experiment_id']} not found")
        specification = version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])
        known, given = specification["root"]["inputDefinitions"]["parameters"], body["runtime_config"]["parameters"]
        for name, entry in known.items():
            problem = f"Invalid input error: input parameter {name} requires type {entry['parameterType'].lower()}"
            if name in given and not _is_of_type(given[name], entry["parameterType"]):
                raise Refused(400, f"invalid pipeline job inputs: {problem}, but the parameter value is not of it")
            if name not in given and not entry.get("isOptional") and "defaultValue" not in entry:
                problem = f"Invalid input error: parameter {name} is not optional, yet has neither default value nor"
                raise Refused(400, f"invalid pipeline job inputs: {problem} user provided value")
        if unknown := sorted(given.keys() - known.keys()):
            raise Refused(400, f"Invalid input error: parameter(s) provided are not required by pipeline: {unknown}")
        return specification

    def _check_namespace(self, namespace: str | None, problem: str) -> None:
        """Check access; with one user a namespace is ignored (resource/resource_manager.go, ReplaceNamespace)."""
        if self.multi_user and not namespace:
            raise Refused(400, f"Invalid input error: {problem}")
        if self.multi_user and namespace == "foreign":
            problem = "User 'ann' is not authorized with reason: no role in it (request: …): Unauthorized access"
            raise Refused(403, f"Failed to authorize with API: PermissionDenied: {problem}")

    def _new(self, table: dict[str, Entry], key: str, entry: Entry) -> Entry:
        identifier = str(uuid.uuid4())
        table[identifier] = entry | {key: identifier, "created_at": _now()}
        return table[identifier]

    def _listed(self, key: str, table: dict[str, Entry], query: Entry) -> Entry:
        """Return a page: 20 entries unless asked for up to 200 (list/list.go), and the token of the next one.

        The token is base64 of JSON; it fits one filter and one order only (server/list_request_util.go,
        validatedListOptions).
        """
        found = [entry for entry in table.values() if all(map(entry_matches(entry), _parse_filter(query)))]
        size = min(int(query.get("page_size") or 20), 200)
        filters = {name: query.get(name, "") for name in ("filter", "sort_by")}
        token = json.loads(base64.b64decode(query.get("page_token", "")) or json.dumps({"start": 0} | filters))
        start = token.pop("start")
        if token != filters:
            raise Refused(400, "Invalid input error: page token does not match the supplied sort by and/or filtering")
        answer: Entry = {key: found[start : start + size]} if found else {}
        if len(found) > start + size:
            following = json.dumps({"start": start + size} | filters)
            answer["next_page_token"] = base64.b64encode(following.encode()).decode()
        return answer | ({"total_size": len(found)} if found else {})


def _parse_filter(query: Entry) -> list[Entry]:
    """Return the predicates of a filter, which the server unescapes although it has unescaped the URL.

    server/list_request_util.go, parseAPIFilter, and in 2.17.0 server/pipeline_server.go,
    extractTagFiltersFromFilterSpec, too: each unescapes the text of the request.
    """
    text = query.get("filter", "")
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise Refused(400, f"Invalid input error: failed to parse valid filter from {text!r}: invalid URL escape")
    return json.loads(unquote_plus(text))["predicates"] if text else []


def entry_matches(entry: Entry) -> Callable[[Entry], bool]:
    """Return a function that says whether a predicate holds for an entry."""

    def holds(predicate: Entry) -> bool:
        assert predicate["operation"] in ("EQUALS", 1), predicate
        return _collate(entry.get(predicate["key"], "")) == _collate(predicate["stringValue"])

    return holds


def _collate(text: str) -> str:
    """Return a text as MySQL 8's default collation, utf8mb4_0900_ai_ci, compares it: no accents, no upper case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()


def _check_length(kind: str, name: str) -> None:
    """Refuse a long name: an upload's by validation/length.go, the others' by the database ("Data too long")."""
    if len(name) > _LONGEST[kind]:
        status = 400 if kind in ("pipeline", "version") else 500
        raise Refused(status, f"Invalid input error: {kind}.Name length cannot exceed {_LONGEST[kind]}")


def _is_of_type(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "BOOLEAN" or not isinstance(value, bool))


def _get_namespace(query: Entry) -> Entry:
    return {"namespace": query["namespace"]} if query.get("namespace") else {}


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


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


def kubeflow_server(
    multi_user: bool = False, token: str | None = None, version: str = "2.15.0"
) -> AbstractContextManager[KubeflowServer]:
    """Serve until the block ends."""
    return http_server(KubeflowServer(multi_user, token, version))
