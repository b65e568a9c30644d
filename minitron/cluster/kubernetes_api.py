"""The Kubernetes API: access, patience, and errors in one line. The only user of its client."""

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
"""An API server that is away for a quarter of an hour costs nothing: what runs in the cluster runs on."""

LAST_RETRY = Retry(4, backoff_factor=0.5, status_forcelist=_AWAY, allowed_methods=None)
"""For what is done at the end: Kubernetes kills a task 30 seconds after it asked it to end."""


class RefusedError(RunError):
    """Any 4xx: the API answered, and did not do it."""


class MissingError(RefusedError):
    """404."""


class ConflictError(RefusedError):
    """409."""


class NotReadyError(RefusedError):
    """400: a container that has not started has no log."""


def core_api() -> client.CoreV1Api:
    """Return the API of pods, claims and the like.

    Raises:
        ConfigError: this is no pod of a cluster, and there is no kubeconfig.
    """
    return client.CoreV1Api(_connection(RETRY))


def custom_api(retries: Retry) -> client.CustomObjectsApi:
    """Return the API of TrainJobs and their runtimes.

    Raises:
        ConfigError: as above.
    """
    return client.CustomObjectsApi(_connection(retries))


def plain(value: Any) -> Any:
    """Return objects of the client as a manifest has them."""
    return client.ApiClient().sanitize_for_serialization(value)


def limit_waiting(api: Any, seconds: float = 60) -> Any:
    """Let no request of a generated API client wait for ever, as it does when a connection is lost in silence."""
    request = api.rest_client.request

    def limited(*arguments: Any, **options: Any) -> Any:
        return request(*arguments, **options | {"_request_timeout": options.get("_request_timeout") or seconds})

    api.rest_client.request = limited
    return api


def try_get(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call found and "", or None and what is wrong with it: missing, forbidden, or no answer."""
    try:
        return call(), ""
    except ApiException as error:
        return None, {403: "forbidden", 404: "missing"}.get(error.status, f"{error.status} {error.reason}")
    except HTTPError as error:
        return None, f"no answer ({type(error).__name__})"


@contextlib.contextmanager
def errors(what: str, namespace: str) -> Iterator[None]:
    """Turn what the client raises into one line.

    Raises:
        RunError: of the classes above where it is one; the API did not answer, or failed.
    """
    try:
        yield
    except ApiException as error:
        raise _explained(what, namespace, error) from error
    except HTTPError as error:
        raise RunError(f"{what}: the Kubernetes API does not answer ({type(error).__name__}); is it up?") from error


def _explained(what: str, namespace: str, error: ApiException) -> RunError:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    if error.status == 403 and "exceeded quota" in message:
        return RefusedError(f"{what}: {message}; ask for less, or for more quota in namespace {namespace}")
    if error.status == 403:
        return RefusedError(f"{what}: {message}; apply manifests/base, and run as its account minitron")
    kinds = {400: NotReadyError, 404: MissingError, 409: ConflictError}
    kind = kinds.get(error.status, RefusedError if error.status < 500 else RunError)
    return kind(f"{what}: {error.status} {message}; 'kubectl get events -n {namespace}' may say more")


def _connection(retries: Retry) -> client.ApiClient:
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    except config.ConfigException as error:
        raise ConfigError(f"Kubernetes: no access ({error}); run it in a pod, or set KUBECONFIG") from error
    settings.retries = retries
    return limit_waiting(client.ApiClient(settings))
