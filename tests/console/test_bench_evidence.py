"""The benchmark of reading evidence says what the documents quote; how quick it is here is nobody's concern."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_part_prints_its_figures() -> None:
    small = ["--lines", "600", "--mib", "0.2", "--runs", "3", "--repeats", "1", "--json"]
    command = [sys.executable, str(ROOT / "bench" / "evidence.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == 1
    assert {row["what"]: row["ratio"] for row in told["decode"]}["bare"] == 1.0
    for part in ("decode", "fold", "text"):
        assert all(row["best"] >= row["median"] > 0 for row in told[part])
    stream, log = (next(row for row in told["memory"] if row["what"] == what) for what in ("a stream", "a text log"))
    assert stream["steps"] == stream["rows"] > 500
    assert log["rows"] > 200
    assert all(20 < row["peak_mib"] < 400 for row in told["memory"])
    cold, warm = told["list"]
    assert (cold["runs"], cold["to_fold"]) == (3, 3)
    assert (warm["runs"], warm["to_fold"]) == (3, 0)


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    command = [sys.executable, str(ROOT / "bench" / "evidence.py"), "decoding"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "decode, fold, text, memory, list" in done.stderr
