"""Compare our transfers with bare calls of Google's transfer manager on an emulated bucket: one JSON line.

Run it: `python benchmarks/storage.py` (`make bench`).

One side is `transfers.download_objects` and `transfers.upload_files`: snapshot, generations, temporary names, CRC32C,
batches that outlive a kill. The other is `download_many`, `download_chunks_concurrently` and `upload_many` with the
same threads and chunks, and the checksums that they compute by default. They take turns; medians. The server, a process
of its own, is the slower part, as a network is: what is shown is that we add little to it.
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
from servers import free_port, running

from minitron.storage import transfers
from minitron.storage.bucket import CHUNK, list_objects, take_snapshot

MB = 1 << 20
BUCKET = "gs://bucket"
OPTIONS = {"worker_type": transfer_manager.THREAD, "max_workers": transfers.WORKERS}


def main() -> None:
    """Measure both sides, both ways, and print the smaller ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=192, help="size of the model that is moved")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, emulator(Path(name)):
        model = make_model(Path(name) / "model", arguments.megabytes)
        size = sum(path.stat().st_size for path in model.values()) / MB
        speeds = {way: measure(sides, size, arguments.runs) for way, sides in both_ways(model, Path(name)).items()}
    ratios = {way: sides["ours"] / sides["bare"] for way, sides in speeds.items()}
    figures = {f"{way}_{side}_mb_per_second": round(mb) for way, sides in speeds.items() for side, mb in sides.items()}
    claim = {"claim": "storage_over_transfer_manager", "value": round(min(ratios.values()), 3), "runs": arguments.runs}
    print(json.dumps(claim | {way: round(ratio, 3) for way, ratio in ratios.items()} | figures))


def make_model(directory: Path, megabytes: int) -> dict[str, Path]:
    """Write files as a model has them: two thirds in shards of more than a chunk, the rest in many small ones."""
    directory.mkdir()
    large, small = max(1, megabytes * MB * 2 // 3 // (2 * CHUNK)), 16
    sizes = [2 * CHUNK] * large + [max(MB, megabytes * MB // 3) // small] * small
    paths = {f"{number}.safetensors": directory / f"{number}.safetensors" for number in range(len(sizes))}
    for path, size in zip(paths.values(), sizes, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def both_ways(model: dict[str, Path], directory: Path) -> dict[str, dict[str, Callable[[], float]]]:
    """Return what is measured: up and down, ours and bare."""
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

    def clean(prefix: str) -> Callable[[], None]:
        def delete_all() -> None:
            for blob in bucket.list_blobs(prefix=prefix):
                blob.delete()

        return delete_all

    def renew() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    transfers.upload_files(model, f"{BUCKET}/model", list_objects(f"{BUCKET}/model"))
    return {
        "upload": {
            "ours": _after(clean("ours/"), lambda: transfers.upload_files(model, f"{BUCKET}/ours", {})),
            "bare": _after(clean("bare/"), upload_bare),
        },
        "download": {
            "ours": _after(renew, lambda: transfers.download_objects(take_snapshot(f"{BUCKET}/model"), target)),
            "bare": _after(renew, download_bare),
        },
    }


def _after(prepare: Callable[[], None], move: Callable[[], object]) -> Callable[[], float]:
    """Return a function that moves a model, in a place that is prepared, and returns the seconds that it takes."""

    def timed() -> float:
        prepare()
        started = time.perf_counter()
        move()
        return time.perf_counter() - started

    return timed


def measure(sides: dict[str, Callable[[], float]], size: float, runs: int) -> dict[str, float]:
    """Return both sides' megabytes per second, by the medians of runs in turn."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(runs + 1):
        for side, move in sides.items():
            took = move()
            if number:  # the first turn warms up
                seconds[side].append(took)
    return {side: size / statistics.median(taken) for side, taken in seconds.items()}


@contextmanager
def emulator(directory: Path) -> Iterator[None]:
    """Run the storage emulator in a process of its own, with a bucket named `bucket`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    os.environ |= {"STORAGE_EMULATOR_HOST": address, "GOOGLE_CLOUD_PROJECT": "test"}
    with running([*command, "--in-memory", "--default-bucket", "bucket"], address, directory / "log", os.environ):
        yield


if __name__ == "__main__":
    main()
