"""What a headless run tells on standard error while it goes: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from console.report import duration
from console.run_state import RunState
from console.stored import prepares
from console.without_steps import came
from dispatch.follower import Batch
from engine.human import human_lines
from engine.stream import Control, Eval, Log, Phase, Run, Verdict
from engine.stream import Progress as Made

PLAIN_SECONDS = 5.0
"""Between two step lines where there is no terminal."""


class Narrator:
    """Tells how a run goes.

    Args:
        console: standard error.
        quiet: say errors and warnings only.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._budget: float | None = None
        self._started = self._told = 0.0

    def say(self, text: str) -> None:
        """One line, shown as text and never as markup."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def detached(self, run_id: str) -> None:
        """The operator let go of a run that goes on."""
        self.say(
            f"left; the run goes on. kdconsole --headless attach {run_id} to watch, kdconsole stop {run_id} to stop"
        )

    @contextlib.contextmanager
    def watching(self, mode: str, budget: float | None) -> Iterator[None]:
        """Shows progress while inside.

        Args:
            mode: smoke, train or prepare.
            budget: seconds after which a smoke ends.
        """
        self._budget, self._started = budget, time.monotonic()
        if self._quiet or not self._console.is_terminal:
            yield
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(f"{mode}: starting", total=1.0)
        try:
            with self._progress:
                yield
        finally:
            self._progress = None

    def show(self, state: RunState, batch: Batch) -> None:
        """What a batch brought, and where the run stands now."""
        for event in batch.events:
            telling = isinstance(event, Phase | Eval | Run | Log | Control) or (
                isinstance(event, Verdict) and event.verdict != "PASS"
            )
            if telling:
                for line in human_lines(event, state.run):
                    self.say(line)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=_where(state), completed=self._fraction(state))
        elif (state.last_step or state.progress) and batch.events and time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            self.say(_where(state))

    def _fraction(self, state: RunState) -> float:
        """How much is done: of the steps, of the budget or of work without steps, whichever is further."""
        if state.last_step is None and state.progress is not None:
            return _share(state.progress)
        steps = state.last_step.step / state.target_steps if state.last_step and state.target_steps else 0.0
        spent = (time.monotonic() - self._started) / self._budget if self._budget else 0.0
        return min(1.0, max(steps, spent))


def _share(made: Made) -> float:
    """How much is done, 0 to 1."""
    return min(1.0, made.done / made.total) if made.total > 0 else 0.0


def _where(state: RunState) -> str:
    """One line: phase, step of total, loss, held-out loss, and for a long run the time left."""
    made = state.progress
    if made is not None and not prepares(state) and state.phases and state.phases[-1].started > made.t:
        made = None  # of a phase that is over
    if state.last_step is None and made is not None and state.end is None:
        left = made.seconds_left
        text = f"{state.phase}  {made.done:,}/{made.total:,} {made.unit}  {_share(made):.0%}"
        result = came(state)
        text += f"  {result.short}" if result is not None and result.short else ""
        return text if left is None or not math.isfinite(left) else f"{text}  {duration(left)} left"
    if state.last_step is None:
        return state.phase
    step, total = state.last_step, state.target_steps or 0
    text = f"{state.phase}  step {step.step:,}/{total:,}  loss {step.loss:.4f}"
    if state.evals:
        text += f"  held-out {state.evals[-1].loss:.4f}"
    if state.run is not None and state.run.mode == "train" and step.step:
        began = next((p.started for p in state.phases if p.name == "train"), state.first_t)
        left = (step.t - began) / step.step * (total - step.step)
        text += f"  {duration(left)} left"
    return text
