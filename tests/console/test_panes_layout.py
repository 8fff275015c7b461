"""Text that fits: parts that give way, cuts by cells, bars, numbers."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.content import Content
from textual.widget import Widget

from console.widgets.layout import Part, bar, cut, fit, flowed, number, padded, short_step, size, wrapped
from console.widgets.projection import ProjectionPane
from console.widgets.verdicts import Verdicts
from tests.console.pane_views import HOSTILE, Host

texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60) | st.sampled_from(HOSTILE)
widths = st.integers(0, 80)


def line(parts: list[Part], right: list[Part], width: int) -> str:
    return fit(parts, right, width, 2).plain


@given(texts, widths)
def test_a_cut_text_never_takes_more_cells_than_it_may(text: str, width: int) -> None:
    content = Content(text)
    short = cut(content, width)
    assert cell_len(short.plain) <= width
    assert short.plain == content.plain if content.cell_length <= width else short.plain[-1:] in ("…", "")
    assert cell_len(padded(content, width).plain) == width


def test_a_cut_text_keeps_its_style_to_the_end() -> None:
    short = cut(Content.styled("no step for 4 min", "reverse"), 8)
    assert short.plain == "no step…"
    assert [(span.start, span.end) for span in short.spans] == [(0, 8)]


@given(st.lists(texts, max_size=8), st.integers(1, 80))
def test_parts_flow_into_lines_that_fit(parts: list[str], width: int) -> None:
    assert all(line.cell_length <= width for line in flowed([Content(part) for part in parts], width))


def test_lines_of_parts_are_broken_between_parts() -> None:
    parts = [Content(part) for part in ("12,000", "988 MB", "291 tensors", "verified")]
    assert [line.plain for line in flowed(parts, 22)] == ["12,000 · 988 MB", "291 tensors · verified"]


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "nord", "solarized-dark", "kdconsole-light"])
@pytest.mark.parametrize("kind", [Verdicts, ProjectionPane])
def test_frames_are_seen_in_every_theme(kind: type[Widget], theme: str) -> None:
    async def scenario() -> None:
        pane = kind()
        pane.can_focus = False
        app = Host(pane, theme)
        async with app.run_test(size=(40, 6)) as pilot:
            await pilot.pause()
            ground = pane.background_colors[1]
            line = ground + pane.styles.border_top[1]
            assert abs(line.brightness - ground.brightness) * 255 > 30

    asyncio.run(scenario())


@given(texts, st.integers(1, 80))
def test_wrapped_lines_fit(text: str, width: int) -> None:
    assert all(cell_len(each.plain) <= width for each in wrapped(text, width, "    "))


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(texts, max_size=3)), max_size=5), texts, widths)
def test_a_line_of_parts_is_as_wide_as_it_is_to_be(parts: list[tuple[int, list[str]]], last: str, width: int) -> None:
    left = [Part.of(keep, *forms) for keep, forms in parts]
    made = fit(left, [Part.of(5, last, least=4)], width, 3)
    assert cell_len(made.plain) == width


def test_the_least_important_part_gives_way_first() -> None:
    left = [Part.of(1, "product"), Part.of(9, "STALLED")]
    right = [Part.of(5, "step 1,200 of 5,000", "step 1,200")]
    assert line(left, right, 40) == "product  STALLED     step 1,200 of 5,000"
    assert line(left, right, 32) == "STALLED      step 1,200 of 5,000"
    assert line(left, right, 22) == "STALLED     step 1,200"
    assert line(left, right, 16) == "STALLED         "
    assert line(left, right, 5) == "STAL…"


def test_a_part_that_stays_is_cut_and_grows_back_when_others_go() -> None:
    left, right = [Part.of(2, "connection refused by the host", least=10)], [Part.of(8, "UNREACHABLE")]
    assert line(left, right, 30) == "connection refus…  UNREACHABLE"
    assert line(left, right, 18) == "connection refuse…"


def test_a_part_with_two_equal_forms_ends() -> None:
    assert line([Part.of(1, "same", "same"), Part.of(2, "other")], [], 6) == "other "


@pytest.mark.parametrize(
    ("fraction", "width", "drawn"),
    [
        (0.0, 4, "────"),
        (1.0, 4, "████"),
        (0.5, 4, "██──"),
        (1 / 32, 4, "▏───"),
        (0.47, 4, "█▉──"),
        (7.0, 3, "███"),
        (-1.0, 3, "───"),
        (math.nan, 3, "───"),
        (math.inf, 3, "───"),
        (0.5, 0, ""),
        (0.5, -3, ""),
    ],
)
def test_bars_are_drawn_to_an_eighth_of_a_cell(fraction: float, width: int, drawn: str) -> None:
    assert "".join(bar(fraction, width)) == drawn


def test_losses_have_four_digits() -> None:
    assert [number(x) for x in (10.95, 3.95, 0.0123, 123.456, 0.0)] == ["10.95", "3.950", "0.01230", "123.5", "0.000"]
    assert [number(x) for x in (math.nan, math.inf, -math.inf, 1e-9)] == ["NaN", "inf", "-inf", "1.000e-09"]


def test_bytes_are_told_in_decimal_units() -> None:
    told = [size(n) for n in (512, 988_097_824, 61_200_000_000, 412_000_000_000, 1_950_000_000_000, -5_000)]
    assert told == ["512 B", "988 MB", "61.2 GB", "412 GB", "1.95 TB", "-5 kB"]


def test_steps_are_short_under_marks() -> None:
    assert [short_step(n) for n in (0, 400, 12_000, 12_500, 1_250_000)] == ["0", "400", "12k", "12.5k", "1.25M"]
    assert len(short_step(2**63 - 1)) < 10
