"""The predecessor's text logs as the events of our stream, and our own `launch.log` where the stream itself is lost."""

from __future__ import annotations

import math
import re
from typing import Any, Final, TypeVar

from dispatch import legacy_lines as forms
from dispatch.log_text import MAX_MESSAGE, LogText, plain
from dispatch.old_manifest import OldManifest, parse_old_manifest
from engine.falsifiers import FIRST_PHASE, JUDGE_PHASE
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Log,
    Measure,
    Phase,
    Projection,
    Run,
    Step,
    Verdict,
)
from engine.text import clean

__all__ = ["RUN", "LegacyLog", "OldManifest", "parse_old_manifest"]

RUN: Final = "predecessor"
"""What events that were read from lines carry in place of a run's uuid."""
_NAN: Final = math.nan
_E = TypeVar("_E", bound=Event)


class LegacyLog:
    """The predecessor's text lines as the events of ours; bytes in, events out.

    Events carry `run="predecessor"`, `seq` counts, and `t` is the number of the line: a log has no times. Every line
    is a `Log`; what it says stands behind it as an event of its type. What the lines do not say is NaN, 0 or empty. How
    the data is cut into pieces changes nothing, and memory is bounded whatever comes.

    Args:
        old: the manifest beside the log: what was asked for.
    """

    def __init__(self, old: OldManifest | None = None) -> None:
        self.unit = "step"
        """What `Step.step` counts, and `End.steps` where no line says it: `epoch` where the log counts nothing else."""
        self._old = old or OldManifest()
        self._text = LogText()
        self._out: list[Event] = []
        self._seq, self._line = 0, 0
        self._said_run: tuple[object, ...] = ()
        self._news = True
        """Something may be known of the run that was not said yet."""
        self._about: dict[str, Any] = {"device": self._old.backend, "teacher": self._old.teacher}
        self._about |= {"student": self._old.student, "mode": "smoke" if self._old.max_steps else "train"}
        self._total = 0
        self._max_steps = self._old.max_steps
        self._smoke_said = False
        self._ours = False
        """It has lines that only our own engine prints."""
        self._phase = ""
        self._attempt, self._highest = 1, 0
        self._begin()

    def _begin(self) -> None:
        """What is known of an attempt."""
        self._first: float | None = None
        self._step, self._last = 0, _NAN
        self._completed, self._closed, self._judged = "", "", ""
        self._ran: int | None = None
        self._seconds = _NAN
        self._summary: dict[str, float] = {}
        self._failure, self._fatal, self._failure_goes_on = "", False, False

    def feed(self, data: bytes) -> list[Event]:
        """The events of the lines that are whole now; of what is left over at most 64 KiB are kept."""
        if (block := self._text.feed(data)) is not None:
            self._take(block)
        return self._taken()

    def finish(self) -> list[Event]:
        """The events of the line that nothing ended, and the `End`; nothing may be fed after it."""
        if (block := self._text.finish()) is not None:
            self._take(block)
        self._finish()
        return self._taken()

    def _taken(self) -> list[Event]:
        out, self._out = self._out, []
        return out

    def _take(self, block: str) -> None:
        # Nearly all lines of a log are of no form at all, so the loop is about passing those on.
        number, seq, out = self._line, self._seq, self._out
        for line in block.split("\n"):
            number += 1
            text = line.rstrip()
            if len(line) > MAX_MESSAGE or not text.isprintable():
                self._line, self._seq = number, seq
                for part in plain(line):
                    if self._failure_goes_on or forms.may_mean_something(part):
                        self._known(part)
                    else:
                        self._emit(Log, level="info", message=part)
                seq = self._seq
            elif "oss" in text and (found := forms.STEP.search(text)) is not None:
                out.append(Log(run=RUN, seq=seq, t=number, level="info", message=text))
                self._line, self._seq = number, seq + 1
                self._step_line(found)
                seq = self._seq
            elif self._failure_goes_on or forms.may_mean_something(text):
                self._line, self._seq = number, seq
                self._known(text)
                seq = self._seq
            else:
                out.append(Log(run=RUN, seq=seq, t=number, level="info", message=text))
                seq += 1
        self._line, self._seq = number, seq

    # Lines to events

    def _emit(self, kind: type[_E], /, **fields: Any) -> None:
        self._out.append(kind(run=RUN, seq=self._seq, t=float(self._line), **fields))
        self._seq += 1

    def _known(self, text: str) -> None:
        """A line that may be of some form: its `Log`, and what it says."""
        log = len(self._out)
        self._emit(Log, level="info", message=text)
        level = self._meaning(text)
        if level != "info":
            at = self._out[log]
            self._out[log] = Log(run=RUN, seq=at.seq, t=at.t, level=level, message=text)

    def _meaning(self, text: str) -> str:
        """Emits what a line says; its level."""
        goes_on, self._failure_goes_on = self._failure_goes_on, False
        if "oss" in text and self._losses(text):
            return "info"
        if "heckpoint save" in text and (known := self._checkpoint(text)):
            return known
        if self._smoke(text) or self._ours_only(text):
            return "info"
        if goes_on and self._failure and text.strip():
            self._failure = clean(f"{self._failure} {text.strip()}", 600)
            return "error"
        level = self._verdict(text)
        if level == "info":
            return level
        fatal = forms.ends_a_run(text)
        prefix = forms.LEVEL.match(text)
        if fatal or (level is None and not (prefix and prefix[1] != "error") and forms.tells_an_error(text)):
            self._fail(text, fatal)
            return "error"
        if level is not None:
            return level
        if prefix and prefix[1] != "error":
            return prefix[1]
        return "warning" if re.search(r"\bwarn(?:ing)?\b", text, re.IGNORECASE) else "info"

    def _fail(self, text: str, fatal: bool) -> None:
        if self._failure and (self._fatal or not fatal):
            return
        self._failure, self._fatal = f"line {self._line}: {clean(text.strip(), 500)}", fatal
        self._failure_goes_on = text.endswith(":")  # Rust's panics say where first, and what on the next line

    def _losses(self, text: str) -> bool:
        if (found := forms.STEP.search(text)) is not None:
            self._step_line(found)
        elif (found := forms.EPOCH.search(text)) is not None:
            self._epoch(int(found[1]), int(found[2]), float(found[3]), found[4], found[5])
        elif (found := forms.COMPLETE.search(text)) is not None:
            losses = {"initial_loss": float(found[1]), "final_loss": float(found[2])}
            # Ours counts loading and saving as well.
            seconds = {} if found[4] is None or self._ours else {"train_seconds": float(found[4])}
            self._complete("Distillation complete", found[3], found[4], losses | seconds)
        elif (found := forms.SMOKED.search(text)) is not None:
            losses = {"initial_loss": float(found[3]), "final_loss": float(found[4])}
            speed = {} if found[5] is None else {"steps_per_second": float(found[5])}
            self._is_smoke()
            self._complete("smoke complete", found[1], found[2], losses | {"train_seconds": float(found[2])} | speed)
            for value in speed.values():
                self._emit(Measure, name="steps_per_second", value=value)
        elif (found := forms.HELD_OUT.search(text)) is not None:
            more = (None if each is None else float(each) for each in found.groups()[2:])
            self._held_out(int(found[1]), float(found[2]), *more)
        else:
            return False
        return True

    def _step_line(self, found: re.Match[str]) -> None:
        self._failure_goes_on = False
        if self.unit == "epoch":
            self.unit = "step"
            self._another_attempt()
        step, total, loss = found.groups()
        self._step_made(int(step), int(total), float(loss))

    def _step_made(self, step: int, total: int, loss: float, seconds: float = _NAN) -> None:
        if step == self._step and loss == self._last and not (self._failure or self._completed):
            return  # the same line twice
        if step < self._step or self._completed or (step == self._step and self._failure):
            self._another_attempt()
        if not self._fatal:
            self._failure = ""  # training went on after it
        if not self._total:
            self._total, self._news = total, True
        self._say_run()
        if not self._phase:
            self._phase = "train"
            self._emit(Phase, name="train")
        again = step <= self._highest
        self._step, self._last, self._highest = step, loss, max(step, self._highest)
        if self._first is None:
            self._first = loss
        self._out.append(
            Step(
                run=RUN, seq=self._seq, t=self._line, step=step, loss=loss, ce=_NAN, kd=_NAN, lr=_NAN, grad_norm=_NAN,
                tokens=0, seconds=seconds, again=again,
            )
        )  # fmt: skip
        self._seq += 1

    def _epoch(self, epoch: int, epochs: int, loss: float, held_out: str | None, seconds: str | None) -> None:
        if self.unit == "epoch" or not self._highest:
            self.unit = "epoch"
            self._step_made(epoch, epochs, loss, _NAN if seconds is None else float(seconds))
        if held_out is not None:
            self._held_out(epoch if self.unit == "epoch" else self._step, float(held_out))

    def _held_out(self, step: int, loss: float, *more: float | None) -> None:
        ce, kd, agreed = more or (None, None, None)
        self._say_run()
        self._emit(
            Eval, step=step, loss=loss, ce=_or_nan(ce), kd=_or_nan(kd),
            agreement=None if agreed is None else agreed / 100, tokens=0, seconds=_NAN,
        )  # fmt: skip

    def _another_attempt(self) -> None:
        self._attempt += 1
        self._news = True
        self._begin()

    def _complete(self, what: str, steps: str | None, seconds: str | None, summary: dict[str, float]) -> None:
        self._completed, self._failure, self._fatal = f"line {self._line}: {what}", "", False
        self._ran = self._ran if steps is None else int(steps)
        self._seconds = self._seconds if seconds is None else float(seconds)
        self._summary |= summary
        self._say_run()

    def _checkpoint(self, text: str) -> str:
        """The level of a line about a checkpoint; empty for one of another form."""
        if (found := forms.SAVED.search(text)) is not None:
            self._say_run()
            self._emit(
                Checkpoint, step=int(found[1]), kind="periodic", path=found[2], bytes=0, tensors=0, sha256="",
                seconds=_NAN, waited_seconds=_NAN,
            )  # fmt: skip
            return "info"
        if (found := forms.NOT_SAVED.search(text)) is not None:
            self._say_run()
            self._emit(CheckpointFailed, step=int(found[1]), kind="periodic", error=found[2], seconds=_NAN)
            return "error"
        return ""

    def _smoke(self, text: str) -> bool:
        """What only smokes print, the name of the GPU, and where the model went."""
        if (found := forms.PROJECTED.search(text)) is not None:
            self._say_run()
            self._emit(
                Projection, target_steps=int(found[1]), p10_seconds=_NAN, p50_seconds=float(found[4]), p90_seconds=_NAN,
                step_seconds=_NAN, fixed_seconds=_NAN, samples=0,
            )  # fmt: skip
        elif (found := forms.SMOKE_MODE.search(text)) is not None:
            if self._step:
                self._another_attempt()
            self._is_smoke()
            self._max_steps = int(found[1])
            self._say_run()
        elif forms.NO_EXPORT.search(text) is not None:
            self._is_smoke()
            self._say_run()
            self._emit(Measure, name="model_files", value=0.0)
        elif "GPU:" in text and (found := forms.GPU.search(text)) is not None:
            self._about["device_name"], self._news = found[1], True
            if self._said_run:
                self._say_run()
        elif self._smoke_said and forms.OUTPUT.search(text) is not None:
            self._say_run()
            self._emit(Measure, name="model_files", value=1.0)
        else:
            return False
        return True

    def _is_smoke(self) -> None:
        self._about["mode"], self._smoke_said, self._news = "smoke", True, True

    def _ours_only(self, text: str) -> bool:
        """What only our own engine prints."""
        if (found := forms.PHASE.match(text)) is not None:
            if found[1] == FIRST_PHASE and self._phase:
                self._another_attempt()
            self._phase, self._ours = found[1], True
            if found[1] == JUDGE_PHASE:
                self._judged = found[2] or "the log says so"  # what the last lines tell is to be judged as well
                return True
            self._say_run()
            self._emit(Phase, name=found[1], detail=found[2] or "")
        elif (found := forms.BEGUN.match(text)) is not None:
            self._about |= {"mode": found[1], "student": found[2], "device": found[4], "device_name": found[5]}
            self._about |= {"teacher": None if found[3] == "no teacher" else found[3], "precision": found[6]}
            self._about["tokens_per_step"], self._news = int(found[7].replace(",", "") or 0), True
            self._say_run()
        elif (found := forms.CLOSED.search(text)) is not None:
            self._say_run()
            self._closed, self._completed, self._failure, self._fatal = found[1], found[2].strip(), "", False
            self._ran, self._seconds = int(found[3]), float(found[4])
        else:
            return False
        return True

    def _verdict(self, text: str) -> str | None:
        """The level of a line that states verdicts; None for another."""
        if (found := forms.JUDGED.match(text)) is not None:
            self._state(found[2], found[1], found[3], found[4])
            return "error" if found[1] == "FAIL" else "info"
        stated = forms.stated_verdicts(text)
        for identifier, word in stated:
            verdict = "FAIL" if word.startswith("FAIL") else "PASS"
            self._state(identifier, verdict, "", f"{word}, line {self._line}: {text.strip()}")
        return None if not stated else "error" if stated[0][1].startswith("FAIL") else "info"

    def _state(self, identifier: str, verdict: str, expected: str, observed: str) -> None:
        self._say_run()
        severity, claim = forms.known_falsifiers().get(identifier, ("gate", ""))
        self._emit(
            Verdict, id=identifier, verdict=verdict, severity=severity, claim=claim, expected=expected,
            observed=observed, step=self._step,
        )  # fmt: skip

    def _say_run(self) -> None:
        """The `Run` before the first event that is no `Log`, and again when more is known of it."""
        if not self._news:
            return
        self._news = False
        about, old = self._about, self._old
        asked = old.epochs if self.unit == "epoch" else old.steps
        target = asked if asked is not None else self._total or self._max_steps or 0
        said = (*about.values(), target, self._max_steps, self._attempt)
        if said == self._said_run:
            return
        self._said_run = said
        self._emit(
            Run, attempt=self._attempt, mode=about["mode"], config="", gate="", contract="", teacher=about["teacher"],
            student=about["student"], host=old.host, device=about["device"], device_name=about.get("device_name", ""),
            precision=about.get("precision", ""), target_steps=target, max_steps=self._max_steps,
            temperature=_or_nan(old.temperature), alpha=_or_nan(old.alpha),
            tokens_per_step=about.get("tokens_per_step", 0),
        )  # fmt: skip

    # The end

    def _finish(self) -> None:
        self._say_run()
        reached = bool(self._total) and self._step >= self._total and not self._failure
        if self._failure:
            status, reason = "CRASHED", self._failure
        elif self._closed or self._completed:
            status, reason = self._closed or "COMPLETED", self._completed
        else:
            status, reason = "LOST", "the log does not say how it ended"
        ran = self._step if self._ran is None else self._ran
        if (status == "COMPLETED" or (status == "LOST" and reached)) and not self._ours:
            self._imply(ran)
            self._judged = self._judged or "the log ends"
        if self._judged:
            self._emit(Phase, name=JUDGE_PHASE, detail=self._judged)
        self._emit(
            End, status=status, reason=reason, exit_code=None, steps=ran, seconds=self._seconds, summary=self._summary
        )

    def _imply(self, ran: int) -> None:
        """What a run that came to its end shows without saying it, for falsifiers to be judged on."""
        losses = self._summary or (
            {} if self._first is None else {"initial_loss": self._first, "final_loss": self._last}
        )
        if losses and ran != 1:
            for name in ("initial_loss", "final_loss"):
                self._emit(Measure, name="training_loss", value=losses[name], detail=name)
        if self._max_steps is not None and self.unit == "step":
            self._emit(Measure, name="extra_or_missing_steps", value=float(abs(ran - self._max_steps)))


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value
