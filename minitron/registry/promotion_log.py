"""The promotion log: who made which version of a registered model the champion, when and why.

Moves happen one at a time, and none is lost. Any process can overwrite an alias in MLflow, but a run's parameter is
written only once. So every registered model has a run, "promotions of NAME", whose parameters move.0001, move.0002, …
are its moves. The process that writes number n has made that move, and all others read it. The aliases `previous` and
`champion` follow, and `done.0001` records that they did. If `done` is missing, the next reader waits for the author
and then completes the move. A move starts where the alias is, also if it was moved by hand.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from minitron.errors import RunError
from minitron.tracking.client import find_active_run, find_or_create_experiment, is_missing
from minitron.tracking.write_once import write_once

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "EXPERIMENT", "PREVIOUS", "PROMOTED_TAG", "Move", "PromotionLog", "State"]

CHAMPION, PREVIOUS = "champion", "previous"
EXPERIMENT = "promotions"

PROMOTED_TAG = "promoted_at"
"""Tag of a version that is or was the champion."""

_TAG = "minitron.promotions"
"""On a registered model: the id of its run. On the run: the model's name."""

_AUTHOR_SECONDS, _READER_SECONDS = 10, 20
"""Seconds that an author has to begin setting the aliases, and that a reader waits for the author."""


@dataclass(frozen=True)
class Move:
    """One move of the alias champion; `source` is None if there was no champion."""

    source: int | None
    to: int
    who: str
    when: str
    why: str | None
    id: str

    @classmethod
    def from_json(cls, text: str) -> "Move":
        """Return the move of a log entry."""
        values = json.loads(text)
        return cls(source=values.pop("from"), **values)

    def to_json(self) -> str:
        """Return the log entry."""
        values = asdict(self)
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
        """Find the run, or make it.

        Raises:
            RunError: no version of the model has a run.
        """
        self._client, self._name = client, name
        self._run_id = client.get_registered_model(name).tags.get(_TAG) or self._elect_run()

    def read_moves(self) -> list[Move]:
        """Return all moves, the earliest first."""
        parameters = self._read_parameters()
        return [Move.from_json(parameters[key]) for key in sorted(parameters) if key.startswith("move.")]

    def settle_moves(self) -> State:
        """Complete the last move if its author could not, and return the state of the aliases."""
        moves = self.read_moves()
        if moves and not self._wait_for_author(len(moves), moves[-1]):
            self._complete_move(len(moves), moves[-1])
            return self.settle_moves()
        champion, previous = self._read_aliases()
        return State(len(moves), champion, previous)

    def move(self, state: State, to: int, who: str, why: str | None) -> Move:
        """Make a version the champion, and the present one the previous.

        Args:
            state: the state that the move starts from.
            to: the version.
            who: the author of the move.
            why: reason, for those who read the log.

        Raises:
            RunError: another process has made a move since then.
        """
        number, began = state.moves + 1, time.monotonic()
        move = Move(state.champion, to, who, datetime.now(UTC).isoformat(timespec="seconds"), why, uuid.uuid4().hex)
        written = write_once(self._client, self._run_id, _format_key("move", number), move.to_json())
        if written != move.to_json():
            other = Move.from_json(written)
            raise RunError(
                f"{self._name}: {other.who} made version {other.to} {CHAMPION} at the same time; run the command again "
                "if yours is still wanted"
            )
        if time.monotonic() - began < _AUTHOR_SECONDS:
            self._apply_move(number, move)
        self.settle_moves()
        return move

    def _elect_run(self) -> str:
        """Create a run, and return the one that all processes agree on: the run of the first version names it."""
        versions = self._client.search_model_versions(f"name = '{self._name}'")
        numbered = sorted(versions, key=lambda version: int(version.version))
        runs = (find_active_run(self._client, version.run_id) for version in numbered if version.run_id)
        first = next(filter(None, runs), None)
        if first is None:
            raise RunError(f"{self._name}: no version has an MLflow run; register one with the pipeline")
        experiment = find_or_create_experiment(self._client, EXPERIMENT)
        tags, title = {_TAG: self._name}, f"promotions of {self._name}"
        made = self._client.create_run(experiment, tags=tags, run_name=title).info.run_id
        self._client.set_terminated(made)  # nothing runs in it
        key = f"promotions.{hashlib.sha256(self._name.encode()).hexdigest()[:12]}"
        elected = write_once(self._client, first.info.run_id, key, made)
        if elected != made:
            self._client.delete_run(made)  # another process was faster
        self._client.set_registered_model_tag(self._name, _TAG, elected)
        return elected

    def _read_parameters(self) -> dict[str, str]:
        return self._client.get_run(self._run_id).data.params

    def _read_aliases(self) -> tuple[int | None, int | None]:
        aliases = self._client.get_registered_model(self._name).aliases
        champion, previous = (int(aliases[alias]) if alias in aliases else None for alias in (CHAMPION, PREVIOUS))
        return champion, previous

    def _wait_for_author(self, number: int, move: Move) -> bool:
        """Wait for the author of a recent move to set the aliases, and say whether they follow it."""
        age = (datetime.now(UTC) - datetime.fromisoformat(move.when)).total_seconds()
        # Clocks differ by minutes at most, so do not wait for an older move.
        deadline = time.monotonic() + (_READER_SECONDS if abs(age) < 600 else 0)
        while _format_key("done", number) not in self._read_parameters():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        return True

    def _complete_move(self, number: int, move: Move) -> None:
        """Complete a move for its author, unless the alias was moved by hand or the version was deleted."""
        if self._read_aliases()[0] in (move.source, move.to):
            try:
                return self._apply_move(number, move)
            except Exception as error:
                if not is_missing(error):
                    raise
        write_once(self._client, self._run_id, _format_key("done", number), "given up")

    def _apply_move(self, number: int, move: Move) -> None:
        """Let the aliases follow a move or a later one, so the last process to set them has seen all moves."""
        latest = move
        while True:
            self._set_aliases(latest)
            newest = self.read_moves()[-1]
            if newest == latest:
                break
            latest = newest
        write_once(self._client, self._run_id, _format_key("done", number), "applied")

    def _set_aliases(self, move: Move) -> None:
        client, name, version = self._client, self._name, str(move.to)
        if move.source is not None:
            _ignore_missing(lambda: client.set_registered_model_alias(name, PREVIOUS, str(move.source)))
        client.set_registered_model_alias(name, CHAMPION, version)
        for tag, value in (("promoted_by", move.who), (PROMOTED_TAG, move.when), ("promoted_why", move.why or "")):
            client.set_model_version_tag(name, version, tag, value)


def _ignore_missing(call: Callable[[], None]) -> None:
    """Call a function on a version that may have been deleted."""
    try:
        call()
    except Exception as error:
        if not is_missing(error):
            raise


def _format_key(kind: str, number: int) -> str:
    return f"{kind}.{number:04d}"
