"""The interactive app: it owns the settings and the way between screens; runs belong to their hosts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from textual import work
from textual.app import App, SystemCommand
from textual.events import Event, Paste
from textual.screen import Screen

from console.actions import bindings
from console.palette_commands import ActionCommands
from console.screens.confirm import ConfirmScreen
from console.screens.guarded import CHANGING, GuardedScreen
from console.screens.home import HomeScreen
from console.settings import Settings
from console.themes import THEMES
from engine.errors import KdError
from engine.text import clean

if TYPE_CHECKING:
    from console.launch import Job
    from dispatch.places import Reach
    from dispatch.runs import RunDir


class KdConsoleApp(App[str]):
    """kdconsole on a terminal.

    Args:
        evidence: the directories whose runs are listed; new ones are made in the first.
        settings: the user's own.
        readonly: forbid every action that starts, stops or writes something.
        run: a run to show at once.
        job: a run to start and show at once.
        resume: with `run`: start another attempt of it; what may differ from its beginning, by name.
        review: past evidence to look at, in place of the runs of `evidence`; nothing of it is followed or sealed.
        alone: the one piece of evidence that `review` is; it is shown at once.
        compare: evidence of any kind to lay over each other at once.
    """

    TITLE = "kdconsole"
    CSS_PATH = "app.tcss"
    BINDINGS = bindings("app")
    COMMANDS = {ActionCommands}
    ENABLE_COMMAND_PALETTE = True

    def __init__(
        self,
        evidence: Sequence[Path],
        settings: Settings,
        *,
        readonly: bool = False,
        run: Path | None = None,
        job: Job | None = None,
        resume: Sequence[str] | None = None,
        review: Sequence[Path] = (),
        alone: Path | None = None,
        compare: Sequence[Path] = (),
    ) -> None:
        super().__init__()
        self.evidence, self.settings, self.readonly = tuple(evidence), settings, readonly
        self._first_run, self._first_job, self._resume = run, job, resume
        self._reviewed, self._first_reviewed, self._compared = tuple(review), alone, tuple(compare)
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = settings.theme
        self.set_keymap(settings.keymap())

    @cached_property
    def reach(self) -> Reach:
        """The ways to the hosts of runs."""
        from dispatch.places import Reach

        return Reach()

    def on_mount(self) -> None:
        """Paints the list of runs before anything is read."""
        self.push_screen(HomeScreen(self._reviewed or self.evidence))
        if self._first_job is not None:
            self.start_run(self._first_job)
        elif self._first_run is not None:
            self.open_run(self._first_run, self._resume)
        elif self._first_reviewed is not None:
            self.review(self._first_reviewed)
        elif self._compared:
            self.compare_runs(self._compared)

    async def on_unmount(self) -> None:
        """Ends the connections to hosts in order; what runs there goes on."""
        if "reach" in vars(self):
            await self.reach.close()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """See Textual. What changes something is not offered under --readonly."""
        return False if self.readonly and action in CHANGING else super().check_action(action, parameters)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """See Textual. Everything in the palette comes from the registry of actions."""
        return ()

    async def on_event(self, event: Event) -> None:
        """See Textual. A line shows what is pasted into it as it is, so nothing may be in it that steers a terminal."""
        if isinstance(event, Paste):
            event = Paste(clean("\n".join(event.text.splitlines()), keep="\n"))
        await super().on_event(event)

    # Ways to screens

    def open_run(self, path: Path, resume: Sequence[str] | None = None) -> None:
        """Shows what a row of the list stands for; with `resume`, after another attempt of that run was started.

        A run of ours is followed, on its host if it stands there; what is not one, or is under review, is only read.
        """
        from console.screens.run import RunScreen
        from dispatch import runs

        if resume is None and (self._reviewed or _only_read(path)):
            self.review(path)
            return
        try:
            run_dir = runs.open_run(path)
        except KdError as error:
            self.say(str(error), "error")
            return
        if resume is None:
            self.push_screen(RunScreen(run_dir))
        else:
            self.resume_run(run_dir, resume)

    def review(self, path: Path) -> None:
        """Shows past evidence of any kind, as it is here."""
        from console.screens.review import ReviewScreen

        self.push_screen(ReviewScreen(path))

    def compare_runs(self, paths: Sequence[Path]) -> None:
        """Lays runs over each other."""
        from console.screens.compare import CompareScreen

        self.push_screen(CompareScreen(paths))

    @work(group="launch", exit_on_error=False)
    async def start_run(self, job: Job) -> None:
        """Starts a run and shows it; from then on it is its own."""
        from console import launch
        from console.screens.run import RunScreen

        try:
            run_dir = await launch.make(job, self.reach, self.say)
            self.push_screen(RunScreen(run_dir))
            await launch.start(self.reach.place(run_dir), job.config)
        except KdError as error:
            self.say(f"not started: {error}", "error")

    @work(group="launch", exit_on_error=False)
    async def resume_run(self, run_dir: RunDir, allow_changed: Sequence[str]) -> None:
        """Starts another attempt of a run and shows it, or how it stands if none could be started."""
        from console import launch
        from console.screens.run import RunScreen

        try:
            await launch.start_again(run_dir, allow_changed, self.reach.place(run_dir))
        except KdError as error:
            self.say(f"not resumed: {error}", "error")
        self.push_screen(RunScreen(run_dir))

    # Actions

    def action_new_run(self) -> None:
        """Opens the screen where a run is chosen and started."""
        from console.screens.new_run import NewRunScreen

        self.push_screen(NewRunScreen())

    def action_hosts(self) -> None:
        """Opens the list of hosts."""
        from console.screens.hosts import HostsScreen

        self.push_screen(HostsScreen())

    def action_help(self) -> None:
        """Shows what every key does here."""
        from console.screens.help import HelpScreen

        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen(getattr(self.screen, "where", "app")))

    def action_toggle_dark(self) -> None:
        """Switches between the dark and the light theme."""
        self.theme = "kdconsole-dark" if not self.current_theme.dark else "kdconsole-light"

    async def action_leave(self) -> None:
        """Leaves; the runs that were shown go on, and the terminal says so."""
        # One that is just being started is started first, so that nobody has to wonder.
        if launching := [w for w in self.workers if w.group == "launch"]:  # of none it would wait for all
            await self.workers.wait_for_complete(launching)
        going = {screen.goes_on for screen in self.screen_stack if isinstance(screen, GuardedScreen)}
        self.exit(_left(sorted(going - {""})))

    def say(self, text: str, severity: str = "information") -> None:
        """A message to the operator, shown as text and never as markup."""
        self.notify(text, severity=severity, markup=False, timeout=15 if severity == "error" else 6)  # type: ignore[arg-type]

    def alert(self, text: str, severity: str) -> None:
        """What an operator wants to hear of without looking: also by the bell and on the desktop, where wanted."""
        self.say(text, severity)
        if self.settings.bell:
            self.bell()
        if self.settings.notify and self._driver is not None:
            # OSC 9, which terminals that know it show on the desktop and others drop; no text can end it early.
            self._driver.write(f"\x1b]9;{clean(text, 200)}\x07")

    async def ask(self, question: str, consequences: str, yes: str, typed: str = "") -> bool:
        """Asks before something is stopped or removed; to be awaited from a worker. See `ConfirmScreen`."""
        answer: bool = await self.push_screen_wait(ConfirmScreen(question, consequences, yes, typed))
        return answer


def _only_read(path: Path) -> bool:
    """Whether there is evidence that nobody can follow: a log, the predecessor's, a stream without its manifest."""
    from dispatch import runs
    from dispatch.evidence import open_evidence
    from dispatch.manifest import EVENTS

    try:
        found = open_evidence(path)
    except KdError:
        return False
    if found.logs or found.old is not None:
        return True
    try:
        runs.open_run(path)
    except KdError:
        return (path / EVENTS).exists()
    return False


def _left(going: Sequence[str]) -> str:
    lines = [
        f"{name} goes on. kdconsole attach {name} shows it again, kdconsole stop {name} stops it" for name in going
    ]
    return "\n".join(lines)
