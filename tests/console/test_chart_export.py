"""Files: every point as it came, and pictures that are well-formed whatever a run is called."""

from __future__ import annotations

import csv
import io
import math
import sys
import types
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.chart.export import csv_lines, pictures, png, svg
from console.chart.frame import Look
from console.chart.model import RunLanes, many_runs
from engine.errors import RunError
from tests.console.chart_runs import evaluation, plot, state

pytestmark = pytest.mark.filterwarnings("error")

ANY = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7e308, 1e22]))
SVG = "{http://www.w3.org/2000/svg}"


def texts(document: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(document).iter(f"{SVG}text")]


@settings(deadline=None)
@given(st.lists(ANY, max_size=30))
def test_numbers_come_back_from_csv_bit_for_bit(loss: list[float]) -> None:
    shown = plot(state(loss, ce=np.zeros(len(loss)), kd=np.ones(len(loss))))
    rows = list(csv.DictReader(io.StringIO("".join(csv_lines(shown)))))
    total = [row for row in rows if row["series"] == "total"]
    assert np.array([float(row["value"]) for row in total]).tolist() == pytest.approx(loss, rel=0, abs=0, nan_ok=True)
    assert [math.copysign(1, float(row["value"])) for row in total] == [
        1.0 if math.isnan(value) else math.copysign(1, value) for value in loss
    ]
    assert [int(row["step"]) for row in total] == list(range(1, len(loss) + 1))
    assert [float(row["t_unix_seconds"]) for row in total] == shown.curves[-1].lane.x("time").tolist()


def test_the_numbers_of_lines_are_no_times_in_csv() -> None:
    shown = replace(plot(state([3.0, 2.0])), timed=False)
    rows = list(csv.DictReader(io.StringIO("".join(csv_lines(shown)))))
    assert {row["t_unix_seconds"] for row in rows} == {""}


def test_csv_has_every_point_of_every_series_however_closely_one_looks() -> None:
    shown = plot(state(np.ones(25_000), evals=[evaluation(0, 5.0), evaluation(9, 4.0)]))
    rows = list(csv.reader(io.StringIO("".join(csv_lines(shown)))))
    series = [row[1] for row in rows]
    counts = {name: series.count(name) for name in ("total", "ce", "kd", "held-out")}
    assert counts == {"total": 25_000, "ce": 25_000, "kd": 25_000, "held-out": 2}


@settings(deadline=None)
@given(st.text(max_size=60), st.lists(ANY, max_size=40), st.booleans(), st.sampled_from(["step", "time"]))
def test_a_picture_is_well_formed_whatever_a_run_is_called_and_holds(
    name: str, loss: list[float], log: bool, axis: str
) -> None:
    lanes = RunLanes()
    lanes.update(state(loss))
    for shown in (plot(state(loss)), many_runs([(name, 0, lanes)], "loss")):
        document = svg(shown, Look(log=log, axis="step" if axis == "step" else "time"), name)
        ElementTree.fromstring(document)
        assert "nan" not in document.replace(name, "")


def test_a_name_is_text_and_never_markup() -> None:
    hostile = '</text><script>alert("1")</script>&amp;\x1b[31m]]>'
    document = svg(plot(state([3.0, 2.0])), Look(), hostile)
    assert "<script" not in document
    assert any('</text><script>alert("1")</script>&amp;' in text for text in texts(document))


def test_a_picture_has_axes_legend_marks_and_every_spike() -> None:
    loss = 4 + 0.01 * np.sin(np.arange(30_000.0))
    loss[9_000], loss[20_000:20_003], loss[15_000] = 1e9, math.nan, 7.0
    held = [evaluation(0, 5.0), evaluation(30_000, 3.95)]
    document = svg(plot(state(loss, kd=np.zeros(30_000), ce=loss * 0 + 3, evals=held)), Look(), "a run")
    found = texts(document)
    for wanted in ("a run", "step", "3 non-finite", "1.000e+09", "10k", f"━ total {loss[-1]:.3f}", "● held-out 3.950"):
        assert any(wanted in text for text in found), wanted
    assert len(ElementTree.fromstring(document).findall(f"{SVG}circle")) == 2


def test_the_area_behind_a_smoothed_curve_reaches_up_to_every_spike() -> None:
    loss = np.full(30_000, 4.0)
    loss[9_000] = 9.0
    document = svg(plot(state(loss, kd=np.zeros(30_000), ce=loss * 0 + 3)), Look(log=False, smoothing=0.99), "a run")
    areas = [path for path in ElementTree.fromstring(document).iter(f"{SVG}path") if path.get("fill-opacity")]
    assert len(areas) == 1
    heights = [float(point.split()[1]) for point in (areas[0].get("d") or "").strip("MZ").split("L")]
    assert max(heights) - min(heights) > 400


def test_a_picture_of_a_hundred_thousand_interruptions_stays_small() -> None:
    loss = np.ones(200_000)
    loss[::2] = math.nan
    assert len(svg(plot(state(loss, kd=np.zeros(200_000), ce=np.ones(200_000))), Look(), "x")) < 300_000


def test_an_empty_page_is_a_picture_too() -> None:
    assert "no step yet" in " ".join(texts(svg(plot(state()), Look(), "x")))


def test_png_is_drawn_where_its_package_is_there_and_else_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    document = svg(plot(state([3.0, 2.0])), Look(), "x")
    try:
        import resvg_py  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        pass
    else:
        assert png(document).startswith(b"\x89PNG\r\n\x1a\n")
        assert list(pictures(plot(state([3.0, 2.0])), Look(), "x")) == [".svg", ".png"]
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(RunError, match="resvg_py is not installed"):
        png(document)
    assert pictures(plot(state([3.0, 2.0])), Look(), "x") == {".svg": document}


def test_a_package_that_draws_is_given_the_document_and_its_bytes_are_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def drawn(**arguments: object) -> list[int]:
        given.update(arguments)
        return list(b"\x89PNG")

    package = types.ModuleType("resvg_py")
    package.svg_to_bytes = drawn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", package)
    files = pictures(plot(state([3.0, 2.0])), Look(), "x")
    assert files[".png"] == b"\x89PNG"
    assert given["svg_string"] == files[".svg"]
