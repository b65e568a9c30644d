"""The inputs of a stage: identified before anything large is fetched, then resolved once to local directories."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minitron.config.addresses import Address, find_scheme_faults
from minitron.config.fields import HUB_DATASET, INPUT, Fault, format_address
from minitron.config.parse import SectionError, find_marked_fields
from minitron.config.settings import CorpusPart, format_parts, identify_parts, list_parts
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError
from minitron.runtime import model_sources
from minitron.storage import bucket, references
from minitron.storage.cache import persistent_directory
from minitron.storage.hashing import content_hash, keep_notes, verified_hash
from minitron.storage.hub import resolve_hub_dataset

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Input:
    """An input: its address, its hash or snapshot, and a function that returns its local directory.

    `path` is None for text in a bucket or on a hub: the stage streams or fetches it. `pinned` is the fixed address
    behind an alias or a branch. `snapshot` identifies the content of a model in a bucket: an address and a digest.
    `parts` are the inputs that several corpora are; their address is the text of the setting.
    """

    address: str
    sha256: str
    path: Callable[[], Path] | None
    pinned: str | None = None
    snapshot: str | None = None
    parts: tuple["Input", ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the input's entry in stage.json."""
        fixed = {"pinned": None if self.pinned == self.address else self.pinned, "snapshot": self.snapshot}
        entry = {"address": self.address, "sha256": self.sha256} | {name: text for name, text in fixed.items() if text}
        if self.parts:
            return entry | {"parts": [part.record() for part in self.parts]}
        return entry if ":/" in self.address else entry | {"address": str(Path(self.address).absolute())}


def find_inputs(config: StageConfig, *names: str) -> dict[str, Input]:
    """Identify inputs, and check them against the record of the stage that wrote them.

    Args:
        config: the stage's configuration.
        *names: names of the inputs; none: all inputs that are given.

    Raises:
        ConfigError: an input is missing or is not the expected one, or the output lies inside it.
        RunError: an input is damaged, or cannot be reached.
    """
    wanted = names or find_marked_fields(type(config), INPUT)
    with keep_notes(persistent_directory(config.workspace)):
        found = {name: _find_input(config, name) for name in wanted if getattr(config, name) is not None}
    if faults := list(_find_unexpected(config, found, wanted)):
        raise SectionError(faults)
    return found


def _find_unexpected(config: StageConfig, found: dict[str, Input], names: Collection[str]) -> Iterator[Fault]:
    for name, expected in config.expected_sha256.items():
        if name not in names:
            continue
        sha256, address = (found[name].sha256, found[name].address) if name in found else ("none", "not given")
        if sha256 != expected:
            yield Fault(
                name,
                f"{address}: its SHA-256 is {sha256}, but expected_sha256 is {expected}; give the original input, or "
                f"remove {name} from expected_sha256",
            )


def with_local_paths(config: Config, inputs: dict[str, Input]) -> Config:
    """Return a configuration whose inputs are local directories; fetch the inputs that are not local."""
    paths = {name: entry.path() for name, entry in inputs.items() if entry.path}
    types = {name: type(getattr(config, name)) for name in paths}  # a model's address is a str
    values: dict[str, Any] = {name: str(path) if types[name] is str else path for name, path in paths.items()}
    for name, entry in inputs.items():
        if entry.parts:
            addresses = [str(part.path()) if part.path else part.address for part in entry.parts]
            values[name] = format_parts(list_parts(entry.address), addresses)
    return config.model_copy(update=values)


def _find_input(config: StageConfig, name: str) -> Input:
    address = format_address(getattr(config, name))
    is_text = name in find_marked_fields(type(config), HUB_DATASET)
    parts = list_parts(address) if is_text else []
    return _find_mixture(config, name, parts) if len(parts) > 1 else _find_address(config, name, address)


def _find_mixture(config: StageConfig, name: str, parts: list[CorpusPart]) -> Input:
    """Identify several corpora: by the identity and the share of each, in their order."""
    found = tuple(_find_address(config, name, part.address) for part in parts)
    entries = [entry.record() for entry in found]
    address = format_parts(parts, [entry["address"] for entry in entries])
    pinned = format_parts(parts, [entry.get("pinned", entry["address"]) for entry in entries])
    return Input(address, identify_parts(parts, [entry.sha256 for entry in found]), None, pinned, parts=found)


def _find_address(config: StageConfig, name: str, address: str) -> Input:
    if name in find_marked_fields(type(config), HUB_DATASET):
        if dataset := resolve_hub_dataset(address):
            return Input(address, dataset.identity, None, dataset.pinned)
        if bucket.is_bucket(address):
            return Input(address, bucket.pin_objects(address)[0].rpartition("#")[2], None)
        if faults := list(find_scheme_faults(name, Address(address, is_text=True))):
            raise SectionError(faults)
    elif (reference := _read_reference(address)) and bucket.is_bucket(reference.address):
        return Input(address, reference.sha256, lambda: references.locate_result(reference, address))
    path, pinned = model_sources.pinned_local_model(address, config)
    if config.output.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"output {config.output}: lies inside {name} {address} and would change it; move it out")
    sha256 = verified_hash(path)
    model_sources.check_unchanged(path, sha256)
    if bucket.is_bucket(address):  # its snapshot identifies the content, but is not an address
        single = path / address.rpartition("/")[2]
        if [*path.iterdir()] == [single] and single.is_file():  # one object: it is what the same file on a disk is
            path, sha256 = single, content_hash(single)
        return Input(address, sha256, lambda: path, snapshot=pinned)
    return Input(address, sha256, lambda: path, pinned)


def _read_reference(address: str) -> references.Reference | None:
    return None if bucket.is_bucket(address) else references.read_reference(Path(address))
