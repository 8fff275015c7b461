"""What a stream says, followed event by event as its writer went: attempts, steps, verdicts, what remains of each."""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import dataclass, field

from console.verify.answer_fold import AnswerFold
from console.verify.faults import MAX_FAULTS, Faults
from console.verify.speed import wrong
from engine.falsifiers import FIRST_PHASE, Contract, Judge
from engine.stream import (
    Checkpoint,
    Control,
    Efficiency,
    End,
    Eval,
    Event,
    Inputs,
    Log,
    Measure,
    Phase,
    Problem,
    Projection,
    Run,
    Step,
    Verdict,
)

__all__ = ["MAX_FAULTS", "MAX_GAP", "Attempt", "Faults", "Fold", "Saved"]

MAX_GAP = 1 << 20
"""Steps that may be missing in a row before what follows is not placed any more."""
_RESUMED = re.compile(r"resumed from ckpt-step-[0-9]+, step ([0-9,]{1,30})")
_DISK = "the stream could not be written"


@dataclass
class Attempt:
    """One start of the trainer, as the stream has it."""

    run: Run | None = None
    resumed: int | None = None
    """Step of the checkpoint that it went on from, as it said."""
    steps: array[int] = field(default_factory=lambda: array("q"))
    losses: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of each step that it made."""
    speed: float | None = None
    """Its measure `steps_per_second`."""
    end: End | None = None
    disk: bool = False
    """The disk was full for a while: lines that were printed may be missing from launch.log."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as the stream speaks of it, and what training had come to at its step."""

    event: Checkpoint
    line: int
    loss: float | None
    tokens: float | None
    attempt: int
    """As its `run` event counts them."""


class Fold:
    """Follows a stream; what cannot have been written so goes to `faults`.

    Args:
        contract: what the run is judged by; None where it cannot be read.
        faults: takes what does not fit.
    """

    def __init__(self, contract: Contract | None, faults: Faults) -> None:
        self._judge = None if contract is None else Judge(contract)
        self._faults = faults
        self.answers = AnswerFold()
        self.attempts: list[Attempt] = []
        self.runs = 0
        self.run: Run | None = None
        self.losses: array[float] = array("d")
        """Of the steps that still count: what was made again stands in place of what was lost."""
        self.tokens: array[float] = array("d")
        """Up to each of them."""
        self.evals: list[Eval] = []
        self.saved: dict[int, Saved] = {}
        self.projection: Projection | None = None
        self.speeds = 0
        """How often it told how fast it was."""
        self.stated: dict[str, Verdict] = {}
        self.fallen: dict[str, Verdict] = {}
        """Each falsifier's last change, as judged anew: the engine states a verdict as it falls."""
        self.owed: dict[str, Verdict] = {}
        """Verdicts that fell and were not stated yet."""
        self._carried: dict[str, Verdict] = {}
        self.end: End | None = None
        """Where nothing follows it."""
        self._highest = 0
        self._line = 0

    @property
    def judged(self) -> list[Verdict]:
        """Every falsifier as judged anew."""
        return [] if self._judge is None else self._judge.verdicts

    @property
    def unsaid(self) -> dict[str, Verdict]:
        """Verdicts that fell and were never stated."""
        return {**self._carried, **self.owed}

    def seconds(self) -> float:
        """That all finite steps that still count took, in seconds; at least so long training took."""
        total, wanted = 0.0, len(self.losses)
        for attempt in reversed(self.attempts):
            for step, loss, took in zip(
                reversed(attempt.steps), reversed(attempt.losses), reversed(attempt.seconds), strict=True
            ):
                if step <= wanted:
                    total += took if math.isfinite(loss) and math.isfinite(took) else 0.0
            if attempt.steps:
                wanted = min(wanted, attempt.steps[0] - 1)
        return total

    def see(self, event: Event, line: int) -> None:
        """Follows one event.

        Args:
            event: the next one.
            line: its number in the file, the first being 1.
        """
        self._line = line
        opens = isinstance(event, Phase) and event.name == FIRST_PHASE
        if isinstance(event, Verdict):
            self._verdict(event)
        elif self.owed and not opens:
            self._unsaid(event)
        if opens:
            self._begin()
        elif not self.attempts:
            self._fault("attempts", event, f"the first event, expected phase {FIRST_PHASE}")
            self._begin()
        elif self.end is not None:
            self._fault("attempts", event, "an event after the end, expected nothing or another attempt")
        self.end = event if isinstance(event, End) else None
        if isinstance(event, Step):
            self._step(event)
        else:
            self._other(event)
        if self._judge is not None:
            for verdict in self._judge.observe(event):
                self.owed[verdict.id] = self.fallen[verdict.id] = verdict
            if isinstance(event, Run):
                self.owed, self._carried = {**self._carried, **self.owed}, {}

    def _fault(self, kind: str, event: Event, text: str) -> None:
        name = str(event.__struct_config__.tag)
        self._faults.add(kind, f"line {self._line}, seq {event.seq}, {name}: {text}")

    # Attempts

    def _begin(self) -> None:
        # Killed between an event and the verdict that it brought: the next attempt says the verdict.
        self._carried |= self.owed
        self.owed = {}
        self.attempts.append(Attempt())
        self.answers.begin()

    def _other(self, event: Event) -> None:
        attempt = self.attempts[-1]
        if isinstance(event, Run):
            self.runs += 1
            if event.attempt != self.runs:
                self._fault("attempts", event, f"attempt {event.attempt}, expected {self.runs}")
            if attempt.run is not None:
                self._fault("attempts", event, "the second one of its attempt")
            attempt.run = self.run = event
        elif isinstance(event, Eval):
            made = attempt.steps[-1] if attempt.steps else attempt.resumed or 0
            if event.step != made:
                self._fault("steps", event, f"at step {event.step}, expected step {made}")
            self._cut_evals(event.step)
            self.evals.append(event)
        elif isinstance(event, Log):
            attempt.disk = attempt.disk or event.message.startswith(_DISK)
            if (found := _RESUMED.match(event.message)) is not None:
                attempt.resumed = int(found[1].replace(",", "") or 0)
                self._rewind(attempt.resumed + 1)
        elif isinstance(event, Measure):
            self.answers.measures[event.name] = event.value
            if event.name == "steps_per_second":
                attempt.speed = event.value
        elif isinstance(event, Control | Problem | Inputs):
            for text in self.answers.see(event, self._line):
                self._fault("answers", event, text)
        elif isinstance(event, Checkpoint):
            self._checkpoint(event)
        elif isinstance(event, Projection):
            self.projection = event
        elif isinstance(event, Efficiency):
            self.speeds += 1
            if text := wrong(event, attempt):
                self._fault("speed", event, text)
        elif isinstance(event, End):
            attempt.end = event

    def _rewind(self, step: int) -> None:
        """Forgets this step and those after it: they are made again."""
        del self.losses[max(0, step - 1) :]
        del self.tokens[max(0, step - 1) :]
        self._cut_evals(step)

    def _cut_evals(self, step: int) -> None:
        while self.evals and self.evals[-1].step >= step:
            self.evals.pop()

    # Steps

    def _step(self, event: Step) -> None:
        attempt, step = self.attempts[-1], event.step
        if attempt.steps:
            wanted = attempt.steps[-1] + 1
        elif attempt.resumed is not None:
            wanted = attempt.resumed + 1
        else:
            wanted = step if 1 <= step <= self._highest + 1 else self._highest + 1
        if step != wanted:
            self._fault("steps", event, f"step {step}, expected step {wanted}")
        if event.again != (step <= self._highest):
            told = "was made before" if step <= self._highest else "was not made before"
            self._fault("steps", event, f"again is {str(event.again).lower()}, and step {step} {told}")
        if self.run is not None and event.tokens != self.run.tokens_per_step:
            self._fault("steps", event, f"{event.tokens:,} tokens, expected {self.run.tokens_per_step:,}")
        if step <= len(self.losses):
            self._rewind(step)
        missing = step - len(self.losses) - 1
        if 0 <= missing <= MAX_GAP:  # a gap was told; what follows it is not to be told of each step again
            self.losses.extend([math.nan] * missing + [event.loss])
            before = self.tokens[-1] if self.tokens else 0.0
            self.tokens.extend([before] * missing + [before + event.tokens])
        attempt.steps.append(step)
        attempt.losses.append(event.loss)
        attempt.seconds.append(event.seconds)
        self._highest = max(self._highest, step)

    def _checkpoint(self, event: Checkpoint) -> None:
        known = 0 < event.step <= len(self.losses)
        loss = self.losses[event.step - 1] if known else None
        tokens = self.tokens[event.step - 1] if known else None
        if not known:
            self._fault("steps", event, f"of step {event.step}, which was not made")
        self.saved[event.step] = Saved(event, self._line, loss, tokens, self.runs)

    # Verdicts

    def _verdict(self, event: Verdict) -> None:
        self.stated[event.id] = event
        if self._judge is None:
            return
        judged = self.owed.pop(event.id, None)
        if judged is None:
            self._fault("verdicts", event, f"{event.verdict} {event.id}, which nothing before it brings about")
        elif judged.verdict != event.verdict:
            self._fault("verdicts", event, f"{event.verdict} {event.id}, judged anew it is {judged.verdict}")

    def _unsaid(self, event: Event) -> None:
        for identifier, verdict in self.owed.items():
            self._fault("verdicts", event, f"before it {verdict.verdict} {identifier} fell and was not stated")
        self.owed = {}
