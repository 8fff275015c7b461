"""When a full run is saved, why, and what must be the same for it to go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import Best, Kind, OrderState, State, find_latest, read_manifest
from engine.checkpoint_writer import INITIAL_WEIGHTS, Checkpoints
from engine.config import RunConfig, fingerprint
from engine.errors import RunError
from engine.inputs import digests_of
from engine.loading import Loaded
from engine.recorder import Recorder
from engine.snapshot import Snapshot, capture_random_state, load
from engine.space import SpaceWatch
from engine.stream import Vitals
from engine.windows import Order

RESUME = "resume.json"
"""In the run directory, written by who resumes: `allow_changed`, the names of what may differ."""

_WHAT = {
    "config": "the configuration",
    "teacher": "the teacher's weights",
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

    Args:
        run_dir: of the run.
        config: of the run.
        loaded: its models and corpus, the student untrained.
        optimizer: over the student's parameters.
        recorder: takes events and log lines.
        device: that trains.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        loaded: Loaded,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._run_dir, self._config, self._recorder, self._device = run_dir, config, recorder, device
        self._model, self._optimizer = loaded.student.model, optimizer
        snapshot = Snapshot(self._model, optimizer)
        self.inputs = digests_of(loaded)
        """What was loaded, by hash; see `engine.inputs`."""
        self._digests = {"config": fingerprint(config), **self.inputs, INITIAL_WEIGHTS: snapshot.weights_sha256()}
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
        self._saved_step, self._finished = -1, False

    def resume(self) -> tuple[Totals, OrderState] | None:
        """Puts the newest whole checkpoint back; None where there has never been one.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or it does not fit the student.
            RunError: what the run began with has changed, by name.
        """
        path = find_latest(self._run_dir, self._recorder.run_id, self._recorder.log)
        if path is None:
            return None
        then = read_manifest(path, self._recorder.run_id).state.digests
        allowed = _allowed(self._run_dir)
        for name, digest in self._digests.items():
            if name in then and then[name] != digest and name not in allowed:
                raise RunError(
                    f"resume: {_WHAT.get(name, name)}: changed since the run began",
                    expected=f"{name} {then[name][:12]}…, found {digest[:12]}…",
                    do=f"put it back, or say --allow-changed {name}",
                )
        state = load(path, self._model, self._optimizer, self._recorder.run_id)
        self._recorder.log(f"resumed from {path.name}, step {state.step:,}")
        self._saved_step = state.step
        return Totals.of(state), state.order

    @property
    def last_error(self) -> str | None:
        """Why the newest state that was to be saved is not; None where it is, or is still being written."""
        return self._checkpoints.last_error

    def kinds_due(self, step: int) -> list[Kind]:
        """Why the state after this step is to be saved by the calendar alone."""
        every = self._config.checkpoint.every_steps
        return ["periodic"] if every and step % every == 0 else []

    def save(self, kinds: Sequence[Kind], totals: Totals, order: Order, *, wait: bool = False) -> None:
        """Saves the present state; an interrupt that finds its step saved already saves nothing."""
        if list(kinds) == ["interrupt"] and self._saved_step == totals.step:
            self._checkpoints.drain()
            if self._checkpoints.last_error is None:
                return
        self._finished = self._finished or "final" in kinds
        state = State(
            step=totals.step,
            tokens=totals.tokens,
            order=OrderState(seed=order.seed, epoch=order.epoch, position=order.position),
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

    def watch_space(self, vitals: Vitals) -> None:
        """Warns where the next checkpoint would not fit; for the recorder to call with each look at the machine."""
        if vitals.disk_free_bytes is not None and not self._finished:
            self._space.look(vitals.disk_free_bytes, max(self._saved_step, self._recorder.step))

    def drain(self) -> None:
        """Waits until nothing is being written."""
        self._checkpoints.drain()


def _allowed(run_dir: Path) -> frozenset[str]:
    try:
        given = json.loads((run_dir / RESUME).read_text(encoding="utf-8"))
        return frozenset(str(name) for name in given["allow_changed"])
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run_dir / RESUME}: {error}", expected='{"allow_changed": [NAME, …]}') from None
