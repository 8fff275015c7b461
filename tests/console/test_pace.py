"""How fast a run is, on the screen and in every report: with its basis, within bounds, and nothing made up."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from console.differences import differences
from console.efficiency import document, facts
from console.forecast import forecast
from console.kept_pace import MOST, Pace
from console.long_work import work
from console.outlook import fraction_done, host_now, outlook
from console.report import Result, show
from console.report import document as result_document
from console.review.document import document as review_document
from console.review.past import review
from console.review.text import show as show_review
from console.run_reader import load_run
from console.run_report import as_html, as_markdown, as_svg
from console.run_report.gather import report_of
from console.run_state import Reducer, RunState
from console.view import View
from console.widgets.headline import head_lines
from console.widgets.projection import projection_lines
from dispatch.liveness import OTHER_PHASE_SECONDS
from engine.errors import ExitCode
from engine.falsifiers import parse_contract
from engine.human import human_lines
from engine.stream import Efficiency, End, Phase, Progress
from tests.console.pace_runs import CODER, H100, PEAK, RUN, SPLIT, fast_run, prepare_events, with_pace
from tests.console.pane_views import ended, heartbeat, numbered, train_events, view_of
from tests.console.run_dirs import good_train
from tests.streams import EPOCH, end_event, run_event, smoke_contract, stamped, step_event


def window(**changes: Any) -> Efficiency:
    told = Efficiency(
        step=10,
        steps=10,
        tokens_per_second=64_000.0,
        mfu=0.391,
        flops_per_token=6.05e9,
        peak_flops=989.5e12,
        peak_source="a data sheet",
        formula=CODER.formula,
        split={"teacher": 0.05, "student": 0.05, "other": 0.025},
    )
    return msgspec.structs.replace(told, **changes)


def progress(done: int, seconds: float, **changes: Any) -> Progress:
    told = Progress(done=done, total=1_000, unit="windows", seconds=seconds, t=EPOCH + seconds)
    return msgspec.structs.replace(told, **changes)


def reduced(*events: Any) -> RunState:
    return Reducer(smoke_contract()).feed(stamped(list(events)))


def projection(view: View, width: int = 76, height: int = 30) -> dict[str, str]:
    """The pane's lines by what they are about."""
    lines = [line.plain for line in projection_lines(view, width, height)]
    return {line[:12].strip(): line[12:].strip() for line in lines}


FAST = view_of(numbered(with_pace(train_events(300, **RUN))))


# The state


def test_the_last_window_is_what_is_known_and_all_of_them_make_the_mean() -> None:
    state = reduced(run_event(), window(steps=10), window(step=40, steps=30, tokens_per_second=32_000.0, mfu=0.2))
    assert state.efficiency is not None
    assert (state.efficiency.step, state.efficiency.tokens_per_second) == (40, 32_000)
    mean = state.pace.mean
    assert mean is not None
    assert mean.steps == 40
    assert mean.tokens_per_second == pytest.approx((64_000 + 3 * 32_000) / 4)
    assert mean.mfu == pytest.approx((0.391 + 3 * 0.2) / 4)
    assert (mean.formula, mean.split) == (
        CODER.formula,
        pytest.approx({"teacher": 0.05, "student": 0.05, "other": 0.025}),
    )


def test_speed_is_weighted_by_time_and_a_split_by_steps() -> None:
    slow = window(steps=10, tokens_per_second=10.0, split={"teacher": 3.0, "data": 1.0})
    fast = window(steps=30, tokens_per_second=30.0, split={"teacher": 1.0})
    mean = reduced(run_event(), slow, fast).pace.mean
    assert mean is not None
    assert mean.tokens_per_second == pytest.approx((40 * 10 + 30 * 30) / 70)
    assert mean.split == {"teacher": 1.5, "data": 0.25}


def test_without_one_peak_there_is_no_mean_utilisation() -> None:
    mean = reduced(run_event(), window(), window(mfu=None, peak_flops=None)).pace.mean
    assert mean is not None
    assert mean.mfu is None


def test_a_run_that_tells_nothing_of_its_speed_has_none() -> None:
    state = reduced(run_event(), Phase(name="train"), step_event(1, 4.0))
    assert (state.efficiency, state.pace.mean, state.progress) == (None, None, None)


def test_at_an_earlier_moment_only_what_was_told_by_then_is_known() -> None:
    events = numbered([*prepare_events(5), *(window(step=10 * k, t=EPOCH + 100 + 10 * k) for k in range(1, 4))])
    state = Reducer(smoke_contract()).feed(events)
    past = state.at(EPOCH + 125)
    assert past.efficiency is not None
    assert past.efficiency.step == 20
    assert [w.step for w in past.pace.windows] == [10, 20]
    assert state.at(EPOCH + 50).efficiency is None
    earlier = state.at(EPOCH + 30).progress
    assert earlier is not None
    assert earlier.done == 128


def test_however_long_a_run_is_its_windows_stay_few_and_their_means_what_they_were() -> None:
    count = 20_000
    pace = Pace()
    for k in range(1, count + 1):
        pace = pace.then(window(step=20 * k, steps=20, tokens_per_second=1_000.0 + k % 7, t=EPOCH + 10.0 * k))
        assert len(pace.windows) <= 2 * MOST
    mean = pace.mean
    assert mean is not None
    assert (mean.steps, mean.step) == (20 * count, 20 * count)
    assert mean.tokens_per_second == pytest.approx(sum(1_000 + k % 7 for k in range(1, count + 1)) / count)
    assert sum(w.steps for w in pace.windows) == 20 * count
    # As evenly as at first, so that an early moment can be looked at as well as a late one.
    assert max(w.steps for w in pace.windows) < 4 * 20 * count / MOST


def test_however_many_reports_come_those_that_stay_are_spread_over_the_time() -> None:
    count = 20_000
    pace = Pace()
    for k in range(1, count + 1):
        pace = pace.then(progress(k, 10.0 * k))
    assert len(pace.reports) <= 2 * MOST
    assert pace.reports[-1].done == count
    gaps = [b.t - a.t for a, b in itertools.pairwise(pace.reports)]
    assert max(gaps) < 4 * 10 * count / MOST


numbers = st.floats() | st.sampled_from([0.0, -1.0, 1e308])


@settings(max_examples=100, deadline=None)
@given(
    numbers,
    st.none() | numbers,
    st.none() | numbers,
    numbers,
    st.integers(-(2**63), 2**63 - 1),
    st.dictionaries(st.text(max_size=60), numbers, max_size=20),
    st.integers(1, 90),
)
@example(1.0, None, None, 1.0, 1, {"⼀" * 3: 1.0, "漢字漢字": 1.0, "data": 1.0, "other": 1.0}, 25)
def test_whatever_is_told_the_lines_fit_and_nothing_fails(
    rate: float, mfu: float | None, peak: float | None, flops: float, steps: int, split: dict[str, float], width: int
) -> None:
    odd = window(
        tokens_per_second=rate, mfu=mfu, peak_flops=peak, flops_per_token=flops, steps=steps, split=split,
        formula="x" * 9_000, peak_source="漢字\u202e\n" * 900,
    )  # fmt: skip
    state = Reducer(smoke_contract()).feed(numbered([run_event(t=EPOCH), odd, odd]))
    view = View(state=state, now=EPOCH + 1)
    for over in (view, replace(view, state=replace(state, end=end_event()))):
        lines = projection_lines(over, width, 12)
        assert all(cell_len(line.plain) <= width for line in lines)
    assert human_lines(odd, None)
    json.dumps(document(state.pace.mean), allow_nan=False)
    assert facts(state.pace.mean)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-5, 2**62), numbers, st.none() | numbers), min_size=1, max_size=6),
    st.integers(-5, 2**62),
    st.integers(20, 90),
)
def test_whatever_work_tells_the_lines_fit_and_nothing_fails(
    told: list[tuple[int, float, float | None]], total: int, width: int
) -> None:
    events = [Progress(done=d, total=total, unit="\x1b[31mw" * 20, seconds=s, seconds_left=left) for d, s, left in told]
    state = reduced(run_event(mode="prepare", target_steps=0), Phase(name="store"), *events)
    view = View(state=state, now=state.last_t)
    for line in (*projection_lines(view, width), *head_lines(view, width)):
        assert cell_len(line.plain) <= width
        assert "\x1b" not in line.plain
    done = fraction_done(view)
    assert done is None or 0 <= done <= 1
    for event in events:
        assert human_lines(event, None)


# The pane


def test_the_pane_tells_speed_utilisation_with_its_basis_and_the_split() -> None:
    told = projection(FAST)
    assert told["speed"] == "65,536 tokens/s 125 ms/step"
    assert told["MFU"] == "40.1 % of 989.5 TFLOP/s"
    assert told["counted"] == "6 x 0.494 B + 2 x 1.544 B = 6.05 GFLOP a token"
    assert told["peak"] == "NVIDIA H100 data sheet, SXM, dense bf16"
    lines = [line.plain for line in projection_lines(FAST, 76)]
    at = next(n for n, line in enumerate(lines) if line.startswith("data"))
    assert lines[at].split() == [*SPLIT, "other"]
    assert lines[at + 1].split() == ["1%", "22%", "16%", "18%", "35%", "5%", "3%"]


def test_in_forty_cells_the_parts_have_short_names_and_in_thirty_the_largest_stand_first() -> None:
    narrow = [line.plain for line in projection_lines(FAST, 40)]
    assert "data teach stud loss back optim other" in narrow
    assert any(line.startswith("backward 35%, teacher 22%") for line in (p.plain for p in projection_lines(FAST, 30)))


def test_where_no_peak_is_known_utilisation_is_not_given() -> None:
    view = view_of(numbered(with_pace(train_events(300, **RUN), None)))
    assert projection(view)["MFU"] == f"n/a no peak is known of {H100}"
    assert projection(view)["speed"].startswith("65,536 tokens/s")
    assert "peak" not in projection(view)


def test_in_a_low_pane_when_it_ends_comes_first_then_speed_then_the_rest() -> None:
    view = replace(FAST, smoke_seconds=(500.0, 600.0, 700.0))
    names = [[line.plain.split()[0] for line in projection_lines(view, 40, height)] for height in (3, 5, 8)]
    assert names[0] == ["smoke", "now", "ends"]
    assert names[1] == ["smoke", "now", "ends", "speed", "MFU"]
    assert names[2] == ["smoke", "now", "ends", "speed", "MFU", "data", "1%", "elapsed"]


def test_while_it_goes_on_the_last_window_is_told_and_of_a_run_that_is_over_the_mean() -> None:
    events = [*with_pace(train_events(300, **RUN)), window(step=300, steps=1, tokens_per_second=1_000.0)]
    view = view_of(numbered(events))
    assert projection(view)["speed"].startswith("1,000 tokens/s")
    over = ended(view_of(numbered([*events, end_event(300, t=EPOCH + 1_000)])))
    assert projection(over)["speed"].startswith("65,")


def test_a_run_that_tells_no_speed_looks_as_before() -> None:
    told = projection(view_of(train_events(300)))
    assert not {"speed", "MFU", "counted", "peak"} & told.keys()
    assert "a step" in told


# Work without steps


def prepared(reports: int, after: float = 3.0, **changes: Any) -> View:
    return view_of(prepare_events(reports, **changes), after)


def test_the_head_tells_how_far_work_without_steps_has_come_and_when_it_ends() -> None:
    first, second, *_ = [line.plain for line in head_lines(prepared(64), 120)]
    assert "store 4,096 / 8,192 windows" in first
    assert "50 %" in second
    assert "ETA 10m 37s" in second  # 640 s from the last report, three seconds ago
    assert fraction_done(prepared(64)) == 0.5


def test_the_pane_tells_done_rate_and_time_left_of_it() -> None:
    told = projection(prepared(64))
    assert told["done"] == "4,096 of 8,192 windows"
    assert told["speed"] == "6.4 windows/s"
    assert told["time left"] == "10m 37s"
    assert "elapsed" in told
    assert "smoke" not in " ".join(told)


def test_before_the_first_report_nothing_is_made_up() -> None:
    view = prepared(0)
    assert list(projection(view)) == ["elapsed"]
    assert fraction_done(view) is None
    assert forecast(view) is None
    assert "ETA" not in " ".join(line.plain for line in head_lines(view, 120))


def test_the_rate_is_that_of_the_last_minute_of_this_attempt() -> None:
    def rate(*reports: Progress) -> float | None:
        state = reduced(run_event(mode="prepare"), *reports)
        made = work(View(state=state), state.last_t)
        assert made is not None
        return made.rate

    assert rate(progress(10, 1.0)) is None
    assert rate(progress(10, 1.0), progress(30, 11.0)) == 2.0
    slower = [progress(100 * k, 10.0 * k) for k in range(1, 11)]
    assert rate(*slower, *(progress(1_000 + k, 100.0 + 60.0 * k) for k in (1, 2))) == pytest.approx(1 / 60)
    # A later attempt goes on from what is stored, and its clock begins anew.
    assert rate(progress(500, 100.0), progress(500, 0.5), progress(510, 10.5)) == 1.0
    assert rate(progress(500, 100.0), progress(500, 0.5)) is None


def test_work_that_tells_of_itself_is_late_only_when_it_stops_telling() -> None:
    reports = int(2 * OTHER_PHASE_SECONDS / 10)
    view = prepared(reports, total=100_000)
    assert host_now(view) - view.state.phases[-1].started > 1.5 * OTHER_PHASE_SECONDS
    assert outlook(view).status == "RUNNING"
    late = OTHER_PHASE_SECONDS + 10
    beats = [heartbeat(EPOCH + 36 + k, phase="store") for k in range(0, int(late), 5)]
    silent = outlook(view_of(numbered([*prepare_events(3), *beats]), 1))
    assert silent.status == "STALLED"
    assert silent.alarm[0] == "no progress for 30 min"


def test_steps_put_an_end_to_what_was_told_of_work_before_them() -> None:
    before = reduced(run_event(), Phase(name="load-data"), progress(10, 1.0, t=0.0))
    assert work(View(state=before), before.last_t) is not None
    later = reduced(run_event(), progress(10, 1.0, t=0.0), Phase(name="train"), step_event(1, 4.0))
    assert work(View(state=later), later.last_t) is None
    assert projection(View(state=later, now=later.last_t)).get("done") is None


def test_what_is_done_when_it_ended_is_still_told() -> None:
    end = End(status="STOPPED", reason="SIGINT", exit_code=130, steps=0, seconds=650.0, t=EPOCH + 650)
    view = ended(view_of(numbered([*prepare_events(64), end])))
    told = projection(view)
    assert told["done"] == "4,096 of 8,192 windows"
    assert "time left" not in told
    assert told["took"] == "10m 50s"
    assert "4,096 / 8,192 windows" in head_lines(view, 120)[0].plain


# Log lines


def test_human_lines_tell_speed_and_progress_in_words_to_grep_for() -> None:
    assert human_lines(window(), None) == [
        "  Speed at step 10: 64,000 tokens/s, MFU 39.1% of 989.5 TFLOP/s; "
        "ms a step: teacher 50.0, student 50.0, other 25.0"
    ]
    assert human_lines(window(mfu=None, peak_flops=None, split={}), None) == ["  Speed at step 10: 64,000 tokens/s"]
    assert human_lines(progress(250, 9.0, seconds_left=27.0), None) == ["  250/1000 windows (25.0%), 27 s left"]
    assert human_lines(progress(3, 9.0, total=0), None) == ["  3/0 windows"]


# Reports


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_run(tmp_path_factory.mktemp("pace"))


EXPLAINED = ("40.1%", "989.5 TFLOP/s", "NVIDIA H100 data sheet, SXM", "6 x 0.494 B + 2 x 1.544 B = 6.05 GFLOP a token")


def told_by(show_it: Any, *arguments: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_it(*arguments, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_review_tells_it_to_people_and_to_programs(fast: Path) -> None:
    reviewed = review(load_run(fast), ())
    text = told_by(show_review, reviewed)
    for words in (*EXPLAINED, "125 ms: data 1%, teacher 22%, student 16%"):
        assert words in text
    told = json.loads(json.dumps(review_document(reviewed)))["efficiency"]
    assert told["mfu"] == pytest.approx(65_536 * 6.05e9 / 989.5e12)
    assert told["peak_source"] == "NVIDIA H100 data sheet, SXM, dense bf16"
    assert told["split"]["teacher"] == pytest.approx(0.22 * 0.125)
    assert told["split"]["other"] == pytest.approx(0.03 * 0.125)
    assert (told["formula"], told["flops_per_token"], told["peak_flops"]) == (CODER.formula, 6.05e9, 989.5e12)


def test_the_conclusion_of_a_headless_run_tells_it(fast: Path) -> None:
    loaded = load_run(fast)
    result = Result("id", "train", loaded.state, ExitCode.OK, "COMPLETED", "done", fast, 0.1)
    text = told_by(show, result)
    assert all(words in text for words in EXPLAINED)
    assert result_document(result)["efficiency"]["tokens_per_second"] == pytest.approx(65_536)


def test_a_report_explains_the_figure_in_every_format(fast: Path) -> None:
    report = report_of(load_run(fast))
    assert ("MFU", "40.1%") in [(name, said.text) for name, said in report.summary]
    for form in (as_html, as_markdown, as_svg):
        text = form.document(report)
        for words in EXPLAINED:
            assert words in text, form.__name__
        assert "teacher 22%" in text
    text = as_markdown.document(report)
    assert "MFU = tokens/s x FLOP a token / peak." in text
    assert "no embedding look-up" in text
    assert "| teacher | 27.5 ms | 22.0% |" in text


def test_runs_are_compared_by_it(fast: Path, tmp_path: Path) -> None:
    slow = fast_run(tmp_path, peak=None, name="slow")
    runs = [load_run(fast), load_run(slow), load_run(good_train(tmp_path))]
    lines = {line.label: line for section in differences(runs, 0.0) for line in section.lines}
    assert [cell.text for cell in lines["MFU"].cells] == ["40.1%", "–", "–"]
    assert lines["MFU"].measured
    assert [cell.text for cell in lines["a step: teacher"].cells] == ["27.5 ms", "27.5 ms", "–"]
    assert lines["counted"].cells[0].text == "6 x 0.494 B + 2 x 1.544 B = 6.05 GFLOP a token"
    assert lines["MFU is of"].cells[0].text == "989.5 TFLOP/s (NVIDIA H100 data sheet, SXM, dense bf16)"


def test_of_a_run_that_tells_nothing_of_it_nothing_is_said(tmp_path: Path) -> None:
    loaded = load_run(good_train(tmp_path))
    reviewed = review(loaded, ())
    assert review_document(reviewed)["efficiency"] is None
    assert "MFU" not in told_by(show_review, reviewed)
    report = report_of(loaded)
    assert report.section("efficiency") is None
    assert "MFU" not in as_html.document(report) + as_svg.document(report)


def test_a_number_that_is_none_is_not_given(tmp_path: Path) -> None:
    assert PEAK is not None
    nan = document(window(tokens_per_second=math.nan, mfu=math.inf, flops_per_token=math.nan))
    assert nan is not None
    assert (nan["tokens_per_second"], nan["mfu"], nan["flops_per_token"]) == (None, None, None)


# Falsifiers


def test_a_contract_may_look_at_speed_and_utilisation() -> None:
    text = """
version: 1
name: mine
falsifiers:
  - {id: F-FAST-001, kind: threshold, claim: it is used, metric: efficiency.mfu, at_least: 0.4, over: last}
  - {id: F-FAST-002, kind: threshold, claim: it is fast, metric: efficiency.tokens_per_second, at_least: 70000}
  - {id: F-FAST-003, kind: present, claim: it is told, metrics: [efficiency.mfu]}
"""
    events = [run_event(), window(mfu=0.5), window(step=20, mfu=0.3), Phase(name="judge", detail="steps")]
    for peak, words in ((True, ["FAIL", "FAIL", "PASS"]), (False, ["UNKNOWN", "FAIL", "UNKNOWN"])):
        told = [e if peak or not isinstance(e, Efficiency) else msgspec.structs.replace(e, mfu=None) for e in events]
        state = Reducer(parse_contract(text, "mine.yaml")).feed(stamped(told))
        assert [v.verdict for v in state.judged] == words


def test_how_far_work_has_come_changes_no_verdict() -> None:
    text = "{version: 1, name: mine, falsifiers: [{id: F-STALL-001, kind: no_stall, claim: it goes on, seconds: 30}]}"
    verdicts = []
    for told in ([], [progress(1, 1.0, t=EPOCH + 500)]):
        events = [run_event(t=EPOCH), Phase(name="store", t=EPOCH + 1), *told, Phase(name="train", t=EPOCH + 2)]
        verdicts.append(Reducer(parse_contract(text, "mine.yaml")).feed(numbered(events)).judged)
    assert verdicts[0] == verdicts[1]
