"""What an operator does with a run that exists: stop it, go on with it, bring its weights here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from textual import work

from console import launch
from console.screens.choose import ChooseScreen
from console.screens.following import FollowingScreen
from dispatch.mirror import LostTail
from dispatch.stopping import stop_run
from engine.errors import KdError
from engine.text import clean

if TYPE_CHECKING:
    from dispatch.fetch import Choice, Fetched
    from dispatch.transfer import Progress

STOP_GRACE_SECONDS = 300.0
PROGRESS_SECONDS = 0.25
"""Between two pictures of a progress."""


class RunControl(FollowingScreen):
    """Gives a screen that follows a run the actions that steer it."""

    def do(self, text: str) -> None:
        """Shows what is being done for the operator; empty: nothing."""
        raise NotImplementedError

    @work(exclusive=True, group="resume", exit_on_error=False)
    async def action_resume(self) -> None:
        """Asks, and starts another attempt of a training that ended before its last step, or of an evaluation."""
        name = self.run_dir.id
        if self.going_on:
            self.app.say(f"{name} goes on")
            return
        try:  # before anybody is asked
            launch.require_word(self.run_dir)
        except KdError as error:
            self.app.say(f"not resumed: {error}", "error")
            return
        came_to = "its newest whole checkpoint" if self.run_dir.manifest.mode == "train" else "what it has already"
        consequences = f"It goes on from {came_to}, with its own configuration, in the same directory."
        if not await self.app.ask(f"Resume {name}?", consequences, "resume the run"):
            return
        place = self.app.reach.place(self.run_dir)
        try:
            try:
                await launch.start_again(self.run_dir, (), place)
            except LostTail as error:
                if not await self.accepts(error):
                    return
                await launch.start_again(self.run_dir, (), place, self.app.say)
        except KdError as error:
            self.app.say(f"not resumed: {error}", "error")
            return
        self.app.say(f"{name} was started again")
        self.follow_run()

    @work(exclusive=True, group="stop", exit_on_error=False)
    async def action_stop(self) -> None:
        """Asks, stops the run, and says when its end was seen."""
        name = self.run_dir.id
        if not self.going_on:
            self.app.say(f"{name} has ended already")
            return
        keeps = (
            "It ends after the present step, and commits a checkpoint where there is something to save; a training "
            "can be resumed from it."
        )
        if self.run_dir.manifest.mode == "evaluate":
            keeps = "It ends soon, and keeps the answers that are generated and judged; it can be resumed from them."
        consequences = f"{keeps} One that has not ended after {STOP_GRACE_SECONDS:.0f} s is killed."
        if not await self.app.ask(f"Stop {name}?", consequences, "stop the run"):
            return
        self.do(f"stopping {name}; it commits what it has")
        try:
            place = self.app.reach.place(self.run_dir)
            done = await stop_run(
                place, grace=STOP_GRACE_SECONDS, kill=True, say=lambda text: self.do(clean(text, 200))
            )
            self.app.say(f"{name}: {done.describe()}", "information" if done.stop.cancelled else "error")
        except KdError as error:
            self.app.say(f"{name}: {error}", "error")
        finally:
            self.do("")

    @work(exclusive=True, group="fetch", exit_on_error=False)
    async def action_fetch(self) -> None:
        """Asks what is wanted, and brings it here; a fetch that was broken off goes on where it stopped."""
        from dispatch.fetch import Choice, fetch

        if self.run_dir.manifest.remote is None:
            self.app.say(f"{self.run_dir.id} ran on this machine: all of it is here")
            return
        choices: list[tuple[str, str, Choice]] = [
            ("The best checkpoint, and the model", "lowest held-out loss, or else the latest", Choice(None, True)),
            ("The latest checkpoint", "what a resume goes on from", Choice("latest", False)),
            ("The model alone", "what a training writes at its end", Choice("none", True)),
            ("All checkpoints, and the model", "everything that the run kept", Choice("all", True)),
        ]
        question = f"What of {self.run_dir.id} is to be brought here from {self.run_dir.manifest.where}?"
        taken = await self.app.push_screen_wait(ChooseScreen(question, [(a, b) for a, b, _ in choices]))
        if taken is None:
            return
        shown = 0.0

        def say(text: str) -> None:
            self.do(clean(text, 200))

        def tell(progress: Progress) -> None:
            nonlocal shown
            if time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                self.do(f"fetching {progress.describe()}")

        self.do(f"fetching from {self.run_dir.manifest.where} …")
        try:
            done = await fetch(self.app.reach, self.run_dir, choices[taken][2], say, tell)
            self.app.say(fetched_text(done), "error" if done.refused else "information")
        except KdError as error:
            self.app.say(f"not fetched: {error}", "error")
        finally:
            self.do("")


def fetched_text(done: Fetched) -> str:
    """What a fetch brought, in one line."""
    here = [*(path.name for path in done.checkpoints), *(["model"] if done.model else [])]
    moved = f"{done.moved / 1e6:,.1f} MB brought" if done.moved else "everything was here already"
    return "; ".join(
        ["here and verified: " + (", ".join(here) or "the small files"), moved, *done.refused, *done.notes]
    )
