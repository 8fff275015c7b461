"""The benchmark's parts run and say what the documents quote; how quick they are here is nobody's concern."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from dispatch_rig import ROOT

from tests.ssh_rig import MISSING


@pytest.mark.slow
def test_each_quick_part_prints_its_figures() -> None:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    small = ["--mib", "2", "--repeats", "1", "--seconds", "0.5", "--json"]
    command = [sys.executable, str(ROOT / "bench" / "dispatch.py"), "transfer", "tail", "preflight", *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == 1
    ours = {row["way"]: row["ratio"] for row in told["transfer"] if row["tool"] == "kdconsole"}
    assert ours == {"get": 1.0, "put": 1.0}
    assert {row["tool"] for row in told["transfer"]} >= {"kdconsole", "scp", "ssh"}
    for row, rate in zip(told["tail"], (10_000, 100_000), strict=True):
        assert row["wanted events/s"] == rate
        assert 0 <= row["p50 ms"] <= row["p95 ms"] <= row["max ms"]
    assert told["preflight"][0]["what"] == "kdconsole preflight"
