"""Files that the operator asked for stand beside what is there, never in its place, and never in part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from console.export_files import write_new


def test_files_get_the_same_number_where_one_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run-chart.svg").write_text("mine")
    written = write_new(tmp_path, "run-chart", {".csv": "1,2\n", ".svg": b"<svg/>"})
    assert [p.name for p in written] == ["run-chart-2.csv", "run-chart-2.svg"]
    assert [p.read_bytes() for p in written] == [b"1,2\n", b"<svg/>"]
    assert (tmp_path / "run-chart.svg").read_text() == "mine"


def test_what_is_written_is_for_its_owner_alone(tmp_path: Path) -> None:
    [path] = write_new(tmp_path, "log", {".txt": "x"})
    assert path.stat().st_mode & 0o777 == 0o600


def test_none_is_left_when_one_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_new(tmp_path, "run", {".csv": "1", "/nowhere/x.svg": "2"})
    assert os.listdir(tmp_path) == []
