"""What every process of the tests sets before it imports anything; the fixtures are in `shared_fixtures.py`."""

from __future__ import annotations

import gc
import os

import pytest

# While much is imported, collections of garbage walk all of it again and again. What collected the tests enables them.
gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before anything imports torch: processes that each compute on all cores wait for each other most of the time.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, but not where this process only hands tests to workers: they import for twenty seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
