"""In what runs differ: every value taken from their streams, and what is not alike found."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.differences import differences
from console.run_reader import LoadedRun, load_run
from console.run_state import Reducer
from console.side_by_side import Cell, Line, as_csv, document, labels, rows
from engine.stream import Run, Step
from tests.console.run_dirs import (
    READY,
    ending,
    failed_checkpoint_run,
    good_smoke,
    good_train,
    make_run,
    nan_run,
    resumed_run,
    spike_run,
    steps_between,
    train_contract,
    train_events,
)
from tests.streams import EPOCH, run_event, stamped, with_verdicts

NOW = EPOCH + 3_600.0


def lines_of(*runs: LoadedRun) -> dict[str, Line]:
    return {line.label: line for section in differences(runs, NOW) for line in section.lines}


def texts(line: Line) -> list[str]:
    return [cell.text for cell in line.cells]


def changed(
    tmp_path: Path, steps: int = 200, *, loss_times: float = 1.0, tokens: int = 1_024, **run: object
) -> LoadedRun:
    """A full run with other losses, other batches, or another `run` event."""
    events = [
        msgspec.structs.replace(e, loss=e.loss * loss_times, tokens=tokens) if isinstance(e, Step) else e
        for e in train_events(steps, **run)
    ]
    return load_run(make_run(tmp_path, with_verdicts(events, train_contract(), ending(steps)), 0, "train"))


# What differs


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    run = load_run(good_train(tmp_path))
    sections = differences([run, run], NOW)
    assert not [line.label for section in sections for line in section.lines if line.differs]
    assert next(s.note for s in sections if s.title.startswith("configuration")) == "no key differs"


def test_only_configuration_keys_that_differ_are_listed(tmp_path: Path) -> None:
    one = load_run(good_train(tmp_path, 20))
    other = load_run(good_train(tmp_path, 20, sets=["train.batch=2", "distill.alpha=0.5", "train.threads=3"]))
    section = next(s for s in differences([one, other], NOW) if s.title.startswith("configuration"))
    assert {line.label: texts(line) for line in section.lines} == {
        "train.batch": ["8", "2"],
        "distill.alpha": ["0.3", "0.5"],
        "train.threads": ["none", "3"],
    }


def test_what_a_run_was_and_where_stands_side_by_side(tmp_path: Path) -> None:
    one = load_run(good_smoke(tmp_path, 30, host="gx10"))
    other = load_run(nan_run(tmp_path))
    lines = lines_of(one, other)
    assert texts(lines["status"]) == ["■ COMPLETED", "✘ FAILED"]
    assert texts(lines["mode"]) == ["smoke", "train"]
    assert texts(lines["host"]) == ["gx10", "box"]
    assert texts(lines["steps"]) == ["30", "60 of 200"]
    assert texts(lines["torch"]) == ["2.13.0", "2.13.0"]
    assert texts(lines["precision"]) == ["fp32", "fp32"]
    assert texts(lines["created, UTC"]) == ["2025-10-09 08:53", "2025-10-09 08:53"]
    assert not lines["torch"].differs
    assert lines["host"].differs_at(1)


def test_attempts_and_the_time_between_them_are_told(tmp_path: Path) -> None:
    lines = lines_of(load_run(good_train(tmp_path)), load_run(resumed_run(tmp_path)))
    assert texts(lines["attempts"]) == ["1", "2"]
    assert texts(lines["in steps"]) == ["1m 40s", "1m 40s"]
    assert lines["took"].differs


# Losses


def test_first_last_and_best_losses_are_those_of_the_stream(tmp_path: Path) -> None:
    run = load_run(good_train(tmp_path))
    lines, steps, evals = lines_of(run), run.state.steps, run.state.evals
    for name, label in (("loss", "train"), ("ce", "train ce")):
        column = steps.column(name)
        assert lines[f"{label}, last"].cells[0].value == column[-1]
        best = int(column.argmin())
        assert lines[f"{label}, best"].cells[0].value == column[best]
        assert lines[f"{label}, best"].cells[0].text.endswith(f" at {int(steps.column('step')[best])}")
    assert lines["train, first"].cells[0].value == steps.column("loss")[0]
    assert lines["held-out, first"].cells[0].value == evals[0].loss
    assert lines["held-out ce, last"].cells[0].value == evals[-1].ce
    assert lines["held-out, best"].cells[0].value == min(each.loss for each in evals)
    assert lines["top-1 agreement, best"].cells[0].value == max(each.agreement or 0 for each in evals)


def test_a_spike_is_not_the_best_and_nan_is_not_hidden(tmp_path: Path) -> None:
    spike, nan = load_run(spike_run(tmp_path)), load_run(nan_run(tmp_path))
    lines = lines_of(spike, nan)
    assert lines["train, best"].cells[1].value == np.nanmin(nan.state.steps.column("loss"))
    assert lines["train, last"].cells[1].text == "NaN"
    assert math.isnan(float(lines["train, last"].cells[1].value or 0))
    assert "NaN" in lines["train at step 60, mean of 10"].cells[1].text
    assert lines["train, last"].change(1) is None


def test_losses_are_held_against_each_other_at_the_largest_step_that_all_have(tmp_path: Path) -> None:
    long, short = load_run(good_train(tmp_path, 200)), load_run(good_train(tmp_path, 120))
    lines = lines_of(long, short)
    line = lines["train at step 120, mean of 10"]
    assert line.cells[0].value == pytest.approx(long.state.steps.column("loss")[110:120].mean())
    assert not line.differs, "the two runs made the same 120 steps"
    assert not lines["held-out at step 100"].differs
    assert lines["train, last"].differs


def test_at_equal_tokens_the_run_with_smaller_batches_has_made_more_steps(tmp_path: Path) -> None:
    one, halved = changed(tmp_path, 100), changed(tmp_path, 160, tokens=512)
    line = lines_of(one, halved)["train at 81,920 tokens"]
    first, second = (run.state.steps.column("loss") for run in (one, halved))
    assert line.cells[0].value == pytest.approx(first[70:80].mean())
    assert line.cells[1].value == pytest.approx(second[150:160].mean())
    held = lines_of(one, halved)["held-out by 81,920 tokens"]
    assert [cell.text.partition(" at ")[2] for cell in held.cells] == ["50", "160"]


def test_a_change_is_told_in_parts_of_the_first_run(tmp_path: Path) -> None:
    lines = lines_of(changed(tmp_path), changed(tmp_path, loss_times=1.1))
    line = lines["train, last"]
    assert line.differs_at(1)
    assert line.change(1) == pytest.approx(0.1)
    assert line.change(0) == 0


def test_other_weights_of_the_loss_and_other_data_are_warned_of(tmp_path: Path) -> None:
    plain, hot = changed(tmp_path, 20), changed(tmp_path, 20, temperature=2.0)
    other_text = load_run(good_train(tmp_path, 20, sets=["data.heldout_windows=7"]))

    def note(*runs: LoadedRun) -> str:
        return next(s.note for s in differences(runs, NOW) if s.title.startswith("losses"))

    assert note(plain, plain) == ""
    assert "compare ce" in note(plain, hot)
    assert "of different texts" in note(plain, other_text)


# Verdicts and speed


def test_verdicts_stand_side_by_side_with_glyph_and_word(tmp_path: Path) -> None:
    lines = lines_of(load_run(good_train(tmp_path)), load_run(nan_run(tmp_path)), load_run(good_smoke(tmp_path)))
    assert texts(lines["F-FINITE-001"]) == ["✔ PASS", "✘ FAIL", "✔ PASS"]
    assert texts(lines["F-EXPORT-001"]) == ["✔ PASS", "◌ PENDING", "–"]
    assert [lines["F-EXPORT-001"].differs_at(i) for i in (1, 2)] == [True, True]
    assert texts(lines["F-DISTILL-SMOKE-001"]) == ["–", "–", "✔ PASS"]


def test_runs_of_different_contracts_say_that_a_name_may_mean_another_check(tmp_path: Path) -> None:
    train, smoke = load_run(good_train(tmp_path)), load_run(good_smoke(tmp_path))
    notes = {s.title: s.note for s in differences([train, smoke], NOW)}
    assert "another check" in notes["verdicts"]


def test_speed_leaves_the_first_steps_out(tmp_path: Path) -> None:
    events = [
        msgspec.structs.replace(e, seconds=30.0 if e.step <= 2 else 0.25) if isinstance(e, Step) else e
        for e in train_events(100)
    ]
    run = load_run(make_run(tmp_path, with_verdicts(events, train_contract(), ending(100)), 0, "train"))
    lines = lines_of(run)
    assert lines["steps/s"].cells[0].value == pytest.approx(4.0)
    assert lines["tokens/s"].cells[0].text == "4,096"
    assert lines["memory peak"].cells[0].text == "1.1 GB"


def test_a_projection_is_told_with_its_range(tmp_path: Path) -> None:
    line = lines_of(load_run(good_smoke(tmp_path, 30)))["projection"]
    assert texts(line) == ["6h 56m (6h 40m to 7h 13m)"]


# Whatever it is


@pytest.mark.parametrize("name", READY)
def test_every_kind_of_run_can_be_compared_with_a_good_one(tmp_path: Path, name: str) -> None:
    sections = differences([load_run(good_train(tmp_path / "good")), load_run(READY[name](tmp_path))], NOW)
    assert all(len(line.cells) == 2 for section in sections for line in section.lines)


def test_a_directory_that_is_no_run_is_compared_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    lines = lines_of(load_run(good_smoke(tmp_path)), load_run(tmp_path / "nothing"))
    assert texts(lines["status"])[1] == "? UNREADABLE"
    assert "no manifest" in texts(lines["problem"])[1]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.floats(), st.floats(allow_nan=True), st.integers(-(2**40), 2**40)), min_size=0, max_size=40),
    st.lists(st.floats(), max_size=12),
)
def test_no_number_breaks_the_table(steps: list[tuple[float, float, int]], other: list[float]) -> None:
    def run(rows: Sequence[tuple[float, float, int]]) -> LoadedRun:
        events = [
            msgspec.structs.replace(s, loss=loss, ce=loss, kd=loss, seconds=seconds, tokens=tokens)
            for s, (loss, seconds, tokens) in zip(steps_between(1, len(rows)), rows, strict=False)
            if isinstance(s, Step)
        ]
        return LoadedRun(Path("x"), state=Reducer(train_contract()).feed(stamped([run_event(), *events])))

    sections = differences([run(steps), run([(loss, 0.5, 10) for loss in other])], NOW)
    assert sections
    json.dumps(document([run([]), run([])], sections), allow_nan=False)


def test_numbers_too_large_to_be_summed_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    events = [msgspec.structs.replace(s, tokens=2**62) for s in steps_between(1, 40, lambda step: 1.7e308)[:30]
              if isinstance(s, Step)]  # fmt: skip
    run = LoadedRun(Path("x"), state=Reducer(train_contract()).feed(stamped([run_event(), *events])))
    assert texts(lines_of(run, run)["train, last"]) == ["1.700e+308"] * 2
    assert not recwarn.list


# Out of here


def test_names_are_short_and_never_the_same(tmp_path: Path) -> None:
    runs = [load_run(good_smoke(tmp_path, name=name, created=EPOCH + n)) for n, name in enumerate([None, "a", "a"])]
    first = runs[0].path.name
    assert labels([*runs, runs[0]]) == [first[16:], "a", "a (2)", f"{first[16:]} (2)"]


def test_the_table_as_texts_and_as_a_file_has_a_column_a_run(tmp_path: Path) -> None:
    runs = [load_run(good_train(tmp_path, name='a "b",\nc')), load_run(failed_checkpoint_run(tmp_path))]
    sections = differences(runs, NOW)
    table = rows(runs, sections)
    assert table[0] == ["section", "what", 'a "b",\\x0ac', "full disk"]
    assert all(len(row) == 4 for row in table)
    written = list(csv.reader(io.StringIO(as_csv(runs, sections))))
    assert len(written) == len(table)
    last = next(row for row in written if row[1] == "train, last")
    assert float(last[2]) == runs[0].state.steps.column("loss")[-1], "a file has every digit"


def test_a_program_gets_plain_values_and_what_differs(tmp_path: Path) -> None:
    runs = [load_run(good_train(tmp_path)), load_run(nan_run(tmp_path))]
    told = json.loads(json.dumps(document(runs, differences(runs, NOW)), allow_nan=False))
    assert told["schema"] == "kdconsole.compare/1"
    lines = {line["label"]: line for section in told["sections"] for line in section["lines"]}
    assert lines["status"] == {"label": "status", "values": ["COMPLETED", "FAILED"], "differs": True}
    assert lines["train, last"]["values"][1] == "NaN"
    assert [run["path"] for run in told["runs"]] == [str(run.path) for run in runs]


def test_nan_is_like_nan() -> None:
    line = Line("x", (Cell("NaN", math.nan), Cell("NaN", float(np.nan)), Cell("1", 1.0)))
    assert [line.differs_at(i) for i in (1, 2)] == [False, True]


def test_the_run_event_decides_on_the_weights_and_not_the_name(tmp_path: Path) -> None:
    run = changed(tmp_path, 20)
    assert isinstance(run.state.run, Run)
    assert run.state.run.temperature == 4.0
