"""What every test stands on."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nursery import Nursery

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that: the tests that press
# Ctrl-C would then wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run beside each other on every core: the threads of a tiny tensor's arithmetic would only wait for one another.
# The command's own processes do not get this (see `console_rig.Desk`).
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = ("faults", "real_models")
"""Directories whose files take the longest, so that no core is left with one of them at the end."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as cores: a third of the time a test waits, for a process, a host or a clock."""
    return (3 * len(os.sched_getaffinity(0)) + 1) // 2 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in FIRST)


def pytest_collection_finish() -> None:
    # Hundreds of thousands of objects of torch, transformers and textual live to the end: to go through them at every
    # full collection took a quarter of the time.
    gc.collect()
    gc.freeze()


_CACHES = itertools.count()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this test's console keeps what it may forget: nowhere that anybody else looks. It is not there yet."""
    path = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks engines and whatever else needs torch."""
    made = Nursery()
    yield made
    made.close()
