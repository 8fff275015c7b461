"""What a report says of a run, of any kind: the same whatever it is written as, and never more than is known."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from console.run_reader import load_run
from console.run_report import as_html, as_markdown, as_svg
from console.run_report.curve import curve_of
from console.run_report.gather import counted, report_of
from console.run_report.model import Curve, Facts, Moment, Report, Table, Timeline
from console.run_report.series import SERIES, csv_of
from console.run_report.timeline import clusters, line_of_text, picture
from dispatch.sums import files_of, sha256_told, write_sums
from engine.stream import Step, Verdict
from tests import old_evidence as old
from tests.console.run_dirs import (
    READY,
    ending,
    failed_checkpoint_run,
    failed_verdict_run,
    good_smoke,
    good_train,
    live_run,
    lost_run,
    make_run,
    nan_run,
    resumed_run,
    train_contract,
    train_events,
)
from tests.streams import with_verdicts

FORMATS: dict[str, Callable[[Report], str]] = {
    "html": as_html.document,
    "md": as_markdown.document,
    "svg": as_svg.document,
}


def report(path: Path) -> Report:
    return report_of(load_run(path))


def facts(told: Report, key: str) -> dict[str, str]:
    section = told.section(key)
    assert section is not None, key
    return {name: text.text for block in section.blocks if isinstance(block, Facts) for name, text in block.rows}


def rows(told: Report, key: str) -> list[list[str]]:
    section = told.section(key)
    assert section is not None, key
    return [[cell.text for cell in row] for block in section.blocks if isinstance(block, Table) for row in block.rows]


def seal(path: Path) -> str:
    """Writes its SHA256SUMS; returns the evidence id."""
    names, _ = files_of(path)
    return write_sums(path, {name: sha256_told(path / name, name, lambda name, count: None) for name in names})


# Runs of ours


def test_the_head_says_how_it_ended_and_the_few_numbers_one_wants_first(tmp_path: Path) -> None:
    told = report(good_train(tmp_path, name="a run"))
    assert (told.name, told.mark.glyph, told.mark.word) == ("a run", "■", "COMPLETED")
    assert told.reason == "every step is done (exit code 0: every fatal and gate verdict is PASS)"
    assert told.title == "train: builtin:student taught by builtin:teacher, on box"
    assert {name: text.text for name, text in told.summary} == {
        "steps": "200 of 200",
        "train loss": "8.898 → 2.554",
        "held-out loss": "9.100 → 2.654",
        "top-1 agreement": "0.1% → 29.6%",
        "took": "2m 19s",
        "speed": "2,048 tokens/s",
        "verdicts": "15 PASS",
    }
    assert told.warnings == ()


def test_losses_are_those_of_the_stream(tmp_path: Path) -> None:
    path = good_train(tmp_path)
    state = load_run(path).state
    table = {row[0]: row[1:] for row in rows(report(path), "losses")}
    ce = state.steps.column("ce")
    assert table["train ce"] == [f"{ce[0]:.3f}", f"{ce[-1]:.3f}", f"{ce.min():.3f} at {ce.argmin() + 1}", "-74.7%"]
    assert table["held-out total"][:2] == [f"{state.evals[0].loss:.3f}", f"{state.evals[-1].loss:.3f}"]
    assert table["top-1 agreement"][3] == "+29.5 points"


def test_a_verdict_that_fails_stands_first_with_expected_observed_step_and_basis(tmp_path: Path) -> None:
    told = report(failed_verdict_run(tmp_path))
    assert told.mark.word == "FAILED"
    table = rows(told, "verdicts")
    assert [row[0] for row in table[:2]] == ["✘ FAIL", "✘ FAIL"]
    smoke = next(row for row in table if row[1] == "F-DISTILL-SMOKE-001")
    assert smoke[2].endswith("eval.loss falls")
    assert smoke[3:] == ["5 to 6.5", "30", "judged"]
    assert told.verdicts == "2 FAIL, 14 PASS"
    assert [row for row in table if row[0] == "✔ PASS (warn)"]


def test_what_was_found_and_is_severe_is_said_before_everything_else(tmp_path: Path) -> None:
    told = report(nan_run(tmp_path))
    assert any("NaN at step 60" in line for line in told.warnings)
    assert rows(told, "findings")[0][0] == "✘ severe"
    assert dict(told.summary)["train loss"].tone == "bad"


def test_failed_checkpoints_stand_in_the_table_and_on_the_timeline(tmp_path: Path) -> None:
    told = report(failed_checkpoint_run(tmp_path))
    [timeline] = told.blocks(Timeline)
    assert isinstance(timeline, Timeline)
    assert [(m.step, m.kind) for m in timeline.moments if m.kind != "evaluation"] == [
        (100, "failed"),
        (200, "best"),
        (200, "final"),
    ]
    assert [m.step for m in timeline.moments if m.kind == "evaluation"] == [0, 50, 100, 150, 200, 200]
    table = rows(told, "checkpoints")
    assert table[0][:2] == ["100", "✘ failed: No space left on device: 412 MB free, 988 MB needed"]
    assert table[1][1] == "periodic+best"


def test_a_smoke_tells_its_projection_and_that_it_was_not_run_so_far(tmp_path: Path) -> None:
    told = facts(report(good_smoke(tmp_path, 30)), "projection")
    assert told["projected"] == "50,000 steps in 6h 56m (6h 40m to 7h 13m)"
    assert told["real"].startswith("not known: 50,000 steps were not run here")
    assert "real to projected" not in told


def test_a_projection_that_came_true_is_held_against_what_it_took(tmp_path: Path) -> None:
    log = old.smoke_log(steps=62, seconds=124.0, project_to=62)
    told = facts(report(old.write_old(tmp_path / "x", logs={"launch.log": log})), "projection")
    assert told["real to projected"] == "1.00"
    assert "real" not in told


def test_phases_attempts_and_how_the_process_ended_are_told(tmp_path: Path) -> None:
    told = report(resumed_run(tmp_path))
    phases = [row[0] for row in rows(told, "phases")]
    assert phases[:3] == ["import", "self-check", "load-teacher"]
    assert facts(told, "attempts") == {"attempts": "2", "the last one ended with": "exit code 0"}


def test_what_was_asked_and_what_ran_are_held_against_each_other(tmp_path: Path) -> None:
    assert ["precision", "auto", "fp32"] in rows(report(good_train(tmp_path)), "asked")
    short = report(nan_run(tmp_path))
    assert ["steps", "200", "60"] in rows(short, "asked")


@pytest.mark.parametrize("name", READY)
def test_every_run_can_be_reported_in_every_format(tmp_path: Path, name: str) -> None:
    told = report(READY[name](tmp_path))
    for form, write in FORMATS.items():
        assert told.mark.word in write(told), form


def test_a_run_that_goes_on_is_told_as_of_its_last_event(tmp_path: Path) -> None:
    told = report(live_run(tmp_path))
    assert told.mark.word == "RUNNING"
    assert told.warnings[0].startswith("The run goes on")
    assert report(lost_run(tmp_path)).mark.word == "LOST"


def test_a_run_that_made_no_step_has_no_curve_and_says_so(tmp_path: Path) -> None:
    told = report(make_run(tmp_path, [], 2, "train"))
    assert "No step was made" in as_html.document(told)
    assert told.section("checkpoints") is None
    assert dict(told.summary)["steps"].text == "not said"


def test_a_broken_stream_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    path = good_train(tmp_path)
    lines = (path / "events.jsonl").read_bytes().splitlines(keepends=True)
    (path / "events.jsonl").write_bytes(b"".join(lines[:300]) + b"{broken\n")
    told = report(path)
    assert (told.mark.glyph, told.mark.word) == ("?", "UNREADABLE")
    assert "events.jsonl" in told.reason
    assert rows(told, "losses")


# Proof


def test_sealed_evidence_has_its_id_its_hashes_and_how_to_check_them(tmp_path: Path) -> None:
    path = good_train(tmp_path)
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "w").write_bytes(b"weights")
    identity = seal(path)
    told = report(path)
    assert facts(told, "provenance")["evidence id"] == identity
    assert told.footer.endswith(f"evidence id {identity}")
    written = as_markdown.document(told)
    assert f"sha256sum SHA256SUMS                        # {identity}" in written
    assert f"kdconsole verify {path.name} --id {identity}" in written
    for line in (path / "SHA256SUMS").read_text().splitlines():
        assert (line in written) == ("checkpoints/" not in line)
    assert "1 files of weights are listed" in written


def test_a_file_that_was_changed_since_is_said_first(tmp_path: Path) -> None:
    path = good_train(tmp_path)
    seal(path)
    (path / "config.yaml").write_text((path / "config.yaml").read_text() + "# more\n")
    told = report(path)
    assert told.mark.word == "CHANGED"
    assert any("config.yaml: changed" in line for line in told.warnings)


def test_without_checksums_the_files_are_hashed_for_the_report(tmp_path: Path) -> None:
    told = report(good_train(tmp_path))
    assert facts(told, "provenance")["evidence id"] == "none: it was not sealed"
    assert "hashes were computed for this report" in as_markdown.document(told)


def test_provenance_says_what_is_not_known(tmp_path: Path) -> None:
    told = facts(report(good_train(tmp_path)), "provenance")
    assert told["operator"] != "not said"
    assert told["teacher, SHA-256"] == "not said"
    assert told["started from"] == "box, Linux-6.12-x86_64, Python 3.12.3"


# The predecessor's, and less


@pytest.mark.parametrize("name", old.SCENES)
def test_old_evidence_is_reported_as_what_it_is(tmp_path: Path, name: str) -> None:
    expected = old.EXPECTED[name]
    path = old.SCENES[name](tmp_path / "scene")
    told = report(path)
    status = "DISPUTED" if expected.contradicted else expected.status
    assert told.mark.word == status
    bases = {row[1]: (row[0].split()[1], row[5]) for row in rows(told, "verdicts")}
    for identifier, basis in expected.bases.items():
        assert bases[identifier] == basis
    if not math.isnan(expected.initial):
        losses = {row[0]: row[1:3] for row in rows(told, "losses")}
        assert losses["train total"] == [f"{expected.initial:#.4g}", f"{expected.final:#.4g}"]
    if not math.isnan(expected.seconds):
        assert dict(told.summary)["took"].text in ("2m 03s", "1m 00s", "3m 52s")
    assert told.section("phases") is None, "the log has no times"
    for write in FORMATS.values():
        assert not re.search(r"(?<!loss is )\bnan\b", write(told), re.IGNORECASE)


def test_steps_asked_and_run_of_an_old_run_are_held_against_each_other(tmp_path: Path) -> None:
    told = report(old.SCENES["asked-50-ran-62"](tmp_path / "x"))
    assert rows(told, "asked") == [["steps", "50", "62"]]
    assert facts(told, "ran")["teacher"] == "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert facts(told, "ran")["loss"] == "temperature 4, alpha 0.3"


def test_a_contradiction_is_said(tmp_path: Path) -> None:
    told = report(old.SCENES["contradiction"](tmp_path / "x"))
    assert any("F-DISTILL-PIPELINE-001" in line for line in told.warnings)
    assert "stated and judged differently" in as_html.document(told)


def test_epochs_are_called_epochs(tmp_path: Path) -> None:
    path = old.SCENES["epochs"](tmp_path / "x")
    told = report(path)
    assert dict(told.summary)["steps"].text == "3 epochs"
    [curve] = told.blocks(Curve)
    assert isinstance(curve, Curve)
    assert ">epoch</text>" in curve_of(curve, 400)
    [timeline] = told.blocks(Timeline)
    assert isinstance(timeline, Timeline)
    assert ">epoch</text>" in picture(timeline, "serif")
    assert [row["t_unix_seconds"] + row["ce"] + row["tokens"] for row in table_of(path, "evals")] == [""] * 3


def test_a_log_alone_says_what_nobody_knows(tmp_path: Path) -> None:
    told = report(old.SCENES["bare-log"](tmp_path / "x") / "run.log")
    assert told.title == "a log alone: student not said taught by a teacher that is not said"
    assert facts(told, "ran")["teacher"] == "not said"
    assert "there is no manifest" in facts(told, "provenance")["who, where, with what"]
    assert "run.log" in as_markdown.document(told)


# The same in every format, and always


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_every_verdict_and_the_losses(tmp_path: Path, form: str) -> None:
    told = report(failed_verdict_run(tmp_path))
    written = FORMATS[form](told)
    for row in rows(told, "verdicts"):
        assert row[1] in written
        assert row[0].split()[1] in written
    for name in ("train loss", "held-out loss"):
        assert dict(told.summary)[name].text in written


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_evidence_gives_the_same_bytes_wherever_it_stands(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = good_train(tmp_path / "one")
    seal(path)
    first = FORMATS[form](report(path))
    moved = tmp_path / "two" / path.name
    moved.parent.mkdir()
    path.rename(moved)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.chdir(moved)
    assert FORMATS[form](report(moved)) == first


# Series


def table_of(path: Path, series: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO("".join(csv_of(load_run(path), series)))))


def test_steps_come_back_bit_for_bit_with_every_column(tmp_path: Path) -> None:
    events = [
        msgspec.structs.replace(e, loss=[math.nan, math.inf, -math.inf, 0.1 + 0.2][e.step % 4])
        if isinstance(e, Step)
        else e
        for e in train_events(40)
    ]
    path = make_run(tmp_path, with_verdicts(events, train_contract(), ending(40)), 0, "train")
    steps, table = load_run(path).state.steps, table_of(path, "steps")
    assert list(table[0]) == ["step", "t_unix_seconds", "loss", "ce", "kd", "lr", "grad_norm", "tokens", "seconds"]
    assert [row["loss"] for row in table[:4]] == ["Infinity", "-Infinity", repr(0.1 + 0.2), "NaN"]
    assert [row["step"] for row in table] == [str(n) for n in range(1, 41)]
    for name, own in (("t_unix_seconds", "t"), ("grad_norm", "grad_norm"), ("lr", "lr")):
        np.testing.assert_array_equal([float(row[name]) for row in table], steps.column(own))


def test_what_a_log_does_not_tell_is_empty_in_every_series(tmp_path: Path) -> None:
    path = old.SCENES["checkpoints"](tmp_path / "x")
    step = table_of(path, "steps")[0]
    assert step == {name: "" for name in step} | {"step": "1", "loss": "7.6746"}
    saved = table_of(path, "checkpoints")
    assert saved[0] == {name: "" for name in saved[0]} | {
        "step": "50", "kind": "periodic", "path": "/home/op/runs/checkpoint.apr"
    }  # fmt: skip
    assert "No space left" in saved[1]["error"]
    assert {row["basis"] for row in table_of(path, "verdicts")} == {"derived"}
    assert next(iter(table_of(old.SCENES["epochs"](tmp_path / "e"), "steps")[0])) == "epoch"


def test_evaluations_checkpoints_and_verdicts_have_every_row(tmp_path: Path) -> None:
    path = good_train(tmp_path)
    state = load_run(path).state
    assert [float(row["loss"]) for row in table_of(path, "evals")] == [e.loss for e in state.evals]
    assert [row["sha256"] for row in table_of(path, "checkpoints")] == [c.sha256 for c in state.checkpoints]  # type: ignore[union-attr]
    assert [row["id"] for row in table_of(path, "verdicts")] == [v.id for v in state.judged]
    assert set(SERIES) == {"steps", "evals", "checkpoints", "verdicts", "answers"}


# The timeline


def test_marks_that_fall_together_are_drawn_as_one_and_counted() -> None:
    moments = [Moment(step, "periodic", "") for step in (10, 11, 500, 990, 1_000)]
    assert [[m.step for m in group] for group in clusters(moments, 1_000, 1_000, 18)] == [[10, 11], [500], [990, 1_000]]
    assert clusters([], 1_000, 1_000, 18) == []


def test_a_timeline_of_text_shows_what_was_asked_and_how_far_it_came() -> None:
    moments = (Moment(50, "periodic", ""), Moment(100, "failed", ""), Moment(0, "evaluation", ""))
    lines = line_of_text(Timeline(100, 200, moments), 41)
    assert lines[0] == "╷" + " " * 9 + "●" + " " * 9 + "✘"
    assert lines[1].count("━") == 21
    assert lines[3:] == ["100 steps made, 200 asked", "✘ 1 failed, ● 1 periodic, ╷ 1 held-out evaluations"]


def test_a_warning_that_fails_is_told_as_one() -> None:
    def verdict(word: str, severity: str) -> Verdict:
        return Verdict(id="x", verdict=word, severity=severity, claim="", expected="", observed="", step=0)

    passed, warned = verdict("PASS", "gate"), verdict("FAIL", "warn")
    assert counted([passed, warned, passed]) == ("1 FAIL (warn), 2 PASS", "warn")
    assert (
        counted([warned, verdict("FAIL", "gate"), verdict("PENDING", "gate")])[0] == "1 FAIL, 1 FAIL (warn), 1 PENDING"
    )
    assert counted([passed]) == ("1 PASS", "")
