"""Following without a screen: a link that is down ends no run, and no long run is ended for its silence."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from textual.pilot import Pilot

from console import headless
from console.app import KdConsoleApp
from console.narration import Narrator
from console.report import Result
from console.screens.confirm import ConfirmScreen
from console.screens.run import RunScreen
from console.view import Link
from console.watch import Watcher
from dispatch import follower, runs
from dispatch.hosts import add_host
from dispatch.liveness import Clock, Liveness
from dispatch.manifest import Remote, Stall, SupervisorHeartbeat
from dispatch.places import Place, Reach
from dispatch.runs import RunDir
from dispatch.supervisor import identify
from dispatch.transport import TransportError
from engine.config import load_config
from engine.errors import ExitCode, RunError
from engine.falsifiers import builtin_contract
from tests.console.app_rig import in_app
from tests.console.desk_app import shown
from tests.console.desk_app import until as desk_until
from tests.console_rig import processes_of, until
from tests.ssh_rig import MISSING, Rig, running_sshd

ROOT = Path(__file__).parents[2]
TRAINER = """
import json, os, sys, time
run, seq = json.load(open('dispatch.json'))['run'], 0
def emit(event, **fields):
    global seq
    with open('events.jsonl', 'a') as file:
        file.write(json.dumps(dict(event=event, v=1, run=run, seq=seq, t=time.time(), **fields)) + chr(10))
    seq += 1
emit('phase', name='import')
emit('phase', name='train')
while not os.path.exists('go'):
    if not os.path.exists('silent'):
        emit('heartbeat', phase='train', step=0, rss_bytes=1)
    time.sleep(0.05)
emit('end', status='STOPPED', reason='as it was told', exit_code=130, steps=0, seconds=1.0)
sys.exit(130)
"""
"""As quiet as a trainer can be that lives."""


@dataclass
class Followed:
    """A real run with a small trainer, and a console without a screen that follows it."""

    run_dir: RunDir
    place: Place
    there: Path
    """Its directory on its host."""
    out: io.StringIO

    @property
    def said(self) -> str:
        return self.out.getvalue()

    async def launch(self) -> None:
        trainer = (sys.executable, "-I", "-S", "-c", TRAINER)
        await dataclasses.replace(self.place, command=trainer).launch(gpu=False)

    def follow(self, ours: bool, budget: float | None = None) -> asyncio.Task[Result | None]:
        narrator = Narrator(Console(file=self.out, width=200))
        following = headless._follow_run(self.run_dir, self.place, narrator, asyncio.Event(), ours, budget, 0.0)
        return asyncio.create_task(following)

    async def heard(self, text: str) -> None:
        async with asyncio.timeout(60):
            while text not in self.said:
                await asyncio.sleep(0.02)


def create(evidence: Path, mode: str, remote: Remote | None = None) -> RunDir:
    config = load_config(None, template="builtin", sets=["train.device=cpu"], overrides={"mode": mode})
    return runs.create_run(config, evidence=evidence, contract_text=builtin_contract(mode), remote=remote)


@pytest.fixture(autouse=True)
def no_process_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    try:
        until(lambda: not processes_of(tmp_path), "every process to end")
    finally:
        for pid in processes_of(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def local(tmp_path: Path, mode: str, reach: Reach) -> Followed:
    run_dir = create(tmp_path / "evidence", mode)
    return Followed(run_dir, reach.place(run_dir, keep=True), run_dir.path, io.StringIO())


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    with running_sshd(tmp_path_factory.mktemp("host")) as running:
        add_host(
            "gx10",
            {"address": "127.0.0.1", "port": running.port, "identity": str(running.identity), "python": sys.executable},
            running.environ,
        )
        yield running.trusted()


def remote(tmp_path: Path, mode: str, reach: Reach) -> Followed:
    base = tmp_path / "base"
    where = Remote(host="gx10", run_dir=str(base), python=sys.executable, engine=str(ROOT))
    run_dir = create(tmp_path / "evidence", mode, where)
    there = base / run_dir.id
    shutil.copytree(run_dir.path, there)
    return Followed(run_dir, reach.place(run_dir, keep=True), there, io.StringIO())


def test_a_smoke_whose_host_cannot_be_reached_is_never_ended_for_its_silence(
    tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless, "SILENCE_SECONDS", 0.6)

    async def scenario() -> tuple[Followed, Result | None]:
        async with Reach(rig.environ) as reach:
            run = remote(tmp_path, "smoke", reach)
            await run.launch()
            following = run.follow(ours=True)
            await run.heard("train")
            rig.end()
            try:
                await run.heard("gx10")
                await asyncio.sleep(2.0)  # far more than it may be silent
            finally:
                rig.restart()
            await run.heard("is reached again")
            (run.there / "go").touch()
            return run, await asyncio.wait_for(following, 60)

    run, result = asyncio.run(scenario())
    assert result is not None
    assert (result.status, result.exit_code) == ("STOPPED", ExitCode.INTERRUPTED)
    assert "ending it" not in run.said
    assert "nothing heard" not in run.said
    assert '"signal"' not in (run.there / "supervisor.jsonl").read_text().replace('"signal": null', "")


def test_a_smoke_over_its_budget_on_a_host_that_is_not_reached_is_unknown_and_goes_on(
    tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless, "SILENCE_SECONDS", 0.5)

    async def scenario() -> Followed:
        async with Reach(rig.environ) as reach:
            run = remote(tmp_path, "smoke", reach)
            await run.launch()
            following = run.follow(ours=True, budget=2.0)
            await run.heard("train")
            rig.end()
            try:
                with pytest.raises(TransportError, match="the run may go on"):
                    await asyncio.wait_for(following, 60)
            finally:
                rig.restart()
            run.place.close()
            assert not (run.there / "exit.json").exists(), "it was not touched"
            (run.there / "go").touch()
            return run

    run = asyncio.run(scenario())
    until((run.there / "exit.json").exists, "its own end")


def test_a_smoke_that_ended_while_nobody_could_look_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its budget is over long ago when the host is reached again; that says nothing of how it ended."""
    monkeypatch.setattr(headless, "SILENCE_SECONDS", 0.0)

    async def scenario() -> tuple[Followed, Result | None]:
        async with Reach({}) as reach:
            run = local(tmp_path, "smoke", reach)
            (run.there / "go").touch()
            await run.launch()
            await asyncio.to_thread(until, (run.there / "exit.json").exists, "its end")
            return run, await asyncio.wait_for(run.follow(ours=True, budget=0.0), 60)

    run, result = asyncio.run(scenario())
    assert result is not None
    assert (result.status, "ending it" in run.said) == ("STOPPED", False)


def test_a_smoke_of_ours_that_is_silent_though_its_host_answers_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless, "SILENCE_SECONDS", 1.0)

    async def scenario() -> tuple[Followed, Result | None]:
        async with Reach({}) as reach:
            run = local(tmp_path, "smoke", reach)
            await run.launch()
            following = run.follow(ours=True)
            await run.heard("train")
            (run.there / "silent").touch()
            return run, await asyncio.wait_for(following, 60)

    run, result = asyncio.run(scenario())
    assert result is not None
    assert (result.status, result.exit_code) == ("TIMEOUT", ExitCode.TIMEOUT)
    assert "nothing heard from the run for 1 s; ending it" in run.said
    assert "CANCELLED: killed by SIGTERM" in run.said


def test_a_long_run_is_not_ended_for_its_silence_whoever_looks_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("dispatch.liveness.HEARTBEAT_SECONDS", 0.6)

    async def scenario() -> tuple[Followed, Result | None]:
        async with Reach({}) as reach:
            run = local(tmp_path, "train", reach)
            await run.launch()
            following = run.follow(ours=False)
            await run.heard("train")
            (run.there / "silent").touch()
            await run.heard("nothing heard for")
            (run.there / "silent").unlink()
            await run.heard("it goes on, in phase train")
            (run.there / "go").touch()
            return run, await asyncio.wait_for(following, 60)

    run, result = asyncio.run(scenario())
    assert result is not None
    assert result.status == "STOPPED"
    assert "ending it" not in run.said


def link(
    heartbeat: float = 0.0, progress: float = 0.0, reached: bool = True, supervisor: SupervisorHeartbeat | None = None
) -> Link:
    clocks = (Clock(0.0, 16.0), Clock(heartbeat, 20.0), Clock(progress, 60.0))
    return Link(host="gx10", status="running", liveness=Liveness(*clocks, "train", reached, supervisor))


def stalled(waited: float) -> SupervisorHeartbeat:
    stall = Stall(phase="train", since=0.0, allowed_seconds=600.0, stacks=True)
    return SupervisorHeartbeat(run="r", beat=1, t=0.0, phase="train", waited_seconds=waited, stall=stall)


def test_a_stall_that_the_supervisor_saw_is_narrated_once_each_time() -> None:
    out = io.StringIO()
    trouble = headless._Trouble(Narrator(Console(file=out, width=200)))
    first, later = stalled(700), stalled(900)
    for supervisor in (None, first, later, None, first):
        trouble.tell(link(supervisor=supervisor))
        trouble.tell(link(supervisor=supervisor, reached=False))
    said = "no progress for 12 min in phase train, says the supervisor; its stacks are in launch.log"
    assert out.getvalue().splitlines() == [said, said]


def test_what_changes_is_told_once_and_what_is_not_known_is_no_news() -> None:
    out = io.StringIO()
    trouble = headless._Trouble(Narrator(Console(file=out, width=200)))
    for each in (
        *(link(), link(progress=61.0), link(progress=99.0), link(progress=120.0, reached=False)),
        *(link(progress=130.0), link(heartbeat=30.0, progress=160.0), Link(), link(reached=False), link(), link()),
    ):
        trouble.tell(each)
    assert out.getvalue().splitlines() == [
        "no progress for 61 s in phase train (allowed: 60 s), though the process lives",
        "nothing heard for 30 s in phase train, though the host answers",
        "it goes on, in phase train",
    ]


def after_a_reboot(tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> tuple[Followed, list[str]]:
    """A run whose host was started anew and has only six of the nine lines that are here."""
    for name, value in rig.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(follower, "STATUS_SECONDS", 0.2)
    run = remote(tmp_path, "train", Reach(rig.environ))
    run.place.close()
    event = {"event": "phase", "v": 1, "run": run.run_dir.run, "t": 1.0}
    lines = [json.dumps({**event, "seq": seq, "name": f"phase-{seq}"}) + "\n" for seq in range(9)]
    (run.run_dir.path / "events.jsonl").write_text("".join(lines))
    (run.there / "events.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    process = {**identify(os.getpid(), run.run_dir.run), "boot_id": "an earlier boot"}
    started = {"event": "started", "supervisor": process, "trainer": process, "session": 1}
    (run.there / "supervisor.jsonl").write_text(json.dumps(started) + "\n")
    return run, lines


def test_what_a_reboot_of_the_host_lost_is_refused_until_it_is_accepted(
    tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = after_a_reboot(tmp_path, rig, monkeypatch)
    narrator = Narrator(Console(file=run.out, width=400))
    lost = f"lost the end of {run.there}/events.jsonl: events 6 to 8 are here only"
    with pytest.raises(RunError, match=lost):
        headless.attach(run.run_dir, narrator)
    with pytest.raises(RunError, match=lost):
        headless.resume(run.run_dir, (), narrator)
    assert not (run.there / "resume.json").exists(), "nothing was begun there"

    result = headless.attach(run.run_dir, narrator, accept_loss=True)
    assert result is not None
    assert (result.status, result.exit_code) == ("CRASHED", ExitCode.UNDECIDED)
    assert "its host was started anew while it ran" in result.reason
    assert lost in run.said
    assert result.state.phase == "phase-5"
    assert (run.run_dir.path / "events.jsonl").read_text() == "".join(lines[:6])
    assert (run.run_dir.path / "events.jsonl.lost-1").read_text() == "".join(lines)


@pytest.mark.parametrize("answer", ["n", "y"])
def test_the_app_asks_before_it_goes_on_without_what_a_reboot_lost(
    answer: str, tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = after_a_reboot(tmp_path, rig, monkeypatch)

    async def body(app: KdConsoleApp, pilot: Pilot[None]) -> None:
        await desk_until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
        assert "events 6 to 8 are here only" in " ".join(re.sub("[│╭╮╰╯─]", " ", shown(app)).split())
        await pilot.press(answer)
        await desk_until(pilot, lambda: isinstance(app.screen, RunScreen), "the run")
        if answer == "y":
            await desk_until(pilot, lambda: "CRASHED" in shown(app) or "LOST" in shown(app), "how it ended")

    in_app(body, tmp_path / "evidence", run=run.run_dir.path, wait=False)
    kept = run.run_dir.path / "events.jsonl.lost-1"
    assert kept.exists() == (answer == "y")
    whole = (kept if answer == "y" else run.run_dir.path / "events.jsonl").read_text()
    assert whole == "".join(lines)


def test_while_the_host_is_away_the_run_is_unknown_and_its_clocks_stand_still(tmp_path: Path, rig: Rig) -> None:
    async def scenario() -> list[Link]:
        links: list[Link] = []
        async with Reach(rig.environ) as reach:
            run = remote(tmp_path, "train", reach)
            await run.launch()
            away = back = False
            async for sight in Watcher(run.run_dir, run.place).sights():
                links.append(sight.link)
                told = sight.link.liveness
                if not away and told is not None and sight.caught_up:
                    rig.end()
                    away = True
                elif not back and sum(bool(each.problem) for each in links) == 3:
                    back = True
                    rig.restart()
                    (run.there / "go").touch()
            run.place.close()
        return links

    links = asyncio.run(asyncio.wait_for(scenario(), 60))
    unknown = [each for each in links if each.problem]
    assert len(unknown) >= 3
    clocks = [each.liveness for each in unknown if each.liveness is not None]
    assert {each.state for each in clocks} == {"UNKNOWN"}
    assert clocks[0].link.seconds < clocks[-1].link.seconds
    assert clocks[0].heartbeat == clocks[-1].heartbeat
    assert links[-1].status == "ended"
    assert links[-1].answered > 0
