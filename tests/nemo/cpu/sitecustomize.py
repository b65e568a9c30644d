"""On PYTHONPATH, it puts cpu_shim.py under NeMo in every Python process that imports it, workers included."""

import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import time
from pathlib import Path

HERE = str(Path(__file__).parent)


class _Shim(importlib.abc.MetaPathFinder):
    """Patches torch before `nemo` is imported, and NeMo once `nemo.collections.llm` is."""

    def find_spec(self, name, path=None, target=None):
        if name in ("nemo", "megatron", "nemo.collections.llm") and HERE not in sys.path:
            sys.path.insert(0, HERE)  # pytest-xdist gives its processes a path of its own
        if name in ("nemo", "megatron"):
            import cpu_shim  # noqa: F401
        if name != "nemo.collections.llm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import cpu_shim

            cpu_shim.patch_nemo()
            cpu_shim.patch_config()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Shim())

if seconds := float(os.environ.get("SLOW_DISK_SECONDS", 0)):  # a disk that takes its time to keep what is written aside
    fsync = os.fsync

    def fsync_slowly(descriptor):
        if multiprocessing.parent_process():  # one of the writers; the worker itself syncs many small files
            time.sleep(seconds)
        fsync(descriptor)

    os.fsync = fsync_slowly
