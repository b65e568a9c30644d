"""Access to the API of Kubeflow Pipelines: connect, read the server's version, explain errors in one line."""

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.cluster import kubernetes_api
from minitron.errors import ConfigError, MinitronError, RunError, without_password

OLDEST = (2, 15, 0)
"""The oldest server with the driver and API that the pipelines need."""

_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class NoAnswerError(RunError):
    """The server does not answer now: it, or its database, is unavailable or overloaded."""


class Connection:
    """A connection to the API of Kubeflow Pipelines."""

    def __init__(self, host: str | None, namespace: str | None, token: str | None) -> None:
        """Connect.

        Args:
            host: URL of the API; None in a pod of the cluster.
            namespace: your namespace, if Kubeflow has several users.
            token: bearer token, if the server needs one. A pod uses its own token. Behind Google's Identity-Aware
                Proxy, set KF_PIPELINES_IAP_OAUTH2_CLIENT_ID to its OAuth client to use the service account's token.

        Raises:
            ConfigError: outside a cluster there is no host, or Google issues no token.
            RunError: the host is not the API, or it refuses the token.
        """
        if host is None and not _IN_CLUSTER.is_file():
            raise ConfigError("--host: missing; give the URL of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT")
        self.host = without_password(host or "ml-pipeline in this cluster")
        with self.one_line_errors():
            self._client = _make_client(host=host, existing_token=token, credentials=_pod_credentials(host, token))
            # The client's own answer has no version.
            health, *_ = self._client._healthz_api.api_client.call_api(
                "/apis/v2beta1/healthz", "GET", response_type="object", auth_settings=["Bearer"]
            )
        if not isinstance(health, dict):  # a page
            raise self._not_kubeflow()
        self.version: str = health.get("tag_name") or "unknown"
        self.release = _parse_release(self.version)
        self.multi_user = bool(health.get("multi_user"))
        if self.multi_user and not namespace:
            raise ConfigError(f"--namespace: missing; {self.host} has several users, so give your namespace")
        self.namespace = namespace if self.multi_user else None
        self.tasks_namespace = namespace or "kubeflow"

    def check_version(self) -> None:
        """Check that the server is new enough; a development build, which names no release, passes.

        Raises:
            ConfigError: the server is too old.
        """
        if self.release and self.release < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ConfigError(
                f"{self.host}: Kubeflow Pipelines {self.version}, but minitron needs {oldest} or newer; upgrade it"
            )

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
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
                f"{self.host}: no token for its Identity-Aware Proxy ({reason}); set GOOGLE_APPLICATION_CREDENTIALS to "
                "a service account's key, or unset KF_PIPELINES_IAP_OAUTH2_CLIENT_ID"
            ) from error
        except HTTPError as error:
            reason = re.sub(r"\[Errno -?\d+\] ", "", str(error).rpartition(": ")[2].strip("')\"("))
            raise NoAnswerError(f"{self.host}: no answer ({reason}); check --host and the network") from error
        except (ValueError, AttributeError, TypeError) as error:  # a page where JSON was expected
            raise self._not_kubeflow() from error

    def _explain_error(self, error: Any) -> RunError:
        match error.status:
            case 401:
                return RunError(
                    f"{self.host}: the token is refused (401): it has expired or is another server's; get a new "
                    "one and give it with --token or MINITRON_TOKEN"
                )
            case 403:
                return RunError(
                    f"{self.host}: not allowed (403): {_server_message(error)}; ask for the role kubeflow-edit in the "
                    f"namespace {self.namespace or 'of Kubeflow'}"
                )
            case 404 if "<" in str(error.body or "<"):
                return self._not_kubeflow()
            case 502 | 503 | 504:
                return NoAnswerError(
                    f"{self.host}: no answer ({error.status} {error.reason}); check that ml-pipeline is running"
                )
        kind = NoAnswerError if error.status in (429, 500) else RunError
        return kind(f"{self.host}: refused ({error.status}): {_server_message(error)}; see the log of ml-pipeline")

    def _not_kubeflow(self) -> RunError:
        return RunError(
            f"{self.host}: answers, but is not the API of Kubeflow Pipelines; give the URL of its page with the path "
            "(often …/pipeline), and a token if the page asks for a login"
        )


def _make_client(**access: Any) -> Any:
    """Return Kubeflow's client with one health check; the original always checks five times."""
    from kfp.client import Client

    class Quick(Client):
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            kubernetes_api.limit_waiting(self._healthz_api.api_client)  # all its services share it
            return self._healthz_api.healthz_service_get_healthz(_request_timeout=10)  # retried by urllib3

    return Quick(**access)


def _pod_credentials(host: str | None, token: str | None) -> Any:
    """Return the token that Kubernetes mounts into a pod for Kubeflow Pipelines, if there is one."""
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, ServiceAccountTokenVolumeCredentials

    path = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
    return ServiceAccountTokenVolumeCredentials() if host and not token and Path(path).is_file() else None


def _parse_release(version: str) -> tuple[int, int, int] | None:
    """Return the numbers of a release; None for a development build, which has `unknown`, a branch or a commit."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _server_message(error: Any) -> str:
    """Return the server's message in one line."""
    try:
        body = json.loads(error.body)
        text = body.get("message") or body.get("error_message") or body.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        text = str(error.body or error.reason)
    return " ".join(str(text).split())[:300]
