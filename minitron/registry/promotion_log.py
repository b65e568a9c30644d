"""The promotion log: who made which version of a registered model the champion, when, and why.

Moves happen one at a time, and none is lost. Any process can overwrite an alias in MLflow, but a run's parameter can be
written only once. So every registered model has a run, "promotions of NAME", and its parameters move.0001, move.0002, …
are the moves. The process that writes number n has made that move, and all others read it. Then it sets the aliases
`champion` and `previous`, and repeats this while there is a later move, so the last process to set them has seen all
moves. Finally it writes `done.0001`. If that is missing, the process died: the next promotion completes the move,
unless someone has moved the alias by hand. A move starts from the present alias.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from minitron.errors import RunError
from minitron.tracking.client import find_active_run, find_or_create_experiment, is_missing, is_refusal
from minitron.tracking.pipeline_run import NOTE_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "EXPERIMENT", "FORCED_TAG", "PREVIOUS", "PROMOTED_TAG", "Move", "PromotionLog", "State"]

CHAMPION, PREVIOUS = "champion", "previous"
EXPERIMENT = "promotions"

PROMOTED_TAG = "promoted_at"
"""Tag of a version that is or was the champion."""

FORCED_TAG = "promoted_forced"
"""Tag of such a version: the outcome of the gates that a person overruled; empty if no gate was overruled."""

_TAG = "minitron.promotions"
"""Tag of a registered model: the id of its run of promotions. Tag of that run: the model's name."""

_NOTE = "Its parameters record who made which version the champion, when and why. `minitron promote` needs this run."


@dataclass(frozen=True)
class Move:
    """One move of the alias champion.

    `source` is None if there was no champion; `forced` is the outcome of the gates that a person overruled, if any.
    """

    source: int | None
    to: int
    who: str
    when: str
    why: str | None
    id: str
    forced: str | None = None

    @classmethod
    def from_json(cls, text: str) -> "Move":
        """Return the move of a log entry."""
        values = json.loads(text)
        return cls(source=values.pop("from"), **values)

    def to_json(self) -> str:
        """Return the log entry."""
        values = asdict(self)
        if self.forced is None:
            del values["forced"]  # an earlier version must be able to read it
        return json.dumps({"from": values.pop("source")} | values, ensure_ascii=False)


@dataclass(frozen=True)
class State:
    """The number of moves, and the versions that have the aliases now."""

    moves: int
    champion: int | None
    previous: int | None


class PromotionLog:
    """The moves of one registered model."""

    def __init__(self, client: "MlflowClient", name: str) -> None:
        """Find the run of promotions, or create it.

        Raises:
            RunError: no version of the model has a run.
        """
        self._client, self._name = client, name
        self._run_id = client.get_registered_model(name).tags.get(_TAG) or self._make_run()

    def read_moves(self) -> list[Move]:
        """Return all moves, the earliest first."""
        return _list_moves(self._read_parameters())

    def settle_moves(self) -> State:
        """Complete the last move if its process died, and return the state of the aliases."""
        parameters = self._read_parameters()
        moves, aliases = _list_moves(parameters), self._read_aliases()
        if moves and aliases[0] in (moves[-1].source, moves[-1].to) and _name_mark(moves) not in parameters:
            _ignore_missing(self._follow_moves)
            aliases = self._read_aliases()
        return State(len(moves), *aliases)

    def move(self, state: State, to: int, who: str, why: str | None, forced: str | None = None) -> Move:
        """Make a version the champion, and the present champion the previous one.

        Args:
            state: the state that the move starts from.
            to: the version.
            who: the author of the move.
            why: reason, for readers of the log.
            forced: the outcome of the gates that the author overrules.

        Raises:
            RunError: another process has made a move since `state` was read.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        move = Move(state.champion, to, who, now, why, uuid.uuid4().hex, forced)
        written = self._write_once(self._run_id, f"move.{state.moves + 1:04d}", move.to_json())
        if written != move.to_json():
            other = Move.from_json(written)
            raise RunError(
                f"{self._name}: {other.who} made version {other.to} {CHAMPION} at the same time; run the command again "
                "if you still want your version"
            )
        self._follow_moves()
        return move

    def _make_run(self) -> str:
        """Return the run of the moves, on which all processes agree: a parameter of the first version's run names it.

        Afterwards, a tag of the registered model names it.
        """
        client = self._client
        versions = client.search_model_versions(f"name = '{self._name}'", 1000, ["version_number ASC"])
        runs = (find_active_run(client, version.run_id) for version in versions if version.run_id)
        if (first := next(filter(None, runs), None)) is None:
            raise RunError(f"{self._name}: no version has an MLflow run; register one with the pipeline")
        experiment, title = find_or_create_experiment(client, EXPERIMENT), f"promotions of {self._name}"
        tags = {_TAG: self._name, NOTE_TAG: _NOTE}
        made = client.create_run(experiment, tags=tags, run_name=title).info.run_id
        client.set_terminated(made)  # it never runs
        key = f"promotions.{hashlib.sha256(self._name.encode()).hexdigest()[:12]}"
        if (run_id := self._write_once(first.info.run_id, key, made)) != made:
            client.delete_run(made)  # another process was faster
        client.set_registered_model_tag(self._name, _TAG, run_id)
        return run_id

    def _write_once(self, run_id: str, name: str, value: str) -> str:
        """Write a parameter of a run, and return its value, which may be another process's: MLflow never changes it."""
        try:
            self._client.log_param(run_id, name, value)
        except Exception as error:
            if not is_refusal(error) or (written := self._client.get_run(run_id).data.params.get(name)) is None:
                raise
            return written
        return value

    def _read_parameters(self) -> dict[str, str]:
        return self._client.get_run(self._run_id).data.params

    def _read_aliases(self) -> tuple[int | None, int | None]:
        aliases = self._client.get_registered_model(self._name).aliases
        champion, previous = (int(aliases[alias]) if alias in aliases else None for alias in (CHAMPION, PREVIOUS))
        return champion, previous

    def _follow_moves(self) -> None:
        """Set the aliases by the latest move, and repeat this while there is a later move."""
        followed = None
        while followed != (moves := self.read_moves())[-1]:
            followed = moves[-1]
            self._set_aliases(followed)
        self._write_once(self._run_id, _name_mark(moves), "applied")

    def _set_aliases(self, move: Move) -> None:
        client, name, version = self._client, self._name, str(move.to)
        client.set_registered_model_alias(name, CHAMPION, version)
        if move.source is not None:
            _ignore_missing(lambda: client.set_registered_model_alias(name, PREVIOUS, str(move.source)))
        tags = {"promoted_by": move.who, PROMOTED_TAG: move.when, "promoted_why": move.why, FORCED_TAG: move.forced}
        for tag, value in tags.items():
            client.set_model_version_tag(name, version, tag, value or "")


def _list_moves(parameters: dict[str, str]) -> list[Move]:
    return [Move.from_json(parameters[key]) for key in sorted(parameters) if key.startswith("move.")]


def _name_mark(moves: list[Move]) -> str:
    """Return the name of the parameter that records that the aliases are set by the last move."""
    return f"done.{len(moves):04d}"


def _ignore_missing(call: Callable[[], None]) -> None:
    """Call a function on a version that may have been deleted."""
    try:
        call()
    except Exception as error:
        if not is_missing(error):
            raise
