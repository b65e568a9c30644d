"""Check whether a version made from the same data, teacher and settings exists; if so, nothing is trained.

The first task of the pipeline `retrain`, without a GPU: `minitron run retrain --preset tiny`.
"""

import math
from typing import Any

from minitron.config.document import Plan, read_plan
from minitron.config.stages import PrepareConfig
from minitron.config.tasks import ResolveConfig
from minitron.registry import fingerprint, training_lock
from minitron.registry.fingerprint import Fingerprint
from minitron.registry.promotion_log import CHAMPION, PROMOTED_TAG
from minitron.registry.versions import GATE_OUTCOME_TAG, list_versions
from minitron.runtime import inputs
from minitron.storage.files import write_atomically
from minitron.storage.layout import RESOLUTION
from minitron.storage.staging import replace_directory
from minitron.tracking.client import connect, fail_fast, one_line_errors
from minitron.tracking.pipeline_run import join_pipeline_run, record_outcome


def run(config: ResolveConfig) -> dict[str, Any]:
    """Write `decision.json` to `config.output`: `train`, the `reason`, the `champion`'s address or None, `model_name`.

    Raises:
        ConfigError: a setting or an input cannot be used.
        RunError: the corpus, the teacher or MLflow cannot be reached.
    """
    plan = read_plan(config)
    name, wanted = plan.model_name, plan.pipeline
    prepare = PrepareConfig(
        corpus=wanted.corpus, teacher=wanted.teacher, output=config.output, workspace=config.workspace,
        tracking_uri=config.tracking_uri, pipeline_run_id=config.pipeline_run_id,
    )  # fmt: skip
    resolved = inputs.find_inputs(prepare)
    made_from = fingerprint.fingerprint_plan(plan, resolved["corpus"].sha256, resolved["teacher"].sha256)
    with one_line_errors(config.tracking_uri), fail_fast():
        resolution = _check_for_changes(config, plan, made_from) | {"model_name": name}
    print(f"resolve: {resolution['reason']}", flush=True)
    with replace_directory(config.output) as directory:
        write_atomically(directory / RESOLUTION, resolution)
    return {"metrics": {"train": int(resolution["train"])}} | resolution


def _check_for_changes(config: ResolveConfig, plan: Plan, made_from: Fingerprint) -> dict[str, Any]:
    name, client = plan.model_name, connect(config.tracking_uri)
    run = join_pipeline_run(client, config)
    assert run is not None  # there is a pipeline_run_id
    versions, aliases = list_versions(client, name)
    champion = next((version for version in versions if CHAMPION in aliases.get(int(version.version), [])), None)
    if same := _find_same_version(versions, aliases, plan, made_from):
        outcome, reason = "unchanged", same
    elif rival := training_lock.claim_training(client, run, made_from | {"name": name}):
        outcome, reason = "made elsewhere", f"{rival} makes the same already"
    elif same := _find_same_version(*list_versions(client, name), plan, made_from):  # by a run that has just ended
        outcome, reason = "unchanged", same
    else:
        outcome, reason = None, _describe_changes(champion, plan, made_from)
    if outcome:
        record_outcome(client, run.info.run_id, outcome, reason)
    address = f"models:/{name}/{champion.version}" if champion else None
    return {"train": outcome is None, "reason": reason, "champion": address, "made_from": made_from}


def _find_same_version(
    versions: list[Any], aliases: dict[int, list[str]], plan: Plan, made_from: Fingerprint
) -> str | None:
    """Return a sentence about a version with this fingerprint whose gates were judged; None if there is none."""
    for version in versions:
        names = aliases.get(int(version.version), [])
        outcome = version.tags.get(GATE_OUTCOME_TAG) or _describe_promotion(version, names)
        if (
            fingerprint.read_fingerprint(version.tags, plan) == made_from
            and outcome
            and not _describe_bad_loss(version)
        ):
            named = f", {' and '.join(names)}," if names else ""
            return f"version {version.version}{named} is made from the same data, teacher and settings; {outcome}"
    return None


def _describe_bad_loss(version: Any) -> str | None:
    """Say that a version has no finite loss, as a training that diverged left it with minitron 0.2; None if it has."""
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
