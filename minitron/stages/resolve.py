"""Check whether a version exists that was made from the same data, teacher and settings; if so, train nothing.

The first task of the pipeline `retrain`, without a GPU: `minitron run retrain --preset tiny`.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from minitron.config.document import Plan, read_plan
from minitron.config.fields import format_address
from minitron.config.settings import EvaluateSettings
from minitron.config.stages import PrepareConfig, PruneConfig, ResolveConfig
from minitron.registry import fingerprint, gates, lineage, promotion, training_lock
from minitron.registry.fingerprint import Fingerprint
from minitron.registry.promotion_log import CHAMPION, PROMOTED_TAG
from minitron.registry.versions import GATE_OUTCOME_TAG, read_aliases, search_versions
from minitron.runtime import inputs, model_sources
from minitron.storage.files import write_atomically
from minitron.storage.layout import RESOLUTION
from minitron.storage.staging import replace_directory
from minitron.tracking.client import connect, fail_fast, one_line_errors
from minitron.tracking.pipeline_run import join_pipeline_run, record_outcome

if TYPE_CHECKING:
    from mlflow import MlflowClient


def run(config: ResolveConfig) -> dict[str, Any]:
    """Write `decision.json` to `config.output`: `train`, the `reason`, the `champion`'s address or None, `model_name`.

    Raises:
        ConfigError: a setting or an input is not valid.
        RunError: the corpus, the teacher or MLflow cannot be reached.
    """
    plan = read_plan(config)
    wanted = plan.pipeline
    prepare = PrepareConfig(
        corpus=wanted.corpus, teacher=wanted.teacher, output=config.output, workspace=config.workspace,
        tracking_uri=config.tracking_uri, pipeline_run_id=config.pipeline_run_id,
    )  # fmt: skip
    corpus, teacher = _identify_inputs(prepare, plan.model_name)
    made_from = fingerprint.fingerprint_plan(plan, corpus, teacher, _identify_kept(plan, prepare))
    with one_line_errors(config.tracking_uri), fail_fast():
        resolution = _check_for_changes(config, plan, made_from) | {"model_name": plan.model_name}
    print(f"resolve: {resolution['reason']}", flush=True)
    with replace_directory(config.output) as directory:
        write_atomically(directory / RESOLUTION, resolution)
    return {"metrics": {"train": int(resolution["train"])}} | resolution


def _identify_inputs(prepare: PrepareConfig, name: str) -> tuple[str, str]:
    """Return the hashes that identify corpus and teacher; a remote teacher is not fetched.

    A version that was made from the same commit, version or snapshot has the hash of the teacher's content. If there
    is no such version, the teacher is new, and the commit replaces the hash.
    """
    pinned = model_sources.pin_address(format_address(prepare.teacher), prepare)
    found = inputs.find_inputs(prepare, "corpus", *(() if pinned else ("teacher",)))
    if pinned is None:
        return found["corpus"].sha256, found["teacher"].sha256
    assert prepare.tracking_uri is not None
    with one_line_errors(prepare.tracking_uri), fail_fast():
        teacher = lineage.find_teacher_hash(connect(prepare.tracking_uri, create=True), name, pinned)
    return found["corpus"].sha256, teacher or pinned


def _identify_kept(plan: Plan, prepare: PrepareConfig) -> str | None:
    """Return the hash of the lists of what to keep; None if prune chooses everything."""
    settings, output = plan.stages["prune"].as_settings(), prepare.output  # prune's own inputs are not there yet
    prune = PruneConfig(**settings, output=output, teacher=output, dataset=output, workspace=prepare.workspace)
    found = inputs.find_inputs(prune, "keep")
    return found["keep"].sha256 if found else None


def _check_for_changes(config: ResolveConfig, plan: Plan, made_from: Fingerprint) -> dict[str, Any]:
    name, client = plan.model_name, connect(config.tracking_uri, create=True)
    run = join_pipeline_run(client, config, name)
    assert run is not None  # there is a pipeline_run_id
    number = read_aliases(client, name).get(CHAMPION)
    champion = client.get_model_version(name, number) if number else None
    same = _find_same_version(client, plan, made_from)
    outcome, reason = None, same.reason if same else _describe_changes(champion, plan, made_from)
    if same and same.is_decided:
        outcome = "unchanged"
    elif rival := training_lock.claim_training(client, run, made_from | {"name": name}):
        outcome, reason = "made elsewhere", f"{rival} is already making the same version"
    elif (same := _find_same_version(client, plan, made_from)) and same.is_decided:  # a run has just ended
        outcome, reason = "unchanged", same.reason
    if outcome:
        record_outcome(client, run.info.run_id, outcome, reason)
    address = f"models:/{name}/{number}" if number else None
    return {"train": outcome is None, "reason": reason, "champion": address, "made_from": made_from}


class _Same(NamedTuple):
    """A version with the same fingerprint: whether the same gates have decided about it, and a sentence."""

    is_decided: bool
    reason: str


def _find_same_version(client: "MlflowClient", plan: Plan, made_from: Fingerprint) -> _Same | None:
    """Return a version with this fingerprint that gates or a person decided about; None if there is none.

    A version that was ever promoted is decided, whatever the gates are now.
    """
    aliases, judged_otherwise = read_aliases(client, plan.model_name), None
    parts = made_from["corpus"], made_from["teacher"]
    for version in search_versions(client, plan.model_name, fingerprint.TAG, *parts):
        if fingerprint.read_fingerprint(version.tags, plan) != made_from or _describe_bad_loss(version):
            continue
        names = [alias for alias, number in aliases.items() if number == str(version.version)]
        promoted = _describe_promotion(version, names)
        if not (outcome := version.tags.get(GATE_OUTCOME_TAG) or promoted):
            continue
        named = f"version {version.version}{', ' + ' and '.join(names) + ',' if names else ''} was made from the same"
        if promoted or not _have_gates_changed(client, plan, int(version.version)):
            return _Same(True, f"{named} data, teacher and settings; {outcome}")
        judged_otherwise = judged_otherwise or _Same(
            False, f"{named}, but other gates judged it; it is evaluated again"
        )
    return judged_otherwise


def _read_gates(plan: Plan) -> list[dict[str, Any]]:
    evaluate = plan.stages["evaluate"]
    assert isinstance(evaluate, EvaluateSettings)
    return gates.read_gates(evaluate)


def _have_gates_changed(client: "MlflowClient", plan: Plan, version: int) -> bool:
    before = promotion.read_declared_gates(client, plan.model_name, version)
    return before is not None and sorted(map(str, before)) != sorted(map(str, _read_gates(plan)))


def _describe_bad_loss(version: Any) -> str | None:
    """Return a note if a version's loss is not finite (minitron 0.2 registered diverged trainings); None otherwise."""
    loss = version.tags.get("validation_loss", "")
    try:
        return None if math.isfinite(float(loss)) else f"has a validation loss of {loss}"
    except ValueError:  # "unknown", or a tag of another tool
        return None


def _describe_promotion(version: Any, names: list[str]) -> str | None:
    if CHAMPION in names:
        return "it is the champion"
    return "it was the champion" if PROMOTED_TAG in version.tags else None


def _describe_changes(champion: Any, plan: Plan, made_from: Fingerprint) -> str:
    if champion is None:
        return "there is no champion yet"
    before = fingerprint.read_fingerprint(champion.tags, plan)
    if before is None:
        return f"the champion (version {champion.version}) has no record of its inputs"
    if bad := _describe_bad_loss(champion):
        return f"the champion (version {champion.version}) {bad}"
    changed = [name for name, value in made_from.items() if before.get(name) != value]
    return f"changed since the champion (version {champion.version}): {', '.join(changed)}"
