"""The Hosts screen against a real sshd: what it lists, what it asks before it trusts, what it says of a host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from console.app import KdConsoleApp
from console.host_text import HostView, host_text
from console.screens.confirm import ConfirmScreen
from console.screens.home import HomeScreen
from console.screens.hosts import HostsScreen
from dispatch import host_keys
from dispatch.hosts import add_host, load_hosts
from tests.console.app_rig import SIZES, in_app
from tests.console.desk_app import shown, until
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd

needs_sshd = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDCONSOLE_HOSTS", str(tmp_path / "kd" / "hosts.yaml"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10") as rig:
        yield rig


@pytest.fixture
def rig(sshd: Rig, tmp_path: Path) -> Rig:
    """The sshd as the host gx10 of hosts.yaml, whose key nobody trusts yet, and another host after it."""
    at = {"address": "127.0.0.1", "port": sshd.port, "identity": str(sshd.identity)}
    add_host("gx10", {**at, "python": sys.executable, "run_dir": str(tmp_path / "base")})
    add_host("lambda-vector", {"address": "127.0.0.1", "port": 1, "user": "kd"})
    file = Path(os.environ["KDCONSOLE_HOSTS"])
    file.write_text(file.read_text() + "lanes: [gx10, lambda-vector]\n")
    return sshd


async def on_hosts(app: KdConsoleApp, pilot: Pilot[Any]) -> HostsScreen:
    await until(pilot, lambda: isinstance(app.screen, HomeScreen), "Home")
    await pilot.press("h")
    await until(pilot, lambda: isinstance(app.screen, HostsScreen) and app.screen._read, "the hosts are read")
    screen = app.screen
    assert isinstance(screen, HostsScreen)
    return screen


def trust(rig: Rig) -> None:
    """As if the key had been trusted before."""
    public = (rig.directory / "host_key.pub").read_text()
    Path(os.environ["KDCONSOLE_HOSTS"]).with_name("known_hosts").write_text(f"[127.0.0.1]:{rig.port} {public}")


async def idle(pilot: Pilot[Any], screen: HostsScreen) -> HostView:
    """The chosen host once nothing is done there any more."""
    await until(pilot, lambda: screen.chosen is not None and not screen.chosen.doing, "an end")
    assert screen.chosen is not None
    return screen.chosen


def test_without_hosts_it_says_how_to_get_one(tmp_path: Path) -> None:
    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await on_hosts(app, pilot)
        assert "No hosts yet" in shown(app)
        assert "kdconsole hosts add gx10" in shown(app)
        await pilot.press("enter", "t", "b", "escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen), "Home again")

    in_app(body, tmp_path / "evidence")


def test_a_file_that_is_wrong_is_said_and_can_be_read_again(tmp_path: Path) -> None:
    file = Path(os.environ["KDCONSOLE_HOSTS"])
    file.parent.mkdir()
    file.write_text("hosts: {gx10: {prot: 22, prto: 1}}\n")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        assert "prot" in shown(app)
        assert "prto" in shown(app), shown(app)
        file.write_text("hosts: {gx10: {port: 22}}\n")
        await pilot.press("ctrl+r")
        await until(pilot, lambda: screen.chosen is not None, "the host")
        assert "gx10" in shown(app)

    in_app(body, tmp_path / "evidence")


@needs_sshd
def test_a_key_is_trusted_after_a_typed_yes_and_nothing_less(rig: Rig, tmp_path: Path) -> None:
    fingerprint = host_keys.fingerprint(rig.key)

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        assert [each.name for each in screen._views.values()] == ["gx10", "lambda-vector"]
        assert "its key is not trusted yet" in shown(app)
        for answer in ("y", "enter", "escape"):
            await pilot.press("t") if answer == "y" else None
            await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
            assert fingerprint in shown(app)
            await pilot.press(answer)  # one letter is text, and not an answer
        assert "not trusted; nothing was written" in (await idle(pilot, screen)).told[-1]
        assert not host_keys.trusted_keys(load_hosts().named("gx10"))
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, ConfirmScreen), "the question")
        await pilot.press(*"yes", "enter")
        await until(pilot, lambda: screen.chosen is not None and screen.chosen.trusted, "the key is known")
        assert "is trusted now" in (await idle(pilot, screen)).told[-1]
        assert [host_keys.fingerprint(k) for k in host_keys.trusted_keys(load_hosts().named("gx10"))] == [fingerprint]

    in_app(body, tmp_path / "evidence")


@needs_sshd
def test_a_changed_key_is_refused_with_both_fingerprints(rig: Rig, tmp_path: Path) -> None:
    make_key(tmp_path / "old")
    public = (tmp_path / "old.pub").read_text()
    Path(os.environ["KDCONSOLE_HOSTS"]).with_name("known_hosts").write_text(f"[127.0.0.1]:{rig.port} {public}")

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        await pilot.press("t")
        problem = (await idle(pilot, screen)).problem
        assert host_keys.fingerprint(rig.key) in problem
        assert screen.chosen is not None
        assert screen.chosen.found["host_keys"][0]["fingerprint"] in problem

    in_app(body, tmp_path / "evidence")


@needs_sshd
def test_a_preflight_stands_there_and_the_next_lane_is_named(rig: Rig, tmp_path: Path) -> None:
    trust(rig)

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        await pilot.press("enter")
        view = await idle(pilot, screen)
        assert view.preflight is not None
        names = {line.name for line in view.preflight.lines}
        assert {"python", "torch"} <= names, names
        assert "Pre-flight" in shown(app)
        await pilot.press("down", "p")
        await until(pilot, lambda: screen.chosen is not None and screen.chosen.name == "lambda-vector", "the other")
        view = await idle(pilot, screen)
        failed = view.preflight is not None and any(line.outcome == "FAIL" for line in view.preflight.lines)
        assert failed or view.problem

    in_app(body, tmp_path / "evidence")


@needs_sshd
def test_what_cannot_be_made_is_said_and_leaving_meanwhile_asks_for_a_second_press(rig: Rig, tmp_path: Path) -> None:
    trust(rig)
    file = Path(os.environ["KDCONSOLE_HOSTS"])
    file.write_text(file.read_text().replace(sys.executable, "/nowhere/python"))

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        await pilot.press("b")
        assert screen.chosen is not None
        if screen.chosen.doing:
            await pilot.press("escape")
            assert app.screen is screen
        view = await idle(pilot, screen)
        assert "/nowhere/python" in view.problem
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen), "Home again")

    in_app(body, tmp_path / "evidence")


@needs_sshd
def test_leftovers_go_after_a_typed_yes(rig: Rig, tmp_path: Path) -> None:
    trust(rig)
    left = tmp_path / "base" / "store" / ("0" * 64 + ".part")
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(1000))
    for path in (left / "half", left):
        os.utime(path, (1, 1))

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        for answer in (("escape",), ("y", "e", "s", "enter")):
            await pilot.press("c")
            await until(pilot, lambda: isinstance(app.focused, Input), "the question")
            assert left.name[:20] in shown(app)
            await pilot.press(*answer)
            view = await idle(pilot, screen)
            assert left.exists() == (answer == ("escape",)), view.told
        assert "freed" in view.told[-1]

    in_app(body, tmp_path / "evidence")


def test_under_readonly_nothing_is_trusted_made_or_removed(tmp_path: Path) -> None:
    add_host("gx10", {"address": "127.0.0.1", "port": 1})

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        screen = await on_hosts(app, pilot)
        await pilot.press("t", "b", "c")
        assert screen.chosen is not None
        assert not screen.chosen.doing
        assert isinstance(app.screen, HostsScreen)

    in_app(body, tmp_path / "evidence", readonly=True)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_shows_what_matters(size: tuple[int, int], tmp_path: Path) -> None:
    add_host("gx10", {"address": "127.0.0.1", "port": 1})

    async def body(app: KdConsoleApp, pilot: Pilot[Any]) -> None:
        await on_hosts(app, pilot)
        assert "gx10" in shown(app)
        assert "not trusted yet" in shown(app)
        assert "help" in shown(app).splitlines()[-1]

    in_app(body, tmp_path / "evidence", size=size)


def test_what_a_host_says_is_text_and_not_markup() -> None:
    view = HostView("gx10", problem="[red]x[/] [@click=app.exit]").says("[bold]pip[/]")
    plain = host_text(view, 60).plain
    assert "[red]x[/] [@click=app.exit]" in plain
    assert "[bold]pip[/]" in plain
