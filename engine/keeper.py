"""When a full run is saved, why, and what must be the same for it to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import (
    DIRECTORY,
    Best,
    CheckpointError,
    Kind,
    OrderState,
    State,
    directory_name,
    find_latest,
    read_manifest,
)
from engine.checkpoint_writer import INITIAL_WEIGHTS, Checkpoints
from engine.config import RunConfig, fingerprint
from engine.errors import RunError
from engine.inputs import digests_of
from engine.loading import Loaded
from engine.ranks import ALONE, Ranks
from engine.recorder import Recorder
from engine.resume import read_resume
from engine.snapshot import Snapshot, capture_random_state, gather, load
from engine.space import SpaceWatch
from engine.stream import Vitals

_PRIME = 1_000_003
_WHAT = {
    "config": "the configuration",
    "teacher": "the teacher's weights",
    "teacher_store": "the stored teacher",
    "tokenizer": "the tokenizer",
    "data": "the corpus",
    INITIAL_WEIGHTS: "the untrained student",
}


@dataclass
class Totals:
    """What training has done so far, over all attempts."""

    step: int = 0
    tokens: int = 0
    initial_loss: float | None = None
    final_loss: float | None = None
    train_seconds: float = 0.0
    learned: bool = False
    heldout_initial: float | None = None
    heldout_final: float | None = None
    best: Best | None = None

    @classmethod
    def of(cls, state: State) -> Totals:
        """Those that a checkpoint holds."""
        return cls(
            step=state.step,
            tokens=state.tokens,
            initial_loss=state.initial_loss,
            final_loss=state.final_loss,
            train_seconds=state.train_seconds,
            learned=state.learned,
            heldout_initial=state.heldout_initial,
            heldout_final=state.heldout_final,
            best=state.best,
        )


class Keeper:
    """Saves a run as it goes, and puts it back.

    Of several processes rank 0 alone writes, and what it writes does not tell how many there were: a checkpoint of any
    number of them is one that any other number goes on from. All of them read. The random states that it keeps are
    those of rank 0; the others begin new ones (only a model with dropout would notice).

    Args:
        run_dir: of the run.
        config: of the run.
        loaded: its models and corpus, the student untrained.
        optimizer: over the student's parameters.
        recorder: takes events and log lines.
        device: that trains.
        ranks: of this process.
        divided: the student is divided among the processes: they all take part in what is saved.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        loaded: Loaded,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        device: torch.device,
        ranks: Ranks = ALONE,
        divided: bool = False,
    ) -> None:
        self._run_dir, self._config, self._recorder, self._device = run_dir, config, recorder, device
        self._ranks, self._divided = ranks, divided
        self._model, self._optimizer = loaded.student.model, optimizer
        self._checkpoints: Checkpoints | None = None
        self._saved_step, self._finished = -1, False
        self.inputs: dict[str, str] = {}
        """What was loaded, by hash; see `engine.inputs`. Rank 0's alone, as all that is told of a run."""
        self._digests: dict[str, str] = {}
        if not ranks.main:
            if divided:
                gather(self._model, optimizer)
            return
        snapshot = Snapshot(self._model, optimizer)
        self.inputs = digests_of(loaded)
        self._digests = {
            "config": fingerprint(config),
            **self.inputs,
            INITIAL_WEIGHTS: snapshot.weights_sha256(),
        }
        self._checkpoints = Checkpoints(
            run_dir,
            recorder.run_id,
            snapshot,
            emit=recorder.emit,
            sync=recorder.sync,
            log=recorder.log,
            keep_last=config.checkpoint.keep_last,
        )
        self._space = SpaceWatch(self._checkpoints, recorder.log)

    def resume(self) -> tuple[Totals, OrderState] | None:
        """All: puts the newest whole checkpoint back; None where there has never been one.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or it does not fit the student.
            RunError: what the run began with has changed, by name.
        """
        step = self._ranks.share(self._newest() if self._ranks.main else -1)
        if step < 0:
            return None
        path = self._run_dir / DIRECTORY / directory_name(step)
        state = load(path, self._model, self._optimizer, self._recorder.run_id)
        if not self._ranks.main:
            torch.manual_seed(self._config.train.seed + self._ranks.rank + _PRIME * state.step)
        self._recorder.log(f"resumed from {path.name}, step {state.step:,}")
        self._saved_step = state.step
        return Totals.of(state), state.order

    def _newest(self) -> int:
        """Step of the newest whole checkpoint, -1 where there is none; raises as `resume`."""
        path = find_latest(self._run_dir, self._recorder.run_id, self._recorder.log)
        if path is None:
            return -1
        manifest = read_manifest(path, self._recorder.run_id)
        if path.name != directory_name(manifest.step):
            raise CheckpointError(f"{path.name}: it holds step {manifest.step}", expected="the step of its name")
        then, allowed = manifest.state.digests, read_resume(self._run_dir).allow_changed
        for name, digest in self._digests.items():
            if name in then and then[name] != digest and name not in allowed:
                raise RunError(
                    f"resume: {_WHAT.get(name, name)}: changed since the run began",
                    expected=f"{name} {then[name][:12]}…, found {digest[:12]}…",
                    do=f"put it back, or say --allow-changed {name}",
                )
        return manifest.step

    @property
    def last_error(self) -> str | None:
        """Why the newest state that was to be saved is not; None where it is, or is still being written."""
        return None if self._checkpoints is None else self._checkpoints.last_error

    def kinds_due(self, step: int) -> list[Kind]:
        """Why the state after this step is to be saved by the calendar alone."""
        every = self._config.checkpoint.every_steps
        return ["periodic"] if every and step % every == 0 else []

    def save(self, kinds: Sequence[Kind], totals: Totals, order: OrderState, *, wait: bool = False) -> None:
        """All: saves the present state; an interrupt that finds its step saved already saves nothing."""
        due = self._is_due(kinds, totals)
        if self._divided:
            due = bool(self._ranks.share(due))
        if self._checkpoints is None:
            if due and self._divided:
                gather(self._model, self._optimizer)
            return
        if not due:
            return
        self._finished = self._finished or "final" in kinds
        state = State(
            step=totals.step,
            tokens=totals.tokens,
            order=order,
            random=capture_random_state(self._device),
            learned=totals.learned,
            attempt=self._recorder.attempt,
            train_seconds=totals.train_seconds,
            initial_loss=totals.initial_loss,
            final_loss=totals.final_loss,
            heldout_initial=totals.heldout_initial,
            heldout_final=totals.heldout_final,
            best=totals.best,
            digests=self._digests,
        )
        self._checkpoints.save(kinds, state, wait=wait)
        if not wait or self._checkpoints.last_error is None:
            self._saved_step = totals.step

    def _is_due(self, kinds: Sequence[Kind], totals: Totals) -> bool:
        """Whether there is anything to save; rank 0 knows."""
        if self._checkpoints is None or list(kinds) != ["interrupt"] or self._saved_step != totals.step:
            return True
        self._checkpoints.drain()
        return self._checkpoints.last_error is not None

    def watch_space(self, vitals: Vitals) -> None:
        """Warns where the next checkpoint would not fit; for the recorder to call with each look at the machine."""
        if vitals.disk_free_bytes is not None and not self._finished:
            self._space.look(vitals.disk_free_bytes, max(self._saved_step, self._recorder.step))

    def drain(self) -> None:
        """Waits until nothing is being written."""
        if self._checkpoints is not None:
            self._checkpoints.drain()
