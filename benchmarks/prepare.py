"""Compare prepare with the bare tokenizer on the demo's corpus: tokens per second, one JSON line.

Run it: `python benchmarks/prepare.py` (`make bench`).

One side is `tokenizers`' encode_batch on the documents' text in memory; its token ids are dropped. The other side is
prepare from the corpus's files to the dataset's: reading, cleaning, deduplicating, splitting, tokenizing, writing.
Fixed costs of a start, loading the tokenizer and hashing the teacher, are left out. Both sides use all cores, in turn.
A third one is prepare that also looks for near-duplicates.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minitron.cli import demo_inputs
from minitron.config.stages import PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.selection import Selection
from minitron.data.tokenizer import load_tokenizer
from minitron.stages.prepare import write_dataset
from minitron.tracking.stage_run import Tracker

NEAR = "near_duplicates"


def main() -> None:
    """Measure both sides and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", choices=("tiny", "demo"), default="demo", help="inputs: corpus and tokenizer")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = demo_inputs.build_inputs(arguments.sample, directory)
        config = PrepareConfig(output=directory, corpus=str(paths["corpus"]), teacher=str(paths["teacher"]))
        sides = {"prepare": _make_prepare_run(config), "encode_batch": _make_tokenizer_run(config, "encode_batch")}
        sides["encode_batch_fast"] = _make_tokenizer_run(config, "encode_batch_fast")
        sides[NEAR] = _make_prepare_run(config.model_copy(update={"near_duplicates": 0.8}))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        tokens = {side: run() for side, run in sides.items()}  # the first turn warms up
        for _ in range(arguments.runs):
            for side, run in sides.items():
                started = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - started)
    agreeing = {tokens[side] for side in sides if side != NEAR}
    assert len(agreeing) == 1, f"the sides do not agree on the tokens: {tokens}"
    speeds = {side: tokens[side] / statistics.median(runs) for side, runs in seconds.items()}
    ratio = speeds["prepare"] / speeds["encode_batch"]
    figures = {f"{side}_tokens_per_second": round(speed) for side, speed in speeds.items()}
    claim = {"claim": "prepare_over_tokenizer", "value": round(ratio, 3), "runs": arguments.runs}
    claim["near_duplicates_over_prepare"] = round(speeds[NEAR] / speeds["prepare"], 3)
    print(json.dumps(claim | figures))


def _make_prepare_run(config: PrepareConfig) -> Callable[[], int]:
    tokenizer = load_tokenizer(Path(config.teacher))
    tracker = Tracker({"stage": "prepare", "key": "key", "inputs": {}})

    def run_once() -> int:
        selection = Selection([Corpus(config.corpus, config.text_field)], config)
        with tempfile.TemporaryDirectory() as directory:
            tokens, _ = write_dataset(selection, tokenizer, Path(directory), tracker)
        return sum(tokens.values()) - sum(map(len, selection.digests.values()))

    return run_once


def _make_tokenizer_run(config: PrepareConfig, method: str) -> Callable[[], int]:
    """Return a function that tokenizes the documents that prepare keeps, and returns the number of tokens."""
    encode = getattr(load_tokenizer(Path(config.teacher)).backend_tokenizer, method)
    texts = [text for _, text in Selection([Corpus(config.corpus, config.text_field)], config)]
    return lambda: sum(map(len, encode(texts, add_special_tokens=False)))


if __name__ == "__main__":
    main()
