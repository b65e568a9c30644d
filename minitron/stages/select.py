"""Select the candidates of a search's next round: at first by the budget, then the better half by validation loss.

It runs before the first round and after each. `search.json` and `search.html` show all candidates so far. After the
last round `settings` is the settings document with the winner's sizes, which the pipeline compress takes.

Latency is that of a forward pass on this machine, with random weights in the dtype of the computation: a model of one
layer and a model of three are timed, so that the time without layers and that of a layer are known, and all depths with
them. Each time is the least of five passes, because what else the machine does only adds to it.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import yaml

from minitron.config.resources import count_parameters
from minitron.config.shapes import PruneSettings, SearchSettings
from minitron.config.stages import SelectConfig
from minitron.engines.plan_checks import read_sizes
from minitron.errors import RunError
from minitron.report.search import write_search_page
from minitron.runtime.candidates import count_memory_gb, describe_student, propose_candidates
from minitron.runtime.model_sources import read_architecture
from minitron.storage.files import write_atomically
from minitron.storage.layout import PLAN, SEARCH, SEARCH_PAGE, WINNER, read_json_object
from minitron.storage.staging import replace_directory
from minitron.tracking.pipeline_run import log_pages

ROUNDS = 3
"""A round for the cut, one for the short distillation and one for the long: as many as pipelines/search.py has."""

_PASSES = 5


def run(config: SelectConfig) -> dict[str, Any]:
    """Write `search.json`, `search.html` and, after the last round, `winner.yaml` to `config.output`.

    Returns:
        `outputs` of the task: the candidates of the next round (`Output`) and the `rest` as JSON, and the winner's
        `settings`.

    Raises:
        ConfigError: no shape meets the budget.
        RunError: every candidate of the round failed.
    """
    planned = read_json_object(config.planned / PLAN)
    search, prune = SearchSettings.model_validate(planned["search"]), PruneSettings.model_validate(planned["prune"])
    architecture = read_architecture(planned["teacher"])
    if config.results:
        racing, rest = _halve([json.loads(text) for text in config.results])
        rest += [json.loads(text) for text in config.rest]
    else:
        racing, rest = _start(search, prune, architecture), []
    winner = racing[0] if len(racing[0]["losses"]) == ROUNDS else None
    content = _describe_search(search, architecture, racing, rest, winner)
    with replace_directory(config.output) as directory:
        write_atomically(directory / SEARCH, content)
        write_search_page(directory, content)
        if winner:
            (directory / WINNER).write_text(yaml.safe_dump(content["settings"], sort_keys=False))
    log_pages("select", config, SEARCH, SEARCH_PAGE)
    state = f"{winner['name']} wins" if winner else f"{len(racing)} candidates: {', '.join(c['name'] for c in racing)}"
    print(f"select: {state}", flush=True)
    settings = {}
    if winner:
        settings = {**config.document, "prune": {**config.document.get("prune", {}), **content["settings"]["prune"]}}
    outputs = {
        "Output": [json.dumps(row) for row in racing],
        "rest": [json.dumps(row) for row in rest],
        "settings": settings,
    }
    return {"metrics": {}, "outputs": outputs}


def _start(search: SearchSettings, prune: PruneSettings, architecture: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the candidates of the first round."""
    found = propose_candidates(search, architecture, prune, lambda student: _measure_latency(student, search))
    rows = []
    for candidate in found:
        student = describe_student(architecture, candidate.sizes)
        row = {"name": candidate.name, "sizes": candidate.sizes, "cost": candidate.cost}
        row |= {"parameters": count_parameters(student), "memory_gb": round(count_memory_gb(student, search), 6)}
        rows.append(row | {"losses": [], "seconds": 0.0, "error": None})
    return rows


def _halve(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the better half of a round's candidates, the best first, and the others.

    Raises:
        RunError: every candidate failed.
    """
    alive = sorted((row for row in results if not row["error"]), key=lambda row: row["losses"][-1])
    if not alive:
        errors = "; ".join(f"{row['name']}: {row['error']}" for row in results)
        raise RunError(f"every candidate failed, so the race has no winner: {errors}")
    kept = alive[: math.ceil(len(results) / 2)] if len(alive[0]["losses"]) < ROUNDS else alive[:1]
    return kept, [row for row in results if row not in kept]


def _describe_search(
    search: SearchSettings,
    architecture: Mapping[str, Any],
    racing: list[dict[str, Any]],
    rest: list[dict[str, Any]],
    winner: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of search.json."""
    assert search.budget is not None
    teacher = describe_student(architecture, read_sizes(architecture))
    rows = [row | {"state": "won" if row is winner else "racing"} for row in racing]
    rows += [row | {"state": "failed" if row["error"] else "eliminated"} for row in rest]
    loss = next((row["teacher_loss"] for row in rows if "teacher_loss" in row), None)
    for row in rows:
        row.pop("teacher_loss", None)
    return {
        "budget": {search.budget[0]: search.budget[1], "batch": search.batch, "context": search.context},
        "steps": [0, search.short_steps, search.long_steps],
        "teacher": {
            "sizes": read_sizes(architecture),
            "parameters": count_parameters(teacher),
            "memory_gb": round(count_memory_gb(teacher, search), 6),
            "loss": loss,
        },
        "candidates": rows,
        "winner": winner and winner["name"],
        "settings": winner and {"prune": winner["sizes"]},
    }


def _measure_latency(student: Mapping[str, Any], search: SearchSettings) -> tuple[float, float]:
    """Return the milliseconds of a forward pass without layers, and of each layer."""
    one, three = (_time_forward({**student, "num_hidden_layers": layers}, search) for layers in (1, 3))
    layer = max(three - one, 0.0) / 2
    return max(one - layer, 0.0), layer


def _time_forward(student: Mapping[str, Any], search: SearchSettings) -> float:
    """Return the milliseconds of a forward pass of a model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minitron.engines import hf

    left_out = ("architectures", "layer_types", "dtype", "torch_dtype")
    config = AutoConfig.for_model(**{name: value for name, value in student.items() if name not in left_out})
    with hf.get_device():
        model = AutoModelForCausalLM.from_config(config).to(hf.get_compute_dtype()).eval()
        ids = torch.randint(config.vocab_size, (search.batch, search.context))
    seconds = []
    for _ in range(_PASSES + 1):
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds[1:])
