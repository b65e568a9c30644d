"""Where data lies: turns an address (a local path, file://, hf://) into a verified local path. Buckets: bucket.py."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from minitron.errors import ConfigError, RunError

RECORD = "stage.json"
"""The file that makes a stage's directory complete: written last, never part of the directory's content hash."""

AWAITED = f"{RECORD}.partial"
"""What is in its place while a directory is uploaded to a bucket."""

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


def content_hash(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """Return the sha256 of a file, or of a directory's names and contents: its stage.json and `leave_out` excepted."""
    if path.is_file():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path)
        if name.parts[0] not in leave_out and str(name) not in (RECORD, AWAITED):
            digest.update(f"{name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def verified_hash(path: Path) -> str:
    """Return the content hash of an input, checked against the record of the stage that wrote it.

    Raises:
        RunError: the content is not what the stage wrote.
    """
    found = content_hash(path)
    if record := read_record(path):
        recorded = record["output_sha256"]
        if recorded != found:
            raise RunError(
                f"{path}: content hash {found[:12]} is not the {recorded[:12]} its {RECORD} records: "
                "a file is damaged or was changed; delete the directory and run the stage that writes it again"
            )
    return found


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a stage's result; None where there is none, or a file of that name that is no record."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if is_record(record) else None


def is_record(found: Any) -> TypeGuard[dict[str, Any]]:
    """Say whether the content of a JSON file is the record of a stage's result."""
    return isinstance(found, dict) and {"stage", "key", "output_sha256"} <= found.keys()


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
