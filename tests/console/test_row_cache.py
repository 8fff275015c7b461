"""Rows that are kept between two starts: used while every file is as it was, and never otherwise; nothing breaks it."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from console import row_cache
from console.row import Row
from console.row_cache import RowCache, cache_path, signature, stamp
from console.run_index import RunIndex
from console.run_reader import RunReader
from engine.text import clean
from tests.console.run_dirs import (
    failed_verdict_run,
    good_smoke,
    good_train,
    live_run,
    lost_run,
    nan_run,
)
from tests.streams import EPOCH

NOW = EPOCH + 3_600.0


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written counts as written long ago."""
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", -3_600.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kdconsole" / "rows"


def index_of(evidence: Path, file: Path | None, *, readonly: bool = False, look: bool = True) -> RunIndex:
    """An index as a start of the console makes one."""
    index = RunIndex([evidence], lambda: NOW, RowCache(file, readonly=readonly))
    if look:
        for _ in index.look():
            pass
    return index


def filled(evidence: Path, file: Path) -> tuple[Row, ...]:
    """The exact rows of an evidence directory, which the cache has from now on."""
    index = index_of(evidence, file)
    while index.fold_next():
        pass
    index.keep()
    return index.rows()


def told(rows: tuple[Row, ...]) -> list[str]:
    """Rows as text: NaN is no reason to differ."""
    return [repr(row) for row in rows]


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no file of a run may be read."""
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a file of a run was read"))


# What is used


def test_a_second_start_has_every_row_exactly_and_reads_no_run(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = tmp_path / "evidence"
    good_smoke(evidence, name="evil\x1b[2J"), good_train(evidence, host="gx10"), failed_verdict_run(evidence)
    nan_run(evidence)
    good_train(evidence, 50).rename(os.fsdecode(bytes(evidence) + b"/not\xff text"))
    before = filled(evidence, file)
    unread(monkeypatch)
    index = index_of(evidence, file)
    assert told(index.rows()) == told(before)
    assert index.to_fold == 0
    assert all(row.exact and row.verdicts for row in index.rows())


def test_the_file_is_ones_own_and_replaced_at_once(tmp_path: Path, file: Path) -> None:
    good_smoke(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert os.listdir(file.parent) == ["rows"]


def test_it_stands_where_the_platform_keeps_caches(own_cache: Path) -> None:
    assert cache_path() == own_cache / "kdconsole" / "rows"


def test_a_run_that_goes_on_or_is_lost_is_looked_for_every_time(tmp_path: Path, file: Path) -> None:
    """Whether its process lives stands in no file."""
    evidence = tmp_path / "evidence"
    live_run(evidence, last_t=NOW - 1), lost_run(evidence)
    filled(evidence, file)
    assert not file.exists()
    assert {row.exact for row in index_of(evidence, file).rows()} == {False}


def test_a_row_that_cannot_be_read_is_tried_every_time(tmp_path: Path, file: Path) -> None:
    path = good_smoke(tmp_path / "evidence")
    (path / "events.jsonl").write_bytes(b"junk\n")
    [row] = filled(tmp_path / "evidence", file)
    assert row.problem
    assert not file.exists()


def test_what_changed_a_moment_ago_is_not_kept(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within one tick of the file system's clock."""
    good_smoke(tmp_path / "evidence")
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", 60.0)
    filled(tmp_path / "evidence", file)
    assert not file.exists()


def test_two_consoles_keep_each_others_rows_and_forget_what_is_gone(tmp_path: Path, file: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    gone = good_smoke(mine)
    good_train(mine), good_train(other)
    first, second = index_of(mine, file), index_of(other, file)
    for index in (first, second):
        while index.fold_next():
            pass
        index.keep()
    assert [index_of(each, file).to_fold for each in (mine, other)] == [0, 0]
    shutil.rmtree(gone)
    good_train(mine, 60)
    filled(mine, file)
    cache = RowCache(file)
    assert cache.files(gone) is None
    assert len(cache._loaded()) == 3


def test_refreshing_believes_nothing(tmp_path: Path, file: Path) -> None:
    good_smoke(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    index = index_of(tmp_path / "evidence", file)
    assert index.to_fold == 0
    index.forget()
    for _ in index.look():
        pass
    assert index.to_fold == 1


# What is not


def _same_times(path: Path, change: Callable[[Path], None]) -> None:
    """Changes a file and sets the time of its contents back, as `touch -r` and rsync do."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def _one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["events.jsonl", "dispatch.json", "exit.json", "contract.yaml", "config.yaml"])
def test_one_changed_byte_behind_an_unchanged_time_is_noticed(
    tmp_path: Path, file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    _same_times(path / name, _one_byte)
    read: list[Path] = []
    advance = RunReader.advance
    monkeypatch.setattr(RunReader, "advance", lambda self: read.append(self.path) or advance(self))
    index = index_of(tmp_path / "evidence", file)
    [row] = index.rows()
    assert not row.exact or row.problem
    while index.fold_next():
        pass
    assert read or row.problem


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "SHA256SUMS").write_text("x  events.jsonl\n"),
        lambda path: (path / "contract.yaml").unlink(),
        lambda path: os.chmod(path / "events.jsonl", 0o400),
        lambda path: shutil.copy(path / "events.jsonl", path / "x") and os.replace(path / "x", path / "events.jsonl"),
        lambda path: os.truncate(path / "events.jsonl", 2_000),
        lambda path: os.mkfifo(path / "pipe") or os.replace(path / "pipe", path / "exit.json"),
    ],
    ids=["sums made", "contract gone", "mode", "another inode", "cut", "a pipe"],
)
def test_every_other_change_is_noticed_too(tmp_path: Path, file: Path, change: Callable[[Path], object]) -> None:
    path = good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    change(path)
    [row] = index_of(tmp_path / "evidence", file).rows()
    assert not row.exact or row.problem


def test_a_directory_in_the_place_of_another_has_its_own_row(tmp_path: Path, file: Path) -> None:
    path = good_train(tmp_path / "evidence", name="first")
    filled(tmp_path / "evidence", file)
    shutil.rmtree(path)
    good_train(tmp_path / "evidence", name="second").rename(path)
    [row] = index_of(tmp_path / "evidence", file).rows()
    assert row.name == "second"


def test_a_directory_that_is_gone_has_no_row(tmp_path: Path, file: Path) -> None:
    path = good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    shutil.rmtree(path)
    assert index_of(tmp_path / "evidence", file).rows() == ()


def test_other_software_believes_none_of_it(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    software = row_cache._software()
    monkeypatch.setattr(row_cache, "_software", lambda: f"{software}0")
    assert index_of(tmp_path / "evidence", file).to_fold == 1


def test_sources_that_change_under_one_version_are_other_software(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.py").write_text("x = 1\n")
    monkeypatch.setattr("console.__path__", [str(tmp_path)])
    before = row_cache._software()
    assert row_cache._software() == before
    (tmp_path / "some.py").write_text("x = 22\n")
    assert row_cache._software() != before


# A file that anybody may have written


def _rewritten(file: Path, change: Callable[[row_cache._Kept], object]) -> None:
    """The cache with other rows in it, sound as a file."""
    whole = msgspec.msgpack.decode(file.read_bytes(), type=row_cache._File)
    kept = [row_cache._decoder.decode(each) for each in whole.rows]
    rows = tuple(msgspec.Raw(row_cache._encoder.encode(change(each))) for each in kept)
    file.write_bytes(row_cache._encoder.encode(row_cache._File(whole.schema, whole.software, rows)))


def _with(**changes: object) -> Callable[[row_cache._Kept], object]:
    def change(kept: row_cache._Kept) -> object:
        return msgspec.structs.replace(kept, row=replace(kept.row, **changes))  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "RUNNING"},
        {"status": "LOST"},
        {"status": "WONDERFUL"},
        {"exact": False},
        {"problem": "what"},
        {"created": float("inf")},
        {"last_t": float("nan")},
        {"verdicts": {"MAYBE": 1}},
        {"verdicts": {"PASS": -1}},
    ],
)
def test_a_row_that_no_run_over_can_have_is_read_from_its_files(
    tmp_path: Path, file: Path, changes: dict[str, object]
) -> None:
    good_train(tmp_path / "evidence")
    before = filled(tmp_path / "evidence", file)
    _rewritten(file, _with(**changes))
    assert index_of(tmp_path / "evidence", file).to_fold == 1
    assert told(filled(tmp_path / "evidence", file)) == told(before)


def test_texts_of_the_file_cannot_steer_the_terminal(tmp_path: Path, file: Path) -> None:
    good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    evil = "\x1b]0;x\x07\x9b2J\u202e" * 1_000
    texts = dict.fromkeys(("id", "name", "host", "device", "reason", "mode", "kind", "phase", "teacher", "unit"), evil)
    _rewritten(file, _with(**texts, failing=(evil,), judged={evil: evil}))
    [row] = index_of(tmp_path / "evidence", file).rows()
    shown = [*(getattr(row, name) for name in texts), *row.failing, *row.judged, *row.judged.values()]
    assert "x1b]0;" in row.name
    for text in shown:
        assert clean(text) == text
        assert len(text) <= 500


@pytest.mark.parametrize("harm", ["half", "junk", "empty", "another schema", "a link", "a pipe", "a directory",
                                  "huge", "others may write", "not ours"])  # fmt: skip
def test_a_file_that_is_none_of_ours_is_passed_over_and_written_anew_where_it_can_be(
    tmp_path: Path, file: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_train(tmp_path / "evidence")
    before = filled(tmp_path / "evidence", file)
    whole, elsewhere = file.read_bytes(), tmp_path / "elsewhere"
    if harm in ("half", "junk", "empty"):
        file.write_bytes({"half": whole[: len(whole) // 2], "junk": bytes(range(256)), "empty": b""}[harm])
    elif harm == "another schema":
        known = msgspec.msgpack.decode(whole, type=row_cache._File)
        file.write_bytes(row_cache._encoder.encode(msgspec.structs.replace(known, schema=2)))
    elif harm == "huge":
        os.truncate(file, 1 << 40)
    elif harm == "others may write":
        file.chmod(0o620)
    elif harm == "not ours":
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    else:
        file.unlink()
        elsewhere.write_bytes(whole)
        {"a link": lambda: file.symlink_to(elsewhere), "a pipe": lambda: os.mkfifo(file), "a directory": file.mkdir}[
            harm
        ]()
    assert index_of(tmp_path / "evidence", file).to_fold == 1
    assert told(filled(tmp_path / "evidence", file)) == told(before)
    if harm == "a link":
        assert elsewhere.read_bytes() == whole, "what the link names was written"
    if harm not in ("a directory", "not ours"):
        assert index_of(tmp_path / "evidence", file).to_fold == 0


def _unwritable(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the directory should be")


def _linked(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    (folder.parent / "other").mkdir()
    folder.symlink_to("other")


@pytest.mark.parametrize("make", [_unwritable, _linked, lambda folder: folder.symlink_to(folder)])
def test_where_nothing_can_be_kept_everything_works_without(
    tmp_path: Path, file: Path, make: Callable[[Path], object]
) -> None:
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(file.parent.parent)
    if make not in (_unwritable, _linked):
        file.parent.parent.mkdir()
    make(file.parent)
    good_train(tmp_path / "evidence")
    assert [row.status for row in filled(tmp_path / "evidence", file)] == ["COMPLETED"]
    assert not file.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_keeps_nothing(tmp_path: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, mode=0o500)
    good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    assert not file.exists()


def test_a_full_disk_leaves_the_old_file_and_no_rest(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    before = file.read_bytes()
    good_smoke(tmp_path / "evidence")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    filled(tmp_path / "evidence", file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["rows"]


def test_readonly_takes_and_writes_nothing(tmp_path: Path, file: Path) -> None:
    good_train(tmp_path / "evidence")
    filled(tmp_path / "evidence", file)
    before = file.read_bytes(), file.stat().st_ino
    good_smoke(tmp_path / "evidence")
    index = index_of(tmp_path / "evidence", file, readonly=True)
    assert index.to_fold == 1
    while index.fold_next():
        pass
    index.keep()
    assert (file.read_bytes(), file.stat().st_ino) == before


def test_it_is_bounded_and_gives_up_other_places_first(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "MAX_ROWS", 3)
    for hour in range(3):
        good_smoke(tmp_path / "other", created=EPOCH + 9_000 + hour * 60)
    filled(tmp_path / "other", file)
    for hour in range(2):
        good_smoke(tmp_path / "evidence", created=EPOCH + hour * 60)
    filled(tmp_path / "evidence", file)
    assert index_of(tmp_path / "evidence", file).to_fold == 0
    assert index_of(tmp_path / "other", file).to_fold == 2
    assert len(msgspec.msgpack.decode(file.read_bytes(), type=row_cache._File).rows) == 3
    monkeypatch.setattr(row_cache, "MAX_BYTES", 8_000)
    filled(tmp_path / "other", file)
    assert file.stat().st_size <= 8_000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), junk=st.binary(max_size=40), instead=st.booleans())
def test_whatever_stands_in_the_file_the_list_stands(
    tmp_path: Path, file: Path, at: float, junk: bytes, instead: bool
) -> None:
    if not file.exists():
        failed_verdict_run(tmp_path / "evidence"), nan_run(tmp_path / "evidence")
        filled(tmp_path / "evidence", file)
        (tmp_path / "whole").write_bytes(file.read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    cut = int(at * len(whole))
    file.write_bytes(junk if instead else whole[:cut] + junk + whole[cut + len(junk) :])
    for row in index_of(tmp_path / "evidence", file, readonly=True).rows():
        for text in (row.id, row.name, row.reason, row.host, row.mode, *row.failing, *row.judged):
            assert clean(text) == text


# Stamps


def test_a_stamp_follows_no_link_and_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("pipe", "link"):
        found = stamp(tmp_path / name)
        assert found is not None
        assert found[4] == os.lstat(tmp_path / name).st_mode
    assert stamp(tmp_path / "none") is None
    assert stamp("\0") is None
    assert signature(tmp_path, (".", "none")) == (stamp(tmp_path), None)


def test_a_thousand_rows_are_there_at_once(tmp_path: Path, file: Path) -> None:
    """1,000 directories: each is looked at, none is read; 0.3 s on a quiet machine."""
    evidence = tmp_path / "evidence"
    made = good_smoke(tmp_path / "made")
    evidence.mkdir()
    for number in range(1_000):
        copy = evidence / f"run-{number:04d}"
        copy.mkdir()
        for each in made.iterdir():
            os.link(each, copy / each.name)
    before = filled(evidence, file)
    began = time.process_time()
    index = index_of(evidence, file)
    spent = time.process_time() - began
    assert (index.to_fold, told(index.rows())) == (0, told(before))
    assert len(before) == 1_000
    assert spent < 1.5
