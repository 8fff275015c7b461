"""The hosts that runs are sent to: whose key is trusted, whether a run can start there, and what makes them ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from console.actions import Where, bindings
from console.clean_command import WHAT as LEFTOVERS
from console.columns import columns, stacked
from console.host_runs_table import size
from console.host_text import HostView, host_text, no_hosts
from console.screens.guarded import GuardedScreen
from console.widgets.flow import Flow
from console.widgets.key_bar import KeyBar
from engine.errors import KdError
from engine.text import clean

if TYPE_CHECKING:
    from console.app import KdConsoleApp

Change = Callable[[HostView], HostView]


class HostList(OptionList, inherit_bindings=False):
    """The hosts; Enter is left for the pre-flight of the one under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "cursor_down", show=False),
        Binding("up", "cursor_up", show=False),
        Binding("end", "last", show=False),
        Binding("home", "first", show=False),
        Binding("pagedown", "page_down", show=False),
        Binding("pageup", "page_up", show=False),
    ]


class HostsScreen(GuardedScreen[None]):
    """Lists the hosts of hosts.yaml in the order of its lanes. Nothing is sent to any before it is asked for."""

    app: KdConsoleApp
    BINDINGS: ClassVar[list[BindingType]] = bindings("hosts")
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (76, "-wide")]
    AUTO_FOCUS = "#hosts"
    where: ClassVar[Where] = "hosts"
    DEFAULT_CSS = """
    HostsScreen {
        layout: vertical;
        & > #title { height: 1; padding: 0 1; background: $panel; }
        & > #body { height: 1fr; }
        #hosts { padding: 1; background: transparent; text-wrap: nowrap; text-overflow: ellipsis; }
        #details { border: round $foreground 30%; }
        #details:focus { border: round $border; }
        #details { padding: 0 1; width: 1fr; height: 1fr; }
        &.-wide #hosts { width: 34%; max-width: 44; height: 100%; }
        &.-narrow #body { layout: vertical; }
        &.-narrow #hosts { height: auto; max-height: 6; padding: 0 1; }
    }
    """

    @dataclass
    class Known(Message):
        """What this machine knows of the hosts; posted by the worker that reads it."""

        path: str
        views: tuple[HostView, ...]
        problem: str = ""

    @dataclass
    class Changed(Message):
        """Something about one host is known; posted by whatever is done there."""

        name: str
        change: Change

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[str, HostView] = {}
        self._began: dict[str, float] = {}
        self._path = self._problem = ""
        self._read = self._warned = False

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield Static(Content.styled("Hosts", "bold"), id="title")
        with Horizontal(id="body"):
            yield HostList(id="hosts", markup=False, compact=True)
            with VerticalScroll(id="details"):
                yield Flow(self._details)
        yield KeyBar("hosts")

    def on_mount(self) -> None:
        """Paints an empty list and begins to read."""
        self.set_interval(1.0, self._tick)
        self.action_read_again()

    def _tick(self) -> None:
        for view in self._views.values():
            if view.doing:
                seconds = time.monotonic() - self._began[view.name]
                self._views[view.name] = replace(view, seconds=seconds)
        self._show()

    # What is known

    @work(thread=True, exclusive=True, group="read", exit_on_error=False)
    def action_read_again(self) -> None:
        """Reads hosts.yaml, ssh_config and the known keys; nothing is sent anywhere."""
        from console.host_desk import document
        from dispatch.hosts import hosts_path, load_hosts

        path = clean(str(hosts_path()), 300)
        try:
            hosts = load_hosts()
        except KdError as error:
            self.post_message(self.Known(path, (), clean(str(error), 2000, keep="\n")))
            return
        names = list(dict.fromkeys([*(lane for lane in hosts.lanes if lane in hosts.known), *hosts.known]))
        views = []
        for name in names:
            try:
                views.append(HostView(name, document(hosts.known[name], hosts)))
            except KdError as error:
                views.append(HostView(name, problem=clean(str(error), 500)))
        self.post_message(self.Known(path, tuple(views)))

    @on(Known)
    def _known(self, message: Known) -> None:
        before = self._views
        self._views = {
            view.name: replace(before[view.name], found=view.found, problem=view.problem)
            if view.name in before
            else view
            for view in message.views
        }
        self._path, self._problem, self._read = message.path, message.problem, True
        self._draw()

    @on(Changed)
    def _change(self, message: Changed) -> None:
        if message.name in self._views:
            self._views[message.name] = message.change(self._views[message.name])
            self._draw()

    def _tell(self, name: str, change: Change) -> None:
        self.post_message(self.Changed(name, change))

    # Drawing

    @property
    def _list(self) -> HostList:
        return self.query_one(HostList)

    @property
    def chosen(self) -> HostView | None:
        """The host under the cursor."""
        index = self._list.highlighted
        views = list(self._views.values())
        return views[index] if index is not None and index < len(views) else None

    def _draw(self) -> None:
        options, index = self._list, self._list.highlighted
        with self.prevent(OptionList.OptionHighlighted):
            options.set_options([Option(_prompt(view)) for view in self._views.values()])
            if self._views:
                options.highlighted = min(index or 0, len(self._views) - 1)
        options.display = bool(self._views)
        told = Content.styled(f"  {len(self._views)} in {self._path}" if self._read else "", "$foreground-muted")
        self.query_one("#title", Static).update(Content.assemble(("Hosts", "bold"), told))
        self._show()

    @on(OptionList.OptionHighlighted)
    def _show(self) -> None:
        self.query_one(Flow).show(self._details)

    def _details(self, width: int) -> Content:
        if not self._read:
            return Content.styled("◔ reading …", "$foreground-muted")
        view = self.chosen
        if self._problem:
            lines = (Content.styled(line, "$error") for line in self._problem.splitlines())
            return stacked(part for line in lines for part in columns([line], [width]))
        return no_hosts(self._path, width) if view is None else host_text(view, width)

    # What is done there: one thing at a time for each host

    def _begin(self, doing: str) -> HostView | None:
        """The chosen host, now busy; None where there is none, or where it is busy already."""
        view = self.chosen
        if view is None:
            return None
        if view.doing:
            self.app.say(f"{view.name}: {view.doing}; wait for its end", "warning")
            return None
        self._views[view.name] = replace(view, doing=doing, seconds=0.0, problem="", told=())
        self._began[view.name] = time.monotonic()
        self._draw()
        return view

    def action_preflight(self) -> None:
        """Looks at the chosen host over one connection."""
        view = self._begin("looking at it")
        if view is not None:
            self._preflight(view.name)

    @work(group="hosts", exit_on_error=False)
    async def _preflight(self, name: str) -> None:
        from console.preflight import preflight

        try:
            found = await preflight(self.app.reach, name, None, self.app.evidence[0])
            self._tell(name, lambda view: replace(view, preflight=found, doing=""))
        except KdError as error:
            self._tell(name, partial(_failed, error))

    def action_trust(self) -> None:
        """Shows the key that the chosen host presents, and asks."""
        view = self._begin("asking for its key")
        if view is not None:
            self._trust(view.name)

    @work(group="hosts", exit_on_error=False)
    async def _trust(self, name: str) -> None:
        from console.host_desk import offered_key

        try:
            offer = await offered_key(self.app.reach.host(name))
            if offer.new:
                question = f"Trust {name} at {offer.address}?"
                consequences = (
                    f"It presents this key:\n\n{offer.shown}\n\n"
                    "On the host itself `ssh-keygen -lf /etc/ssh/ssh_host_…_key.pub` shows what it should be."
                )
                if not await self.app.ask(question, consequences, "trust this key", typed="yes"):
                    self._tell(name, lambda view: replace(view, doing="").says("not trusted; nothing was written"))
                    return
            path = await asyncio.to_thread(offer.trust)
            said = f"{offer.shown} " + (
                f"is trusted now, by {clean(str(path), 300)}" if offer.new else "was trusted already"
            )
            self._tell(name, lambda view: replace(view, doing="").says(said))
            self.action_read_again()
        except KdError as error:
            self._tell(name, partial(_failed, error))

    def action_bootstrap(self) -> None:
        """Makes the environment of the chosen host."""
        view = self._begin("making its environment")
        if view is not None:
            self._bootstrap(view.name)

    @work(group="hosts", exit_on_error=False)
    async def _bootstrap(self, name: str) -> None:
        from dispatch.environment import bootstrap

        say = partial(self._say, name)
        try:
            made = await bootstrap(self.app.reach.transport(name), self.app.reach.host(name), say)
            cuda = f"CUDA {made.cuda}" if made.cuda else "no CUDA"
            say(f"{'made' if made.made else 'was ready'}: Python {made.python_version}, torch {made.torch}, {cuda}")
            self._tell(name, lambda view: replace(view, doing="", preflight=None))
        except KdError as error:
            self._tell(name, partial(_failed, error))

    def action_clean(self) -> None:
        """Shows what old runs and leftovers take room on the chosen host, and asks before they go."""
        view = self._begin("looking at what is kept there")
        if view is not None:
            self._clean(view.name)

    @work(group="hosts", exit_on_error=False)
    async def _clean(self, name: str) -> None:
        from dispatch import cleaning
        from dispatch.survey import survey

        say = partial(self._say, name)
        try:
            kept = await survey(self.app.reach, name, say)
            plan = await asyncio.to_thread(cleaning.plan, kept, self.app.evidence[0], cleaning.Rules())
            stays = len(plan.runs) - len(plan.going)
            if not (plan.going or plan.rest):
                say(f"nothing to remove; {stays} runs stay")
                return
            going = [f"runs/{each.run.id}  {size(each.run.bytes)}  {each.why}".rstrip() for each in plan.going]
            rest = [f"{each.name}  {size(each.bytes)}  {LEFTOVERS[each.what]}" for each in plan.rest]
            after = f"{size(plan.bytes)} in all; {stays} runs stay. kdconsole clean --host {name} has more choices."
            question = f"Remove {len(going)} runs and {len(rest)} leftovers from {name}?"
            if not await self.app.ask(question, "\n".join([*going, *rest, "", after]), "remove them", typed="yes"):
                say("nothing was removed")
                return
            done = await cleaning.remove(self.app.reach, plan, say)
            for refused in done.refused:
                say(refused)
            say(f"removed {len(done.removed)}, freed {size(done.freed)}")
        except KdError as error:
            self._tell(name, partial(_failed, error))
        finally:
            self._tell(name, lambda view: replace(view, doing=""))

    def _say(self, name: str, text: str) -> None:
        self._tell(name, lambda view: view.says(clean(text, 300)))

    def action_back(self) -> None:
        """Back to where one came from; what is being made there is broken off only by a second press."""
        busy = [view.name for view in self._views.values() if view.doing]
        if busy and not self._warned:
            self._warned = True
            self.app.say(
                f"{', '.join(busy)}: not done yet; once more breaks it off, which can be made good later", "warning"
            )
            return
        self.dismiss()


def _prompt(view: HostView) -> Content:
    mark, _ = view.state()
    lane = view.found.get("lane")
    after = Content.styled(f"  lane {lane}" if lane else "", "$foreground-muted")
    # In the colour of the text: the cursor's own ground is behind it.
    return Content.assemble(f"{mark.glyph} ", clean(view.name, 100), after)


def _failed(error: Exception, view: HostView) -> HostView:
    return replace(view, doing="", problem=clean(str(error), 1000))
