"""The rows of an estimate that are disk: what a run writes and keeps, at most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engine import stored_bytes
from engine.config import RunConfig
from engine.estimate_rows import MIB, Row, counted
from engine.problems import SuiteError, file_bytes
from engine.sections import SUITES
from engine.shapes import Shape

_STEP_BYTES = 700
"""Of one step in the stream and in launch.log, with heartbeats and vitals where it takes a few seconds."""
_FIXED_LOG = 8 * MIB
_SUITE_PROBLEMS = 164
"""Of HumanEval, and taken for a file of problems that is not here."""
_TOKEN_BYTES = 6
"""Of a generated token's text, as JSON has it."""
_ANSWER_BYTES = 2_000
"""Of one answer besides: its lines in completions, results and the stream."""


def disk_rows(
    config: RunConfig, student: Shape, teacher: Shape | None, wide: int, corpus_tokens: int | None
) -> Iterator[Row]:
    """What is written.

    Args:
        config: of the run.
        student: its shape.
        teacher: that of the teacher; None where there is none.
        wide: bytes of a number of the teacher's: 2 in mixed precision, 4 in float32.
        corpus_tokens: in the whole corpus, for a preparation; None where nobody counted them.
    """
    p, steps, every = student.parameters, config.steps_asked, config.checkpoint.every_steps
    if config.mode == "prepare":
        assert teacher is not None  # the schema asks for one
        yield from _stored(config, student, teacher, wide, corpus_tokens)
        yield Row(name="stream and log", bytes=_FIXED_LOG, where="disk", how="an allowance")
        return
    if config.mode == "evaluate":
        if config.evaluate.runs_code:
            yield _answers(config)
        yield Row(name="stream and log", bytes=_FIXED_LOG, where="disk", how="an allowance")
        return
    if config.mode == "train":
        periodic = min(config.checkpoint.keep_last, steps // every) if every else 0
        count = periodic + 3
        yield Row(
            name="checkpoints",
            bytes=count * (12 * p + MIB),
            where="disk",
            how=f"{count} ({periodic} periodic, the best, the final, one being written) x {counted(p)} x 3 x 4 bytes",
        )
        yield Row(
            name="exported model",
            bytes=2 * p + 32 * MIB,
            where="disk",
            how=f"{counted(p)} x 2 bytes, and the tokenizer",
        )
    else:
        yield Row(
            name="checkpoint probe",
            bytes=min(12 * p, 256 * MIB + 4 * student.embedding),
            where="disk",
            how="written once to be timed, and deleted",
        )
    yield Row(
        name="stream and log",
        bytes=steps * _STEP_BYTES + _FIXED_LOG,
        where="disk",
        how=f"{steps:,} steps x {_STEP_BYTES} bytes",
    )


def _answers(config: RunConfig) -> Row:
    asked = config.evaluate
    every, size, longest = _SUITE_PROBLEMS, 0, asked.max_new_tokens
    if asked.suite not in SUITES:
        with contextlib.suppress(SuiteError):  # on a host its file stands in the run directory
            data = file_bytes(Path(asked.suite))
            every, size = data.count(b"\n") + 1, len(data)
    problems = min(asked.limit or every, every)
    each = f"({longest:,} tokens x {_TOKEN_BYTES} + {_ANSWER_BYTES:,} bytes)"
    return Row(
        name="completions and results",
        bytes=size + problems * asked.samples * (longest * _TOKEN_BYTES + _ANSWER_BYTES),
        where="disk",
        how=f"{problems:,} problems x {asked.samples:,} x {each}"
        + (f", and {size:,} bytes of problems" if size else ""),
    )


def _stored(config: RunConfig, student: Shape, teacher: Shape, wide: int, corpus_tokens: int | None) -> Iterator[Row]:
    train = config.train
    stored = stored_bytes.sizes_of(config, student, teacher, wide, corpus_tokens)
    visited = f"{config.steps_asked:,} steps x {train.batch} windows"
    if corpus_tokens is None:
        visited += ", fewer where the corpus has fewer"
    elif stored.windows < config.steps_asked * train.batch:
        visited = f"about {stored.windows:,} windows, the whole corpus"
    yield Row(
        name="stored teacher",
        bytes=stored.window * stored.windows,
        where="disk",
        how=f"{visited}, x {train.sequence} tokens x {stored_bytes.how_a_token(config, student, teacher)}",
    )
    yield Row(
        name="stored, for evaluation",
        bytes=stored.heldout + stored.head,
        where="disk",
        how=f"last hidden states of {config.data.heldout_windows} held-out windows, and the head, x {wide} bytes",
    )
