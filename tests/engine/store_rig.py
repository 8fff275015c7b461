"""A small teacher, student and corpus on the disk, and preparations of them run in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import RunConfig, load_config
from engine.contract import builtin_contract
from engine.device import place
from engine.falsifiers import parse_contract
from engine.loading import Loaded, load
from engine.prepare import Preparer
from engine.recorder import Recorder
from engine.stop import StopRequest
from engine.stream import End, Event, Log, Measure, Progress, decode_line
from tests.engine.model_fixtures import save_qwen2, save_tokenizer
from tests.streams import RUN

VOCABULARY = 64
WORDS = [f"w{i}" for i in range(VOCABULARY)]


@dataclass
class Rig:
    """One directory with all of it; every preparation has a run directory of its own."""

    root: Path
    count: int = 0

    @classmethod
    def make(cls, root: Path) -> Rig:
        save_qwen2(root / "teacher", vocab=VOCABULARY + 8, hidden=48, seed=1)
        save_qwen2(root / "student", vocab=VOCABULARY, hidden=32, layers=2, seed=2, tie_word_embeddings=True)
        for model in ("teacher", "student"):
            save_tokenizer(root / model, WORDS)
        choose = random.Random(0).choice
        (root / "corpus.txt").write_text(" ".join(choose(WORDS) for _ in range(1_400)))
        return cls(root)

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def stores(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []

    def config(self, *sets: str, mode: str = "prepare", source: str = "hidden") -> RunConfig:
        given = (
            f"mode={mode}",
            f"teacher.path={self.root}/teacher",
            f"teacher.source={source}",
            f"teacher.cache={self.cache}",
            "teacher.top_k=20",
            f"student.path={self.root}/student",
            f"data.path={self.root}/corpus.txt",
            "data.heldout_windows=5",
            "data.heldout_fraction=0.1",
            "data.limit_bytes=1000000",
            "train.device=cpu",
            "train.threads=1",
            "train.precision=fp32",
            "train.sequence=16",
            "train.batch=4",
            "train.steps=8",
            "train.warmup_steps=0",
            "smoke.max_steps=null",
            "prepare.min_mass=0.1",
        )
        return load_config(None, template="builtin", sets=(*given, *sets))

    def prepare(
        self,
        *sets: str,
        source: str = "hidden",
        stop_when: Callable[[Event], bool] | None = None,
        contract: str | None = None,
    ) -> Prepared:
        """Runs a preparation; `stop_when` an event makes it true, the run is asked to stop."""
        self.count += 1
        run_dir = self.root / f"run-{self.count}"
        run_dir.mkdir()
        stop = StopRequest()
        recorder = Recorder(
            run_dir / "events.jsonl", RUN, parse_contract(contract or builtin_contract("prepare"), "prepare.yaml")
        )
        plain = recorder.emit

        def emit(event: Event) -> None:
            plain(event)
            if stop_when is not None and stop_when(event):
                stop.signal = "SIGTERM"

        recorder.emit = emit  # type: ignore[method-assign]
        preparer = Preparer(self.config(*sets, source=source), run_dir, recorder, stop, time.monotonic(), "0" * 64)
        try:
            end = preparer.run()
            recorder.finish(end)
        finally:
            recorder.machine.close()
        lines = (run_dir / "events.jsonl").read_bytes().splitlines()
        return Prepared(end, [event for event in map(decode_line, lines) if event is not None])

    def load(self, *sets: str, **options: Any) -> tuple[Loaded, list[Event]]:
        """What a run with the stored teacher loads."""
        self.count += 1
        path = self.root / f"load-{self.count}.jsonl"
        config = self.config(*sets, mode="train", **options)
        recorder = Recorder(path, RUN, parse_contract(builtin_contract("train"), "train.yaml"))
        try:
            loaded = load(config, place(config.train), recorder, lambda phase, detail: None, lambda: None)
        finally:
            recorder.machine.close()
        return loaded, [event for event in map(decode_line, path.read_bytes().splitlines()) if event is not None]


@dataclass
class Prepared:
    """How a preparation ended, and its stream."""

    end: End
    events: list[Event]

    @property
    def logs(self) -> str:
        return "\n".join(event.message for event in self.events if isinstance(event, Log))

    @property
    def measures(self) -> dict[str, float]:
        return {event.name: event.value for event in self.events if isinstance(event, Measure)}

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]
