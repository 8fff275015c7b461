"""The dashboard in a browser: the real server, real sockets, and everybody whom it has to turn away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pyte
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web

from console import pages as server
from console.pages import Pages, size
from engine.errors import ConfigError
from tests.console.run_dirs import make_run
from tests.console_rig import ROOT, Desk, processes_of, until
from tests.streams import end_event, smoke_events, stamped, with_verdicts

SECONDS = 60.0
COLUMNS, ROWS = 110, 32
COMMAND = (
    "-P",
    "-c",
    "from console import cli; cli.COMMANDS.setdefault('serve', 'console.serve:serve_command'); cli.main()",
    "serve",
)
_T = TypeVar("_T")


class Served:
    """`kdconsole serve` in a process of its own, and what it said so far."""

    def __init__(self, desk: Desk, *arguments: str) -> None:
        self.errors = desk.cwd / "serve.err"
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        with self.errors.open("w") as errors, (desk.cwd / "serve.out").open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *COMMAND, "--port", "0", *arguments],
                cwd=desk.cwd,
                env={
                    **keep,
                    "HOME": str(desk.home),
                    "PYTHONPATH": str(ROOT),
                    "KDCONSOLE_EVIDENCE": str(desk.evidence),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        self._out = desk.cwd / "serve.out"
        until(lambda: "Ctrl-C" in self.said or self.process.poll() is not None, "the address")
        found = re.search(r"http://(\S+?:(\d+))/(\S+)/\n", self.said)
        assert found, self.said + self.errors.read_text()
        self.host, self.port, self.key = found[1], int(found[2]), found[3]
        self.origin = f"http://{self.host}"
        self.url = f"{self.origin}/{self.key}/"

    @property
    def said(self) -> str:
        return self._out.read_text()

    def apps(self, desk: Desk) -> list[int]:
        """Pids of the apps behind its pages."""
        found = []
        for pid in processes_of(desk.evidence):
            with contextlib.suppress(OSError):
                if b"console.page_app" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    desk.evidence.mkdir()
    try:
        yield desk
    finally:
        desk.clear()


@pytest.fixture
def serve(desk: Desk) -> Iterator[Callable[..., Served]]:
    """Starts `kdconsole serve`."""
    started: list[Served] = []

    def serve(*arguments: str) -> Served:
        started.append(Served(desk, *arguments))
        return started[-1]

    yield serve
    for each in started:
        each.close()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Desk]]:
    """One server for every test that only asks it something."""
    desk = Desk(tmp_path_factory.mktemp("standing"))
    desk.evidence.mkdir()
    served = Served(desk)
    yield served, desk
    served.close()
    desk.clear()


class Tab:
    """A page as a browser has it: a socket, and a terminal emulator that reads it."""

    def __init__(self, page: ClientWebSocketResponse) -> None:
        self.page, self.pong = page, ""
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def text(self) -> str:
        return "\n".join(self._screen.display)

    async def press(self, keys: str) -> None:
        await self.page.send_json(["stdin", keys])

    async def shows(self, *words: str) -> str:
        """Reads until all of these are on the screen."""
        async with asyncio.timeout(SECONDS):
            while not all(word in self.text for word in words):
                message = await self.page.receive()
                assert message.type in (WSMsgType.BINARY, WSMsgType.TEXT), f"{message}\n{self.text}"
                if message.type is WSMsgType.BINARY:
                    self._stream.feed(message.data)
        return self.text

    async def ends(self) -> None:
        """Reads until the server closes it."""
        async with asyncio.timeout(SECONDS):
            while (await self.page.receive()).type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING):
                pass


@contextlib.asynccontextmanager
async def tab(session: ClientSession, origin: str, key: str) -> AsyncIterator[Tab]:
    url = f"{origin}/{key}/socket?width={COLUMNS}&height={ROWS}"
    async with session.ws_connect(url, headers={"Origin": origin}) as page:
        yield Tab(page)


def with_session(do: Callable[[ClientSession], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        async with ClientSession() as session:
            return await do(session)

    return asyncio.run(run())


async def status(session: ClientSession, url: str, **headers: str) -> int:
    async with session.get(url, headers=headers) as answer:
        await answer.read()
        return answer.status


async def socket_status(session: ClientSession, url: str, **headers: str) -> int:
    """What a request for a socket is answered with; 101 where it is opened."""
    try:
        async with session.ws_connect(url, headers=headers):
            return 101
    except aiohttp.WSServerHandshakeError as error:
        return error.status


def test_a_page_shows_the_same_dashboard_and_ends_with_it(desk: Desk, serve: Callable[..., Served]) -> None:
    run = make_run(desk.evidence, stamped([*with_verdicts(smoke_events(20)), end_event(20)]), name="first-of-all")
    served = serve()

    async def use(session: ClientSession) -> None:
        async with session.get(served.url) as answer:
            html = await answer.text()
            assert answer.status == 200
        assert f"ws://{served.host}/{served.key}/socket" in html
        async with tab(session, served.origin, served.key) as page:
            await page.shows("kdconsole", "first-of-all", "COMPLETED", "new run")
            await page.press("\r")
            await page.shows("Falsifiers", "Projection")
            await page.press("q")
            await page.ends()

    with_session(use)
    assert run.is_dir()
    until(lambda: not served.apps(desk), "the page's app to end")
    assert served.errors.read_text() == ""


def test_under_readonly_no_page_offers_to_start_a_run(desk: Desk, serve: Callable[..., Served]) -> None:
    served = serve("--readonly")

    async def use(session: ClientSession) -> None:
        async with tab(session, served.origin, served.key) as page:
            assert "new run" not in await page.shows("kdconsole", "help", "leave")
            await page.press("n?")
            assert "New run" not in await page.shows("Keys")

    with_session(use)


def test_a_page_from_elsewhere_a_foreign_name_and_a_missing_key_are_refused(standing: tuple[Served, Desk]) -> None:
    served, desk = standing
    url, page = f"{served.origin}/{served.key}/socket", served.url
    evil = f"http://evil.example:{served.port}"

    async def use(session: ClientSession) -> None:
        for origin in (evil, "null", "http://127.0.0.1", f"https://{served.host}", f"http://localhost:{served.port}"):
            assert await socket_status(session, url, Origin=origin) == 403, origin
            assert await status(session, page, Origin=origin) == 403, origin
        assert await socket_status(session, url) == 403
        # A name of somebody else's that was made to point here: then the origin agrees with the host.
        for host in (f"evil.example:{served.port}", "127.0.0.1.evil.example", "localhost/;script-src *", "", "[::2]"):
            assert await status(session, page, Host=host) == 403, host
            assert await socket_status(session, url, Host=host, Origin=f"http://{host}") == 403, host
        wrong = "x" * len(served.key)
        assert await socket_status(session, f"{served.origin}/{wrong}/socket", Origin=served.origin) == 404
        for path in ("", "socket", f"{wrong}/", f"{wrong}/assets/textual.js", f"{served.key}/assets/../../page.html"):
            assert await status(session, f"{served.origin}/{path}") == 404, path

    with_session(use)
    assert served.apps(desk) == []
    assert served.errors.read_text() == ""


def test_a_tunnel_may_give_it_another_name_and_port(standing: tuple[Served, Desk]) -> None:
    served, _ = standing

    async def use(session: ClientSession) -> None:
        for name in ("localhost:9000", "127.0.0.1", "[::1]:9000"):
            async with session.get(served.url, headers={"Host": name}) as answer:
                assert f"ws://{name}/" in await answer.text()
            url = f"{served.origin}/{served.key}/socket"
            assert await socket_status(session, url, Host=name, Origin=f"http://{name}") == 101

    with_session(use)


def test_a_page_loads_nothing_from_elsewhere_and_stands_in_no_frame(standing: tuple[Served, Desk]) -> None:
    served, _ = standing

    async def use(session: ClientSession) -> None:
        async with session.get(served.url) as answer:
            policy, html = answer.headers["Content-Security-Policy"], await answer.text()
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert set(re.findall(r"\w+://[^/\s\"';]+", html + policy)) == {f"ws://{served.host}"}
        links = re.findall(r'(?:src|href)="(/[^"]+)"', html)
        assert len(links) == 3
        for link in links:
            assert await status(session, served.origin + link) == 200, link

    with_session(use)


def test_only_the_loopback_address_is_listened_on(standing: tuple[Served, Desk]) -> None:
    served, _ = standing
    with socket.create_connection(("127.0.0.1", served.port), 5):
        pass
    # Whoever listens on every address listens on this one.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", served.port), 5)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
def test_the_other_loopback_can_be_asked_for(desk: Desk, serve: Callable[..., Served]) -> None:
    served = serve("--host", "::1")
    assert served.host == f"[::1]:{served.port}"
    assert with_session(lambda session: status(session, served.url)) == 200


def refused(desk: Desk, *arguments: str, python: str = "") -> str:
    """The one line in which `kdconsole serve` refuses."""
    command = [*COMMAND]
    command[2] = f"{python}\n{command[2]}"
    done = desk.call(*arguments, command=command)
    assert done.rc == 2, done.said
    assert done.out == ""
    return done.err.splitlines()[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com", "127.0.0.2", ""])
def test_no_other_address_is_served(desk: Desk, host: str) -> None:
    assert "is not this machine's loopback, and nothing else is served" in refused(desk, "--host", host)
    with pytest.raises(ConfigError, match="not this machine's loopback"):
        asyncio.run(server.serve(desk.evidence, readonly=False, host=host, port=0, tell=print))


def test_a_port_that_is_taken_is_told_with_what_to_do(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(desk, "--port", str(port))
    assert (
        line
        == f"error: port {port} of 127.0.0.1: in use by another program; choose another with --port; 0 is any free one"
    )


@pytest.mark.parametrize("module", ["aiohttp", "textual_serve"])
def test_without_the_extra_it_says_what_to_install(desk: Desk, module: str) -> None:
    line = refused(desk, python=f"import sys; sys.modules['{module}'] = None")
    assert line.startswith(f"error: kdconsole serve: {module} is not installed; ")
    assert "pip install 'kdconsole[serve]'" in line


def test_wrong_settings_are_told_at_the_start_and_not_in_each_page(desk: Desk) -> None:
    settings = desk.home / ".config" / "kdconsole" / "settings.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("theem: dark\n")
    assert "theem" in refused(desk)


@pytest.mark.timeout(240)
def test_a_run_started_in_a_page_goes_on_when_the_page_or_the_server_is_gone(
    desk: Desk, serve: Callable[..., Served]
) -> None:
    served = serve()

    async def start(session: ClientSession) -> None:
        async with tab(session, served.origin, served.key) as page:
            await page.shows("new run")
            await page.press("n")
            await page.shows("ready:")
            await page.press("\r")  # the source's line; a second one starts
            await page.press("\r")
            await asyncio.to_thread(until, lambda: any(desk.evidence.glob("*/supervisor.jsonl")), "the start")

    with_session(start)
    until(lambda: not served.apps(desk), "the page's app to end")
    trainer = desk.run.trainer()
    os.kill(trainer, 0)
    until(lambda: f"{desk.run.path.name} goes on. kdconsole attach" in served.said, "the word that it goes on")

    async def look(session: ClientSession) -> None:
        async with tab(session, served.origin, served.key) as page:
            await page.shows(desk.run.path.name[:8])
            served.process.kill()

    with_session(look)
    until(lambda: not served.apps(desk), "the app of a server that was killed to end")
    os.kill(trainer, 0)
    assert desk.call("stop", desk.run.path.name, "--grace", "60").rc == 0
    desk.is_quiet()


def test_ctrl_c_closes_every_page_and_ends_cleanly(desk: Desk, serve: Callable[..., Served]) -> None:
    served = serve()

    async def use(session: ClientSession) -> None:
        async with tab(session, served.origin, served.key) as one, tab(session, served.origin, served.key) as two:
            await one.shows("kdconsole")
            await two.shows("kdconsole")
            assert len(served.apps(desk)) == 2
            os.killpg(served.process.pid, signal.SIGINT)
            await one.ends()
            await two.ends()

    with_session(use)
    assert served.process.wait(SECONDS) == 0
    assert served.errors.read_text() == ""
    until(lambda: not served.apps(desk), "the apps to end")


# The server with other programs in the app's place


class Inside:
    """The server in this process, with `script` in place of the app."""

    def __init__(self, script: str) -> None:
        self.told: list[str] = []
        self.pages = Pages([sys.executable, "-I", "-S", "-c", script], self.told.append)

    async def __aenter__(self) -> Inside:
        self._runner = web.AppRunner(self.pages.application(), access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.origin = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


DEAF = "import sys, time; sys.stdout.write('__GANGLION__\\n'); sys.stdout.flush(); time.sleep(600)"
TALKER = """
import os, sys
def write():
    os.write(1, b'D' + (50_000).to_bytes(4, 'big') + b'x' * 50_000)
os.write(1, b'__GANGLION__\\n')
while not os.path.exists(sys.argv[1]):
    write()
for _ in range(100):  # more than any pipe holds
    write()
"""


def test_an_app_that_fails_tells_why_on_the_servers_terminal_and_ends_its_page() -> None:
    async def use(session: ClientSession) -> list[str]:
        async with Inside("import sys; sys.exit('boom \\x1b[2J')") as inside:
            async with tab(session, inside.origin, inside.pages.key) as page:
                await page.ends()
            return inside.told

    assert with_session(use) == ["boom \\x1b[2J"]


def test_an_app_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.2)

    async def use(session: ClientSession) -> int:
        async with Inside(DEAF) as inside:
            async with tab(session, inside.origin, inside.pages.key):
                while not inside.pages.open or not (process := next(iter(inside.pages.open))._process):
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(SECONDS):
                while inside.pages.open:
                    await asyncio.sleep(0.01)
            assert process.returncode is not None
            return process.returncode

    assert with_session(use) == -signal.SIGKILL


def test_an_app_that_writes_to_a_page_that_is_gone_is_read_until_it_has_left(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    script = TALKER.replace("sys.argv[1]", repr(str(stop)))

    async def use(session: ClientSession) -> int:
        async with Inside(script) as inside:
            async with tab(session, inside.origin, inside.pages.key) as page:
                await page.page.receive()
                connection = page.page._response.connection
                assert connection is not None
                assert connection.transport is not None
                connection.transport.abort()  # as when a browser is killed
                [open_page] = inside.pages.open
                process = open_page._process
                assert process is not None
            stop.touch()
            async with asyncio.timeout(SECONDS):
                while inside.pages.open:
                    await asyncio.sleep(0.01)
            assert process.returncode is not None
            return process.returncode

    started = time.monotonic()
    assert with_session(use) == 0
    assert time.monotonic() - started < server.GRACE_SECONDS


def test_there_are_only_so_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PAGES", 1)
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.2)

    async def use(session: ClientSession) -> list[str]:
        async with Inside(DEAF) as inside:
            async with tab(session, inside.origin, inside.pages.key):
                url = f"{inside.origin}/{inside.pages.key}/socket"
                assert await socket_status(session, url, Origin=inside.origin) == 503
            return inside.told

    assert with_session(use) == ["a page was refused: 1 are open"]


NONSENSE: tuple[Any, ...] = (
    *("", "{", "[]", "[[", "null", "[" * 100_000, '["stdin"]', '["stdin", 7]', '["stdin", "\\ud800"]'),
    *('["resize", {"width": "x"}]', '["resize", {"width": 1e9, "height": 1}]', '["eval", "x"]', '["ping", {}]'),
    b"\xff\x00",
)


def test_what_a_page_sends_that_makes_no_sense_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.2)

    async def use(session: ClientSession) -> str:
        async with Inside(DEAF) as inside, tab(session, inside.origin, inside.pages.key) as page:
            for each in NONSENSE:
                await (page.page.send_bytes(each) if isinstance(each, bytes) else page.page.send_str(each))
            await page.page.send_json(["ping", "x" * 1_000])
            async with asyncio.timeout(SECONDS):
                return json.loads((await page.page.receive()).data)[1]  # type: ignore[no-any-return]

    assert with_session(use) == "x" * 100


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ((100, 30), (100, 30)),
        (("100", "30"), (100, 30)),
        ((0, -5), (1, 1)),
        ((10**9, 10**9), (500, 300)),
        ((None, "30"), (80, 24)),
        (("1e3", "30"), (80, 24)),
        (("9" * 5_000, "30"), (80, 24)),
    ],
)
def test_a_pages_size_is_kept_to_what_a_screen_can_have(told: tuple[object, object], taken: tuple[int, int]) -> None:
    assert size(*told) == taken
