"""`kdconsole screenshot`: a picture of any run, without a terminal; what is wrong is said in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from console import screenshot as screenshot_module
from console.screenshot import picture, screenshot_command
from engine.errors import RunError
from tests.console.app_rig import NOW, frozen
from tests.console.run_dirs import READY, good_train, live_run, make_run
from tests.console_rig import Desk
from tests.old_evidence import SCENES
from tests.streams import end_event, smoke_events, with_verdicts

FEW = ("good_smoke", "nan", "crashed")
"""Kinds of runs; the others are slow here, and drawn in every snapshot."""
HOSTILE = "\x1b]0;OWNED\x07\x9b31m<script>&amp;]]></text>\u202e[bold]x[/]"


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with frozen(monkeypatch):
        yield


def text_of(svg: str) -> str:
    """The rows of cells in a picture, from the top; one that is no XML fails."""
    rows: dict[str, str] = {}
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        line = (element.get("clip-path") or "title").rpartition("line-")[2]
        rows[line] = rows.get(line, "") + unescape("".join(element.itertext())).replace("\xa0", " ").strip("\n")
    return "\n".join(rows.values())


def call(*arguments: str) -> Result:
    return CliRunner().invoke(screenshot_command, arguments)


def refused(result: Result) -> str:
    assert isinstance(result.exception, RunError), result.output
    assert not list(Path().glob("*.svg"))
    return str(result.exception)


def test_it_needs_no_terminal_and_says_which_file_it_wrote(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    run = good_train(desk.evidence)
    done = desk.call("screenshot", run.name[:15], "--size", "100x30", variables={"COLUMNS": "40", "TERM": "dumb"})
    assert done.rc == 0, done.said
    assert done.out == f"{run.name}.svg\n"
    assert done.err == ""
    drawn = text_of((desk.cwd / f"{run.name}.svg").read_text(encoding="utf-8"))
    assert "200 / 200" in drawn
    assert "Falsifiers" in drawn
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["config.yaml", "contract.yaml", "dispatch.json", "events.jsonl", "exit.json", "supervisor.jsonl"]
    ), "a picture changes nothing in the run's directory"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nothing-like-it"], "no such run"), (["./nowhere"], "no such file or directory"), (["."], "no manifest")],
)
def test_a_run_that_is_none_is_refused_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    Desk(tmp_path).call("screenshot", *arguments).refused(words, rc=2)


@pytest.mark.parametrize(("size", "seen"), [("120x40", True), ("60x20", False), ("200X60", True)])
def test_a_picture_has_the_size_that_was_asked_for(tmp_path: Path, size: str, seen: bool) -> None:
    run = good_train(tmp_path / "e")
    columns, rows = map(int, size.lower().split("x"))
    drawn = text_of(picture(run, columns=columns, rows=rows, theme="kdconsole-dark", step=None)).splitlines()
    lines = [line for line in drawn if "kdconsole ·" not in line]
    assert len(lines) == rows
    assert max(map(len, lines)) <= columns
    assert any("Host" in line for line in lines) == seen


@pytest.mark.parametrize("size", ["120", "x", "19x20", "20x4", "501x40", "120x301", "-120x40", "120x40x2", "\x1b[2J"])
def test_a_size_that_makes_no_sense_is_refused(tmp_path: Path, size: str) -> None:
    run = good_train(tmp_path / "e")
    done = call(str(run), "--size", size)
    assert done.exit_code == 2
    assert "such as 120x40" in " ".join(done.output.split())
    assert "\x1b" not in done.output


def test_the_theme_is_the_one_asked_for_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    run = good_train(tmp_path / "e")
    dark, light = (
        picture(run, columns=80, rows=24, theme=theme, step=None) for theme in ("kdconsole-dark", "kdconsole-light")
    )
    assert "#10141a" in dark.lower()
    assert "#10141a" not in light.lower()
    assert text_of(dark) == text_of(light)
    assert call(str(run), "--theme", "kdconsole-drak").exit_code == 2


def test_a_step_shows_the_run_as_it_was(tmp_path: Path) -> None:
    run = READY["nan"](tmp_path / "e")
    drawn = text_of(picture(run, columns=120, rows=40, theme="kdconsole-dark", step=30))
    assert "30 / 200" in drawn
    assert "NaN" not in drawn
    assert "NaN" in text_of(picture(run, columns=120, rows=40, theme="kdconsole-dark", step=None))


@pytest.mark.parametrize(
    "kind", ["live", *(kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in READY)]
)
def test_every_kind_of_run_has_a_picture(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.follower.STATUS_SECONDS", 0.1)
    run = live_run(tmp_path / "e", last_t=NOW - 1) if kind == "live" else READY[kind](tmp_path / "e")
    drawn = text_of(picture(run, columns=120, rows=40, theme="kdconsole-dark", step=None))
    assert "Falsifiers" in drawn
    assert "Checkpoints" in drawn


def test_evidence_of_the_predecessor_has_a_picture_too(tmp_path: Path) -> None:
    old = SCENES["asked-50-ran-62"](tmp_path / "old")
    for path in (old, next(old.glob("*.log"))):
        drawn = text_of(picture(path, columns=120, rows=40, theme="kdconsole-dark", step=None))
        assert "7.204" in drawn
        assert "COMPLETED" in drawn
        assert ("asked 50, ran 62" in drawn) == (path == old)


def test_a_file_of_that_name_stays_and_one_that_was_named_is_replaced(tmp_path: Path) -> None:
    run = good_train(tmp_path / "e")
    own = Path(f"{run.name}.svg")
    own.write_text("mine")
    assert call(str(run)).output == f"{run.name}-2.svg\n"
    assert own.read_text() == "mine"
    assert call(str(run), "--out", "a.svg").output == "a.svg\n"
    first = Path("a.svg").read_text()
    Path("a.svg").write_text("old")
    assert call(str(run), "--out", "a.svg").exit_code == 0
    assert text_of(Path("a.svg").read_text()) == text_of(first)
    assert sorted(path.name for path in Path().iterdir()) == sorted(["e", "a.svg", own.name, f"{run.name}-2.svg"])


@pytest.mark.parametrize("out", ["nowhere/a.svg", ".", "/proc/a.svg"])
def test_a_place_that_takes_no_file_is_told(tmp_path: Path, out: str) -> None:
    said = refused(call(str(good_train(tmp_path / "e")), "--out", out))
    assert said.startswith(f"{out}: ")
    assert "--out" in said


def test_hostile_text_is_in_the_picture_as_text(tmp_path: Path) -> None:
    events = with_verdicts(smoke_events(30), end=end_event(30, reason=HOSTILE))
    run = make_run(tmp_path / "e", events, name=HOSTILE)
    path = run.with_name(f"odd{HOSTILE.replace('/', '')}")
    run.rename(path)
    manifest = json.loads((path / "dispatch.json").read_text())
    (path / "dispatch.json").write_text(json.dumps(manifest | {"id": path.name}))
    done = call(str(path))
    assert done.exit_code == 0, done
    for byte in ("\x1b", "\x07", "\x9b", "\u202e"):
        assert byte not in done.output
    [written] = Path().glob("*.svg")
    drawn = written.read_text(encoding="utf-8")
    assert not any((ord(letter) < 0x20 and letter not in "\n\t") or letter in "\x9b\u202e" for letter in drawn)
    assert "<script>" not in drawn
    assert "<script>" in text_of(drawn)


def test_an_id_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    run = good_train(tmp_path / "e")
    manifest = json.loads((run / "dispatch.json").read_text())
    (run / "dispatch.json").write_text(json.dumps(manifest | {"id": "../away"}))
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    assert call(str(run)).output == f"{run.name}.svg\n"
    assert not list(tmp_path.glob("away*"))


def test_a_run_whose_stream_is_broken_says_so_in_the_picture(tmp_path: Path) -> None:
    run = good_train(tmp_path / "e")
    with (run / "events.jsonl").open("ab") as file:
        file.write(b"not json\n")
    drawn = text_of(picture(run, columns=160, rows=40, theme="kdconsole-dark", step=None))
    assert "not JSON" in drawn or "events.jsonl" in drawn


def test_one_that_cannot_be_read_in_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshot_module, "LOAD_SECONDS", 0.0)
    assert "not read in 0 s" in refused(call(str(good_train(tmp_path / "e"))))
