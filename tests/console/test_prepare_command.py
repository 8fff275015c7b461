"""`kdconsole prepare`, end to end: the built-in teacher really stored, looked at by every command, and used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from console.about import campaign_phase
from console.findings.rules import find
from console.narration import _where
from console.outlook import outlook
from console.prepare import Draft
from console.prepare import prepare as look
from console.prepared_text import what
from console.read_row import exact_row, quick_row
from console.row_filter import parse_query
from console.run_list import COLUMNS
from console.run_reader import load_run
from console.run_state import Reducer
from console.view import Link, View
from dispatch.evidence import open_evidence
from dispatch.liveness import OTHER_PHASE_SECONDS, Clocks
from dispatch.supervisor import _PROGRESS
from engine.falsifiers import Contract
from engine.stream import Event, Heartbeat, Phase, Progress, encode
from tests.console.host_rig import needs_sshd, running_lab
from tests.console.run_dirs import make_run
from tests.console_rig import Desk, Outcome, RunFiles, processes_of, until, write_corpus
from tests.nursery import Nursery
from tests.streams import EPOCH, end_event, run_event, stamped

CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 40, batch: 2, sequence: 32, warmup_steps: 2, learning_rate: 3.0e-3, threads: 1}
smoke: {max_steps: 12}
"""
HIDDEN = ("--set", "teacher.source=hidden", "--set", "teacher.cache=store")
TOPK = ("--set", "teacher.source=topk", "--set", "teacher.top_k=64", "--set", "teacher.cache=store")
COOL = ("--set", "distill.temperature=1.0")


def made_desk(root: Path, nursery: Nursery, lines: int = 3_000) -> Desk:
    desk = Desk(root, nursery)
    desk.write("config.yaml", CONFIG)
    write_corpus(desk.cwd / "corpus.txt", lines)
    return desk


@pytest.fixture
def desk(tmp_path: Path, nursery: Nursery) -> Iterator[Desk]:
    desk = made_desk(tmp_path, nursery)
    yield desk
    desk.clear()


def prepare(desk: Desk, *arguments: str) -> Outcome:
    return desk.call("--headless", "prepare", "config.yaml", *arguments)


def shards(desk: Desk) -> dict[Path, tuple[int, int]]:
    """Every file that was stored, with its size and when it was written."""
    store = desk.cwd / "store"
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[tuple[Desk, Outcome]]:
    """A desk where hidden states were stored."""
    desk = made_desk(tmp_path_factory.mktemp("stored"), nursery)
    outcome = prepare(desk, *HIDDEN)
    yield desk, outcome
    desk.clear()


# What it says


def test_it_stores_the_teacher_and_says_how_much_and_how_true(stored: tuple[Desk, Outcome]) -> None:
    desk, outcome = stored
    assert outcome.rc == 0, outcome.said
    last = outcome.run.events("progress")[-1]
    assert last["done"] == last["total"] > 0
    assert re.search(r"hidden states, (\d+) of \1 windows, [\d.]+ MB read back, [\d,.]+ windows/s", outcome.text)
    [whole] = (desk.cwd / "store").iterdir()
    assert f"store {whole}" in outcome.text, "where it is"
    assert re.search(r"store_cosine +1\.0000", outcome.out)
    assert "PASS F-DISTILL-PREP-001" in outcome.text
    assert "COMPLETED" in outcome.text
    assert "loss" not in outcome.out, "it has none"
    assert "nan" not in outcome.out
    assert "inf" not in outcome.out
    assert shards(desk), "nothing was stored"
    assert not outcome.run.events("step")
    assert not (outcome.run.path / "checkpoints").exists()


def test_its_document_has_what_was_stored_and_no_losses(desk: Desk) -> None:
    outcome = prepare(desk, *HIDDEN, "--json", "-q")
    assert outcome.rc == 0, outcome.said
    told = json.loads(outcome.out)
    assert told["mode"] == "prepare"
    assert told["decision"] == "COMPLETED"
    assert told["stored"]["done"] == told["stored"]["total"] > 0
    assert told["stored"]["bytes"] > 0
    assert Path(told["stored"]["store"]).is_relative_to(desk.cwd / "store")
    assert told["measures"]
    assert told["initial_loss"] is told["final_loss"] is told["heldout_initial"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("review",),
        ("review", "--json"),
        ("verify",),
        ("report",),
        ("--headless", "attach"),
        ("fetch", "--dry-run"),
    ],
    ids=" ".join,
)
def test_every_command_takes_its_directory(
    stored: tuple[Desk, Outcome], words: tuple[str, ...], tmp_path: Path
) -> None:
    desk, outcome = stored
    head = () if words[0].startswith("--") else ("--headless",)
    more = ("--output", str(tmp_path / "report.html")) if words == ("report",) else ()
    told = desk.call(*head, *words, str(outcome.run.path), *more)
    assert "Traceback" not in told.err, told.said
    assert told.rc == (2 if words[0] == "fetch" else 0), told.said
    text = (tmp_path / "report.html").read_text() if more else told.out
    assert "NaN" not in text
    assert "50,000 steps" not in text
    assert "of 40 " not in text, "steps that nobody asked it for"
    assert "Losses" not in text
    if words in (("review",), ("report",)):
        assert re.search(r"hidden states, (\d+) of \1 windows", " ".join(text.split())), text


def test_a_list_of_runs_has_its_progress_and_finds_it_by_its_mode(stored: tuple[Desk, Outcome]) -> None:
    desk, outcome = stored
    told = desk.call("runs", "--filter", "mode:prepare", "--json")
    [row] = json.loads(told.out)["runs"]
    assert row["id"] == outcome.run.path.name
    assert row["mode"] == "prepare"
    assert row["progress"]["done"] == row["progress"]["total"] > 0
    assert row["step"] is row["loss"] is row["heldout"] is row["phase"] is None
    assert desk.call("runs", "--filter", "mode:train", "--json").out.count('"id"') == 0


# What it is for


def test_a_smoke_reads_what_was_stored_and_without_it_is_told_what_makes_it(desk: Desk) -> None:
    smoke = ("--headless", "smoke", "config.yaml", *HIDDEN)
    missing = desk.call(*smoke)
    assert missing.rc == 2, missing.said
    assert "kdconsole prepare" in missing.out, missing.said
    assert "warning: nothing stored in" in missing.err, missing.said
    assert prepare(desk, *HIDDEN).rc == 0
    before = shards(desk)
    read = desk.call(*smoke)
    assert read.rc == 0, read.said
    assert "GO" in read.text
    assert "warning" not in read.err, read.said
    assert shards(desk) == before, "a reader changed the store"


def test_a_second_time_nothing_is_made_again(desk: Desk) -> None:
    assert prepare(desk, *HIDDEN).rc == 0
    before = {path: found for path, found in shards(desk).items() if path.suffix not in (".json", ".lock")}
    again = prepare(desk, *HIDDEN)
    assert again.rc == 0, again.said
    after = shards(desk)
    assert before.items() <= after.items(), "a file was written again"


# In the midst


def test_ctrl_c_lets_go_and_a_stop_leaves_what_is_whole_to_the_next(tmp_path: Path, nursery: Nursery) -> None:
    desk = made_desk(tmp_path, nursery, lines=20_000)
    more = ("--set", "prepare.shard_mib=1", "--set", "train.steps=600")
    try:
        console = desk.start("--headless", "prepare", "config.yaml", *HIDDEN, *more)
        until(lambda: any(0 < each["done"] < each["total"] for each in desk.run.events("progress")), "a part of it")
        console.interrupt()
        left = console.wait()
        assert left.rc == 0, left.said
        assert "left; the run goes on" in left.err
        assert f"kdconsole stop {desk.run.path.name}" in left.err
        first = desk.run
        assert processes_of(first.path), "Ctrl-C ended it"
        stopped = desk.call("stop", first.path.name)
        assert stopped.rc == 0, stopped.said
        assert first.end["status"] == "STOPPED"
        assert first.end["exit_code"] == 130
        kept = shards(desk)
        again = desk.call("--headless", "prepare", "config.yaml", *HIDDEN, *more)
        assert again.rc == 0, again.said
        [second] = [RunFiles(path) for path in desk.evidence.iterdir() if path != first.path]
        done = [each["done"] for each in second.events("progress")]
        assert done[0] > 0, "it began anew"
        assert done[-1] == second.events("progress")[-1]["total"]
        assert any(shards(desk).get(path) == found for path, found in kept.items()), "all of it was made again"
        review = desk.call("--headless", "review", str(first.path))
        assert re.search(r"stopped after [\d,]+ of [\d,]+ windows", review.text), review.said
    finally:
        desk.clear()


def test_a_preparation_is_not_resumed_but_called_again(stored: tuple[Desk, Outcome]) -> None:
    desk, outcome = stored
    told = desk.call("--headless", "train", "--resume", outcome.run.path.name)
    assert told.rc == 2
    assert "a prepare; expected a training run; kdconsole prepare CONFIG once more" in told.err


# Logits


def test_too_little_mass_is_refused_with_the_figure_and_force_takes_it(desk: Desk) -> None:
    hot = (*TOPK, "--set", "distill.temperature=4.0", "--set", "teacher.top_k=2", "--set", "prepare.min_mass=0.9")
    refused = prepare(desk, *hot)
    assert refused.rc == 2, refused.said
    assert re.search(r"the stored logits would hold 0\.\d+ of the probability", refused.text), refused.said
    assert "--force" in refused.text
    [first] = desk.evidence.iterdir()
    forced = prepare(desk, *hot, "--force")
    assert forced.rc in (0, 1), forced.said
    [path] = [each for each in desk.evidence.iterdir() if each != first]
    assert json.loads((path / "dispatch.json").read_text())["overrides"] == ["min-mass"]
    assert re.search(r"min_mass: 0(\.0)?$", (path / "config.yaml").read_text(), re.MULTILINE)


def test_logits_are_stored_and_read_by_a_smoke(desk: Desk) -> None:
    outcome = prepare(desk, *TOPK, *COOL, "--set", "teacher.top_k=1024", "--force")
    assert outcome.rc == 0, outcome.said
    assert "top logits at T 1" in outcome.text
    assert re.search(r"logits +T 1 mass +T 1 cosine +T 2 mass", outcome.out), outcome.said
    assert re.search(r"^ *1,024 +0\.\d{4} ", outcome.out, re.MULTILINE), outcome.said
    overrides = json.loads((outcome.run.path / "dispatch.json").read_text())["overrides"]
    assert overrides == ["min-mass"], "force took any mass"
    smoke = desk.call("--headless", "smoke", "config.yaml", *TOPK, *COOL, "--set", "teacher.top_k=1024")
    assert smoke.rc == 0, smoke.said


# Before it starts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("teacher.source", "hidden or topk", "--set teacher.source=hidden")),
        (("--set", "teacher.source=topp"), ("teacher.source", "did you mean topk?")),
        ((*HIDDEN, "--teacher", "nowhere"), ("nowhere", "no such directory")),
        ((*HIDDEN, "--data", "nowhere.txt"), ("nowhere.txt", "no such file")),
        (("--set", "teacher.source=hidden", "--set", "teacher.cache=gx10:/data"), ("gx10:/data", "another machine")),
        ((*HIDDEN, "--set", "teacher.top_k=0"), ("teacher.top_k",)),
    ],
    ids=str,
)
def test_what_cannot_be_prepared_is_refused_in_one_line(
    desk: Desk, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    prepare(desk, *arguments).refused(*words)


def test_it_needs_a_configuration(desk: Desk) -> None:
    outcome = desk.call("--headless", "prepare")
    assert outcome.rc == 2
    assert "Missing argument 'CONFIG'" in outcome.err


def test_a_teacher_option_leaves_the_source_as_it_is(desk: Desk) -> None:
    told = desk.call("prepare", "config.yaml", *HIDDEN, "--teacher", "builtin:teacher", "--dry-run", "--json")
    assert told.rc == 0, told.said
    [step] = [each for each in json.loads(told.out)["steps"] if each["step"] == "store"]
    assert step["source"] == "hidden"


def test_it_is_judged_by_its_own_contract_and_not_by_that_of_its_trainings(desk: Desk) -> None:
    desk.write("mine.yaml", "version: 1\nname: mine\nfalsifiers: []\n")
    ours = prepare(desk, *HIDDEN, "--set", "contract=builtin", "--dry-run", "--json")
    desk.write("config.yaml", CONFIG + "contract: nowhere.yaml\n")
    told = prepare(desk, *HIDDEN, "--dry-run", "--json")
    assert told.rc == 0, told.said
    assert json.loads(told.out)["steps"][0]["contract"] == json.loads(ours.out)["steps"][0]["contract"] == "builtin"
    prepare(desk, *HIDDEN, "--contract", "nowhere.yaml", "--dry-run").refused("nowhere.yaml")


def test_a_dry_run_says_where_it_would_be_stored_and_stores_nothing(desk: Desk) -> None:
    told = desk.call("prepare", "config.yaml", *HIDDEN, "--dry-run")
    assert told.rc == 0, told.said
    assert f"the teacher's hidden states in {desk.cwd / 'store'}; what is whole there is kept" in told.text
    assert "Ctrl-C lets go of it, and the run goes on" in told.text
    assert "gate" not in told.text.replace("gate fingerprint", "")
    assert not (desk.cwd / "store").exists()
    assert not desk.evidence.exists()
    train = desk.call("train", "config.yaml", *HIDDEN, "--dry-run")
    assert "made by kdconsole prepare; without it the run is refused" in train.text


@needs_sshd
def test_on_a_host_it_is_stored_there_and_nothing_of_it_comes_here(tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.console_rig import ROOT

    with running_lab(tmp_path / "lab") as lab:
        there = tmp_path / "there"
        sets = ("--set", "teacher.source=hidden", "--set", f"teacher.cache=gx10:{there}", "--set", "train.steps=40")
        argv = [sys.executable, "-m", "console", "--headless", "prepare", lab.config.name, *sets, "--host", "gx10"]
        done = subprocess.run(
            argv,
            cwd=lab.config.parent,
            env={**lab.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        [path] = (lab.config.parent / "evidence").iterdir()
        assert f"cache: {there}\n" in (path / "config.yaml").read_text()
        assert any(each.is_file() for each in there.rglob("*")), "nothing was stored there"
        here = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        assert here < sum(each.stat().st_size for each in there.rglob("*") if each.is_file())
        assert "stored" in " ".join(done.stdout.split())


# What is made of its stream


def told(done: int, total: int = 40, t: float = EPOCH, seconds_left: float | None = None) -> Progress:
    return Progress(t=t, done=done, total=total, unit="windows", seconds=1.0, seconds_left=seconds_left)


def preparing(*more: Progress) -> list[Event]:
    return [
        Phase(name="import"),
        run_event(mode="prepare", teacher_source="hidden"),
        Phase(name="store"),
        *more,
    ]


NOTHING = Contract(version=1, name="none", falsifiers=[])


def test_the_narration_says_how_far_it_is() -> None:
    state = Reducer(NOTHING).feed(stamped(preparing(told(10, seconds_left=90.0))))
    assert _where(state) == "store  10/40 windows  25%  1m 30s left"


def test_a_run_that_makes_no_steps_was_asked_for_none() -> None:
    assert Reducer(NOTHING).feed(stamped(preparing(told(10)))).target_steps is None


def test_it_belongs_to_no_phase_of_the_campaign() -> None:
    assert campaign_phase("prepare", 512) == ""


def test_a_filter_knows_the_mode() -> None:
    assert not parse_query("mode:prepare").problems


def test_the_supervisor_counts_progress_and_no_heartbeat() -> None:
    [phase, run, *_, made] = stamped(preparing(told(1)))
    beat = Heartbeat(t=EPOCH, run=made.run, seq=9, phase="store", step=0, rss_bytes=1)
    assert all(_PROGRESS.search(encode(each)) for each in (phase, run, made))
    assert not _PROGRESS.search(encode(beat))


def test_a_list_tells_what_was_stored_and_not_what_was_read_back_at_last(tmp_path: Path) -> None:
    read = Progress(t=EPOCH + 3.0, done=9_000, total=9_000, unit="bytes read back", seconds=0.1)
    events = [*preparing(told(20, t=EPOCH + 1.0), told(40, t=EPOCH + 2.0), read), end_event(steps=0, summary={})]
    [path] = [make_run(tmp_path, stamped(events), mode="prepare", sets=["teacher.source=hidden"])]
    row = exact_row(load_run(path), EPOCH)
    assert (row.done, row.total, row.counted) == (40, 40, "windows")
    shown = next(column for column in COLUMNS if column.name == "step")
    assert shown.text(row, EPOCH) == "40 / 40  100 % windows"
    assert shown.short is not None
    assert shown.short(row, EPOCH) == "40 100 %"
    quick = quick_row(open_evidence(path), EPOCH)
    assert quick.done == 9_000
    assert quick.step is quick.target is None


def test_new_run_looks_at_a_preparation_and_warns_where_a_run_will_find_nothing(tmp_path: Path) -> None:
    sets = f"teacher.source=hidden teacher.cache={tmp_path}"
    online = look(Draft(mode="prepare"), tmp_path, {})
    assert any("hidden or topk" in each for each in online.problems)
    ready = look(Draft(mode="prepare", sets=sets), tmp_path, {})
    assert not ready.refusals
    assert ready.gate is None
    assert what(ready) == "prepare builtin:teacher, hidden states"
    [check] = [each for each in look(Draft(sets=sets), tmp_path, {}).checks if each.name == "stored teacher"]
    assert check.outcome == "UNKNOWN"
    assert "kdconsole prepare CONFIG" in check.text


def test_progress_is_a_sign_of_progress() -> None:
    clocks = Clocks()
    events = stamped(preparing(told(1)))
    clocks.heard(0.0, True, events)
    late = Progress(t=events[-1].t + 2 * OTHER_PHASE_SECONDS, done=2, total=40, unit="windows", seconds=9.0)
    clocks.heard(0.0, True, [late])
    assert clocks.unmoved_seconds == 0.0


def test_a_preparation_of_many_hours_stalls_only_where_it_says_nothing() -> None:
    start, hour = EPOCH, 3_600.0
    events = stamped(preparing(), start)
    events += [told(done, t=start + done * 0.25 * hour) for done in range(1, 13)]
    state = Reducer(NOTHING).feed(events)
    last = events[-1].t

    def at(now: float) -> str:
        return outlook(View(state, Link(status="running", heard=now, answered=now), now)).status

    assert at(last + 15.0) != "STALLED"


@pytest.mark.parametrize(("every", "found"), [(600.0, 0), (2 * OTHER_PHASE_SECONDS, 1)])
def test_a_review_finds_what_was_waited_for(tmp_path: Path, every: float, found: int) -> None:
    start = EPOCH + 2.0
    reports = [told(done, t=start + done * every) for done in range(1, 10)]
    events = stamped([*preparing(*reports), end_event(steps=0, summary={}, t=start + 9 * every + 1.0)])
    loaded = load_run(make_run(tmp_path, events, mode="prepare", sets=["teacher.source=hidden"]))
    waits = [each for each in find(loaded, None) if each.kind == "stall"]
    assert len(waits) == found, waits
    if found:
        assert waits[0].text.startswith("no progress for 1h 00m in phase store")
