"""The web server of `kdconsole serve`: each page is an app of its own, and none is for a stranger.

Only this machine's loopback address is listened on, which every user of the machine and every page of every browser on
it can reach. So the address holds a key that is drawn anew at each start, and three more things are refused: a `Host`
that is no name of the loopback (a foreign name made to point here), an `Origin` other than the page's own (a web page
from elsewhere that opens a socket), and being shown in a frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import html
import json
import os
import re
import secrets
import signal
import socket
import string
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path

import textual_serve
from aiohttp import WSMessage, WSMsgType, web
from aiohttp.typedefs import Handler
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from engine.errors import ConfigError
from engine.text import clean

MAX_PAGES = 8
"""Each is a process of about a hundred MB."""
MAX_MESSAGE_BYTES = 1 << 20
MAX_COLUMNS, MAX_ROWS = 500, 300
GRACE_SECONDS = 20.0
"""So long an app may take to leave, a run that it is just starting included; then it is killed, and the run is not."""
KILL_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "::1")

_STATIC = Path(textual_serve.__file__).with_name("static")
_ASSETS = {
    "textual.js": _STATIC / "js" / "textual.js",
    "xterm.css": _STATIC / "css" / "xterm.css",
    "RobotoMono.ttf": _STATIC / "fonts" / "RobotoMono-VariableFont_wght.ttf",
}
_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""What a browser may call this machine; the port is another one behind a tunnel."""
_STDERR_BYTES = 1 << 16
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PREFIX = b"__GANGLION__\n"
"""What the driver writes before its packets."""


class Page(AppService):
    """One page and the app behind it.

    Args:
        arguments: the app's command line.
        page: the page's socket.
        tell: says something on the server's terminal.
    """

    def __init__(self, arguments: Sequence[str], page: web.WebSocketResponse, tell: Callable[[str], None]) -> None:
        super().__init__(
            " ".join(arguments),
            write_bytes=page.send_bytes,
            write_str=page.send_str,
            close=self._close,
            download_manager=DownloadManager(),
        )
        self._arguments, self._page, self._tell = arguments, page, tell

    async def _close(self) -> None:
        await self._page.close()

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        # Without a shell, and in a session of its own: Ctrl-C at the server's terminal is for the server.
        environment = self._build_environment(width, height) | {"TEXTUAL_DRIVER": "console.page_app:PageDriver"}
        self._process = process = await asyncio.create_subprocess_exec(
            *self._arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True
        )
        self._stdin = process.stdin
        return process

    async def run(self) -> None:
        """Passes on what the app writes, until it ends or the page is gone; see `AppService`."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        told = asyncio.create_task(self._tell_errors(process))
        try:
            await process.stdout.readuntil(_PREFIX)
            while True:
                kind = await process.stdout.readexactly(1)
                payload = await process.stdout.readexactly(int.from_bytes(await process.stdout.readexactly(4), "big"))
                if kind == b"D":
                    await self.on_data(payload)
                elif kind == b"M" and json.loads(payload).get("type") == "exit":
                    break
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # the app ended, or the page did
        finally:
            # An app whose output nobody reads could not even leave.
            while await process.stdout.read(1 << 16):
                pass
            await told
            await self._close()

    async def _tell_errors(self, process: Process) -> None:
        assert process.stderr is not None
        kept = b""
        while data := await process.stderr.read(1 << 12):
            kept = (kept + data)[:_STDERR_BYTES]
        for line in kept.decode(errors="replace").splitlines():
            self._tell(clean(line, 500))

    async def take(self, message: WSMessage) -> None:
        """What the page sent: keys, a size, whether it has the focus. Anything else is passed over."""
        if message.type is not WSMsgType.TEXT:
            return
        try:
            told = json.loads(message.data)
        except (ValueError, RecursionError):
            return
        match told:
            case ["stdin", str(data)]:
                await self.send_bytes(data.encode(errors="replace"))
            case ["resize", {"width": int(width), "height": int(height)}]:
                await self.set_terminal_size(*size(width, height))
            case ["ping", str(data)]:
                await self._page.send_json(["pong", data[:100]])
            case ["blur"]:
                await self.blur()
            case ["focus"]:
                await self.focus()

    async def end(self) -> None:
        """Has the app leave, waits for it, and ends it by force when it takes too long."""
        process, task = self._process, self._task
        if process is None or task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await self.send_meta({"type": "quit"})
                await asyncio.wait([task])
                await process.wait()
                return
        # What it started, such as the supervisor of a run, has a session of its own and goes on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILL_SECONDS)


class Pages:
    """The server's routes and the pages that are open.

    Args:
        arguments: the command line of a page's app.
        tell: says something on the server's terminal.
    """

    def __init__(self, arguments: Sequence[str], tell: Callable[[str], None]) -> None:
        self.key = secrets.token_urlsafe(24)
        self.open: set[Page] = set()
        self._arguments, self._tell = arguments, tell
        self._template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    def application(self) -> web.Application:
        """The routes, guarded."""
        application = web.Application(middlewares=[self._guard])
        application.add_routes(
            [
                web.get("/{key}/", self._index),
                web.get("/{key}/socket", self._socket),
                web.get("/{key}/assets/{name}", self._asset),
            ]
        )
        application.on_response_prepare.append(_seal)
        application.on_shutdown.append(self._shut_down)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.getall("Host", []), request.headers.getall("Origin", [])
        if len(host) != 1 or _HOST.fullmatch(host[0]) is None:
            raise web.HTTPForbidden(text="kdconsole: asked for by a foreign name; expected 127.0.0.1 or localhost\n")
        if not hmac.compare_digest(request.match_info.get("key", "").encode(), self.key.encode()):
            raise web.HTTPNotFound(text="kdconsole: open the whole address that kdconsole serve printed\n")
        # A page's own requests may leave it out, a socket's never do.
        wanted = f"http://{host[0]}".lower()
        if any(each.lower() != wanted for each in origin) or (not origin and request.path.endswith("/socket")):
            raise web.HTTPForbidden(text="kdconsole: asked for by a page from elsewhere\n")
        return await handler(request)

    async def _index(self, request: web.Request) -> web.Response:
        host = request.headers["Host"]
        try:
            font_size = min(40, max(6, int(request.query.get("fontsize", "15"))))
        except ValueError:
            font_size = 15
        fields = {
            "title": f"kdconsole on {clean(socket.gethostname(), 100)}",
            "assets": f"/{self.key}/assets",
            "socket": f"ws://{host}/{self.key}/socket",
            "font_size": str(font_size),
        }
        text = self._template.substitute({name: html.escape(value) for name, value in fields.items()})
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self'; "
            f"img-src 'self' data:; connect-src 'self' ws://{host}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def _asset(self, request: web.Request) -> web.FileResponse:
        path = _ASSETS.get(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        if len(self.open) >= MAX_PAGES:
            self._tell(f"a page was refused: {MAX_PAGES} are open")
            raise web.HTTPServiceUnavailable(text=f"kdconsole: {MAX_PAGES} pages are open\n")
        page_socket = web.WebSocketResponse(heartbeat=15.0, max_msg_size=MAX_MESSAGE_BYTES)
        page = Page(self._arguments, page_socket, self._tell)
        self.open.add(page)
        try:
            await page_socket.prepare(request)
            await page.start(*size(request.query.get("width"), request.query.get("height")))
            async for message in page_socket:
                await page.take(message)
        except OSError as error:
            self._tell(f"a page was refused: {clean(str(error.strerror), 200)}")
        finally:
            await page.end()
            self.open.discard(page)
            await page_socket.close()
        return page_socket

    async def _shut_down(self, application: web.Application) -> None:
        await asyncio.gather(*(page.end() for page in self.open))


def size(width: object, height: object) -> tuple[int, int]:
    """Columns and rows as a page tells them, kept to what a screen can have; 80 by 24 where they are no numbers."""
    try:
        columns, rows = int(str(width)), int(str(height))
    except ValueError:
        return 80, 24
    return min(MAX_COLUMNS, max(1, columns)), min(MAX_ROWS, max(1, rows))


async def _seal(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
    response.headers.pop("Server", None)


async def serve(evidence: Path, *, readonly: bool, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serves pages until SIGINT or SIGTERM, then has their apps leave; runs go on. A second signal is not caught.

    Args:
        evidence: whose runs the pages list.
        readonly: forbid every action that starts, stops or writes something.
        host: one of `LOOPBACK`.
        port: 0 for any free one.
        tell: says something on the server's terminal.

    Raises:
        ConfigError: it is no address of the loopback, or it cannot be listened on.
    """
    if host not in LOOPBACK:
        raise ConfigError(f"host {clean(host, 100)}: not this machine's loopback", expected=" or ".join(LOOPBACK))
    command = [sys.executable, "-P", "-m", "console.page_app", os.path.abspath(evidence)]
    pages = Pages([*command, *(["--readonly"] if readonly else [])], tell)
    runner = web.AppRunner(pages.application(), access_log=None, shutdown_timeout=GRACE_SECONDS)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    await runner.setup()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked.set)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            what = "in use by another program" if error.errno == errno.EADDRINUSE else clean(str(error.strerror), 200)
            choose = "choose another with --port; 0 is any free one"
            raise ConfigError(f"port {port} of {host}: {what}", do=choose) from None
        port, name = runner.addresses[0][1], f"[{host}]" if ":" in host else host
        here = clean(socket.gethostname(), 100)
        tell(f"http://{name}:{port}/{pages.key}/")
        tell("Whoever has this address can do on this machine what you can; it changes with every start.")
        tell(f"From another machine: ssh -L {port}:{name}:{port} {here}, and the same address there.")
        tell("Ctrl-C ends the serving. Runs go on then, and when their page is closed.")
        await asked.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # a second Ctrl-C does not wait for the apps
        await runner.cleanup()
