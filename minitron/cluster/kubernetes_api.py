"""The Kubernetes API: access, retries, and errors in one line. Only this module uses its client."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from minitron.errors import ConfigError, RunError

_AWAY = (429, 500, 502, 503, 504)
RETRY = Retry(20, backoff_factor=1, backoff_max=60, status_forcelist=_AWAY, allowed_methods=None)
"""Waits about 15 minutes for an unavailable API server; the cluster's pods keep running."""

LAST_RETRY = Retry(4, backoff_factor=0.5, status_forcelist=_AWAY, allowed_methods=None)
"""For a waiting user, and for the end of a task: Kubernetes kills a task 30 seconds after it asks it to end."""

ONE_RETRY = Retry(1, backoff_factor=0.5, status_forcelist=_AWAY, allowed_methods=None)
"""For checking whether the API is available at all."""


NO_ANSWER = "no answer"
"""The problem that `try_get` returns for a call without an answer."""


class RefusedError(RunError):
    """Any 4xx: the API refused the request."""


class MissingError(RefusedError):
    """404: the object does not exist."""


class ConflictError(RefusedError):
    """409: the object exists already."""


class NotReadyError(RefusedError):
    """400: the container has not started, so it has no log."""


def core_api(retries: Retry, seconds: int = 60) -> client.CoreV1Api:
    """Return the API of pods, volume claims and the like; a request may take `seconds`.

    Raises:
        ConfigError: this process is not in a pod, and there is no kubeconfig.
    """
    return client.CoreV1Api(_connect_client(retries, seconds))


def custom_api(retries: Retry) -> client.CustomObjectsApi:
    """Return the API of TrainJobs and their runtimes.

    Raises:
        ConfigError: as for `core_api`.
    """
    return client.CustomObjectsApi(_connect_client(retries, 60))


def to_manifest(value: Any) -> Any:
    """Return an object of the client as a manifest."""
    return client.ApiClient().sanitize_for_serialization(value)


def limit_waiting(api: Any, seconds: int = 60) -> Any:
    """Give every request of a generated API client a time limit; else a silently lost connection blocks forever.

    The Kubernetes client ignores a limit that is not an integer.
    """
    request = api.rest_client.request

    def limited_request(*arguments: Any, **options: Any) -> Any:
        return request(*arguments, **options | {"_request_timeout": options.get("_request_timeout") or seconds})

    api.rest_client.request = limited_request
    return api


def try_get(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return a call's result and "", or None and the problem: missing, forbidden, or no answer."""
    try:
        return call(), ""
    except ApiException as error:
        return None, {403: "forbidden", 404: "missing"}.get(error.status, f"{error.status} {error.reason}")
    except HTTPError as error:
        return None, f"{NO_ANSWER} ({type(getattr(error, 'reason', None) or error).__name__})"


@contextlib.contextmanager
def one_line_errors(what: str, namespace: str) -> Iterator[None]:
    """Turn errors of the client into one line.

    Raises:
        RunError: the API failed or did not answer; RefusedError or a subclass: it refused the request.
    """
    try:
        yield
    except ApiException as error:
        raise _explain_error(what, namespace, error) from error
    except HTTPError as error:
        raise RunError(
            f"{what}: no answer from the Kubernetes API ({type(error).__name__}); check that it is running"
        ) from error


def _explain_error(what: str, namespace: str, error: ApiException) -> RunError:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    if error.status == 403 and "exceeded quota" in message:
        return RefusedError(f"{what}: {message}; ask for less, or raise the quota of namespace {namespace}")
    if error.status == 403:
        return RefusedError(f"{what}: {message}; apply manifests/base, and use its service account minitron")
    kinds = {400: NotReadyError, 404: MissingError, 409: ConflictError}
    kind = kinds.get(error.status, RefusedError if error.status < 500 else RunError)
    return kind(f"{what}: {error.status} {message}; see 'kubectl get events -n {namespace}'")


def _connect_client(retries: Retry, seconds: int) -> client.ApiClient:
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    except config.ConfigException as error:
        raise ConfigError(f"Kubernetes: no access ({error}); run it in a pod, or set KUBECONFIG") from error
    settings.retries = retries
    return limit_waiting(client.ApiClient(settings), seconds)
