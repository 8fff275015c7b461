"""Rows of what the predecessor left, of bare logs and of folders in folders: quick and exact ones, kept ones too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from console import row_cache
from console.read_row import LOG_TAIL_BYTES, quick_row
from console.row import Row
from console.row_cache import RowCache
from console.run_index import RunIndex, find_smoke
from console.run_list import COLUMNS, detail
from dispatch.evidence import find_evidence, open_evidence
from engine.text import clean
from tests.console.run_dirs import good_smoke, good_train
from tests.old_evidence import EXPECTED, SCENES, manifest, step, train_log, write_old
from tests.streams import EPOCH

NOW = EPOCH + 3_600.0
DISPATCHED = 1_777_636_800.0
"""2026-05-01T12:00:00Z, as `old_evidence.manifest` has it."""


def index_of(*evidence: Path, cache: RowCache | None = None, fold: bool = True) -> RunIndex:
    index = RunIndex(evidence, lambda: NOW, cache)
    for _ in index.look():
        pass
    while fold and index.fold_next():
        pass
    return index


def only(index: RunIndex) -> Row:
    [row] = index.rows()
    return row


@pytest.mark.parametrize("name", SCENES)
def test_every_scene_has_its_status_steps_loss_and_verdicts(tmp_path: Path, name: str) -> None:
    path, expected = SCENES[name](tmp_path / f"a-{name}"), EXPECTED[name]
    row = only(index_of(tmp_path))
    status = "DISPUTED" if expected.contradicted else expected.status
    assert (row.path, row.kind, row.status, row.exact, row.problem) == (path, expected.kind, status, True, "")
    assert (row.step or 0, row.unit, row.host) == (expected.steps, expected.unit, expected.host)
    if math.isfinite(expected.final):
        assert row.loss == pytest.approx(expected.final)
    assert row.judged == {each: verdict for each, (verdict, _) in expected.bases.items()}
    assert sum(row.verdicts.values()) == len(expected.bases)
    if expected.kind != "log":
        assert (row.phase, row.created, row.ticket) == ("3", DISPATCHED, "PMAT-706")
        assert (row.teacher, row.student) == ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
        if row.mode == "train":
            assert row.target == (expected.asked or row.target)
    assert row.last_t == 0.0, "a log has no times"


@pytest.mark.parametrize("name", SCENES)
def test_the_quick_row_says_the_same_from_the_ends_of_the_files(tmp_path: Path, name: str) -> None:
    SCENES[name](tmp_path / f"a-{name}")
    quick, exact = only(index_of(tmp_path, fold=False)), only(index_of(tmp_path))
    same = ("id", "name", "kind", "host", "created", "phase", "ticket", "step", "unit", "loss", "last_t", "teacher")
    assert [getattr(quick, each) for each in same] == [getattr(exact, each) for each in same]
    assert (quick.exact, quick.verdicts) == (False, {})
    assert quick.status == ("COMPLETED" if exact.status == "DISPUTED" else exact.status)


def test_of_a_long_log_the_quick_row_reads_the_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_old(tmp_path / "long", logs={"launch.log": train_log(steps=20_000)}, manifest=manifest())
    found = open_evidence(path)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))
    row = quick_row(found, NOW)
    assert sum(read) == LOG_TAIL_BYTES
    assert (row.status, row.step, row.target) == ("COMPLETED", 20_000, 50)


def test_folders_in_folders_are_looked_into_and_links_are_not(tmp_path: Path) -> None:
    run = good_smoke(tmp_path / "evidence" / "2026" / "may")
    old = SCENES["smoke"](tmp_path / "evidence" / "predecessor" / "smoke")
    log = SCENES["bare-log"](tmp_path / "evidence" / "stage-c")
    good_train(tmp_path / "elsewhere")
    (tmp_path / "evidence" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "evidence" / "circle").symlink_to(tmp_path / "evidence")
    good_train(tmp_path / "evidence" / "1" / "2" / "3" / "4")
    index = index_of(tmp_path / "evidence")
    assert {row.path for row in index.rows()} == {run, old, log} == set(find_evidence([tmp_path / "evidence"]))
    assert {row.kind for row in index.rows()} == {"run", "predecessor", "log"}


def test_a_log_can_itself_be_given(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(train_log())
    row = only(index_of(tmp_path / "x.log"))
    assert (row.path, row.id, row.kind, row.status, row.step) == (tmp_path / "x.log", "x.log", "log", "COMPLETED", 62)


def test_old_smokes_vouch_for_no_run_and_keep_none_from_being_found(tmp_path: Path) -> None:
    from dispatch.manifest import read_manifest

    path = good_smoke(tmp_path, 30)
    for name in ("smoke", "bare-log", "manifest-only"):
        SCENES[name](tmp_path / name)
    assert find_smoke([tmp_path], read_manifest(path).gate_fingerprint, "box", 50_000) is not None


def _grown(path: Path) -> None:
    with (path / "launch.log").open("ab") as file:
        file.write(f"{step(63, 63, 1.5)}\n".encode())


def _patched(path: Path) -> None:
    log = path / "launch.log"
    before = log.stat()
    log.write_bytes(log.read_bytes().replace(b"Distillation complete", b"Distillation cOmplete"))
    os.utime(log, ns=(before.st_atime_ns, before.st_mtime_ns))


def _another_log(path: Path) -> None:
    (path / "launch-victory.txt").write_bytes(train_log(steps=90))


@pytest.mark.parametrize(
    ("change", "steps"),
    [(_grown, 63), (_patched, 62), (_another_log, 90), (lambda path: (path / "launch.log").unlink(), None)],
)
def test_old_rows_are_kept_until_any_file_changes(
    tmp_path: Path, change: Callable[[Path], object], steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", -3_600.0)
    path, file = SCENES["asked-50-ran-62"](tmp_path / "evidence" / "old"), tmp_path / "rows"
    first = index_of(tmp_path / "evidence", cache=RowCache(file))
    first.keep()
    kept = index_of(tmp_path / "evidence", cache=RowCache(file), fold=False)
    assert (kept.to_fold, kept.rows()) == (0, first.rows())
    change(path)
    index = index_of(tmp_path / "evidence", cache=RowCache(file), fold=False)
    assert not only(index).exact
    while index.fold_next():
        pass
    assert only(index).step == steps
    # The one that is still open sees it as well.
    for _ in kept.look():
        pass
    assert not only(kept).exact


def test_names_and_lines_of_others_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\x9b2J\u202e"
    texts = ("ticket", "phase", "run_name", "host", "teacher", "student_init")
    log = train_log(more=[f"thread 'main' panicked at {evil}", f"F-{evil}: PASS"])
    path = write_old(
        tmp_path / "evil\x1b[2J", logs={"launch\x1b.log": log}, manifest=manifest(**dict.fromkeys(texts, evil))
    )
    for row in (only(index_of(path, fold=False)), only(index_of(path))):
        told = [row.id, row.name, row.host, row.phase, row.ticket, row.teacher, row.student, row.reason, row.device]
        told += [*row.failing, *row.judged, *(line.plain for line in detail(row, 200))]
        assert all(clean(text) == text for text in told)
        assert "x1b]0;" in row.name


def test_what_can_be_told_apart_is(tmp_path: Path) -> None:
    """An epoch is no step, and the kind, the phase and the ticket stand below the list."""
    SCENES["epochs"](tmp_path / "epochs")
    row = only(index_of(tmp_path))
    cells = {column.name: (column.text(row, NOW), column.short(row, NOW) if column.short else "") for column in COLUMNS}
    assert cells["step"] == ("epoch 3 / 3  100 %", "ep 3 100 %")
    assert cells["model"][0] == "Qwen2.5-Coder-1.5B-Instruct → Qwen2.5-Coder-0.5B-Instruct"
    assert cells["last data"][0] == "–"
    below = detail(row, 160)[1].plain
    for text in ("the predecessor's", "phase 3", "PMAT-706"):
        assert text in below
