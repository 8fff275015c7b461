"""What every run that makes no steps has in common: phases, progress, measures, stopping, its end."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from engine.account import against, run_event, summary
from engine.config import RunConfig
from engine.device import device_memory, device_peak_bytes, place, smi_name
from engine.errors import ExitCode
from engine.falsifiers import FAIL, JUDGE_PHASE, exit_code_of
from engine.keeper import Totals
from engine.recorder import Recorder
from engine.stop import StopRequest
from engine.stream import End, Measure, Progress
from engine.training import Ended

PROGRESS_SECONDS = 2.0


class Stepless:
    """A run that makes no steps; a mode says in `phases` what it does.

    Args:
        config: resolved.
        run_dir: where the stream is.
        recorder: where everything that happens goes.
        stop: polled between units of work.
        started: `time.monotonic()` of the engine's start.
        contract_digest: SHA-256 of the contract that the recorder judges.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        recorder: Recorder,
        stop: StopRequest,
        started: float,
        contract_digest: str,
    ) -> None:
        self.config, self.run_dir, self.recorder, self.stop = config, run_dir, recorder, stop
        self.started, self.contract_digest = started, contract_digest
        self.figures: dict[str, float] = {}
        """What the `end` event sums up besides time and memory."""
        self._told = self.work_started = -PROGRESS_SECONDS

    def run(self) -> End:
        """Every phase in turn; the `end` event that closes the stream is returned, not emitted."""
        try:
            self.placement = place(self.config.train)
            if self.config.train.threads:
                torch.set_num_threads(self.config.train.threads)
            self.recorder.device_memory = lambda: device_memory(self.placement.device)
            self.recorder.machine.gpu = smi_name(self.placement.device)
            parts = self.settle()
            self.recorder.emit(run_event(self.config, self.placement, self.contract_digest, accumulation=parts))
            return self.phases()
        except Ended as ended:
            return self.end(ended.status, ended.reason + self.left(), ended.exit_code)
        finally:
            self.close()

    def settle(self) -> int | None:
        """Settles what depends on the machine; the number of parts of a batch, where the work is done by batches."""
        return None

    def phases(self) -> End:
        """What the run does."""
        raise NotImplementedError

    def left(self) -> str:
        """What a run that is ended early leaves for the next attempt, to be put after the reason."""
        return ""

    def close(self) -> None:
        """Called at the end, whatever it is."""

    def judge(self, reason: str) -> End:
        """The last phase: what the verdicts come to."""
        self.enter(JUDGE_PHASE, reason)
        code = exit_code_of(self.recorder.verdicts)
        if code == ExitCode.FAILED:
            failed = [v for v in self.recorder.verdicts if v.severity != "warn" and v.verdict == FAIL]
            return self.end("FAILED", against(failed), code)
        return self.end("COMPLETED", reason, code)

    def measure(self, name: str, value: float, detail: str = "") -> None:
        """Tells a figure that a falsifier may look at; the end sums it up as well."""
        self.figures[name] = value
        self.recorder.emit(Measure(name=name, value=value, detail=detail))

    def begin_work(self) -> None:
        """What `progress` tells of begins now."""
        self.work_started, self._told = time.monotonic(), -PROGRESS_SECONDS

    def progress(self, before: int, done: int, total: int, unit: str) -> None:
        """Tells how far it is, every two seconds and at the end.

        Args:
            before: what earlier attempts had done.
            done: by this one.
            total: of this one.
            unit: of all three.
        """
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS and done < total:
            return
        self._told, seconds = now, now - self.work_started
        self.recorder.emit(
            Progress(
                done=before + done,
                total=before + total,
                unit=unit,
                seconds=seconds,
                seconds_left=seconds * (total - done) / done if done else None,
            )
        )

    def enter(self, phase: str, detail: str = "") -> None:
        """Begins a phase, unless the run is to end."""
        self.recorder.enter(phase, detail)
        self.poll()

    def poll(self) -> None:
        """Ends the run where it was asked to end, or a fatal verdict stands against it."""
        if self.stop.signal is not None:
            raise Ended("STOPPED", f"{self.stop.signal} in phase {self.recorder.phase}", ExitCode.INTERRUPTED)
        if (fatal := self.recorder.fatal) is not None:
            raise Ended("FAILED", against([fatal]), ExitCode.FAILED)

    def end(self, status: str, reason: str, code: ExitCode) -> End:
        """The `end` event."""
        peak = device_peak_bytes(self.placement.device)
        return End(
            status=status,
            reason=reason,
            exit_code=code,
            steps=0,
            seconds=time.monotonic() - self.started,
            summary=summary(Totals(), self.recorder.phase_seconds, peak) | self.figures,
        )
