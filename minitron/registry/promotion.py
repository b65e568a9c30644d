"""Promotion: a version gets the alias champion if it meets its gates; a rollback gives it back to the previous version.

    minitron promote minitron
    minitron promote minitron --version 3 --force --why "the new license matters more than 0.1 points"
    minitron rollback minitron --why "wrong license"

The judged gates are in evaluation.json of the version's MLflow run. If the champion has changed since, they are judged
again. If no gate has judged a version's quality, only a person can promote it, not a pipeline. Only a person can
overrule gates, and must give a reason. The promotion log records who moved which alias when.
"""

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron.config import metrics
from minitron.config.settings import RegisterSettings
from minitron.errors import ConfigError, RunError
from minitron.registry import gates
from minitron.registry.promotion_log import CHAMPION, PREVIOUS, Move, PromotionLog
from minitron.storage.layout import EVALUATION, ITEMS
from minitron.tracking.client import (
    connect,
    defer_sigterm,
    fail_fast,
    is_missing,
    one_line_errors,
    read_artifact,
    without_password,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


CHALLENGER = RegisterSettings.model_fields["alias"].default
_LONGEST_REASON = 1000
_ANEW = "run the pipeline retrain, which evaluates it again"


class GatesFailed(RunError):
    """The version does not meet its gates."""

    verdict = "gates not met"


class NoQualityGate(GatesFailed):
    """No gate has judged the version's quality; only a person can promote it."""

    verdict = "no gate on quality"


class NotJudged(GatesFailed):
    """The gates of the version cannot be judged; the version may be made and measured again."""

    verdict = "not judged"


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion or a rollback.

    Attributes:
        name: the registered model.
        version: the new champion.
        move: the move of the alias; None if the version was already the champion.
        gates: the judged gates of the version, as in evaluation.json; empty for a rollback, or if they were overruled.
    """

    name: str
    version: int
    move: Move | None
    gates: list[dict[str, Any]]


def promote(
    uri: str | None,
    name: str,
    version: int | None = None,
    why: str | None = None,
    pipeline_run_id: str | None = None,
    force: bool = False,
) -> Promotion:
    """Make a version the champion, and the champion the previous one.

    For a pipeline run without a reason, a gate must have judged the version's quality.

    Args:
        uri: MLflow's server or database.
        name: registered model.
        version: its version; None: the challenger.
        why: reason, for the promotion log.
        pipeline_run_id: pipeline run that promotes; None: this user.
        force: overrule the gates; a reason is required, and the log records both.

    Raises:
        ConfigError: there is no registry at the URI, or the reason is too long or missing.
        GatesFailed: a gate is not met.
        NoQualityGate: a pipeline run without a reason promotes a version whose quality no gate has judged.
        NotJudged: the version was not compared with the present champion, or not evaluated by this package.
        RunError: there is no such model or version, another process was faster, or MLflow cannot be reached.
    """
    author, forced = _name_author(why, pipeline_run_id), None
    if force and (pipeline_run_id or not (why or "").strip()):
        raise ConfigError("--force: only a person can overrule gates, and the log says why; give --why REASON")
    with _open_log(uri, name) as (client, log):
        state = log.settle_moves()
        version = find_version(client, name, version)
        if version == state.champion:
            return Promotion(name, version, None, [])
        try:
            rows = _check_gates(client, name, version, state.champion, bool(pipeline_run_id and not why))
        except RunError as error:
            if not force:
                raise
            rows, forced = [], _cut_remedy(error)
        return Promotion(name, version, log.move(state, version, author, why, forced), rows)


def _check_gates(
    client: "MlflowClient", name: str, version: int, champion: int | None, by_pipeline: bool
) -> list[dict[str, Any]]:
    """Return the judged gates of a version if they allow its promotion.

    Raises:
        GatesFailed, NoQualityGate, NotJudged: the gates do not allow it.
    """
    try:
        rows = _judge_version(client, name, version, champion)
    except (KeyError, TypeError, AttributeError) as error:
        raise NotJudged(
            f"{name} version {version}: minitron did not write the {EVALUATION} of its run; {_ANEW}"
        ) from error
    if gates.are_gates_met(rows) is False:
        failed = "; ".join(gates.describe_gate(row) for row in rows if row["outcome"] not in gates.MET)
        raise GatesFailed(
            f"{name} version {version}: {failed}; train it longer, give retrain other evaluate.gates, or overrule them "
            f"yourself: minitron promote {name} --version {version} --force --why REASON"
        )
    if by_pipeline and not gates.is_quality_judged(rows):
        raise NoQualityGate(
            f"{name} version {version}: {_explain_missing_gate(rows)}, so no pipeline promotes it; declare a gate "
            "in evaluate.gates, such as {metric: validation_loss, against: teacher, at_most: 1}, or promote it "
            f"yourself: minitron promote {name} --version {version}"
        )
    return rows


def _cut_remedy(error: RunError) -> str:
    """Return the fault from "NAME version NUMBER: fault; remedy", short enough for the log."""
    return str(error).partition(": ")[2].rpartition("; ")[0][:_LONGEST_REASON]


def _explain_missing_gate(rows: list[dict[str, Any]]) -> str:
    if any(row["outcome"] == "no champion" and row["metric"] not in metrics.COSTS for row in rows):
        return "its gates on quality need a champion, but there is none"
    return "no gate judged its quality (a loss, kl, top1_agreement or a task)"


def rollback(uri: str | None, name: str, why: str | None = None, pipeline_run_id: str | None = None) -> Promotion:
    """Make the previous version the champion again, and the champion the previous version.

    Raises:
        ConfigError: as for promote.
        RunError: no version was champion before; as for promote.
    """
    author = _name_author(why, pipeline_run_id)
    with _open_log(uri, name) as (client, log):
        state = log.settle_moves()
        if state.previous is None or state.previous == state.champion:
            raise RunError(f"{name}: no version has the alias {PREVIOUS}; give the one you want to minitron promote")
        version = find_version(client, name, state.previous)
        return Promotion(name, version, log.move(state, version, author, why), [])


@contextmanager
def _open_log(uri: str | None, name: str) -> Iterator[tuple["MlflowClient", PromotionLog]]:
    """Yield a client and the log of a registered model."""
    if not uri:
        raise ConfigError("tracking_uri: missing; give MLflow's address, http(s)://HOST or sqlite:///FILE")
    with one_line_errors(uri), fail_fast(), defer_sigterm():
        client = connect(uri)
        try:
            client.get_registered_model(name)
        except Exception as error:
            if not is_missing(error):
                raise
            known = ", ".join(model.name for model in client.search_registered_models()) or "none"
            raise RunError(f"{name}: no such model is registered at {without_password(uri)}; known: {known}") from error
        yield client, PromotionLog(client, name)


def find_version(client: "MlflowClient", name: str, version: int | None) -> int:
    """Return the number of an existing version; without a given one, the challenger's.

    Raises:
        RunError: there is no such version, or no challenger.
    """
    if version is None:
        aliases = client.get_registered_model(name).aliases
        if CHALLENGER not in aliases:
            raise RunError(f"{name}: no version has the alias {CHALLENGER}; give a version, or register one")
        return int(aliases[CHALLENGER])
    try:
        return int(client.get_model_version(name, str(version)).version)
    except Exception as error:
        if not is_missing(error):
            raise
        newest = client.search_model_versions(f"name = '{name}'", 10, ["version_number DESC"])
        known = ", ".join(str(entry.version) for entry in reversed(newest)) or "none"
        raise RunError(f"{name}: no version {version}; known: {'…, ' if newest.token else ''}{known}") from error


def _judge_version(client: "MlflowClient", name: str, version: int, champion: int | None) -> list[dict[str, Any]]:
    """Return the judged gates of a version, compared with the present champion."""
    evaluation = _read_evaluation(client, name, version)
    if evaluation is None:
        raise NotJudged(f"{name} version {version}: its MLflow run has no {EVALUATION}; {_ANEW}")
    if reason := metrics.find_not_finite(evaluation):
        raise NotJudged(
            f"{name} version {version}: {reason} in its {EVALUATION}, so it is not promoted; make it again with the "
            "pipeline retrain and a lower learning_rate"
        )
    rows = evaluation.get("gates", [])
    today = f"models:/{name}/{champion}" if champion else None
    compared = (evaluation.get(CHAMPION) or {}).get("address")
    measures = {row["metric"] for row in rows if row["against"] == CHAMPION}
    if compared == today or not measures:
        return rows
    if champion is None:
        return gates.judge_student(rows, evaluation, None)
    other = _read_evaluation(client, name, champion)
    if reason := metrics.find_not_finite(other):
        raise NotJudged(
            f"{name} version {version}: {reason} in {EVALUATION} of the champion, version {champion}: nothing can be "
            f"compared with it; demote it with minitron rollback, then {_ANEW}"
        )
    test_set = evaluation.get("test_set")
    same_test = test_set is not None and other is not None and other.get("test_set") == test_set
    if other is None or not same_test or measures & {*metrics.SPEEDS}:  # speeds on two machines are not comparable
        raise NotJudged(
            f"{name} version {version}: its gates were judged against {compared or 'no champion'}, and its metrics "
            f"cannot be compared with those of the present champion, version {champion}; {_ANEW}"
        )
    return gates.judge_student(rows, evaluation, other["student"])


def read_declared_gates(client: "MlflowClient", name: str, version: int) -> list[dict[str, Any]] | None:
    """Return the gates that judged a version, in the form of `gates.read_gates`; None if its run has none."""
    try:
        rows = (_read_evaluation(client, name, version) or {}).get("gates")
        return None if rows is None else gates.list_declared(rows)
    except (RunError, KeyError, TypeError, AttributeError):  # another tool's run
        return None


def _read_evaluation(client: "MlflowClient", name: str, version: int) -> dict[str, Any] | None:
    """Return evaluation.json of a version's run, with the models' items if there are any; None if it is missing."""
    run_id = client.get_model_version(name, str(version)).run_id
    files = {file.path for file in client.list_artifacts(run_id)} if run_id else set()
    if not run_id or EVALUATION not in files:
        return None
    evaluation = read_artifact(client, run_id, EVALUATION)
    if ITEMS in files:
        from minitron.registry.intervals import unpack_items  # numpy

        for model, items in unpack_items(read_artifact(client, run_id, ITEMS)).items():
            evaluation[model]["items"] = items
    return evaluation


def _name_author(why: str | None, pipeline_run_id: str | None) -> str:
    """Return the name of the user or pipeline run that moves the alias."""
    if (length := len(json.dumps(why, ensure_ascii=False)) - 2) > _LONGEST_REASON:
        raise ConfigError(f"why: {length} characters in JSON; give at most {_LONGEST_REASON}")
    if pipeline_run_id:
        return f"pipeline run {pipeline_run_id}"
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"
