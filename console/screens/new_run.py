"""Choose a configuration, see what it comes to and whether it can run, start it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Input, OptionList, Static
from textual.worker import Worker, WorkerError

from console.actions import Where, bindings
from console.launch import Job
from console.palette import verdict_mark
from console.prepare import Draft, Mode, Prepared, prepare, smoke_command, yaml_files
from console.prepared_text import prepared_text, what
from console.room import OVERRIDE, advice
from console.screens.confirm import ConfirmScreen
from console.screens.guarded import GuardedScreen
from console.widgets.flow import Flow
from console.widgets.key_bar import KeyBar
from console.widgets.one_of import OneOf
from console.widgets.source_list import TYPED, Source, SourceList
from engine.errors import KdError
from engine.text import clean

if TYPE_CHECKING:
    from dispatch.places import Reach

TYPING_SECONDS = 0.25
"""How long a line rests before what it says is looked at."""
CURSOR_SECONDS = 0.08
MAX_NAME = 120
RUNS = {"smoke": "smoke", "train": "training", "prepare": "preparation"}
MODES = (("smoke", "a rehearsal, judged"), ("train", "the long run"), ("prepare", "stores the teacher"))
HERE = ("this machine", "")
READONLY = "--readonly: nothing is started from here"


class Launcher(Protocol):
    """What the screen needs of its app."""

    readonly: bool
    evidence: tuple[Path, ...]

    @property
    def reach(self) -> Reach:
        """The ways to the hosts."""
        ...

    def say(self, text: str, severity: str = "information") -> None:
        """A message to the operator."""
        ...

    def start_run(self, job: Job) -> object:
        """Starts a run and shows it; a worker is waited for."""
        ...


class NewRunScreen(GuardedScreen[None]):
    """Smoke, train or prepare: what is chosen on one side, what comes of it on the other.

    Args:
        draft: what is chosen at first; the smoke of the built-in models.
    """

    BINDINGS = bindings("new")
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (76, "-wide")]
    AUTO_FOCUS = "#source"
    where: ClassVar[Where] = "new"

    CSS_PATH = "new_run.tcss"

    @dataclass
    class Looked(Message):
        """A draft was looked at; posted by the worker, handled by `_known`."""

        prepared: Prepared

    @dataclass
    class Listed(Message):
        """The files of the working directory were listed; posted by the worker, handled by `_offer`."""

        files: Sequence[Path]

    @dataclass
    class HostsListed(Message):
        """The hosts of hosts.yaml were read; posted by the worker, handled by `_offer_hosts`."""

        names: Sequence[str]

    def __init__(self, draft: Draft | None = None) -> None:
        super().__init__()
        self._first = draft or Draft()
        self._prepared: Prepared | None = None
        self._looking_at: Draft | None = None
        self._wanted = self._starting = self._left = False

    @property
    def _launcher(self) -> Launcher:
        return cast("Launcher", self.app)

    @property
    def _evidence(self) -> Path:
        return self._launcher.evidence[0]

    def compose(self) -> ComposeResult:
        """See Textual."""
        first = self._first
        yield Static(id="title")
        with VerticalScroll(id="body", can_focus=False):
            with Vertical(id="form"):
                yield OneOf(MODES, chosen=[name for name, _ in MODES].index(first.mode), id="mode")
                yield OneOf(
                    (HERE, (first.host, "")) if first.host else (HERE,), chosen=int(bool(first.host)), id="host"
                )
                yield SourceList(id="source")
                yield from _line("file", "config.yaml", str(first.file or ""))
                yield from _line("set", "train.steps=500 train.batch=8", first.sets)
                yield from _line("name", "what you call the run", max_length=MAX_NAME)
            with VerticalScroll(id="details"):
                yield Flow(partial(prepared_text, None), id="text")
        with Horizontal(id="bar"):
            yield Static(id="status")
            yield Button(Content("Start"), variant="primary", id="start", compact=True)
        yield KeyBar("new")

    def on_mount(self) -> None:
        """Takes over the first draft and looks at it."""
        place = Content.styled(f"  in {clean(str(self._evidence), 300)}", "$foreground-muted")
        self.query_one("#title", Static).update(Content.assemble(("New run", "bold"), place))
        if self._first.template is None:
            self._sources.choose(TYPED)
        elif self._first.template != "builtin":
            self._sources.choose(Source(template=self._first.template))
        self._list_files()
        self._list_hosts()
        self._look_again()

    def on_screen_resume(self) -> None:
        """After a run was started from here, what is free and which smoke has passed may have changed."""
        if self._left:
            self._left = False
            self._look_again()

    # What is chosen

    @property
    def _sources(self) -> SourceList:
        return self.query_one(SourceList)

    @property
    def draft(self) -> Draft:
        """What is chosen now."""
        source, sets = self._sources.source, self.query_one("#set", Input).value
        file, typed = source.file, self.query_one("#file", Input).value.strip()
        if source == TYPED and typed:
            file = Path(typed)
        host = self.query_one("#host", OneOf)
        mode = cast("Mode", self.query_one("#mode", OneOf).chosen)
        return Draft(mode, source.template, file, sets.strip(), host.chosen if host.index else None)

    @on(OneOf.Changed)
    @on(OptionList.OptionHighlighted)
    def _chosen(self) -> None:
        self._look(CURSOR_SECONDS)

    @on(Input.Changed, "#file")
    def _typed(self, changed: Input.Changed) -> None:
        if changed.value.strip():
            self._sources.choose(TYPED)
        self._look(TYPING_SECONDS)

    @on(Input.Changed, "#set")
    def _set(self) -> None:
        self._look(TYPING_SECONDS)

    @on(Input.Submitted)
    def _leave_line(self) -> None:
        """Enter ends a line; a second one starts what the line made of the run."""
        self.query_one("#start").focus()
        self._look(0.0)

    @on(Listed)
    def _offer(self, message: Listed) -> None:
        self._sources.offer(message.files)
        self._look(0.0)

    # What comes of it

    def _look(self, rest: float) -> None:
        """Has the draft looked at, unless it has been or is being."""
        if self.draft == self._looking_at:
            return
        self._wanted = False
        self._look_again(rest)

    def _look_again(self, rest: float = 0.0) -> None:
        self._looking_at, self._prepared = self.draft, None
        self._prepare(self._looking_at, rest)
        self._show_status()

    @work(exclusive=True, group="prepare")
    async def _prepare(self, draft: Draft, rest: float) -> None:
        await asyncio.sleep(rest)
        prepared = await asyncio.to_thread(prepare, draft, self._evidence, dict(os.environ))
        self.post_message(self.Looked(prepared))
        if not prepared.complete and not prepared.refusals:
            from console.prepare_there import look_there

            self.post_message(self.Looked(await look_there(self._launcher.reach, prepared, self._evidence)))

    @work(exclusive=True, group="files")
    async def _list_files(self) -> None:
        self.post_message(self.Listed(await asyncio.to_thread(yaml_files, Path())))

    @work(exclusive=True, group="hosts", exit_on_error=False)
    async def _list_hosts(self) -> None:
        from dispatch.hosts import load_hosts

        try:
            hosts = await asyncio.to_thread(load_hosts)
        except KdError as error:
            self._launcher.say(f"no hosts: {clean(str(error), 500)}", "error")
            return
        names = dict.fromkeys([*hosts.lanes, *hosts.known])
        self.post_message(self.HostsListed([name for name in names if name in hosts.known]))

    @on(HostsListed)
    def _offer_hosts(self, message: HostsListed) -> None:
        names = dict.fromkeys([*message.names, *([self._first.host] if self._first.host else [])])
        self.query_one("#host", OneOf).offer([HERE, *((name, "") for name in names)])
        self._look(0.0)

    @on(Looked)
    def _known(self, message: Looked) -> None:
        if message.prepared.draft != self._looking_at:
            return
        self._prepared = message.prepared
        self.query_one("#text", Flow).show(partial(prepared_text, message.prepared))
        if self._wanted and (message.prepared.complete or message.prepared.refusals):
            self._wanted = False
            self._start(message.prepared)
        self._show_status()

    def _show_status(self) -> None:
        glyph, style, text = self._status()
        self.query_one("#status", Static).update(Content.assemble((f"{glyph} ", style), text))
        self.query_one("#start", Button).disabled = self._launcher.readonly

    def _status(self) -> tuple[str, str, str]:
        prepared = self._prepared
        if self._launcher.readonly:
            return "?", "$warning", READONLY
        if self._starting:
            return "◔", "$primary", "starting…"
        count = 0 if prepared is None else len(prepared.refusals)
        if prepared is None or not (prepared.complete or count):
            where = "" if prepared is None else f" {prepared.draft.host}"
            return (
                "◔",
                "$primary",
                f"checking{where}; it starts once that is done" if self._wanted else f"checking{where}…",
            )
        if count:
            bad = verdict_mark("FAIL")
            return bad.glyph, bad.style, "1 thing is wrong" if count == 1 else f"{count} things are wrong"
        if prepared.shortages:
            return "⚠", "$warning", "too little " + ", ".join(prepared.shortages) + "; start asks first"
        if prepared.gate_closed:
            return "⚠", "$warning", "no passed smoke; start asks for a reason"
        good = verdict_mark("PASS")
        where = f", on {prepared.draft.host}" if prepared.draft.host else ""
        return good.glyph, good.style, f"ready: {what(prepared)}{where}"

    # The start

    @on(Button.Pressed, "#start")
    def action_start(self) -> None:
        """Starts the run; while its checks are under way, as soon as they have passed."""
        if self._starting:
            return
        if self.draft != self._looking_at:  # typed a moment ago
            self._look_again()
            self._wanted = True
        elif self._prepared is None or not (self._prepared.complete or self._prepared.refusals):
            self._wanted = True
        else:
            self._start(self._prepared)
        self._show_status()

    def _start(self, prepared: Prepared) -> None:
        if prepared.config is None or prepared.refusals:
            first, *others = prepared.refusals
            more = f"\nand {len(others)} more; see Checks" if others else ""
            self.notify(first + more, title="not started", severity="error", markup=False)
            self.query_one("#details").scroll_visible(top=True)
            return
        job = Job(
            prepared.config,
            self._evidence,
            clean(self.query_one("#name", Input).value.strip(), MAX_NAME) or None,
            host=prepared.draft.host,
            smoke=smoke_command(prepared.draft, self._evidence),
        )
        self._ask_and_launch(job, prepared)

    @work(group="ask", exclusive=True)
    async def _ask_and_launch(self, job: Job, prepared: Prepared) -> None:
        """Starts it, once everything that is overridden was said yes to, one by one."""
        run = RUNS[job.config.mode]
        if prepared.shortages:
            short = prepared.room.shortages if prepared.room is not None else []
            lines = [
                *prepared.shortages,
                *([f"To make it fit: {advice(short, job.config)}."] if short else []),
                "It may be killed for memory, or fail when it saves. Its manifest says that it was forced.",
            ]
            question = f"Start this {run} although there is too little room?"
            if not await self.app.push_screen_wait(ConfirmScreen(question, "\n".join(lines), "Start all the same")):
                return
            job = replace(job, force=True, overrides=(OVERRIDE,) if short else ())
        if prepared.gate is not None and prepared.gate_closed:
            lines = [prepared.gate.told(time.time()), "Its manifest keeps the reason that you give."]
            asked = ConfirmScreen(
                f"Start this {run} without a passed smoke?", "\n".join(lines), "Start all the same", reason="say why"
            )
            if not await self.app.push_screen_wait(asked):
                return
            job = replace(job, no_gate=asked.said)
        self._launch(job)

    @work(group="start")
    async def _launch(self, job: Job) -> None:
        if self._starting:
            return
        self._starting = self._left = True
        self._show_status()
        try:
            launching = self._launcher.start_run(job)
            if isinstance(launching, Worker):
                await launching.wait()
        except WorkerError:
            return  # told by the app
        finally:
            self._starting = False
            if self.is_attached:  # the operator may have left meanwhile
                self._show_status()

    # The other actions

    def action_mode(self) -> None:
        """Smoke, train or prepare."""
        self.query_one("#mode", OneOf).next()

    def action_host(self) -> None:
        """This machine, or the next host."""
        host = self.query_one("#host", OneOf)
        if host.count == 1:
            self._launcher.say("there is no other host; kdconsole hosts add writes one down", "warning")
        host.next()

    def action_overrides(self) -> None:
        """Goes to the line that sets keys."""
        self.query_one("#set").focus()

    def action_details(self) -> None:
        """Goes to what is known of the run, to scroll it, and back."""
        details = self.query_one("#details")
        target = self._sources if details.has_focus else details
        target.focus()
        target.scroll_visible(top=True)

    def action_check_again(self) -> None:
        """Reads the files again, and looks at memory and disk again."""
        self._list_files()
        self._list_hosts()
        self._look_again()

    def action_back(self) -> None:
        """Out of a line that is edited, else out of the screen."""
        if isinstance(self.focused, Input):
            self._sources.focus()
        elif len(self.app.screen_stack) > 1:
            self.dismiss(None)


def _line(name: str, placeholder: str, value: str = "", max_length: int = 0) -> ComposeResult:
    with Horizontal(classes="line"):
        yield Static(Content(name), classes="label")
        yield Input(value, placeholder=placeholder, id=name, max_length=max_length, select_on_focus=False, compact=True)
