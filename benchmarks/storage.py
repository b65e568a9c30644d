"""Compare our transfers with bare calls of Google's transfer manager on an emulated bucket: one JSON line.

Run it: `python benchmarks/storage.py` (`make bench`).

One side is `transfers.download_objects` and `transfers.upload_files`: snapshot, generations, temporary names, CRC32C,
batches that outlive a kill. The other is `download_many`, `download_chunks_concurrently` and `upload_many` with the
same threads and chunks, and their default checksums. The sides take turns; the medians count. The server, a process of
its own, is the slower part, like a network: the benchmark shows how little we add to it.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

from google.cloud import storage
from google.cloud.storage import transfer_manager
from servers import free_port, run_server

from minitron.storage import transfers
from minitron.storage.bucket import CHUNK, take_snapshot

MB = 1 << 20
BUCKET = "gs://bucket"
OPTIONS = {"worker_type": transfer_manager.THREAD, "max_workers": transfers.WORKERS}


def main() -> None:
    """Measure both sides, both ways, and print the smaller ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=192, help="size of the model")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, run_emulator(Path(name)):
        model = make_model(Path(name) / "model", arguments.megabytes)
        size = sum(path.stat().st_size for path in model.values()) / MB
        speeds = {
            way: measure_speeds(sides, size, arguments.runs) for way, sides in make_sides(model, Path(name)).items()
        }
    ratios = {way: sides["ours"] / sides["bare"] for way, sides in speeds.items()}
    figures = {f"{way}_{side}_mb_per_second": round(mb) for way, sides in speeds.items() for side, mb in sides.items()}
    claim = {"claim": "storage_over_transfer_manager", "value": round(min(ratios.values()), 3), "runs": arguments.runs}
    print(json.dumps(claim | {way: round(ratio, 3) for way, ratio in ratios.items()} | figures))


def make_model(directory: Path, megabytes: int) -> dict[str, Path]:
    """Write the files of a model: two thirds of the bytes in shards larger than a chunk, the rest in small files."""
    directory.mkdir()
    large, small = max(1, megabytes * MB * 2 // 3 // (2 * CHUNK)), 16
    sizes = [2 * CHUNK] * large + [max(MB, megabytes * MB // 3) // small] * small
    paths = {f"{number}.safetensors": directory / f"{number}.safetensors" for number in range(len(sizes))}
    for path, size in zip(paths.values(), sizes, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def make_sides(model: dict[str, Path], directory: Path) -> dict[str, dict[str, Callable[[], float]]]:
    """Return the timed functions, by direction (upload, download) and side (ours, bare)."""
    bucket = storage.Client().bucket("bucket")
    target = directory / "target"

    def upload_bare() -> None:
        pairs = [(str(path), bucket.blob(f"bare/{name}", chunk_size=CHUNK)) for name, path in model.items()]
        transfer_manager.upload_many(pairs, upload_kwargs={"if_generation_match": 0}, raise_exception=True, **OPTIONS)

    def download_bare() -> None:
        blobs = list(bucket.list_blobs(prefix="model/"))
        few = [blob for blob in blobs if blob.size > CHUNK]
        many = [(blob, str(target / blob.name.removeprefix("model/"))) for blob in blobs if blob.size <= CHUNK]
        transfer_manager.download_many(many, raise_exception=True, **OPTIONS)
        for blob in few:
            path = target / blob.name.removeprefix("model/")
            transfer_manager.download_chunks_concurrently(blob, str(path), CHUNK, **OPTIONS)

    def make_cleaner(prefix: str) -> Callable[[], None]:
        def delete_all() -> None:
            for blob in bucket.list_blobs(prefix=prefix):
                blob.delete()

        return delete_all

    def empty_target() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    transfers.upload_files(model, f"{BUCKET}/model")
    return {
        "upload": {
            "ours": _time_after(make_cleaner("ours/"), lambda: transfers.upload_files(model, f"{BUCKET}/ours")),
            "bare": _time_after(make_cleaner("bare/"), upload_bare),
        },
        "download": {
            "ours": _time_after(
                empty_target, lambda: transfers.download_objects(take_snapshot(f"{BUCKET}/model"), target)
            ),
            "bare": _time_after(empty_target, download_bare),
        },
    }


def _time_after(prepare: Callable[[], None], move: Callable[[], object]) -> Callable[[], float]:
    """Return a function that prepares the target, moves a model, and returns the seconds of the move."""

    def time_move() -> float:
        prepare()
        started = time.perf_counter()
        move()
        return time.perf_counter() - started

    return time_move


def measure_speeds(sides: dict[str, Callable[[], float]], size: float, runs: int) -> dict[str, float]:
    """Return both sides' megabytes per second: medians of runs in turn."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(runs + 1):
        for side, move in sides.items():
            took = move()
            if number:  # the first turn warms up
                seconds[side].append(took)
    return {side: size / statistics.median(taken) for side, taken in seconds.items()}


@contextmanager
def run_emulator(directory: Path) -> Iterator[None]:
    """Run the storage emulator in a process of its own, with a bucket named `bucket`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    os.environ |= {"STORAGE_EMULATOR_HOST": address, "GOOGLE_CLOUD_PROJECT": "test"}
    with run_server([*command, "--in-memory", "--default-bucket", "bucket"], address, directory / "log", os.environ):
        yield


if __name__ == "__main__":
    main()
