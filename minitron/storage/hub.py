"""Where data lies: turns an address (a local path, file://, hf://) into a local path. Buckets: bucket.py."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minitron.errors import ConfigError, RunError

_HUB_DATASET = re.compile(r"hf://([^/@]+(?:/[^/@]+)?)(?:@([^/@]+))?(?:/([^/@]+))?")
"""hf://org/name[@revision][/config]"""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on a hub, at the commit that its revision names now."""

    repository: str
    commit: str
    config: str | None

    @property
    def identity(self) -> str:
        """What stands for the content where other inputs have a hash: the commit, and which of its data sets."""
        return f"{self.commit}/{self.config}" if self.config else self.commit

    @property
    def pinned(self) -> str:
        """The address of this commit."""
        return f"hf://{self.repository}@{self.commit}{f'/{self.config}' if self.config else ''}"


def local_path(address: str | Path) -> Path:
    """Return the local path of a model, fetching hf://org/name when it is not local.

    Raises:
        ConfigError: nothing is there, or the scheme is unknown.
        RunError: the hub cannot be reached.
    """
    scheme, separator, rest = str(address).partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else address)
        if not path.exists():
            raise ConfigError(f"{address}: no such file or directory; give an existing path or hf://org/name")
        return path
    if scheme == "hf":
        return _from_hub(rest)
    raise ConfigError(f"{address}: unknown scheme '{scheme}://'; give a path, file:// or hf://org/name")


@cache
def hub_dataset(address: str) -> HubDataset | None:
    """Resolve hf://org/name[@revision][/config]; None for an address that is not on a hub.

    The answer is kept: one process sees one commit.

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
    except Exception as error:  # which classes there are differs between versions of the library
        raise _hub_error(address, error) from error


def hub_model(address: str) -> str:
    """Return an hf:// address with the commit that its revision names now; where the hub does not answer, as it is."""
    from huggingface_hub import model_info

    name, _, revision = address.removeprefix("hf://").partition("@")
    try:
        return f"hf://{name}@{model_info(name, revision=revision or None).sha}"
    except Exception:  # what is in the cache may do; if not, the download says why
        return address


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None))
    except Exception as error:  # as above
        raise _hub_error(f"hf://{repository}", error) from error


def _hub_error(address: str, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(
        f"{address}: not fetched ({reason}); check the name, HF_TOKEN and the network, or give a local path"
    )
