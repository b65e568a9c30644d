"""The inputs of a stage: what stands for their content, known before anything large is fetched, and where they are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minitron.config.fields import HUB_DATASET, INPUT, format_address
from minitron.config.parse import find_marked_fields
from minitron.config.stages import StageConfig
from minitron.errors import ConfigError
from minitron.runtime import model_sources
from minitron.storage import bucket, references
from minitron.storage.hashing import verified_hash
from minitron.storage.hub import resolve_hub_dataset

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Input:
    """An input's address, the hash of its content, or the snapshot that fixes it, and how its directory is had.

    `path` is None for a corpus that is read, or fetched, by prepare itself; `pinned` is the address of what a movable
    one, an alias or a branch, meant.
    """

    address: str
    sha256: str
    path: Callable[[], Path] | None
    pinned: str | None = None

    def record(self) -> dict[str, str]:
        """Return what stage.json says of the input."""
        pinned = {} if self.pinned in (None, self.address) else {"pinned": str(self.pinned)}
        return {"address": self.address, "sha256": self.sha256} | pinned


def find_inputs(config: StageConfig) -> dict[str, Input]:
    """Find every input that is given, and check it against the record of the stage that wrote it.

    Raises:
        ConfigError: one is missing, or the output lies inside it.
        RunError: one is damaged, or cannot be reached.
    """
    names = find_marked_fields(type(config), INPUT)
    return {name: _find_input(config, name) for name in names if getattr(config, name) is not None}


def with_local_paths(config: Config, found: dict[str, Input]) -> Config:
    """Return a configuration whose inputs are directories of this machine; what lies elsewhere is fetched now."""
    paths = {name: entry.path() for name, entry in found.items() if entry.path}
    types = {name: type(getattr(config, name)) for name in paths}  # an address is text, a path is not
    values: dict[str, Any] = {name: str(path) if types[name] is str else path for name, path in paths.items()}
    return config.model_copy(update=values)


def _find_input(config: StageConfig, name: str) -> Input:
    place = format_address(getattr(config, name))
    if name in find_marked_fields(type(config), HUB_DATASET):
        if dataset := resolve_hub_dataset(place):
            return Input(place, dataset.identity, None, dataset.pinned)
        if bucket.is_bucket(place):
            return Input(place, bucket.pin_objects(place)[0].rpartition("#")[2], None)
    elif (reference := _read_reference(place)) and bucket.is_bucket(reference.address):
        return Input(place, reference.sha256, lambda: references.locate_result(reference, place))
    path, pinned = model_sources.pinned_local_model(place, config)
    if config.output.absolute().is_relative_to(path.absolute()):
        raise ConfigError(f"output {config.output}: lies inside {name} {place} and would change it; move it out")
    found = verified_hash(path)
    model_sources.check_unchanged(path, found)
    # A bucket's snapshot is a digest, which proves what was read but is no address.
    return Input(place, found, lambda: path, None if bucket.is_bucket(place) else pinned)


def _read_reference(place: str) -> references.Reference | None:
    return None if bucket.is_bucket(place) else references.read_reference(Path(place))
