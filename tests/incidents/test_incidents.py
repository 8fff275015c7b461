"""The gallery's quick parts, so that it cannot rot: the same functions as in `make incidents`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gallery
import good_runs
from gallery import INCIDENTS, Gallery, Good, Incident, Outcome, run_well, show
from gallery_tables import BEGIN, END, document, markdown, put_between_marks, table
from scene import SMOKE, Caught, NotMade, Scene, Way

from tests.nursery import Nursery

REFUSED = (5, 6, 7, 8, 12)
FORKED = (1, 4, 9, 10)
"""Runs of these take a second where a nursery forks their engines."""
BY_NUMBER = {incident.number: incident for incident in INCIDENTS}
HOPELESS = """\
version: 1
name: mine
falsifiers:
  - {id: F-MINE-001, claim: there is no loss, kind: threshold, metric: eval.loss, below: 0.0, severity: warn}
  - {id: F-MINE-002, claim: it falls, kind: trend, metric: eval.loss, direction: falls}
"""


@pytest.fixture
def scene(tmp_path: Path, nursery: Nursery) -> Iterator[Scene]:
    made = Scene(tmp_path, nursery)
    yield made
    made.clear()


@pytest.mark.parametrize("number", REFUSED)
def test_an_incident_is_refused_before_anything_is_started(tmp_path: Path, number: int) -> None:
    outcome = show(BY_NUMBER[number], tmp_path / "incident")
    assert outcome.state == "caught", outcome.problem
    assert not [way for way in outcome.ways if isinstance(way, Caught) and way.launched]


@pytest.mark.parametrize("number", FORKED)
def test_an_incident_is_caught_by_the_run_itself(scene: Scene, number: int) -> None:
    make = BY_NUMBER[number].make
    assert make is not None
    ways = list(make(scene))
    assert ways
    assert all(isinstance(way, Caught) and way.in_time and way.message for way in ways), ways


@pytest.mark.parametrize("make", [good_runs.smoke_padded, good_runs.smoke_alone, good_runs.train_plain])
def test_a_good_run_alarms_nobody_and_measures_all_that_it_is_said_to(scene: Scene, make: object) -> None:
    assert callable(make)
    assert good_runs.alarms(make(scene)) == []


def test_a_run_with_a_warning_is_a_false_alarm(scene: Scene) -> None:
    desk = scene.desk()
    desk.write("mine.yaml", HOPELESS)
    ran = good_runs.called(desk, *SMOKE, *good_runs.TWELVE, "--contract", "mine.yaml")
    assert ran.outcome.rc == 0, "it only warns"
    found = good_runs.alarms(ran)
    assert [alarm for alarm in found if alarm.startswith("FAIL F-MINE-001: ")], found


def test_every_incident_of_the_list_is_there_and_none_is_open() -> None:
    assert [incident.number for incident in INCIDENTS] == list(range(1, 14))
    assert [incident.number for incident in INCIDENTS if incident.make is None] == []
    assert len(good_runs.GOOD) in (18, 20)


def caught(scene: Scene) -> Iterator[Way]:
    yield Caught("by hand", "F-MINE-001", "FAIL F-MINE-001 | so", 59.0, launched=True)


def late(scene: Scene) -> Iterator[Way]:
    yield from caught(scene)
    yield Caught("by hand", "F-MINE-001", "FAIL F-MINE-001", 61.0, launched=True)


def silent(scene: Scene) -> Iterator[Way]:
    yield from caught(scene)
    raise AssertionError("nobody could read FAIL")


def impossible(scene: Scene) -> Iterator[Way]:
    yield NotMade("by hand", "no hands")


@pytest.mark.parametrize(
    ("make", "state"),
    [(caught, "caught"), (late, "missed"), (silent, "missed"), (impossible, "missed"), (None, "open")],
)
def test_only_what_was_caught_in_time_and_in_every_way_counts(tmp_path: Path, make: gallery.Make, state: str) -> None:
    outcome = show(Incident(1, "mine", make), tmp_path / "incident", tell=lambda text: None)
    assert outcome.state == state
    told = Gallery([outcome], [Good("g", "a good run")], "a machine")
    assert told.ok == (state in ("caught", "open"))
    assert document(told)["incidents"][0]["state"] == state
    for text in (table(told), markdown(told)):
        assert ("LATE" in text, "MISSED" in text) == (make is late, make is silent)


def test_a_false_alarm_and_a_run_that_could_not_be_made_count_against_it(tmp_path: Path) -> None:
    def broken(scene: Scene) -> good_runs.Ran:
        raise AssertionError("no run")

    good = run_well(broken, tmp_path / "good", tell=lambda text: None)
    told = Gallery([], [good], "a machine")
    assert (told.ok, told.false_alarms) == (False, 1)
    assert "no run" in table(told)


def test_the_tables_are_put_between_the_marks_alone(tmp_path: Path) -> None:
    path = tmp_path / "incidents.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    outcome = Outcome(Incident(1, "mine", caught), list(caught(Scene(tmp_path))))
    put_between_marks(path, markdown(Gallery([outcome], [], "a machine")))
    text = path.read_text()
    assert text.startswith(f"before\n{BEGIN}\n1 of 1 incidents caught")
    assert text.endswith(f"{END}\nafter\n")
    assert "`FAIL F-MINE-001 \\| so`" in text
    assert "old" not in text


def test_the_gallery_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gallery.main(["--only", "12", "--json", "--keep", str(tmp_path / "kept")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["caught"], told["of"]) == (True, 1, 1)
    with pytest.raises(SystemExit) as ended:
        gallery.main(["--only", "14"])
    assert ended.value.code == 2
