from __future__ import annotations

from pathlib import Path

import fuzz_readers
import pytest

from dispatch.legacy import LegacyLog
from engine.stream import Event, Log


def test_the_readers_hold_against_some_bent_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_readers.main(["--minutes", "0.04", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("seed 3\n")
    assert "inputs (" in out


def test_what_breaks_is_kept_and_its_case_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = LegacyLog.feed

    def careless(log: LegacyLog, data: bytes) -> list[Event]:
        return [*real(log, data), Log(run="x", level="info", message="\x1b[2J")]

    with monkeypatch.context() as patch:
        patch.setattr(LegacyLog, "feed", careless)
        assert fuzz_readers.main(["--minutes", "5", "--seed", "3", "--keep", str(tmp_path)]) == 1
        told = capsys.readouterr()
        assert "a control character" in told.err
        kept = next(tmp_path.iterdir())
        case = kept.name.rpartition("-")[2]
        assert f"FAILED: seed 3, case {case}; its input: {kept}" in told.out
        again = tmp_path / "again"
        again.mkdir()
        assert fuzz_readers.main(["--seed", "3", "--case", case, "--keep", str(again)]) == 1
    if kept.is_file():
        assert (again / kept.name).read_bytes() == kept.read_bytes()
    assert fuzz_readers.main(["--seed", "3", "--case", case]) == 0
