"""Turn an address (a local path, file://, hf://) into a local path. Buckets: bucket.py."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minitron.errors import ConfigError, RunError
from minitron.storage.layout import MODEL_FILES, OTHER_MODEL_FILES

_HURRY = 5
"""Seconds to wait for an answer that is worth having only if it comes soon."""

_HUB_DATASET = re.compile(r"hf://([^/@]+(?:/[^/@]+)?)(?:@([^/@]+))?(?:/([^/@]+))?")
"""hf://org/name[@revision][/config]"""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on Hugging Face's hub at one commit."""

    repository: str
    commit: str
    config: str | None

    @property
    def identity(self) -> str:
        """The commit and the configuration: they identify the content, as a hash does for other inputs."""
        return f"{self.commit}/{self.config}" if self.config else self.commit

    @property
    def pinned(self) -> str:
        """The address of this commit."""
        return f"hf://{self.repository}@{self.commit}{f'/{self.config}' if self.config else ''}"


def resolve_local_path(address: str | Path) -> Path:
    """Return the local path of a model; hf://org/name is fetched unless it is in the cache.

    Raises:
        ConfigError: the path does not exist, or the scheme is unknown.
        RunError: the hub cannot be reached.
    """
    scheme, separator, rest = str(address).partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else address)
        if not path.exists():
            raise ConfigError(f"{address}: no such file or directory; give an existing path or hf://org/name")
        return path
    if scheme == "hf":
        return _download_from_hub(rest)
    raise ConfigError(f"{address}: unknown scheme '{scheme}://'; give a path, file:// or hf://org/name")


@cache
def resolve_hub_dataset(address: str) -> HubDataset | None:
    """Resolve hf://org/name[@revision][/config]; return None for any other address.

    The answer is cached: one process sees one commit.

    Raises:
        ConfigError: the address is not of that form.
        RunError: the hub cannot be reached or has no such dataset.
    """
    if not address.startswith("hf://"):
        return None
    if not (match := _HUB_DATASET.fullmatch(address)):
        raise ConfigError(f"{address}: not a dataset's address; give hf://org/name[@revision][/config]")
    from huggingface_hub import dataset_info

    repository, revision, config = match.groups()
    try:
        return HubDataset(repository, str(dataset_info(repository, revision=revision).sha), config)
    except Exception as error:  # the classes differ between versions of the library
        raise _hub_error(address, error) from error


def pin_hub_model(address: str) -> str:
    """Return an hf:// address with the current commit of its revision; unchanged if the hub does not answer."""
    from huggingface_hub import model_info

    name, _, revision = address.removeprefix("hf://").partition("@")
    try:
        return f"hf://{name}@{model_info(name, revision=revision or None).sha}"
    except Exception:  # the cache may have it; if not, the download reports the error
        return address


def fetch_hub_file(address: str, name: str) -> Path:
    """Return the local path of one file of an hf:// model, fetched unless it is in the cache.

    Raises:
        RunError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = address.removeprefix("hf://").partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # as above
        raise _hub_error(address, error) from error


def read_hub_json(address: str, name: str) -> Any:
    """Return the content of a small JSON file of an hf:// model. The hub is asked once: a user waits at a terminal.

    Raises:
        RunError: the hub does not answer at once, or has no such file.
    """
    import requests
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        return json.loads(fetch_hub_file(address, name).read_text())
    repository, _, revision = address.removeprefix("hf://").partition("@")
    try:
        url = hf_hub_url(repository, name, revision=revision or None)
        response = requests.get(url, headers=build_hf_headers(), timeout=_HURRY)
        response.raise_for_status()
        return response.json()
    except Exception as error:  # as above
        raise _hub_error(address, error) from error


def _download_from_hub(repository: str) -> Path:
    """Return the local directory of a model's files, without its weights in other formats.

    Raises:
        ConfigError: it has no safetensors.
        RunError: the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    wanted, unwanted = list(MODEL_FILES), list(OTHER_MODEL_FILES)
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # as above
        raise _hub_error(f"hf://{repository}", error) from error
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"hf://{repository}: no .safetensors file, and weights in other formats are not fetched; load the model "
            "with transformers' from_pretrained, save it with save_pretrained, and give that directory"
        )
    return path


def _hub_error(address: str, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"{address}: not fetched ({reason}); check the name, HF_TOKEN and the network, or give a local path"
    )
