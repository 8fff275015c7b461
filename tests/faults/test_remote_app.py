"""A host in the app: trusted, looked at, trained on, left, found again, stopped, and what it made fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from console.app import KdConsoleApp
from console.screens.choose import ChooseScreen
from console.screens.confirm import ConfirmScreen
from console.screens.home import HomeScreen
from console.screens.hosts import HostsScreen
from console.screens.new_run import NewRunScreen
from console.screens.run import RunScreen
from tests.console.app_rig import in_app, opened, said
from tests.console.desk_app import shown, until
from tests.console.host_rig import Lab, needs_sshd, running_lab
from tests.console_rig import processes_of
from tests.nursery import Nursery

pytestmark = needs_sshd
SETS = "train.steps=4000 checkpoint.every_steps=20 checkpoint.keep_last=2"


@pytest.fixture
def lab(tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with running_lab(tmp_path, nursery) as lab:
        known = Path(lab.environ["KDCONSOLE_HOSTS"]).with_name("known_hosts")
        known.unlink()
        for name in ("HOME", "KDCONSOLE_HOSTS"):
            monkeypatch.setenv(name, lab.environ[name])
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.chdir(lab.config.parent)
        yield lab


def _hashes(directory: Path) -> dict[str, str]:
    files = (file for file in directory.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


async def _trust_and_look(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
    await until(pilot, lambda: isinstance(app.screen, HostsScreen) and app.screen.chosen is not None, "the host")
    hosts = app.screen
    assert isinstance(hosts, HostsScreen)

    def idle() -> bool:
        return hosts.chosen is not None and not hosts.chosen.doing

    await pilot.press("t")
    await until(pilot, lambda: isinstance(app.focused, Input), "the question")
    await pilot.press(*"yes", "enter")
    await until(pilot, lambda: idle() and hosts.chosen is not None and hosts.chosen.trusted, "trust")
    await pilot.press("enter")
    await until(pilot, lambda: idle() and hosts.chosen is not None and hosts.chosen.preflight is not None, "a look")
    assert "ready" in shown(app)
    await pilot.press("escape")
    await until(pilot, lambda: isinstance(app.screen, HomeScreen), "Home again")


async def _start(app: KdConsoleApp, pilot: Pilot[Any]) -> RunScreen:
    await pilot.press("n")
    await until(pilot, lambda: isinstance(app.screen, NewRunScreen), "New run")
    new = app.screen
    assert isinstance(new, NewRunScreen)
    await until(pilot, lambda: new.query_one("#host").count == 2, "the host is offered")  # type: ignore[attr-defined]
    new.query_one("#file", Input).value = "config.yaml"
    new.query_one("#set", Input).value = SETS
    await pilot.press("m", "h")
    ready = lambda: new._prepared is not None and new._prepared.draft == new.draft and new._prepared.complete  # noqa: E731
    await until(pilot, ready, "the host was looked at for this run")
    assert new._prepared is not None
    assert (new._prepared.refusals, new._prepared.shortages) == ((), ())
    assert "to be sent" in " ".join(check.text for check in new._prepared.checks)
    outcomes = [check.outcome for check in new._prepared.checks]
    assert outcomes == sorted(outcomes, key=("FAIL", "UNKNOWN", "PENDING", "PASS").index)
    assert ", on gx10" in shown(app)
    assert "estimated once the models can be read" not in shown(app)
    await pilot.press("enter")
    return await opened(app, pilot)


def test_a_host_from_the_first_key_to_the_last_file(lab: Lab, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"

    async def begin(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await until(pilot, lambda: isinstance(app.screen, HomeScreen), "Home")
        await pilot.press("h")
        await _trust_and_look(app, pilot)
        screen = await _start(app, pilot)
        await until(pilot, lambda: len(screen.latest.state.checkpoints) > 1, "two checkpoints", 120)
        assert "gx10" in shown(app)
        await pilot.press("q")

    in_app(begin, evidence)
    [here] = evidence.iterdir()
    there = lab.base / "runs" / here.name
    assert processes_of(there), "leaving the app ended the run"

    async def finish(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = app.screen
        assert isinstance(screen, RunScreen)
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
        await pilot.press("y")
        await until(pilot, lambda: any("CANCELLED" in text for text in said(app)), "the end was seen", 120)
        assert not processes_of(there)
        await until(pilot, (here / "SHA256SUMS").exists, "it is sealed", 60)
        await pilot.press("g")
        await until(pilot, lambda: isinstance(app.screen, ChooseScreen), "what is wanted")
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen, "the run again")
        await pilot.press("g")
        await until(pilot, lambda: isinstance(app.screen, ChooseScreen), "what is wanted")
        await pilot.press("down", "down", "down", "enter")
        await until(pilot, lambda: any("here and verified" in text for text in said(app)), "fetched", 120)

    in_app(finish, evidence, run=here)
    ours, theirs = _hashes(here), _hashes(there)
    assert ours == theirs
    assert sum(name.startswith("checkpoints/") for name in ours) > 3
