"""A past run looked at as a whole: for people at every width, and for programs."""

from __future__ import annotations

import io
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from console.elapsed import wall_seconds
from console.loss_curve import MOST_POINTS, picture, points
from console.review.document import SCHEMA, document
from console.review.past import Review, heldout_losses, review, train_losses
from console.review.text import Line, block, parts, show, summary, summary_row
from console.run_reader import load_run
from dispatch.manifest import EVENTS, EXIT, MANIFEST
from dispatch.sums import write_sums
from engine.errors import ExitCode
from tests.console import run_dirs as dirs
from tests.old_evidence import EXPECTED, SCENES, write_old

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path.parent for path in (ROOT / "evidence").glob("*/dispatch.json"))
WIDTHS = (40, 80, 120, 140, 200)


def reviewed(path: Path, *smokes: Path) -> Review:
    return review(load_run(path), smokes, now=2e9)


def printed(told: Review, width: int = 140) -> str:
    out = io.StringIO()
    show(told, Console(file=out, width=width, highlight=False, color_system=None))
    return out.getvalue()


def sealed(path: Path) -> str:
    """Writes the checksums of a directory as it is; returns the evidence id."""
    import hashlib

    names = sorted(each.name for each in path.iterdir() if each.is_file())
    return write_sums(path, {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names})


# What is told of the predecessor's runs


@pytest.mark.parametrize("scene", sorted(EXPECTED))
def test_the_predecessors_runs_are_told_with_their_losses_steps_duration_host_and_verdicts(
    scene: str, tmp_path: Path
) -> None:
    expected, told = EXPECTED[scene], reviewed(SCENES[scene](tmp_path / "old"))
    assert told.loaded.kind.value == expected.kind
    status = "DISPUTED" if expected.contradicted else expected.status
    assert told.conclusion.status == status
    assert (told.steps or 0) == expected.steps
    assert told.loaded.about.host == expected.host
    if math.isnan(expected.seconds):
        assert told.seconds is None
    else:
        assert told.seconds == pytest.approx(expected.seconds)
    train = train_losses(told.state)
    if not math.isnan(expected.initial):
        assert train.first is not None
        assert train.last is not None
        assert (train.first.total, train.last.total) == (expected.initial, expected.final)
    verdicts = {each.verdict.id: (each.verdict.verdict, each.basis) for each in told.judgements()}
    assert expected.bases.items() <= verdicts.items()
    text = printed(told)
    assert "nan" not in text.casefold()
    assert "1970" not in text
    for identifier in expected.contradicted:
        assert f"≠ {identifier}: it says PASS, its numbers say FAIL" in text
    if not math.isnan(expected.initial):
        assert f"{expected.initial:.4f}  {expected.final:.4f}" in text


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_what_the_predecessor_did_not_say_is_null_and_never_a_number(scene: str, tmp_path: Path) -> None:
    told = json.loads(json.dumps(document(reviewed(SCENES[scene](tmp_path / "old"))), allow_nan=False))
    assert '"NaN"' not in json.dumps(told)
    assert (told["phases"], told["tokens_per_second"], told["evidence_id"]) == ([], None, None)
    for losses in told["train"].values():
        assert losses is None or (losses["ce"], losses["kd"]) == (None, None)


def test_what_was_asked_and_where_is_told(tmp_path: Path) -> None:
    text = printed(reviewed(SCENES["asked-50-ran-62"](tmp_path / "asked")))
    assert "phase 3 (end-to-end smoke), ticket " in text
    assert "steps 50, " in text
    assert "62 steps of 50 asked for" in text
    assert "(122.7 s)" in text
    assert "asked 50 steps (dispatch.json), ran 62 (the log, launch.log)" in text


def test_a_manifest_alone_says_so_and_invents_no_steps(tmp_path: Path) -> None:
    told = reviewed(SCENES["manifest-only"](tmp_path / "old"))
    text = printed(told)
    assert "50 steps were asked for; how many ran is not said" in text
    assert (told.steps, told.seconds, told.conclusion.exit_code) == (None, None, ExitCode.UNDECIDED)
    assert text.rstrip().splitlines()[-1].startswith("✘ LOST ")


def test_steps_that_a_manifest_limits_are_what_was_asked(tmp_path: Path) -> None:
    told = reviewed(SCENES["smoke"](tmp_path / "old"))
    assert (told.asked, told.steps) == (62, 62)
    assert "of 50 asked for" not in printed(told)


# What is told of ours


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_runs_are_as_they_were_sealed_and_end_as_attach_says(path: Path) -> None:
    told = reviewed(path)
    record = json.loads((path / EXIT).read_text())
    assert told.checked is not None
    assert told.checked.problems == ()
    assert told.conclusion.exit_code == record["exit_code"]
    told_all = document(told)
    assert told_all["evidence_id"] == told.checked.evidence_id
    first, last = train_losses(told.state).first, train_losses(told.state).last
    summary_of = told.state.end.summary if told.state.end else {}
    assert last is not None
    assert first is not None
    assert last.total == pytest.approx(summary_of["final_loss"])
    text = printed(told)
    assert f"{first.total:.4f}" in text
    assert "as they were sealed" in text
    for each in told.judgements():
        assert each.verdict.id in text


def test_the_last_line_has_status_reason_and_what_the_exit_code_means(tmp_path: Path) -> None:
    last = printed(reviewed(dirs.good_smoke(tmp_path)), 400).rstrip().splitlines()[-1]
    assert last.startswith("✔ COMPLETED GO  the time budget is reached; ")
    assert last.endswith("binding verdicts PASS; exit code 0: every fatal and gate verdict is PASS")
    last = printed(reviewed(dirs.failed_verdict_run(tmp_path)), 400).rstrip().splitlines()[-1]
    assert last.startswith("✘ FAILED NO-GO  ")
    assert last.endswith("exit code 1: a fatal or gate verdict is FAIL")
    last = printed(reviewed(dirs.lost_run(tmp_path)), 400).rstrip().splitlines()[-1]
    assert last.startswith("✘ LOST  neither an end nor a process was found")
    assert last.endswith("exit code 5: undecided, its end is not known")


def test_the_worst_finding_stands_last_of_them(tmp_path: Path) -> None:
    path = dirs.nan_run(tmp_path)
    record = json.loads((path / EXIT).read_text())
    (path / EXIT).write_text(json.dumps(record | {"orphans": [{"pid": 7, "name": "x", "signal": 15}]}))
    lines = printed(reviewed(path)).splitlines()
    begin = lines.index("found")
    found = [line.split()[1] for line in lines[begin + 1 :] if line[:1] in "✘⚠·" and line.strip()]
    assert found[:2] == ["orphans", "non-finite"]


def test_a_run_that_goes_on_is_not_over(tmp_path: Path) -> None:
    told = reviewed(dirs.live_run(tmp_path))
    assert (told.conclusion.exit_code, told.open) == (ExitCode.UNDECIDED, True)
    assert "it is not over, as far as is known here" in printed(told, 300)
    assert document(told)["over"] is False


def test_a_run_of_another_host_that_was_not_asked_is_unknown(tmp_path: Path) -> None:
    path = dirs.lost_run(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["remote"] = {"host": "gx10", "run_dir": "/r", "python": "/p", "engine": "/e", "env": []}
    (path / MANIFEST).write_text(json.dumps(manifest))
    told = reviewed(path)
    assert (told.conclusion.status, told.open) == ("UNASKED", True)
    assert "gx10, which was not asked" in printed(told, 300)


def test_files_that_were_changed_make_a_passed_run_fail(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    evidence_id = sealed(path)
    told = reviewed(path)
    assert told.checked is not None
    assert (told.conclusion.status, told.checked.evidence_id) == ("COMPLETED", evidence_id)
    assert f"evidence id  {evidence_id}" in printed(told)
    with (path / "config.yaml").open("a") as file:
        file.write("# changed\n")
    told = reviewed(path)
    assert (told.conclusion.status, told.conclusion.exit_code) == ("CHANGED", ExitCode.FAILED)
    assert "1 file is not as it was sealed: config.yaml: changed" in printed(told)


def test_attempts_and_the_time_between_them(tmp_path: Path) -> None:
    told = reviewed(dirs.resumed_run(tmp_path))
    seconds = wall_seconds(told.state)
    assert seconds is not None
    # Five minutes passed between the attempts, and are no part of the run.
    assert told.state.last_t - told.state.first_t - seconds == pytest.approx(310, abs=10)
    assert "it took 2 attempts; 30 steps lost and made again" in printed(told)


def test_what_a_smoke_promised_is_held_against_what_it_took(tmp_path: Path) -> None:
    dirs.good_smoke(tmp_path)
    told = reviewed(dirs.good_train(tmp_path, 200), tmp_path)
    assert told.smoke is not None
    assert told.smoke[1] == pytest.approx(30 + 24_970 * 200 / 50_000)
    assert told.whole
    took = f"it took {140.0 // 60:.0f}m 20s"
    line = next(line for line in printed(told).splitlines() if line.startswith("smoke said"))
    assert took in line
    assert "+7.8%, outside its range" in line
    assert document(told)["smoke_promised"]["p50_seconds"] == pytest.approx(told.smoke[1])


def test_a_run_that_did_not_make_all_its_steps_is_not_held_against_the_promise(tmp_path: Path) -> None:
    dirs.good_smoke(tmp_path)
    told = reviewed(dirs.crashed_run(tmp_path), tmp_path)
    line = next(line for line in printed(told).splitlines() if line.startswith("smoke said"))
    assert line.rstrip().endswith("for all its steps; it did not make them all")


def test_a_smoke_says_what_it_promises(tmp_path: Path) -> None:
    told = reviewed(dirs.good_smoke(tmp_path))
    assert "50,000 steps in 6h 56m (6h 40m to 7h 13m), 0.500 s a step, 30.0 s around them" in printed(told)
    assert document(told)["projection"]["p50_seconds"] == 25_000.0


def test_a_stream_that_is_lost_leaves_what_the_manifest_says(tmp_path: Path) -> None:
    source = next(path for path in COMMITTED if json.loads((path / MANIFEST).read_text())["v"] == 2)
    (tmp_path / "kept").mkdir()
    shutil.copy(source / MANIFEST, tmp_path / "kept" / MANIFEST)
    told = reviewed(tmp_path / "kept")
    manifest = json.loads((source / MANIFEST).read_text())
    assert told.conclusion.status == manifest["outcome"]["status"]
    assert told.conclusion.exit_code == ExitCode.UNDECIDED
    assert {each.verdict.id for each in told.judgements()} == {each["id"] for each in manifest["verdicts"]}
    assert {each.basis for each in told.judgements()} == {"stated, dispatch.json"}
    assert "undecided, nothing is here to judge it by" in printed(told, 300)


def test_a_run_of_ours_whose_stream_is_lost_is_read_from_what_it_printed(tmp_path: Path) -> None:
    source = next(path for path in COMMITTED if json.loads((path / MANIFEST).read_text())["v"] == 2)
    shutil.copytree(source, tmp_path / "kept")
    (tmp_path / "kept" / EVENTS).unlink()
    whole, told = reviewed(source), reviewed(tmp_path / "kept")
    assert told.steps == whole.steps
    first, expected = train_losses(told.state).first, train_losses(whole.state).first
    assert first is not None
    assert expected is not None
    assert first.total == pytest.approx(expected.total, abs=1e-4)
    assert told.seconds == json.loads((source / MANIFEST).read_text())["seconds"]


# Every run, every width


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Review]:
    """Every kind of run once."""
    place = tmp_path_factory.mktemp("everything")
    paths = [build(place / "ours" / name) for name, build in dirs.READY.items()]
    paths += [scene(place / "old" / name) for name, scene in SCENES.items()]
    log = place / "alone.log"
    shutil.copy(SCENES["bare-log"](place / "log") / "run.log", log)
    return [reviewed(path) for path in (*paths, log)]


def test_every_report_fits_every_width_and_ends_with_its_conclusion(everything: list[Review]) -> None:
    for number, told in enumerate(everything):
        path = told.loaded.path
        for width in WIDTHS if number % 7 == 0 else (80,):
            text = printed(told, width)
            free = {str(part).rstrip() for part in parts(told, width) if isinstance(part, Line)}
            for line in text.splitlines():
                assert cell_len(line.rstrip()) <= width or line.rstrip() in free, (path, width, line)
            last = text.rstrip().split("\n\n")[-1]
            assert told.conclusion.status in last.split("  ")[0]
            assert "exit" in last
            if width >= 80:
                assert all(each.verdict.id in text for each in told.judgements()), (path, width)


def test_every_document_has_every_key_and_no_number_that_json_lacks(everything: list[Review]) -> None:
    keys = None
    for each in everything:
        told = document(each)
        json.dumps(told, allow_nan=False)
        assert told["schema"] == SCHEMA
        keys = keys or told.keys()
        assert told.keys() == keys
        assert len(told["curve"]["low"]) <= MOST_POINTS
        for finding in told["findings"]:
            assert {"kind", "severity", "text", "step", "at", "source", "count", "verdict"} == finding.keys()


def test_a_loss_that_is_no_number_travels_as_text_and_is_shown_as_it_is(tmp_path: Path) -> None:
    told = reviewed(dirs.nan_run(tmp_path))
    assert document(told)["train"]["last"]["total"] == "NaN"
    assert document(told)["curve"]["non_finite"][-1] == 1
    assert "NaN" in printed(told)


HOSTILE = "\x1b[2J\x9b31m\u202eevil[red]x[/]\r\n"


def test_nothing_hostile_reaches_the_terminal(tmp_path: Path) -> None:
    manifest = {"run_name": HOSTILE, "host": HOSTILE, "teacher": HOSTILE, "steps": HOSTILE, "ticket": HOSTILE}
    lines = f"  Step 1/9: loss: 2.0\n{HOSTILE}\nF-X-1: FAIL {HOSTILE}\nerror: {HOSTILE}"
    name = "evil\x1b[2J\u202e"
    paths = [write_old(tmp_path / name, logs={f"l\x1b[2J{n}.log": lines.encode() for n in "ab"}, manifest=manifest)]
    ours = dirs.crashed_run(tmp_path, 20)
    whole = json.loads((ours / MANIFEST).read_text())
    (ours / MANIFEST).write_text(json.dumps(whole | {"name": HOSTILE, "operator": HOSTILE, "overrides": [HOSTILE]}))
    (ours / "launch.log").write_text(f"RuntimeError: {HOSTILE}")
    (ours / f"SHA256SUMS{HOSTILE[:3]}").write_text("x")
    paths.append(ours)
    for path in paths:
        told = reviewed(path)
        text = printed(told) + json.dumps(document(told), ensure_ascii=False)
        console = Console(file=io.StringIO(), width=100, color_system=None)
        with console.capture() as capture:
            console.print(*block(told), summary([summary_row(told, "x")], 100))
        for character in text + capture.get():
            assert character == "\n" or character.isprintable(), repr(character)
        assert "[red]x[/]" in text  # as text, and not as markup


def test_a_directory_of_junk_is_told_as_such(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    (path / EVENTS).write_bytes(b"\xff\xfe\x00junk\n" * 100)
    told = reviewed(path)
    assert (told.conclusion.status, told.conclusion.exit_code) == ("UNREADABLE", ExitCode.UNDECIDED)
    assert "not all of it can be read" in printed(told)


# Several


def test_several_runs_take_a_few_lines_each_and_a_line_of_the_table(tmp_path: Path) -> None:
    told = [reviewed(dirs.good_train(tmp_path)), reviewed(SCENES["asked-50-ran-62"](tmp_path / "old"))]
    out = io.StringIO()
    console = Console(file=out, width=140, color_system=None, highlight=False)
    for each in told:
        console.print(*block(each), sep="\n", end="\n")
    console.print(summary([summary_row(each, f"run {n}") for n, each in enumerate(told)], 140))
    text = out.getvalue()
    assert "train 7.6746 to 7.2036, 62 steps in 2m 03s on gx10" in text
    assert "⚠ steps-differ  asked 50 steps (dispatch.json), ran 62 (the log, launch.log)" in text
    rows = [line for line in text.splitlines() if line.startswith("run ")]
    assert len(rows) == 3  # the header and two
    assert rows[1].rstrip().endswith("✔ COMPLETED  ✔")
    assert rows[2].rstrip().endswith("✔ COMPLETED  ⚠ steps-differ")


# The curve


def test_the_curve_loses_no_spike_and_no_step() -> None:
    steps = np.arange(1.0, 50_001.0)
    losses = 2.0 + np.exp(-steps / 1_000)
    losses[33_333], losses[44_444] = 99.0, np.nan
    told = points(steps, losses)
    assert len(told) == MOST_POINTS
    assert max(each.high for each in told) == 99.0
    assert sum(each.bad for each in told) == 1
    assert (told[0].first, told[-1].last) == (1, 50_000)
    assert all(one.last + 1 == other.first for one, other in pairwise(told))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60), st.integers(1, 30))
def test_every_stretch_holds_its_own_values(values: list[float], most: int) -> None:
    losses = np.array(values, np.float64)
    told = points(np.arange(1.0, len(values) + 1), losses, most)
    assert len(told) <= most
    seen: list[float] = []
    for each in told:
        inside = losses[each.first - 1 : each.last]
        finite = inside[np.isfinite(inside)]
        assert each.bad == len(inside) - len(finite)
        if len(finite):
            assert (each.low, each.high, each.end) == (finite.min(), finite.max(), finite[-1])
        else:
            assert all(map(math.isnan, (each.low, each.high, each.end)))
        seen += inside.tolist()
    assert len(seen) == len(values)


def test_the_picture_shows_a_spike_and_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    flat = [str(line) for line in picture(load_run(dirs.good_train(tmp_path)).state, 80, 10)]
    spike = [str(line) for line in picture(load_run(dirs.spike_run(tmp_path)).state, 80, 10)]
    assert len(flat) == len(spike) == 10
    assert all(cell_len(line) <= 80 for line in flat + spike)
    # The spike is as high as the first losses, 60 % of the way to the right.
    assert any(each.strip() for line in spike[:4] for each in line[45:60])
    assert not any(each.strip() for line in flat[:4] for each in line[45:60])
    assert picture(load_run(SCENES["manifest-only"](tmp_path / "old")).state, 80, 10) == []


def test_held_out_losses_of_one_evaluation_have_no_last(tmp_path: Path) -> None:
    state = load_run(dirs.good_train(tmp_path)).state
    assert heldout_losses(state).last is not None
    one: Any = state.__class__(evals=state.evals[:1], source=state.source)
    assert heldout_losses(one).last is None
