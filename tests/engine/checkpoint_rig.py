"""A small real training with everything that a checkpoint must carry: AdamW, buffers, a tied head, random numbers.

python checkpoint_rig.py RUN_DIR STEPS     goes on from the newest checkpoint and prints what it did, as JSON
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import Best, Kind, OrderState, State, find_latest
from engine.checkpoint_writer import INITIAL_WEIGHTS, Checkpoints
from engine.config import Data, Train
from engine.optimizer import adamw, learning_rate
from engine.snapshot import Snapshot, capture_random_state, load
from engine.stream import Checkpoint, CheckpointFailed, Event
from engine.windows import Order, Windows

RUN = "11111111-2222-3333-4444-555555555555"
CPU = torch.device("cpu")
TRAIN = Train(steps=40, warmup_steps=3, learning_rate=1e-2, min_learning_rate=1e-4, batch=4, sequence=8)
__all__ = ["CPU", "RUN", "TRAIN", "Data", "Model", "Rig"]


class Model(torch.nn.Module):
    """Next-token model whose forward pass draws random numbers and changes a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(31, width)
        self.mid = torch.nn.Linear(width, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.drop = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(width, 31, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("drift", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mid(self.embed(tokens)))
        hidden = self.norm(hidden.flatten(0, 1)).view_as(hidden)
        self.drift += random.random() + float(np.random.rand())
        out: torch.Tensor = self.head(self.drop(hidden)) + 1e-3 * self.drift.sum()
        return out


@dataclass
class Rig:
    """A training in a run directory, and what its checkpoints told."""

    run_dir: Path
    width: int = 16
    keep_last: int = 2
    seed: int = 0
    events: list[Event] = field(default_factory=list)
    logs: list[tuple[str, str]] = field(default_factory=list)
    step: int = 0
    best: Best | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(self.seed)
        self.model = Model(self.width)
        self.optimizer = adamw(self.model, TRAIN, CPU)
        tokens = np.random.default_rng(0).integers(0, 31, 400).astype(np.uint16)
        self.windows = Windows([tokens], TRAIN.sequence)
        self.order = Order(self.windows, seed=3)
        self.snapshot = Snapshot(self.model, self.optimizer)
        self.initial = self.snapshot.weights_sha256()
        self.checkpoints = Checkpoints(
            self.run_dir,
            RUN,
            self.snapshot,
            emit=self.events.append,
            sync=self.sync,
            log=lambda message, level: self.logs.append((level, message)),
            keep_last=self.keep_last,
        )

    def sync(self) -> None:
        """Stands for the stream's."""

    def train(self, steps: int) -> None:
        """Real steps."""
        for _ in range(steps):
            self.step += 1
            batch = torch.from_numpy(self.order.next(TRAIN.batch))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, TRAIN, TRAIN.warmup_steps)
            self.optimizer.zero_grad()
            logits = self.model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().long())
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

    def state(self) -> State:
        return State(
            step=self.step,
            tokens=self.step * 32,
            order=OrderState(seed=self.order.seed, epoch=self.order.epoch, position=self.order.position),
            random=capture_random_state(CPU),
            learned=self.step > 0,
            best=self.best,
            digests={INITIAL_WEIGHTS: self.initial},
        )

    def save(self, *kinds: Kind, heldout: float | None = None) -> Event:
        """Saves, waits, and returns the event; `heldout` makes it the best so far."""
        if heldout is not None:
            self.best = Best(step=self.step, loss=heldout)
        self.checkpoints.save(kinds, self.state(), wait=True)
        return next(e for e in reversed(self.events) if isinstance(e, Checkpoint | CheckpointFailed))

    def saved(self, steps: int, *kinds: Kind, heldout: float | None = None) -> Path:
        """Trains, saves, and returns the committed directory."""
        self.train(steps)
        event = self.save(*(kinds or ("periodic",)), heldout=heldout)
        assert isinstance(event, Checkpoint), event
        return self.run_dir / event.path

    def resume(self) -> State:
        path = find_latest(self.run_dir, RUN)
        assert path is not None
        state = load(path, self.model, self.optimizer, RUN)
        self.step = state.step
        self.order = Order(self.windows, state.order.seed, state.order.epoch, state.order.position)
        return state

    def names(self) -> set[str]:
        """What stands in the directory of checkpoints."""
        return {path.name for path in (self.run_dir / "checkpoints").iterdir()}

    def digest(self) -> str:
        """Of everything that decides how training goes on."""
        self.snapshot.fill()
        return " ".join(image.sha256() for image in self.snapshot.files.values()) + str(capture_random_state(CPU))


def main() -> None:
    rig = Rig(Path(sys.argv[1]), seed=99)
    rig.resume()
    rig.train(int(sys.argv[2]))
    print(json.dumps({"losses": rig.losses, "digest": rig.digest(), "step": rig.step}))


if __name__ == "__main__":
    main()
