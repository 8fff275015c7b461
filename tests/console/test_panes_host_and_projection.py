"""The panes of the machine and of the projection: what is not given is not made up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from console.run_state import Reducer
from console.view import Link, View
from console.widgets.pane import Pane
from console.widgets.projection import ProjectionPane, elapsed, projection_lines
from console.widgets.vitals import VitalsPane, vitals_lines
from engine.stream import Phase, Vitals
from tests.console.desk_app import shown
from tests.console.pane_views import (
    HOSTILE,
    SHAPES,
    Host,
    ended,
    heartbeat,
    numbered,
    train_events,
    view_of,
    vitals,
)
from tests.streams import RUN, end_event, run_event, smoke_contract, smoke_events

EVENTS = train_events(1_250)


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def with_vitals(after: float = 2.0, **changes: object) -> View:
    t = EVENTS[-1].t
    return view_of(numbered([*EVENTS, heartbeat(t), vitals(t=t, **changes)]), after)


def host(view: View, width: int = 60) -> list[str]:
    return [" ".join(line.plain.split()).replace("█", "").replace("─", "") for line in vitals_lines(view, width)]


def row(view: View, name: str, width: int = 60) -> str:
    return next(line for line in host(view, width) if line.startswith(name))


# The host


def test_unified_memory_is_the_hosts_and_says_so() -> None:
    view = with_vitals()
    assert row(view, "GPU").endswith("97 % 71 °C 64 W")
    assert row(view, "mem").endswith("61.2 / 128.5 GB unified")
    assert row(view, "cpu").endswith("14 %")
    assert row(view, "disk").endswith("412 GB free")
    assert row(view, "trainer").endswith("2.1 GB resident")
    assert row(view, "unified", 28).endswith("61.2 / 128.5 GB")


def test_a_device_with_memory_of_its_own_has_its_own_line() -> None:
    own = {"unified_memory": False, "gpu_memory_used_bytes": 78_000_000_000, "gpu_memory_total_bytes": 80_000_000_000}
    view = with_vitals(**own)
    assert row(view, "GPU mem").endswith("78.0 / 80.0 GB ⚠ nearly full")
    assert row(view, "host mem").endswith("61.2 / 128.5 GB")


def test_the_trainers_own_figures_stand_in_where_vitals_give_none() -> None:
    t = EVENTS[-1].t
    beat = heartbeat(t, device_used_bytes=4_000_000_000, device_total_bytes=16_000_000_000)
    view = view_of(numbered([*EVENTS, beat]), 2)
    assert row(view, "GPU mem").endswith("4.0 / 16.0 GB")
    assert row(view, "host mem").endswith("67.3 GB free")


def test_what_is_not_given_is_not_zero() -> None:
    view = view_of(numbered([*EVENTS, Vitals(t=EVENTS[-1].t)]), 2)
    for name in ("GPU", "GPU mem", "cpu", "disk"):
        assert row(view, name) == f"{name} n/a"
    assert not any(" 0" in line for line in host(view))


def test_numbers_that_are_none_are_not_given_either() -> None:
    view = with_vitals(gpu_percent=math.nan, gpu_temperature_c=math.inf, gpu_power_watts=None, cpu_percent=math.nan)
    assert row(view, "GPU") == "GPU n/a"
    assert row(view, "cpu") == "cpu n/a"


def test_a_disk_that_is_nearly_full_is_told_by_a_word() -> None:
    assert row(with_vitals(disk_free_bytes=30_000_000_000), "disk").endswith("30.0 GB free ⚠ low")


def test_old_figures_tell_their_age_and_those_of_a_past_run_that_it_is_over() -> None:
    assert "old" not in " ".join(host(with_vitals(20)))
    assert host(with_vitals(240))[0] == "⚠ figures are 4 min old"
    assert host(ended(with_vitals(), status="lost"))[0] == "last figures of a run that is over"
    view = with_vitals()
    past = replace(view, state=view.state.at(view.state.last_t - 100), now=view.state.last_t - 100, scrubbed=True)
    assert host(past) == ["Figures of the host are not kept for the past."]
    assert host(View()) == ["No figures of the host yet."]


def test_in_a_low_pane_what_is_unknown_goes_first() -> None:
    view = with_vitals(gpu_percent=None, gpu_temperature_c=None, gpu_power_watts=None, cpu_percent=None)
    names = [line.plain.split()[0] for line in vitals_lines(view, 60, 3)]
    assert names == ["mem", "disk", "trainer"]
    assert [line.plain.split()[0] for line in vitals_lines(view, 60, 5)] == ["GPU", "mem", "cpu", "disk", "trainer"]


def test_where_no_share_is_known_no_room_is_kept_for_bars() -> None:
    lines = [line.plain for line in vitals_lines(view_of(numbered([*EVENTS, heartbeat(EVENTS[-1].t)])), 60)]
    assert {line.index("n/a") for line in lines if "n/a" in line} == {10}


def test_bars_stand_in_one_column() -> None:
    lines = [line.plain for line in vitals_lines(with_vitals(), 60)]
    starts = {min(line.find(c) for c in "█─▏▎▍▌▋▊▉" if c in line) for line in lines if "█" in line or "─" in line}
    assert len(starts) == 1


numbers = st.none() | st.floats()
counts = st.none() | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=80, deadline=None)
@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(*[counts] * 6), st.booleans(), st.integers(1, 80))
def test_whatever_a_host_tells_the_lines_fit(
    shares: tuple[float | None, ...], sizes: tuple[int | None, ...], unified: bool, width: int
) -> None:
    names = ("cpu_percent", "gpu_percent", "gpu_temperature_c", "gpu_power_watts")
    more = ("host_total_bytes", "host_free_bytes", "disk_free_bytes", "disk_total_bytes")
    more += ("gpu_memory_used_bytes", "gpu_memory_total_bytes")
    event = vitals(
        **dict(zip(names, shares, strict=True)), **dict(zip(more, sizes, strict=True)), unified_memory=unified
    )
    state = replace(UNTOLD.state, vitals=event)
    assert all(cell_len(line.plain) <= width for line in vitals_lines(replace(UNTOLD, state=state), width))


UNTOLD = view_of(EVENTS)


# The projection


def told(view: View, width: int = 60) -> list[str]:
    return [" ".join(line.plain.split()) for line in projection_lines(view, width)]


SAID = (6_400.0, 6_600.0, 6_900.0)


def test_what_the_smoke_said_stands_over_what_it_really_takes() -> None:
    lines = told(replace(view_of(EVENTS), smoke_seconds=SAID))
    assert lines[0] == "smoke said 1h 50m (1h 46m to 1h 55m)"
    assert lines[1].startswith("now 1h 50m")
    assert lines[1].endswith("%")
    assert lines[2].startswith("ends Thu 10:4")
    assert "elapsed 27m 46s" in lines


def test_the_total_is_what_passed_and_what_is_left() -> None:
    slow = replace(view_of(EVENTS), smoke_seconds=(3_000.0, 3_300.0, 3_600.0))
    percent = float(told(slow)[1].rpartition("+")[2].removesuffix("%"))
    assert percent == pytest.approx(100, abs=2)


def test_without_a_smoke_it_says_what_to_run() -> None:
    text = " ".join(told(view_of(EVENTS)))
    assert "No smoke of this configuration was found." in text
    assert "kdconsole --headless smoke CONFIG" in text
    assert "now" in text


def test_a_run_that_is_over_is_told_of_no_smoke_to_make() -> None:
    text = " ".join(told(ended(view_of(EVENTS), status="lost")))
    assert "No smoke of this configuration was found to hold it against." in text
    assert "kdconsole" not in text


def test_a_run_that_is_over_took_what_it_took() -> None:
    end = msgspec.structs.replace(end_event(1_250), run=RUN, seq=10**6, t=EVENTS[-1].t, seconds=6_660.0)
    whole = train_events(50, target_steps=50)
    over = ended(view_of([*whole, end]))
    assert told(replace(over, smoke_seconds=SAID))[1] == "took 1h 51m +0.9 %"
    early = told(replace(ended(view_of([*EVENTS, end])), smoke_seconds=SAID))
    assert early[1:] == ["took 1h 51m", "It ended after 1,250 of 5,000 steps."]


def test_the_time_between_two_attempts_is_not_elapsed() -> None:
    first = train_events(100)
    t = first[-1].t + 86_400
    again = run_event(attempt=2, mode="train", target_steps=5_000, t=t + 1)
    view = view_of(numbered([*first, Phase(name="import", t=t), again, heartbeat(t + 20)]), 5)
    assert elapsed(view) == pytest.approx(first[-1].t - first[0].t + 25)


def test_a_smoke_shows_the_projection_that_it_makes() -> None:
    state = Reducer(smoke_contract()).feed(smoke_events(12))
    going = View(state=state, link=Link(status="running", heard=state.last_t), now=state.last_t)
    assert told(going) == [
        "real run 50,000 steps",
        "takes 6h 56m (6h 40m to 7h 13m)",
        "a step 0.5 s median of 10",
        "around them 30.0 s",
    ]
    early = replace(state, projection=None)
    assert told(replace(going, state=early))[0].startswith("This smoke projects the real run")
    assert "it ends in" in " ".join(told(replace(going, state=early)))
    over = replace(going, state=replace(early, end=msgspec.structs.replace(end_event(4), t=state.last_t)))
    assert "before it could project anything" in " ".join(told(over))


def test_before_ten_steps_nothing_is_promised() -> None:
    assert "Nothing can be projected yet" in " ".join(told(View()))
    assert not any(line.startswith(("now", "ends")) for line in told(view_of(train_events(9))))


def test_a_stalled_run_promises_nothing_for_certain() -> None:
    assert "while it stands still" in " ".join(told(view_of(EVENTS, 300)))


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("kind", [VitalsPane, ProjectionPane])
def test_they_show_what_they_can_in_any_shape(kind: type[Pane], width: int, height: int) -> None:
    async def scenario() -> None:
        pane = kind()
        app = Host(pane)
        async with app.run_test(size=(width, height)) as pilot:
            pane.show(replace(with_vitals(), smoke_seconds=SAID))
            await pilot.pause()
            first = "97 %" if kind is VitalsPane else "1h 50m"
            assert first in shown(app)
            assert first in pane.copy_text()
            await pilot.resize_terminal(5, 3)
            await pilot.pause()

    asyncio.run(scenario())


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_of_hosts_stay_texts(hostile: str) -> None:
    async def scenario() -> None:
        pane = VitalsPane()
        app = Host(pane)
        async with app.run_test(size=(200, 10)) as pilot:
            pane.show(view_of(train_events(3, host=hostile)))
            await pilot.pause()
            if len(hostile) < 20:
                assert f"Host  {hostile}" in shown(app).splitlines()[0]

    asyncio.run(scenario())
