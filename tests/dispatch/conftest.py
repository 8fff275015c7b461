"""A run directory, and the check that no test leaves a process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatch_rig import ROOT, Run, processes_of, until


@pytest.fixture(autouse=True)
def no_process_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    try:
        until(lambda: not processes_of(tmp_path), "every process of this test to end", 10.0)
    finally:
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")
