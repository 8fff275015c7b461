"""The keys of time: a run as it was earlier, one moment or played from there on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from console.replay import Replay
from console.screens.guarded import GuardedScreen
from console.view import View

if TYPE_CHECKING:
    from textual.timer import Timer

    from console.app import KdConsoleApp


class TimeActions(GuardedScreen[None]):
    """Gives a dashboard the actions of time. The moment is in `replay`; `known` is called when it changed."""

    app: KdConsoleApp
    latest: View
    replay = Replay()
    _clock: Timer | None = None
    """Runs while something is played, so that nothing is drawn while nothing moves."""
    _played = 0.0
    """When the last picture of what is played was drawn, in seconds of our own clock."""

    def known(self) -> None:
        """Draws what is known at the moment."""
        raise NotImplementedError

    def _move(self, replay: Replay) -> None:
        changed, self.replay = replay != self.replay, replay
        if replay.playing and self._clock is None:
            self._played = time.monotonic()
            self._clock = self.set_interval(1 / self.app.settings.fps, self._play_on)
        elif not replay.playing and self._clock is not None:
            self._clock.stop()
            self._clock = None
        if changed:
            self.known()

    def _play_on(self) -> None:
        now = time.monotonic()
        passed, self._played = now - self._played, now
        self._move(self.replay.passed(passed, self.latest.state))

    def go_to_end(self) -> None:
        """Shows the latest that is known."""
        self._move(self.replay.at_end())
        self.known()

    def look_at_step(self, step: int) -> None:
        """Shows the run as it was when a step had just been made; the latest where it was not made yet."""
        steps = self.latest.state.steps
        made = steps.column("step") >= step
        moment = float(steps.column("t")[made.argmax()]) if made.any() else None
        self._move(Replay(moment, self.replay.speed))

    def action_scrub_back(self) -> None:
        """The run as it was earlier."""
        self._move(self.replay.scrubbed(-1, self.latest.state))

    def action_scrub_forward(self) -> None:
        """The run as it was later; at last the latest again."""
        self._move(self.replay.scrubbed(1, self.latest.state))

    def action_play(self) -> None:
        """Plays on from the moment that is shown, from the beginning at the end; or stops there."""
        self._move(self.replay.toggled(self.latest.state))

    def action_faster(self) -> None:
        """Plays faster."""
        self._hurry(1)

    def action_slower(self) -> None:
        """Plays slower."""
        self._hurry(-1)

    def _hurry(self, by: int) -> None:
        self._move(self.replay.faster(by, self.latest.state))
        if self.replay.moment is None and self.latest.state.events:  # the head tells the speed of what is played only
            unit = "x" if self.latest.timed else " lines a second"
            self.app.say(f"replay at {self.replay.speed:,}{unit}")

    def action_to_start(self) -> None:
        """The run at its beginning."""
        self._move(self.replay.at_start(self.latest.state))

    def action_to_end(self) -> None:
        """The latest that is known."""
        self._move(self.replay.at_end())
