"""Rows of runs: quick ones from the ends of the files, exact ones from whole streams, and nothing that breaks them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from console.run_files import read_manifest
from console.run_index import Row, RunIndex, find_smoke, load_run
from console.run_reader import RunReader
from dispatch.manifest import read_manifest as trusted_manifest
from engine.stream import Eval, Step
from tests.console.run_dirs import (
    READY,
    append,
    crashed_run,
    ending,
    failed_verdict_run,
    good_smoke,
    good_train,
    live_run,
    lost_run,
    make_run,
    nan_run,
    resumed_run,
    stalled_run,
    steps_between,
    train_contract,
    train_events,
)
from tests.streams import EPOCH, end_event, smoke_events, stamped, with_verdicts

NOW = EPOCH + 3_600.0
STATUSES = {
    "good_smoke": "COMPLETED",
    "good_train": "COMPLETED",
    "spike": "COMPLETED",
    "nan": "FAILED",
    "failed_checkpoint": "COMPLETED",
    "failed_verdict": "FAILED",
    "stalled": "STALLED",
    "lost": "LOST",
    "crashed": "CRASHED",
    "resumed": "COMPLETED",
}


def looked(*evidence: Path, now: float = NOW) -> RunIndex:
    """An index that has looked once."""
    index = RunIndex(evidence, lambda: now)
    for _ in index.look():
        pass
    return index


def folded(*evidence: Path, now: float = NOW) -> RunIndex:
    """An index that has read every stream."""
    index = looked(*evidence, now=now)
    while index.fold_next():
        pass
    return index


def only(index: RunIndex) -> Row:
    [row] = index.rows()
    return row


def look_again(index: RunIndex) -> None:
    for _ in index.look():
        pass
    while index.fold_next():
        pass


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of run once, in one evidence directory."""
    evidence = tmp_path_factory.mktemp("everything") / "evidence"
    return {name: make(evidence) for name, make in READY.items()}


# Quick rows


@pytest.mark.parametrize("name", STATUSES)
def test_a_quick_row_has_the_status_without_reading_the_stream(everything: dict[str, Path], name: str) -> None:
    rows = {row.path: row for row in looked(everything[name].parent).rows()}
    row = rows[everything[name]]
    assert (row.status, row.exact, row.verdicts) == (STATUSES[name], False, {})


def test_a_quick_row_has_what_stands_at_the_two_ends_of_a_stream(tmp_path: Path) -> None:
    path = good_train(tmp_path, 200, name="first try", host="gx10")
    row = only(looked(tmp_path))
    assert (row.path, row.id, row.name, row.mode, row.host) == (path, path.name, "first try", "train", "gx10")
    assert (row.step, row.target) == (200, 200)
    state = load_run(path).state
    assert state.last_step is not None
    assert (row.loss, row.heldout) == (state.last_step.loss, state.evals[-1].loss)
    assert row.device == "cpu Some CPU, fp32"
    assert row.last_t == state.last_t


def test_the_end_of_a_long_stream_is_found_without_its_middle(tmp_path: Path) -> None:
    path = good_train(tmp_path, 2_000)
    stream = path / "events.jsonl"
    assert stream.stat().st_size > 4 * 65_536
    whole = stream.read_bytes()
    middle = slice(100_000, len(whole) - 100_000)
    stream.write_bytes(whole[: middle.start] + b"\xff" * (middle.stop - middle.start) + whole[middle.stop :])
    row = only(looked(tmp_path))
    assert (row.status, row.step) == ("COMPLETED", 2_000)


def test_the_quick_row_and_the_exact_one_agree_in_all_that_both_know(everything: dict[str, Path]) -> None:
    evidence = everything["spike"].parent
    quick = {row.path: row for row in looked(evidence).rows()}
    for row in folded(evidence).rows():
        before = quick[row.path]
        same = ("id", "name", "mode", "host", "device", "created", "status", "step", "target", "last_t")
        assert [getattr(row, each) for each in same] == [getattr(before, each) for each in same], row.path
        assert repr((row.loss, row.heldout)) == repr((before.loss, before.heldout)), row.path


def test_a_torn_last_line_is_not_there_yet(tmp_path: Path) -> None:
    crashed_run(tmp_path, steps=80)
    assert only(looked(tmp_path)).step == 80
    row = only(folded(tmp_path))
    assert (row.step, row.problem, row.status) == (80, "", "CRASHED")
    assert "killed by SIGKILL" in row.reason


def test_rows_come_the_newest_first(tmp_path: Path) -> None:
    paths = [good_smoke(tmp_path, created=EPOCH + hour * 3_600) for hour in (2, 0, 1)]
    assert [row.path for row in looked(tmp_path).rows()] == [paths[0], paths[2], paths[1]]


def test_the_rows_of_several_directories_stand_in_one_list(tmp_path: Path) -> None:
    one, other = good_smoke(tmp_path / "one"), good_smoke(tmp_path / "other", host="far")
    index = looked(tmp_path / "one", tmp_path / "other", tmp_path / "one", tmp_path / "none")
    assert {row.path for row in index.rows()} == {one, other}


def test_a_run_directory_can_itself_be_given(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    assert only(looked(path)).path == path


# Exact rows


def test_verdicts_are_counted_as_the_stream_is_judged(tmp_path: Path) -> None:
    failed_verdict_run(tmp_path)
    row = only(folded(tmp_path))
    assert row.exact
    assert row.verdicts == {"FAIL": 2, "PASS": 14}
    assert row.failing == ("F-DISTILL-SMOKE-001", "F-DISTILL-PIPELINE-001")


def test_a_stream_whose_engine_judged_otherwise_is_disputed(tmp_path: Path) -> None:
    events = [e for e in with_verdicts(smoke_events(30), end=end_event(30)) if getattr(e, "verdict", "") != "PASS"]
    make_run(tmp_path, stamped(events), 0)
    assert only(looked(tmp_path)).status == "COMPLETED"
    assert only(folded(tmp_path)).status == "DISPUTED"


def test_runs_that_go_on_are_folded_first_and_then_the_newest(tmp_path: Path) -> None:
    old, new = good_smoke(tmp_path, created=EPOCH), good_smoke(tmp_path, created=EPOCH + 1e6)
    going = live_run(tmp_path, last_t=EPOCH + 5e5)
    index = looked(tmp_path, now=EPOCH + 5e5)
    order: list[Path] = []
    while index.fold_next():
        order += [row.path for row in index.rows() if row.exact and row.path not in order]
    assert order == [going, new, old]


def test_a_nan_at_the_end_is_shown_as_one(tmp_path: Path) -> None:
    nan_run(tmp_path)
    for index in (looked(tmp_path), folded(tmp_path)):
        row = only(index)
        assert row.loss is not None
        assert row.loss != row.loss


def test_a_resumed_run_counts_its_last_attempt(tmp_path: Path) -> None:
    resumed_run(tmp_path, 200)
    row = only(folded(tmp_path))
    assert (row.status, row.step, row.verdicts) == ("COMPLETED", 200, {"PASS": 15})


# Runs that go on


def test_what_is_appended_to_a_run_is_folded_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = live_run(tmp_path, steps=40, target=100)
    begun = load_run(path).state.last_t
    index = folded(tmp_path, now=begun + 1)
    assert (only(index).status, only(index).step) == ("RUNNING", 40)

    seq = load_run(path).state.events
    more = stamped([*[None] * seq, *steps_between(41, 60)][seq:], start=begun + 1)  # type: ignore[list-item]
    append(path, [msgspec.structs.replace(e, seq=e.seq + seq) for e in more])
    read: list[int] = []
    advance = RunReader.advance
    monkeypatch.setattr(RunReader, "advance", lambda self: read.append(self._fold.offset) or advance(self))
    look_again(index)
    assert only(index).step == 60
    assert min(read) > 0, "the stream was read from its beginning again"


def test_the_end_of_a_run_that_was_followed_is_seen(tmp_path: Path) -> None:
    events = with_verdicts(train_events(200), train_contract(), ending(200))
    path = make_run(tmp_path, events, 0, "train")
    record, stream = (path / "exit.json").read_bytes(), (path / "events.jsonl").read_bytes()
    lines = stream.splitlines(keepends=True)
    (path / "exit.json").unlink()
    (path / "events.jsonl").write_bytes(b"".join(lines[:100]))
    (path / "supervisor.jsonl").unlink()
    index = folded(tmp_path, now=events[0].t)
    assert only(index).live

    (path / "events.jsonl").write_bytes(stream)
    (path / "exit.json").write_bytes(record)
    look_again(index)
    assert (only(index).status, only(index).step, only(index).verdicts) == ("COMPLETED", 200, {"PASS": 15})


def test_silence_makes_a_run_stalled_and_the_next_line_ends_that(tmp_path: Path) -> None:
    path = live_run(tmp_path, steps=40)
    last = load_run(path).state.last_t
    now = last + 1.0
    index = RunIndex([tmp_path], lambda: now)
    look_again(index)
    assert only(index).status == "RUNNING"
    now = last + 300.0
    look_again(index)
    assert only(index).status == "STALLED"
    assert "nothing heard for 5 min" in only(index).reason
    seq = load_run(path).state.events
    append(path, [msgspec.structs.replace(steps_between(41, 41)[0], seq=seq, t=now)])
    look_again(index)
    assert only(index).status == "RUNNING"


def test_a_run_without_process_and_end_is_lost(tmp_path: Path) -> None:
    lost_run(tmp_path)
    for index in (looked(tmp_path), folded(tmp_path)):
        assert only(index).status == "LOST"


def test_a_run_that_nobody_started_is_starting_only_for_a_while(tmp_path: Path) -> None:
    path = make_run(tmp_path, [], None, created=EPOCH)
    (path / "events.jsonl").unlink()
    assert only(folded(tmp_path, now=EPOCH + 5)).status == "STARTING"
    row = only(folded(tmp_path, now=EPOCH + 600))
    assert (row.status, row.reason) == ("LOST", "it was never started")


def test_no_process_is_started_to_ask_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled_run(tmp_path)
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a process was started"))
    assert only(folded(tmp_path)).status == "STALLED"


# Directories that come, go and change


def test_a_directory_that_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    first = good_smoke(tmp_path)
    index = folded(tmp_path)
    second = good_smoke(tmp_path, created=EPOCH + 60)
    look_again(index)
    assert {row.path for row in index.rows()} == {first, second}
    shutil.rmtree(first)
    look_again(index)
    assert only(index).path == second


def test_a_run_that_did_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good_train(tmp_path)
    index = folded(tmp_path)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a file was read"))
    look_again(index)
    assert only(index).exact


def test_a_run_that_begins_again_is_read_anew(tmp_path: Path) -> None:
    path = lost_run(tmp_path)
    index = folded(tmp_path)
    assert only(index).status == "LOST"
    shutil.rmtree(path)
    other = good_train(tmp_path)
    other.rename(path)
    look_again(index)
    assert (only(index).status, only(index).step, only(index).exact) == ("COMPLETED", 200, True)


def test_forgetting_reads_everything_again(tmp_path: Path) -> None:
    good_train(tmp_path)
    index = folded(tmp_path)
    index.forget()
    assert index.rows() == ()
    look_again(index)
    assert only(index).exact


# What breaks nothing


def _no_stream(path: Path) -> None:
    (path / "events.jsonl").unlink()


def _pipe(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return make


def _holding(name: str, content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_bytes(content)

    return write


def _link(name: str, target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return link


def _huge_line(path: Path) -> None:
    with (path / "events.jsonl").open("ab") as file:
        file.write(b"x" * 5_000_000)


def _sparse(path: Path) -> None:
    os.truncate(path / "events.jsonl", 1 << 40)


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a manifest": (_holding("dispatch.json", b'{"v": 1, "run"'), "dispatch.json"),
    "a manifest nested deeply": (_holding("dispatch.json", b'{"x":' + b"[" * 100_000), "dispatch.json"),
    "binary junk for a manifest": (_holding("dispatch.json", bytes(range(256)) * 16), "dispatch.json"),
    "a huge manifest": (_holding("dispatch.json", b" " * 2_000_000), "dispatch.json: no regular file of at most"),
    "a pipe for a manifest": (_pipe("dispatch.json"), "dispatch.json: no regular file"),
    "a pipe for the stream": (_pipe("events.jsonl"), "events.jsonl: no regular file"),
    "a pipe for the exit record": (_pipe("exit.json"), "exit.json: no regular file"),
    "an exit record of another kind": (_holding("exit.json", b"[]"), "exit.json"),
    "binary junk for a stream": (_holding("events.jsonl", bytes(range(256)) * 1_000), "stream: a line is not JSON"),
    "a stream without a line": (_huge_line, "a line"),
    "a stream of nothing, without end": (_sparse, "a line"),
    "a link for the stream": (_link("events.jsonl", "/etc/passwd"), "events.jsonl"),
    "a link in a circle": (_link("dispatch.json", "dispatch.json"), "dispatch.json"),
    "a contract that is none": (_holding("contract.yaml", b"[1, 2]"), "contract.yaml"),
    "a pipe for the contract": (_pipe("contract.yaml"), "contract.yaml: no regular file"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_directory_has_a_row_that_says_so_and_breaks_no_other(tmp_path: Path, name: str) -> None:
    good, bad = good_smoke(tmp_path), good_smoke(tmp_path, created=EPOCH + 60)
    harm, reason = BREAKS[name]
    harm(bad)
    rows = {row.path: row for row in folded(tmp_path).rows()}
    assert rows[good].status == "COMPLETED"
    assert rows[bad].status == "UNREADABLE"
    assert reason in rows[bad].problem
    assert rows[bad].reason == rows[bad].problem


@pytest.mark.parametrize("harm", [_pipe("supervisor.jsonl"), _holding("supervisor.jsonl", b'{"event":"started",'
                                  b'"supervisor":7,"trainer":[],"session":"x"}\n')])  # fmt: skip
def test_records_of_a_supervisor_that_make_no_sense_break_nothing(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    harm(lost_run(tmp_path))
    assert only(folded(tmp_path)).status == "UNREADABLE"


def test_what_is_no_run_directory_is_passed_over(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert only(folded(tmp_path)).path == path


def test_a_run_without_a_stream_yet_is_no_broken_one(tmp_path: Path) -> None:
    _no_stream(live_run(tmp_path))
    row = only(folded(tmp_path, now=EPOCH))
    assert (row.status, row.problem) == ("STARTING", "")


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = good_smoke(tmp_path, name="evil\x1b[2J\u202e", host="h\x9bost")
    hostile = path.rename(tmp_path / "run\x1b]0;title\x07")
    row = only(folded(hostile.parent))
    for text in (row.id, row.name, row.host, row.reason, row.device):
        assert text.isprintable(), text
    assert row.path == hostile
    manifest = read_manifest(hostile)
    assert manifest.name == "evil\\x1b[2J\\u202e"


def test_a_broken_stream_is_not_read_again_for_every_line_that_it_grows_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = live_run(tmp_path)
    append(path, [], torn=b"junk\n")
    index = folded(tmp_path)
    assert "not JSON" in only(index).problem
    append(path, [], torn=b"more\n")
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("the stream was read again"))
    look_again(index)
    assert "not JSON" in only(index).problem


def test_losses_too_large_to_be_judged_break_nothing(tmp_path: Path) -> None:
    events = [msgspec.structs.replace(e, loss=1.7e308) if isinstance(e, Step | Eval) else e for e in smoke_events(30)]
    make_run(tmp_path, stamped([*events, end_event(30)]), 1)
    assert only(looked(tmp_path)).loss == 1.7e308
    assert only(folded(tmp_path)).exact


@pytest.mark.parametrize("name", ["dispatch.json", "contract.yaml"])
def test_a_run_that_lost_a_file_shows_what_its_stream_still_says(tmp_path: Path, name: str) -> None:
    path = good_smoke(tmp_path)
    whole = only(folded(tmp_path))
    (path / name).unlink()
    quick, row = only(looked(tmp_path)), only(folded(tmp_path))
    for each in (quick, row):
        assert (each.status, each.problem, each.host, each.step, each.loss) == (
            "COMPLETED", "", whole.host, whole.step, whole.loss
        )  # fmt: skip
        assert (each.mode, each.phase, each.teacher) == ("smoke", "3", "builtin:teacher")
    assert row.verdicts == whole.verdicts


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["events.jsonl", "dispatch.json", "exit.json", "contract.yaml", "supervisor.jsonl"]),
    junk=st.binary(max_size=200),
    at=st.floats(0, 1),
    instead=st.booleans(),
)
def test_whatever_bytes_stand_in_a_file_the_list_stands(
    tmp_path: Path, everything: dict[str, Path], name: str, junk: bytes, at: float, instead: bool
) -> None:
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(everything["lost"], path)
    file = path / name
    whole = file.read_bytes() if file.exists() else b""
    cut = int(at * len(whole))
    file.write_bytes(junk if instead else whole[:cut] + junk + whole[cut:])
    row = only(folded(tmp_path))
    assert all(text.isprintable() for text in (row.id, row.name, row.reason, row.problem, row.mode))


# One run


def test_a_run_is_loaded_with_everything_beside_its_stream(tmp_path: Path) -> None:
    path = good_train(tmp_path, 50, name="fifty", sets=["train.batch=4"])
    loaded = load_run(path)
    assert (loaded.problem, loaded.config_problem, loaded.host_state) == ("", "", "ended")
    assert loaded.manifest == trusted_manifest(path)
    assert loaded.exit is not None
    assert (loaded.config["train.batch"], loaded.config["teacher.path"]) == (4, "builtin:teacher")
    assert len(loaded.state.steps) == 50
    assert (loaded.label, loaded.going_on) == ("fifty", False)


def test_a_configuration_that_cannot_be_read_does_not_spoil_the_run(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    (path / "config.yaml").write_text("{")
    loaded = load_run(path)
    assert loaded.problem == ""
    assert "config.yaml" in loaded.config_problem
    assert only(folded(tmp_path)).status == "COMPLETED"


def test_the_events_of_another_run_are_refused(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    manifest = msgspec.structs.replace(trusted_manifest(path), run="0" * 36)
    (path / "dispatch.json").write_bytes(msgspec.json.encode(manifest))
    assert "another run" in load_run(path).problem


def test_a_stream_that_shrank_under_the_reader_is_said_to_have(tmp_path: Path) -> None:
    path = live_run(tmp_path)
    reader = RunReader(path)
    assert reader.read().problem == ""
    os.truncate(path / "events.jsonl", 1_000)
    assert "cut or replaced" in reader.read().problem


def test_lines_that_come_just_before_the_end_is_recorded_are_not_missed(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    stream = (path / "events.jsonl").read_bytes()
    lines = stream.splitlines(keepends=True)
    (path / "events.jsonl").write_bytes(b"".join(lines[:-5]))
    reader = RunReader(path)
    while reader.advance():
        pass
    (path / "events.jsonl").write_bytes(stream)
    loaded = reader.loaded()
    assert loaded.state.end is not None
    assert loaded.host_state == "ended"


# What a smoke said


def gate(path: Path) -> str:
    return trusted_manifest(path).gate_fingerprint


def test_a_smoke_of_the_same_configuration_tells_the_time_of_as_many_steps(tmp_path: Path) -> None:
    path = good_smoke(tmp_path, 30)
    assert find_smoke([tmp_path], gate(path), "box", 50_000) == (24_000.0, 25_000.0, 26_000.0)
    # 30 s around the steps stay; half of the steps take half of the rest.
    assert find_smoke([tmp_path], gate(path), "box", 25_000) == (12_015.0, 12_515.0, 13_015.0)


def test_only_a_smoke_of_this_configuration_on_this_host_counts(tmp_path: Path) -> None:
    path = good_smoke(tmp_path / "one", 30)
    other = good_smoke(tmp_path / "other", 30, sets=["train.batch=2"])
    assert find_smoke([tmp_path / "one"], gate(path), "elsewhere", 50_000) is None
    assert find_smoke([tmp_path / "one"], gate(other), "box", 50_000) is None
    assert find_smoke([tmp_path / "none"], gate(path), "box", 50_000) is None
    assert find_smoke([tmp_path], gate(other), "box", 50_000) is not None
    assert find_smoke([tmp_path / "none", tmp_path / "other"], gate(other), "box", 50_000) is not None


def test_the_newest_smoke_that_passed_is_the_one_that_is_asked(tmp_path: Path) -> None:
    def projecting(seconds: float, created: float, exit_code: int = 0) -> Path:
        events = [
            msgspec.structs.replace(e, p50_seconds=seconds) if hasattr(e, "p50_seconds") else e
            for e in smoke_events(30)
        ]
        end = end_event(30, exit_code=exit_code)
        return make_run(tmp_path, with_verdicts(events, end=end), exit_code, created=created)

    projecting(1_000.0, EPOCH)
    path = projecting(2_000.0, EPOCH + 60)
    projecting(3_000.0, EPOCH + 120, exit_code=5)
    live_run(tmp_path)
    found = find_smoke([tmp_path], gate(path), "box", 50_000)
    assert found is not None
    assert found[1] == pytest.approx(2_000.0)


def test_a_smoke_whose_stream_does_not_show_what_its_exit_code_says_is_not_believed(tmp_path: Path) -> None:
    path = failed_verdict_run(tmp_path)
    record = json.loads((path / "exit.json").read_text())
    (path / "exit.json").write_text(json.dumps(record | {"exit_code": 0}))
    assert find_smoke([tmp_path], gate(path), "box", 50_000) is None


def test_broken_directories_do_not_keep_a_smoke_from_being_found(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    for number, harm in enumerate(harm for harm, _ in BREAKS.values()):
        broken = tmp_path / f"broken-{number}"
        shutil.copytree(path, broken)
        harm(broken)
    assert find_smoke([tmp_path], gate(path), "box", 50_000) is not None
