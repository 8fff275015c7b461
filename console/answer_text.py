"""One answer of an evaluation as it was generated, read when somebody asks for it: it is made by a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from dispatch.supervisor import open_regular
from engine.problems import COMPLETIONS
from engine.text import clean

MAX_FILE_BYTES: Final = 256 << 20
"""Of the file that are looked through."""
MAX_LINE_BYTES: Final = 1 << 20
MAX_CHARACTERS: Final = 64 << 10
MAX_LINES: Final = 1_000


class _Line(msgspec.Struct):
    task: str
    sample: int = 0
    completion: str = ""
    tokens: int = 0
    finish: str = ""


_decoder: Final = msgspec.json.Decoder(_Line)


@dataclass(frozen=True)
class AnswerText:
    """An answer, its lines safe to print; `problem` says why there are none. `cut` are lines that are not shown."""

    lines: tuple[str, ...] = ()
    tokens: int = 0
    finish: str = ""
    cut: int = 0
    problem: str = ""


def read_answer(directory: Path, task: str, sample: int) -> AnswerText:
    """The answer with this number to a problem; the last one, where a file has it twice.

    Args:
        directory: of the run.
        task: name of the problem, as it is shown.
        sample: number of the answer.
    """
    found: _Line | None = None
    try:
        descriptor = open_regular(directory / COMPLETIONS, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            read = 0
            while read < MAX_FILE_BYTES and (raw := file.readline(MAX_LINE_BYTES + 1)):
                read += len(raw)
                try:
                    line = _decoder.decode(raw)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    continue
                if line.sample == sample and clean(line.task, 200) == task:
                    found = line
    except FileNotFoundError:
        return AnswerText(problem=f"{COMPLETIONS} is not here; of a run on a host it comes at the end")
    except OSError as error:
        return AnswerText(problem=f"{COMPLETIONS}: {error.strerror}")
    if found is None:
        return AnswerText(problem=f"{COMPLETIONS} does not have answer {sample} to it")
    lines = found.completion[:MAX_CHARACTERS].expandtabs(4).split("\n")
    shown = tuple(clean(line, 2_000) for line in lines[:MAX_LINES])
    cut = len(lines) - len(shown) + found.completion[MAX_CHARACTERS:].count("\n")
    return AnswerText(shown, found.tokens, clean(found.finish, 40), cut)
