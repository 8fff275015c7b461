"""Whether a teacher's rows mean the same tokens as the student's: row counts and tokenizers, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.errors import ModelError
from engine.sniff import is_count, read_json, say

TOKENIZER_CAP = 64 * 2**20
"""Most bytes of a `tokenizer.json`."""
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class VocabularyCheck:
    """What the comparison of two vocabularies found; a failure is a `ModelError` instead."""

    status: Literal["PASS", "UNKNOWN"]
    """UNKNOWN: equal row counts, but no tokenizers to compare, so the meaning of the ids was not checked."""
    observed: str
    rows: int
    """The rows that both are trained on: the student's."""


class Vocabulary(NamedTuple):
    """The tokens of one tokenizer by id."""

    tokens: Mapping[int, str]
    added: frozenset[int]
    """Ids that come from `added_tokens`: control tokens that a text does not contain by itself."""


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read a directory's `tokenizer.json`.

    Raises:
        ModelError: it is missing, over 64 MiB, or not a tokenizer of the `tokenizers` library.
    """
    file = directory / TOKENIZER_FILE
    document = read_json(file, TOKENIZER_CAP)
    model = document.get("model")
    entries = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[int, str] = {}
    if isinstance(entries, dict):
        pairs: list[tuple[Any, Any]] = [(id_, token) for token, id_ in entries.items()]
    elif isinstance(entries, list):  # Unigram: [token, score] pairs, the position is the id
        pairs = [(id_, item[0] if isinstance(item, list) and item else None) for id_, item in enumerate(entries)]
    else:
        raise _malformed(file, "no model.vocab")
    for id_, token in pairs:
        if not is_count(id_) or not isinstance(token, str):
            raise _malformed(file, f"model.vocab has the entry {say(token)!r}: {say(id_)}")
        tokens[id_] = token
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(item, dict) for item in added):
        raise _malformed(file, "added_tokens is not a list of objects")
    for item in added:
        if not is_count(item.get("id")) or not isinstance(item.get("content"), str):
            raise _malformed(file, "an entry of added_tokens has no id or content")
        tokens[item["id"]] = item["content"]
    return Vocabulary(tokens, frozenset(item["id"] for item in added))


def check_vocabulary(
    teacher_rows: int, student_rows: int, teacher_tokenizer: Path | None, student_tokenizer: Path | None
) -> VocabularyCheck:
    """Hold a teacher's vocabulary against a student's.

    A larger teacher is right where the tokenizers agree on the ids below the student's rows: its logits are cut there
    and renormalised. An id that only the teacher's tokenizer has is no disagreement (the student's rows may be padded),
    nor is a control token (`added_tokens`) that only the student's has; an ordinary token that only the student's has
    is one, since the teacher never learned what to say of it.

    Args:
        teacher_rows: rows of the teacher's head.
        student_rows: rows of the student's head.
        teacher_tokenizer: directory with the `tokenizer.json` that the teacher was trained with; None: not to be had.
        student_tokenizer: the same for the student.

    Raises:
        ModelError: the teacher is smaller, ids mean different tokens, or rows differ with no tokenizers to compare.
    """
    rows = f"teacher has {teacher_rows:,} rows, student {student_rows:,}"
    if teacher_rows < student_rows:
        raise ModelError(
            f"vocabulary: {rows}",
            expected="a teacher with at least the student's rows",
            do="take a teacher of the student's family, or a student with a smaller vocabulary",
        )
    cut = "" if teacher_rows == student_rows else f"; the teacher's logits are cut to {student_rows:,} and renormalised"
    if teacher_tokenizer is None or student_tokenizer is None:
        missing = [
            role for role, found in (("teacher", teacher_tokenizer), ("student", student_tokenizer)) if found is None
        ]
        without = f"no tokenizer for {' and '.join(missing)}"
        if cut:
            raise ModelError(
                f"vocabulary: {rows}, and there is {without}",
                expected="equal numbers where the meaning of the ids cannot be compared",
                do=f"put {TOKENIZER_FILE} into the model's directory",
            )
        return VocabularyCheck("UNKNOWN", f"{rows}; {without}: the ids were not compared", student_rows)
    compared, one_sided = _compare(teacher_tokenizer, student_tokenizer, student_rows)
    extra = f"; {one_sided:,} more on one side only" if one_sided else ""
    return VocabularyCheck("PASS", f"{rows}; {compared:,} ids agree{extra}{cut}", student_rows)


def _compare(teacher_dir: Path, student_dir: Path, rows: int) -> tuple[int, int]:
    """Count the ids below `rows` that both have, and those that one alone may have; differences raise."""
    teacher = read_vocabulary(teacher_dir)
    student = teacher if student_dir.resolve() == teacher_dir.resolve() else read_vocabulary(student_dir)
    compared = one_sided = 0
    different: list[int] = []
    for id_ in sorted(teacher.tokens.keys() | student.tokens.keys()):
        if id_ >= rows:
            break
        ours, theirs = student.tokens.get(id_), teacher.tokens.get(id_)
        if ours == theirs:
            compared += 1
        elif ours is None or (theirs is None and id_ in student.added):
            one_sided += 1
        else:
            different.append(id_)
    if not different and compared:
        return compared, one_sided
    if not different:
        raise ModelError(
            f"vocabulary: the tokenizers {say(teacher_dir)} and {say(student_dir)} share no id below {rows:,}",
            expected="the same tokenizer on both sides",
            do="check that each directory has its own model's tokenizer.json",
        )
    first = different[0]
    raise ModelError(
        f"vocabulary: {len(different):,} of {compared + len(different):,} ids mean different tokens, the first "
        f"is {first:,}: teacher {_token(teacher, first)}, student {_token(student, first)}",
        expected="tokenizers that agree on every id below the student's rows",
        do="take a teacher and a student of the same family",
    )


def _token(vocabulary: Vocabulary, id_: int) -> str:
    token = vocabulary.tokens.get(id_)
    return "has none" if token is None else f"{say(token)[:60]!r}"


def _malformed(file: Path, why: str) -> ModelError:
    return ModelError(
        f"{say(file)}: {why}",
        expected="the tokenizer.json of a fast tokenizer (Hugging Face tokenizers)",
        do="save it again with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
    )
