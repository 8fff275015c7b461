from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from console.run_reader import load_run
from dispatch import evidence, old_logs
from dispatch.evidence import Evidence, Kind, find_evidence, open_evidence
from dispatch.old_manifest import OldManifest, parse_old_manifest
from engine.errors import RunError
from engine.text import clean
from tests import old_evidence as old

OURS = Path(__file__).parents[2] / "evidence" / "20261121-111046-smoke-ccc12b"
RAW = old.train_log()


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def safe(found: Evidence) -> Evidence:
    for remark in found.remarks:
        assert clean(remark, 500) == remark
    return found


# The predecessor's directories


@pytest.mark.parametrize("scene", old.SCENES)
def test_each_of_the_predecessors_directories_opens_with_what_it_says(scene: str, tmp_path: Path) -> None:
    expected = old.EXPECTED[scene]
    directory = old.SCENES[scene](tmp_path / scene)
    found = safe(open_evidence(directory))
    assert found.kind == expected.kind
    assert found.path == directory
    assert (found.old.host if found.old else "") == expected.host
    assert (found.old.steps if found.old else None) == expected.asked
    loaded = load_run(directory)
    assert (loaded.kind, loaded.problem) == (found.kind, "")
    assert {v.id: (v.verdict, loaded.state.bases[v.id]) for v in loaded.state.judged} == expected.bases
    assert tuple(told.partition(":")[0] for told in loaded.state.disagreements) == expected.contradicted
    assert loaded.state.source.unit == expected.unit
    end = loaded.state.end
    if not found.logs:
        return
    assert end is not None
    assert (end.status, end.steps) == (expected.status, expected.steps)
    for told, wanted in (
        (end.seconds, expected.seconds),
        (end.summary.get("initial_loss", math.nan), expected.initial),
        (end.summary.get("final_loss", math.nan), expected.final),
    ):
        assert told == wanted or (math.isnan(told) and math.isnan(wanted))


def test_of_several_logs_the_one_that_came_to_its_end_is_read_and_the_others_are_told_of(tmp_path: Path) -> None:
    found = safe(open_evidence(old.SCENES["several-logs"](tmp_path / "old")))
    assert names(found.logs) == ["launch-victory.txt", "launch.log", "launch-final-pass.txt"]
    assert names(found.notes) == ["findings.md"]
    assert found.remarks[0] == "3 logs: launch-victory.txt is read (complete, 62 steps)"
    assert found.remarks[1].startswith("launch.log is not read (30 steps, crashed: thread 'main' panicked at")
    assert (
        found.remarks[2]
        == "launch-final-pass.txt is not read (10 steps, crashed: error: Validation failed: no teacher)"
    )


def test_the_log_with_the_most_steps_is_read_and_then_the_first_by_name(tmp_path: Path) -> None:
    logs = {"a.log": old.broken_log(steps=5, how=[]), "b.log": old.broken_log(how=[]), "c.log": old.broken_log(how=[])}
    found = open_evidence(old.write_old(tmp_path / "old", logs=logs))
    assert names(found.logs) == ["b.log", "c.log", "a.log"]


def test_the_ends_of_a_long_log_tell_what_it_is(tmp_path: Path) -> None:
    kernels = b"".join(f"{line}\n".encode() for line in old.kernel_lines(20_000))
    for style in ("whole", "utf-16"):
        long = old.STYLES[style].text([*old.head(5_000), old.step(1, 9, 7.0)])
        done = old.STYLES[style].text([*old.kernel_lines(9_000), old.complete(7.0, 6.0, 9, 1.0)])
        directory = old.write_old(
            tmp_path / style, logs={"long.log": done, "middle.log": kernels + RAW + kernels, "open.log": long}
        )
        found = open_evidence(directory)
        assert names(found.logs)[0] == "long.log"
        assert [remark for remark in found.remarks if "logs: " in remark] == [
            "3 logs: long.log is read (complete, 9 steps)"
        ]


def test_a_log_whose_lines_say_nothing_near_its_ends_is_still_the_log_of_its_manifest(tmp_path: Path) -> None:
    log = "".join(f"{line}\n" for line in old.kernel_lines(50)).encode()
    found = open_evidence(old.write_old(tmp_path / "old", logs={"launch.log": log}, manifest=old.manifest()))
    assert (found.kind, names(found.logs)) == (Kind.OLD, ["launch.log"])
    assert found.remarks == ("launch.log: no line of a training near its ends",)


def test_texts_without_a_line_of_a_training_are_notes(tmp_path: Path) -> None:
    notes = {"findings.md": old.step(1, 2, 3.0), "todo.txt": "F-A-1: PASS\nerror: what is this\n", "why": "because"}
    found = open_evidence(
        old.write_old(tmp_path / "old", logs={"run": RAW, "x.bin": RAW}, manifest=old.manifest(), notes=notes)
    )
    assert names(found.logs) == ["run"]
    assert sorted(names(found.notes)) == ["findings.md", "todo.txt", "why"]


def test_problems_of_the_manifest_are_told(tmp_path: Path) -> None:
    manifest = old.manifest(steps="fifty", learning_rate=[1])
    found = safe(open_evidence(old.write_old(tmp_path / "old", logs={"launch.log": RAW}, manifest=manifest)))
    assert found.remarks == (
        "dispatch.json: steps: 'fifty', not a number",
        "dispatch.json: learning_rate: a list of 1, not a number",
    )


def test_a_manifest_that_is_none_leaves_the_log(tmp_path: Path) -> None:
    for raw in (
        b"",
        b"[1]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b'{"steps": ' + b"9" * 5_000 + b"}",
        b" " * (2 << 20),
    ):
        directory = old.write_old(tmp_path / "old", logs={"launch.log": RAW}, manifest=raw)
        found = safe(open_evidence(directory))
        assert (found.kind, found.old) == (Kind.LOG, None)
        assert found.remarks[0].startswith("dispatch.json: ")
        (directory / "launch.log").unlink()
        with pytest.raises(RunError, match=r"dispatch\.json"):
            open_evidence(directory)


# Logs alone


@pytest.mark.parametrize("style", old.STYLES.values(), ids=old.STYLES.keys())
def test_a_log_alone_opens_whatever_its_name(style: old.Style, tmp_path: Path) -> None:
    for name in ("run.log", "launch-victory.txt", "what", "out.1"):
        (tmp_path / name).write_bytes(old.train_log(style))
        assert open_evidence(tmp_path / name) == Evidence(tmp_path / name, Kind.LOG, logs=(tmp_path / name,))


def test_a_link_to_a_log_that_somebody_gives_is_followed(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_bytes(RAW)
    (tmp_path / "link.log").symlink_to("run.log")
    assert open_evidence(tmp_path / "link.log").logs == (tmp_path / "run.log",)
    (tmp_path / "folder").symlink_to(old.SCENES["panic"](tmp_path / "old"))
    assert open_evidence(tmp_path / "folder").path == tmp_path / "folder"


def test_a_text_that_is_no_log_is_one_where_somebody_says_so_and_notes_never_are(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("kernel\n" * 9)
    assert open_evidence(tmp_path / "run.log").remarks == ("run.log: no line of a training near its ends",)
    (tmp_path / "run.log").write_text("kernel\n" * 9, encoding="utf-16")
    assert open_evidence(tmp_path / "run.log").kind is Kind.LOG
    (tmp_path / "README.md").write_text("Read me.\n")
    with pytest.raises(RunError, match="no line of a training"):
        open_evidence(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.log", b"", "empty"),
        ("junk.log", bytes(range(256)) * 40, "no text"),
        ("model.bin", os.urandom(5_000), "no text"),
        ("notes.bin", b"notes\n", "no line of a training"),
        ("dispatch.json", b"{}", "give the directory"),
        ("events.jsonl", b"{}", "give the directory"),
        ("config.yaml", b"a: 1\n", "no line of a training"),
    ],
)
def test_a_file_that_is_no_log_is_refused_with_a_reason(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=why) as raised:
        open_evidence(tmp_path / name)
    assert clean(str(raised.value), 9_999) == str(raised.value)


def test_what_is_not_there_or_nothing_of_a_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.txt").write_text("error: F-A-1 FAIL\n")
    (tmp_path / "folder" / "build.log").write_text("error: F-A-1 FAIL\n")
    for path in (
        tmp_path / "none",
        tmp_path,
        tmp_path / "folder",
        Path("a\0b"),
        Path("/dev/null"),
        tmp_path / "x\x1b[1m",
    ):
        with pytest.raises(RunError, match="expected") as raised:
            open_evidence(path)
        assert clean(str(raised.value), 9_999) == str(raised.value)


# Our own


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OURS, tmp_path / "ours"))


def rewritten(directory: Path, **changes: Any) -> Path:
    path = directory / "dispatch.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not ...}))
    return directory


def test_a_run_of_ours_is_one(ours: Path) -> None:
    assert open_evidence(ours) == Evidence(ours, Kind.RUN)


@pytest.mark.parametrize(("v", "told"), [(..., "without a version"), (9, "version 9"), ("x\x1b", "version x\\x1b")])
def test_a_run_of_any_version_is_one_and_its_version_is_told(ours: Path, v: Any, told: str) -> None:
    found = safe(open_evidence(rewritten(ours, v=v)))
    assert found.kind is Kind.RUN
    assert len(found.remarks) == 1
    assert told in found.remarks[0]


@pytest.mark.parametrize("name", ["config.yaml", "contract.yaml", "dispatch.json"])
def test_what_a_run_lacks_is_told(ours: Path, name: str) -> None:
    (ours / name).unlink()
    found = safe(open_evidence(ours))
    assert found.kind is Kind.RUN
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith(f"no {name}")


def test_a_run_whose_manifest_is_broken_is_one(ours: Path) -> None:
    (ours / "dispatch.json").write_bytes(b"{\x1b")
    found = safe(open_evidence(ours))
    assert found.kind is Kind.RUN
    assert found.remarks[0].startswith("dispatch.json: no JSON")
    (ours / "events.jsonl").unlink()
    assert open_evidence(ours).kind is Kind.RUN


def test_a_run_without_its_stream_is_read_from_what_its_trainer_printed(ours: Path) -> None:
    whole = load_run(ours).state
    (ours / "events.jsonl").unlink()
    found = safe(open_evidence(ours))
    assert (found.kind, names(found.logs)) == (Kind.LOG, ["launch.log"])
    assert found.remarks == ("no events.jsonl: read from launch.log",)
    state = load_run(ours).state
    assert state.end is not None
    assert whole.end is not None
    assert (state.end.status, state.end.steps) == (whole.end.status, whole.end.steps)
    assert state.steps.column("loss").tolist() == [round(loss, 4) for loss in whole.steps.column("loss").tolist()]
    assert [(e.step, e.loss) for e in state.evals] == [(e.step, round(e.loss, 4)) for e in whole.evals]
    assert {v.id: v.verdict for v in state.judged} == {v.id: v.verdict for v in whole.judged}
    assert not state.disagreements


def test_a_manifest_of_ours_alone_is_what_was_asked_for(ours: Path) -> None:
    for name in ("events.jsonl", "launch.log"):
        (ours / name).unlink()
    found = safe(open_evidence(ours))
    assert (found.kind, found.old) == (Kind.MANIFEST, None)
    assert found.remarks == ("no events.jsonl and no launch.log: what ran is not known",)
    assert "version 9" in open_evidence(rewritten(ours, v=9)).remarks[0]


def test_a_run_that_has_only_begun_is_a_run(ours: Path) -> None:
    for name in ("events.jsonl", "exit.json", "supervisor.jsonl", "SHA256SUMS"):
        (ours / name).unlink()
    assert open_evidence(ours) == Evidence(ours, Kind.RUN)
    (ours / "launch.log").unlink()
    assert open_evidence(ours) == Evidence(ours, Kind.RUN)


def test_a_run_that_died_before_its_first_line_is_a_run(ours: Path) -> None:
    (ours / "events.jsonl").unlink()
    (ours / "launch.log").write_text("Traceback (most recent call last):\nImportError: no torch\n")
    found = open_evidence(ours)
    assert (found.kind, found.remarks) == (Kind.RUN, ("no events.jsonl",))


# Hostile directories


def test_links_pipes_and_sockets_are_passed_over(tmp_path: Path) -> None:
    directory = old.write_old(tmp_path / "old", logs={"run.log": RAW})
    outside = tmp_path / "outside"
    outside.write_bytes(json.dumps(old.manifest()).encode())
    (directory / "dispatch.json").symlink_to(outside)
    (tmp_path / "better.log").write_bytes(old.train_log(steps=500))
    (directory / "launch.log").symlink_to(tmp_path / "better.log")
    os.mkfifo(directory / "pipe.log")
    (directory / "folder.log").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "s.log"))
        found = safe(open_evidence(directory))
    assert (found.kind, names(found.logs)) == (Kind.LOG, ["run.log"])
    assert found.remarks == ("dispatch.json: no regular file",)
    for name in ("pipe.log", "launch.log"):
        if name == "pipe.log":
            with pytest.raises(RunError, match="no regular file"):
                open_evidence(directory / name)
    (directory / "events.jsonl").symlink_to(tmp_path / "better.log")
    assert open_evidence(directory).kind is Kind.LOG
    assert list(find_evidence([tmp_path])) == [directory, tmp_path] or directory in list(find_evidence([tmp_path]))


def test_hostile_names_are_told_cleaned_and_kept_as_they_are(tmp_path: Path) -> None:
    hostile = [b"a\x1b[2J\n.log", b"\xff\xfe.log", "\u202egol.txt".encode(), b"-rf.log", b"n" * 250 + b".log"]
    for number, name in enumerate(hostile):
        (tmp_path / os.fsdecode(name)).write_bytes(old.broken_log(steps=9 - number, how=[]))
    found = safe(open_evidence(tmp_path))
    assert [os.fsencode(path.name) for path in found.logs] == hostile
    assert found.remarks[1].startswith("5 logs: a\\x1b[2J\\x0a.log is read (9 steps")
    assert len(found.remarks) == 6


def test_junk_beside_a_log_does_no_harm(tmp_path: Path) -> None:
    directory = old.write_old(tmp_path / "old", logs={"run.log": RAW}, manifest=old.manifest())
    for number in range(50):
        (directory / f"junk{number}.log").write_bytes(os.urandom(2_000))
        (directory / f"junk{number}").write_bytes(b"")
    (directory / "holes.log").touch()
    os.truncate(directory / "holes.log", 1 << 40)
    found = safe(open_evidence(directory))
    assert names(found.logs) == ["run.log"]
    assert found.remarks[0] == "holes.log: no text"
    assert found.remarks[-1] == "41 more logs that are no text"


def test_a_log_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = old.write_old(tmp_path / "old", logs={"launch.log": RAW, "old.log": b""}, manifest=old.manifest())
    assert open_evidence(directory).remarks == ("old.log: empty",)
    real = os.open

    def locked(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).name == "launch.log":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", locked)
    found = open_evidence(directory)
    assert found.kind is Kind.MANIFEST
    assert found.remarks == ("launch.log: Permission denied", "old.log: empty", "no log: what ran is not known")


def test_a_manifest_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = old.write_old(tmp_path / "old", logs={"launch.log": RAW}, manifest=old.manifest())
    real = os.open

    def locked(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path).name == "dispatch.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", locked)
    found = open_evidence(directory)
    assert (found.kind, found.remarks) == (Kind.LOG, ("dispatch.json: Permission denied",))


def test_an_object_that_is_no_manifest_is_none(tmp_path: Path) -> None:
    directory = old.write_old(tmp_path / "old", logs={"launch.log": RAW}, manifest={"name": "package"})
    found = open_evidence(directory)
    assert (found.kind, found.remarks) == (Kind.LOG, ("dispatch.json: no key of a manifest in it",))


def test_binary_junk_in_a_log_hides_none_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_bytes(os.urandom(70_000) + b"\n" + RAW)
    assert open_evidence(tmp_path / "run.log").kind is Kind.LOG


def test_a_directory_of_many_files_is_looked_at_in_part_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = old.write_old(tmp_path / "old", logs={"launch.log": RAW}, manifest=old.manifest())
    for number in range(300):
        (directory / f"note{number:03}").write_text("a note\n")
    monkeypatch.setattr(evidence, "MAX_TEXTS", 10)
    found = open_evidence(directory)
    assert names(found.logs) == ["launch.log"]
    assert len(found.notes) == 9
    assert found.remarks == ("301 texts: 10 of them were looked into",)
    monkeypatch.setattr(evidence, "MAX_ENTRIES", 302)
    assert open_evidence(directory).old is not None
    monkeypatch.setattr(evidence, "MAX_ENTRIES", 301)
    (tmp_path / "few").mkdir()
    for number in range(400):
        (tmp_path / "few" / f"{number}.log").write_bytes(old.broken_log(how=[]))
    assert "more than 301 entries: only so many were looked at" in open_evidence(tmp_path / "few").remarks
    assert "190 more logs are not read" not in open_evidence(tmp_path / "few").remarks


def test_of_many_logs_some_are_told_by_name_and_the_rest_by_number(tmp_path: Path) -> None:
    logs = {f"{number:02}.log": old.broken_log(how=[]) for number in range(20)}
    found = open_evidence(old.write_old(tmp_path / "old", logs=logs))
    assert len(found.logs) == 20
    assert found.remarks[-1] == "9 more logs are not read"


def test_only_the_ends_of_a_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huge.log").write_bytes(RAW)
    with open(tmp_path / "huge.log", "r+b") as file:
        file.seek(1 << 40)
        file.write(b"\n" + old.complete(7.0, 6.0, 9, 1.0).encode() + b"\n")
    asked: list[int] = []
    real = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        asked.append(length)
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    sniffed = old_logs.sniff(tmp_path / "huge.log")
    assert sniffed is not None
    assert (sniffed.status, sniffed.training) == ("COMPLETED", True)
    assert sum(asked) <= 2 * old_logs.SNIFF_BYTES


# Parent folders


def test_what_stands_below_a_folder_is_found_in_order_and_once(tmp_path: Path, ours: Path) -> None:
    old.SCENES["panic"](tmp_path / "b" / "c" / "old")
    old.SCENES["bare-log"](tmp_path / "b" / "logs")
    old.SCENES["manifest-only"](tmp_path / "b" / "logs" / "inner")
    for hidden in (".hidden", "checkpoints", "model", "node_modules"):
        old.SCENES["panic"](tmp_path / "b" / hidden / "old")
    old.SCENES["panic"](ours / "inner")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("F-A-1 PASS\n")
    found = [tmp_path / "b" / "c" / "old", tmp_path / "b" / "logs", tmp_path / "b" / "logs" / "inner", ours]
    assert list(find_evidence([tmp_path])) == found
    assert list(find_evidence([tmp_path / "b" / "logs", tmp_path, tmp_path / "nothing"])) == [
        *found[1:3],
        found[0],
        ours,
    ]
    assert list(find_evidence([tmp_path], depth=2)) == found[1:2] + found[3:]
    assert list(find_evidence([tmp_path], depth=0)) == []


def test_a_log_that_is_given_is_found(tmp_path: Path) -> None:
    directory = old.SCENES["bare-log"](tmp_path / "old")
    (tmp_path / "README.md").write_text("Read me.\n")
    assert list(find_evidence([directory / "run.log", tmp_path / "README.md"])) == [directory / "run.log"]


def test_what_is_found_has_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = old.SCENES["bare-log"](tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    assert list(find_evidence([Path(), Path("old/run.log")])) == [directory, directory / "run.log"]
    assert open_evidence(Path("old")).path == directory


def test_finding_goes_as_far_as_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        old.SCENES["manifest-only"](tmp_path / f"{number:02}")
    looked: list[Path] = []
    real = os.scandir

    def counted(path: Path) -> Any:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", counted)
    found: Iterator[Path] = find_evidence([tmp_path])
    assert [path.name for path in islice(found, 3)] == ["00", "01", "02"]
    assert len(looked) <= 5


def test_folders_that_cannot_be_read_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = old.SCENES["panic"](tmp_path / "old")
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def locked(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert list(find_evidence([tmp_path])) == [directory]
    with pytest.raises(RunError, match="Permission denied"):
        open_evidence(tmp_path / "locked")


# The predecessor's manifest


def parsed(**keys: Any) -> OldManifest:
    return parse_old_manifest(json.dumps(keys).encode(), "dispatch.json")


def test_every_key_of_the_manifest_is_read() -> None:
    found = parse_old_manifest(json.dumps(old.manifest(max_steps="62")).encode(), "dispatch.json")
    assert found.problems == ()
    assert not found.extra
    told = {each.name: getattr(found, each.name) for each in fields(found) if each.name not in ("problems", "extra")}
    assert all(value not in (None, "") for value in told.values())
    assert (found.steps, found.batch_size, found.learning_rate, found.temperature, found.alpha) == (
        50,
        16,
        1.5e-5,
        4.0,
        0.3,
    )
    assert (found.student, found.max_steps, found.checkpoint_every) == ("Qwen/Qwen2.5-Coder-0.5B-Instruct", 62, 0)


def test_a_key_may_have_its_other_name() -> None:
    found = parsed(teacher_apr="t.apr", student_dir_src="/s", kd_temperature=2)
    assert (found.teacher, found.student, found.temperature) == ("t.apr", "/s", 2.0)
    found = parsed(teacher="", teacher_apr="t.apr", student_init="a", student_dir_src="b")
    assert (found.teacher, found.student, dict(found.extra)) == ("t.apr", "a", {"student_dir_src": "b"})


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        *(
            (50, 50),
            ("50", 50),
            (" 50 ", 50),
            ("1_000", 1_000),
            ("50,000", 50_000),
            ("5e4", 50_000),
            (50.0, 50),
            ("0", 0),
        ),
        *((None, None), ("", None), ("  ", None)),
    ],
)
def test_a_number_may_be_a_number_or_a_text_or_missing(value: Any, steps: int | None) -> None:
    found = parsed(steps=value)
    assert (found.steps, found.problems, found.extra) == (steps, (), {})


@pytest.mark.parametrize(
    "value", ["fifty", "50.5", -1, True, [], {}, "nan", 1e400, "1e999", "٣", "_1", "0x10", "1e", ".", "e5"]
)
def test_what_is_no_number_is_a_problem_and_not_known(value: Any) -> None:
    found = parsed(steps=value, host="gx10")
    assert (found.steps, found.host) == (None, "gx10")
    assert len(found.problems) == 1
    assert found.problems[0].startswith("steps: ")


def test_what_is_no_text_is_a_problem_and_a_number_is_a_text() -> None:
    found = parsed(host=[1], ticket=True, phase=3, backend={"a": 1})
    assert (found.host, found.ticket, found.phase, found.backend) == ("", "", "3", "")
    assert found.problems == (
        "ticket: true, not a text",
        "host: a list of 1, not a text",
        "backend: an object of 1 keys, not a text",
    )


def test_no_limit_is_written_as_zero() -> None:
    assert parsed(max_steps="0").max_steps is None


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("2026-05-01T12:00:00Z", 0),
        ("2026-05-01T14:00:00+02:00", 0),
        ("20260501T120000Z", 0),
        ("2026-05-01T12:00:00.000Z", 0),
        ("2026-05-01 12:00:00", 1),
        ("Fri May  1 12:00:00 UTC 2026", 0),
        ("1777636800", 0),
        (1_777_636_800, 0),
        (1_777_636_800.0, 0),
        (1_777_636_800_000, 0),
    ],
)
def test_a_time_is_read_in_any_of_its_forms(text: Any, problems: int) -> None:
    found = parsed(dispatched_at=text)
    assert (found.created, len(found.problems)) == (1_777_636_800.0, problems)
    assert found.dispatched_at == str(text)


@pytest.mark.parametrize(
    "text", ["soon", "9" * 40, -5, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-13-01"]
)
def test_what_is_no_time_is_a_problem_and_stands_as_it_is(text: Any) -> None:
    found = parsed(dispatched_at=text)
    assert found.created is None
    assert len(found.problems) == 1


def test_keys_that_mean_nothing_are_kept_in_bounds_and_without_secrets() -> None:
    found = parsed(gpu="GB10", deep=[{"a": 1}], hf_token="hf_abcdefghijklmnopqrstuvwxyz", **{"k\x1b": "v\x1b"})
    assert dict(found.extra) == {"gpu": "GB10", "deep": "a list of 1", "hf_token": "[redacted]", "k\\x1b": "v\\x1b"}
    assert dict(parsed(a=None, b=True, c=False, d=1.5).extra) == {"a": "null", "b": "true", "c": "false", "d": "1.5"}
    many = parsed(**{f"key{number}": "x" * 300 for number in range(3_000)})
    assert len(many.extra) == 101
    assert max(map(len, many.extra.values())) <= 200


def test_a_key_that_stands_twice_is_told() -> None:
    found = parse_old_manifest(b'{"steps": 1, "steps": 2}', "dispatch.json")
    assert (found.steps, found.problems) == (2, ("steps: stands twice; the last one counts",))


def test_a_manifest_of_more_than_a_mebibyte_is_none() -> None:
    assert parsed(host="gx10", pad="x" * 1_000_000).host == "gx10"
    with pytest.raises(RunError, match="larger than 1,048,576 bytes"):
        parsed(host="gx10", pad="x" * 1_100_000)


def test_a_manifest_in_another_encoding_is_read() -> None:
    text = json.dumps(old.manifest())
    for encoding in ("utf-8-sig", "utf-16"):
        assert parse_old_manifest(text.encode(encoding), "dispatch.json").host == "gx10"
    found = parse_old_manifest(b'{"host": "caf\xe9"}', "dispatch.json")
    assert (found.host, found.problems) == ("caf\ufffd", ("some of it is not UTF-8",))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from([*old.manifest(), "teacher_apr", "max_steps", "student_dir_src"]) | st.text(max_size=10)


@given(st.binary(max_size=200) | st.dictionaries(KEYS, JSON, max_size=12).map(lambda value: json.dumps(value).encode()))
@example(b'{"steps": 1e5000, "dispatched_at": -1e308}')
@example(b'{"\\ud800": "\\ud800"}')
def test_no_manifest_breaks_the_reader_and_nothing_of_it_has_a_control_character(raw: bytes) -> None:
    try:
        found = parse_old_manifest(raw, "dispatch\x1b.json")
    except RunError as error:
        texts = [str(error)]
    else:
        texts = [*found.problems, *found.extra, *found.extra.values()]
        texts += [value for each in fields(found) if isinstance(value := getattr(found, each.name), str)]
    for text in texts:
        assert clean(text, len(text) + 1) == text
