"""Small problems, a model that has learned some of their answers by heart, and evaluations of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from dispatch.runs import create_run
from engine.answers import Answer, Result
from engine.config import RunConfig, load_config
from engine.contract import builtin_contract, contract_name
from engine.evaluate import Evaluator
from engine.falsifiers import parse_contract
from engine.formats import resolve_builtin
from engine.problems import COMPLETIONS, PROBLEMS, RESULTS, Problem
from engine.recorder import Recorder
from engine.stop import StopRequest
from engine.stream import Control, End, Event, Log, Measure, Phase, Progress, Verdict, decode_line
from engine.stream import Problem as ProblemEvent
from tests.engine.model_fixtures import save_qwen2
from tests.streams import RUN

Kind = TypeVar("Kind", bound=Event)
Row = TypeVar("Row", Answer, Result)


def _problem(name: str, arguments: str, says: str, body: str, test: str) -> Problem:
    return Problem(
        task=f"own/{name}",
        prompt=f'def {name}({arguments}):\n    """{says}"""\n',
        entry_point=name,
        canonical=f"    {body}\n",
        test=f"def check(candidate):\n    {test}\n",
    )


PROBLEMS_OF_OURS = (
    _problem("double", "x", "Twice x.", "return 2 * x", "assert candidate(4) == 8 and candidate(-1) == -2"),
    _problem("first", "items", "The first of items.", "return items[0]", "assert candidate([3, 4]) == 3"),
    _problem("shout", "text", "The text, loud.", "return text.upper()", "assert candidate('ab') == 'AB'"),
)
LEARNED = 2
"""So many of them does the model know by heart."""
REST = "    return None\n"
"""What it says to the others."""


def as_lines(problems: Sequence[Problem]) -> bytes:
    rows = (
        {
            "task_id": problem.task,
            "prompt": problem.prompt,
            "entry_point": problem.entry_point,
            "canonical_solution": problem.canonical,
            "test": problem.test,
        }
        for problem in problems
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def save_learned(path: Path, problems: Sequence[Problem] = PROBLEMS_OF_OURS) -> Path:
    """A tiny model that says the answers of the first problems, and of the others that they are `None`."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(resolve_builtin("builtin:teacher") / "tokenizer.json"))
    save_qwen2(path, vocab=tokenizer.get_vocab_size(), hidden=32, layers=1, seed=3, tie_word_embeddings=True)
    shutil.copy(resolve_builtin("builtin:teacher") / "tokenizer.json", path)
    # Encoded in two parts, as it is asked: a prompt goes in without its last line end.
    rows = [
        tokenizer.encode(problem.prompt.rstrip()).ids
        + tokenizer.encode(f"\n{problem.canonical if place < LEARNED else REST}\nassert True\n").ids
        for place, problem in enumerate(problems)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation left."""

    end: End
    events: list[Event]
    answers: list[Answer]
    results: list[Result]

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def phases(self) -> list[str]:
        return [event.name for event in self.of(Phase)]

    @property
    def measures(self) -> dict[str, float]:
        return {event.name: event.value for event in self.of(Measure)}

    @property
    def verdicts(self) -> dict[str, str]:
        return {event.id: event.verdict for event in self.of(Verdict)}

    @property
    def logs(self) -> str:
        return "\n".join(f"{event.level}: {event.message}" for event in self.of(Log))

    @property
    def scores(self) -> dict[tuple[str, int], tuple[bool, str]]:
        """What came of each answer, without its time."""
        return {result.key: (result.passed, result.outcome) for result in self.results}


def rows_of(path: Path, kind: type[Row]) -> list[Row]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=kind) for line in lines]


def events_of(run_dir: Path) -> list[Event]:
    return [event for event in map(decode_line, (run_dir / "events.jsonl").read_bytes().splitlines()) if event]


def left_in(run_dir: Path) -> Evaluated:
    """What stands in a run directory now."""
    events = events_of(run_dir)
    end = events[-1] if isinstance(events[-1], End) else End(status="", reason="", exit_code=None, steps=0, seconds=0)
    return Evaluated(end, events, rows_of(run_dir / COMPLETIONS, Answer), rows_of(run_dir / RESULTS, Result))


@dataclass
class Rig:
    """Where evaluations run; every one has a run directory of its own unless it is given one."""

    root: Path
    student: str = "builtin:student"
    count: int = 0

    def config(self, *sets: str, suite: str = "own.jsonl") -> RunConfig:
        given = (
            "mode=evaluate",
            f"evaluate.suite={suite}",
            "evaluate.run_generated_code=true",
            "evaluate.max_new_tokens=12",
            "evaluate.batch=2",
            f"student.path={self.student}",
            "data.heldout_windows=4",
            "data.limit_bytes=200000",
            "train.device=cpu",
            "train.threads=1",
            "train.precision=fp32",
            "train.sequence=32",
            "train.batch=2",
            "smoke.max_steps=null",
        )
        return load_config(None, template="builtin", sets=(*given, *sets))

    def contract(self, config: RunConfig) -> str:
        return builtin_contract(contract_name(config))

    def run_dir(self) -> Path:
        self.count += 1
        path = self.root / f"run-{self.count}"
        path.mkdir()
        return path

    def evaluate(
        self,
        *sets: str,
        suite: str = "own.jsonl",
        problems: Sequence[Problem] | bytes | None = PROBLEMS_OF_OURS,
        run_dir: Path | None = None,
        stop_when: Callable[[Event], bool] | None = None,
        contract: str | None = None,
    ) -> Evaluated:
        """An evaluation in this process; `stop_when` an event makes it true, the run is asked to stop.

        Raises:
            KdError: as the evaluation does; the stream is closed all the same.
        """
        config = self.config(*sets, suite=suite)
        path = run_dir or self.run_dir()
        if problems is not None:
            (path / PROBLEMS).write_bytes(problems if isinstance(problems, bytes) else as_lines(problems))
        stop = StopRequest()
        recorder = Recorder(
            path / "events.jsonl", RUN, parse_contract(contract or self.contract(config), "contract.yaml")
        )
        plain = recorder.emit

        def emit(event: Event) -> None:
            plain(event)
            if stop_when is not None and stop_when(event):
                stop.signal = "SIGTERM"

        recorder.emit = emit  # type: ignore[method-assign]
        try:
            recorder.finish(Evaluator(config, path, recorder, stop, time.monotonic(), "0" * 64).run())
        finally:
            recorder.machine.close()
        return left_in(path)

    def create(self, *sets: str, suite: str = "own.jsonl", problems: Sequence[Problem] = PROBLEMS_OF_OURS) -> Path:
        """A run directory as the console makes one, for an engine of its own."""
        config = self.config(*sets, suite=suite)
        return create_run(
            config, evidence=self.root / "evidence", contract_text=self.contract(config), problems=as_lines(problems)
        ).path


def progress_of(event: Event, unit: str) -> int:
    """How far a unit of work is; -1 for every other event."""
    return event.done if isinstance(event, Progress) and event.unit == unit else -1


def controls_of(evaluated: Evaluated) -> dict[str, float]:
    return {event.name: event.observed for event in evaluated.of(Control)}


def problems_of(evaluated: Evaluated) -> dict[tuple[str, int], ProblemEvent]:
    return {(event.task, event.sample): event for event in evaluated.of(ProblemEvent)}
