"""Whole runs of the engine in this process, over tiny models and a tiny corpus of tokens."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import RunConfig, load_config
from engine.errors import KdError
from engine.falsifiers import parse_contract
from engine.recorder import Recorder
from engine.stop import StopRequest
from engine.stream import End, Event, Step, decode_line
from engine.trainer import Trainer
from tests.engine.model_fixtures import save_qwen2

VOCABULARY = 60
CONTRACT = """\
version: 1
name: few
falsifiers:
  - {id: F-FEW-001, claim: the loss stays low, kind: threshold, metric: step.loss, below: 1.0e+9, severity: gate}
"""


@dataclass(frozen=True)
class Desk:
    """Two models and a corpus, for as many runs as one likes."""

    root: Path
    teacher: Path
    student: Path
    corpus: Path

    def config(self, *settings: str) -> RunConfig:
        """A smoke of 6 steps of 4 windows, with these settings."""
        given = {
            "mode": "smoke",
            "teacher.path": self.teacher,
            "student.path": self.student,
            "data.path": self.corpus,
            "data.heldout_windows": 4,
            "train.steps": 6,
            "smoke.max_steps": 6,
            "smoke.warmup_steps": 1,
            "smoke.budget_seconds": 120,
            "train.batch": 4,
            "train.sequence": 16,
            "train.device": "cpu",
            "train.precision": "fp32",
            "train.warmup_steps": 1,
            "train.learning_rate": 0.001,
            "train.threads": 1,
            "checkpoint.every_steps": 0,
        }
        return load_config(sets=[*(f"{key}={value}" for key, value in given.items()), *settings], environ={})


@dataclass
class Ran:
    """What a run left: its end, its events, and the weights in memory."""

    end: End
    events: list[Event]
    weights: dict[str, torch.Tensor]

    def of(self, kind: type[Any]) -> list[Any]:
        """Its events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[tuple[float, ...]]:
        """Step, loss, ce, kd, norm, learning rate and tokens of every step in the stream."""
        return [(s.step, s.loss, s.ce, s.kd, s.grad_norm, s.lr, float(s.tokens)) for s in self.of(Step)]


def make_desk(root: Path) -> Desk:
    """Models of different widths and a corpus of 3,000 random tokens."""
    teacher = save_qwen2(root / "teacher", vocab=VOCABULARY, hidden=48, layers=2, seed=1)
    student = save_qwen2(root / "student", vocab=VOCABULARY, layers=2, seed=2, tie_word_embeddings=True)
    corpus = root / "tokens.bin"
    np.random.default_rng(0).integers(0, VOCABULARY, 3_000, dtype=np.uint32).tofile(corpus)
    return Desk(root, teacher, student, corpus)


class StopAfter(StopRequest):
    """A stop that is asked for as soon as a step is in the stream."""

    def __init__(self, recorder: Recorder, step: int) -> None:
        self._recorder, self._step = recorder, step
        super().__init__()

    @property
    def signal(self) -> str | None:  # type: ignore[override]
        return "SIGTERM" if self._recorder.step >= self._step else None

    @signal.setter
    def signal(self, value: str | None) -> None:
        pass


def run(config: RunConfig, run_dir: Path, contract: str = CONTRACT, stop_after: int | None = None) -> Ran:
    """One attempt of a run, as `engine.__main__` makes it, but for signals and threads."""
    run_dir.mkdir(exist_ok=True)
    recorder = Recorder(run_dir / "events.jsonl", "11111111-2222-3333-4444-555555555555", parse_contract(contract, "c"))
    digest = hashlib.sha256(contract.encode()).hexdigest()
    stop = StopRequest() if stop_after is None else StopAfter(recorder, stop_after)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    trainer = Trainer(config, run_dir, recorder, stop, time.monotonic(), digest)
    try:
        end = trainer.run()
    except KdError as error:
        end = End(status="FAILED", reason=str(error), exit_code=error.exit_code, steps=recorder.step, seconds=0.0)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    recorder.finish(end)
    lines = (run_dir / "events.jsonl").read_bytes().splitlines(keepends=True)
    events = [event for event in map(decode_line, lines) if event is not None]
    weights = {}
    if trainer.training is not None:
        model = trainer.training.stepper.pair.student.model
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Ran(end, events, weights)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return make_desk(tmp_path_factory.mktemp("desk"))
