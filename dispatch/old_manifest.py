"""The predecessor's dispatch.json: one flat object, its numbers written as numbers or as strings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Final

from dispatch.redaction import redact
from engine.errors import RunError
from engine.text import clean

MAX_BYTES: Final = 1 << 20
_MAX_TEXT: Final = 500
_MAX_EXTRA, _MAX_EXTRA_TEXT = 100, 200
_MAX_PROBLEMS: Final = 20
_MAX_COUNT: Final = 10**15
_ALIASES: Final = {
    "teacher": ("teacher", "teacher_apr"),
    "student": ("student_init", "student_dir_src", "student"),
    "temperature": ("kd_temperature", "temperature"),
    "alpha": ("kd_alpha", "alpha"),
}
"""Keys that a field may stand under, the first one that is there counts; other fields have their own name's."""
_COUNTS: Final = ("steps", "epochs", "batch_size", "log_every", "checkpoint_every", "max_steps")
_REALS: Final = ("learning_rate", "temperature", "alpha")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:[_,][0-9]+)*)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_DATE_COMMAND = ("%a %b %d %H:%M:%S UTC %Y", "%a %d %b %Y %H:%M:%S UTC", "%a %d %b %Y %I:%M:%S %p UTC")
_YEARS: Final = (946_684_800.0, 7_258_118_400.0)
"""2000 to 2200 as Unix seconds: what is taken for a time."""


@dataclass(frozen=True)
class OldManifest:
    """What the predecessor's scripts wrote down before a run: what was asked for, not what ran.

    Texts are cleaned, and empty where nothing was said; numbers are None there, and where what is said is no number.
    """

    ticket: str = ""
    phase: str = ""
    falsifier: str = ""
    run_name: str = ""
    host: str = ""
    teacher: str = ""
    student: str = ""
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    temperature: float | None = None
    alpha: float | None = None
    log_every: int | None = None
    checkpoint_every: int | None = None
    backend: str = ""
    max_steps: int | None = None
    """None where it is 0 as well: that is how the scripts wrote that there is no limit."""
    dataset_dir: str = ""
    remote_run_dir: str = ""
    remote_log: str = ""
    dispatched_at: str = ""
    """As it stands there."""
    created: float | None = None
    """`dispatched_at` in Unix seconds."""
    problems: tuple[str, ...] = ()
    """What could not be taken as it stands, a sentence each."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Keys that mean nothing here, with their values as text."""


def parse_old_manifest(raw: bytes, source: str) -> OldManifest:
    """Reads the predecessor's manifest; what is wrong in it is said in `problems` and does not stop it.

    Args:
        raw: the file's bytes.
        source: how messages call it.

    Raises:
        RunError: longer than 1 MiB, or no JSON object.
    """
    return old_manifest(json_object(raw, source))


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in a file, keys that stand twice and all."""


def json_object(raw: bytes, source: str) -> Pairs:
    """The pairs of a JSON object.

    Raises:
        RunError: longer than 1 MiB, or no JSON object.
    """
    source = clean(source, 300)
    if len(raw) > MAX_BYTES:
        raise RunError(f"{source}: larger than {MAX_BYTES:,} bytes", expected="a manifest")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig", "replace")
    try:
        value = json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        what = "nested too deeply" if isinstance(error, RecursionError) else clean(str(error), 200)
        raise RunError(f"{source}: no JSON: {what}", expected="a JSON object") from None
    if not isinstance(value, Pairs):
        raise RunError(f"{source}: {_kind(value)}", expected="a JSON object")
    return value


def is_ours(pairs: Pairs) -> bool:
    """It is a manifest of ours, of whatever version, and not the predecessor's."""
    keys = {key for key, _ in pairs}
    return "run" in keys and ("v" in keys or not keys & {"run_name", "ticket", "dispatched_at", "remote_run_dir"})


def is_old(pairs: Pairs) -> bool:
    """Some key of the predecessor's stands in it."""
    known = {key for each in fields(OldManifest) for key in _ALIASES.get(each.name, (each.name,))}
    return bool((known - {"created", "problems", "extra"}) & {key for key, _ in pairs})


def old_manifest(pairs: Pairs) -> OldManifest:
    """The manifest that a JSON object is; see `parse_old_manifest`."""
    problems: list[str] = []
    given: dict[str, Any] = {}
    for key, value in pairs:
        if key in given:
            problems.append(f"{clean(key, 100)}: stands twice; the last one counts")
        given[key] = value
    values: dict[str, Any] = {}
    for each in fields(OldManifest):
        if each.name in ("created", "problems", "extra"):
            continue
        keys = _ALIASES.get(each.name, (each.name,))
        there = [key for key in keys if not _blank(given.get(key))]
        for key in keys:
            if key not in there:
                given.pop(key, None)
        if not there:
            continue
        value, problem = _reader(each.name)(given.pop(there[0]))
        if problem:
            problems.append(f"{there[0]}: {problem}")
        elif value is not None:
            values[each.name] = value
    if values.get("max_steps") == 0:
        del values["max_steps"]
    if "dispatched_at" in values:
        values["created"], problem = _moment(values["dispatched_at"])
        if problem:
            problems.append(f"dispatched_at: {problem}")
    if any("\ufffd" in value for value in values.values() if isinstance(value, str)):
        problems.append("some of it is not UTF-8")
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS:,} more like these"]
    return OldManifest(**values, problems=tuple(problems), extra=_extra(given))


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _reader(name: str) -> Callable[[Any], tuple[Any, str]]:
    return _count if name in _COUNTS else _real if name in _REALS else _text


def _text(value: Any) -> tuple[str | None, str]:
    if isinstance(value, str):
        return clean(value.strip(), _MAX_TEXT), ""
    if isinstance(value, (bool, Pairs, list)):
        return None, f"{_kind(value)}, not a text"
    return clean(_shown(value), _MAX_TEXT), ""


def _real(value: Any) -> tuple[float | None, str]:
    number: float | None = None
    if isinstance(value, str):
        stripped = value.strip()
        if stripped and _NUMBER.fullmatch(stripped) and any(map(str.isdigit, stripped)):
            try:
                number = float(stripped.replace("_", "").replace(",", ""))
            except ValueError:  # "e5", "."
                number = None
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if number is None or not math.isfinite(number):
        return None, f"{_kind(value)}, not a number"
    return number, ""


def _count(value: Any) -> tuple[int | None, str]:
    number, problem = _real(value)
    if number is None:
        return None, problem
    if number != int(number) or not 0 <= number <= _MAX_COUNT:
        return None, f"{_kind(value)}, not a whole number from 0 on"
    return int(number), ""


def _moment(text: str) -> tuple[float | None, str]:
    """A time in Unix seconds, and what is to be said of it."""
    number, _ = _real(text)
    if number is not None and not re.fullmatch(r"[0-9]{8}", text):
        seconds = next((number / unit for unit in (1, 1e3, 1e6, 1e9) if _YEARS[0] <= number / unit < _YEARS[1]), None)
        return seconds, "" if seconds is not None else f"{clean(text, 40)} is no time"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        for form in _DATE_COMMAND:
            try:
                moment = datetime.strptime(" ".join(text.split()), form).replace(tzinfo=UTC)
                break
            except ValueError:
                continue
        else:
            return None, f"{clean(text, 40)} is no time"
    said = "" if moment.tzinfo else "without a time zone, taken as UTC"
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return (seconds, said) if _YEARS[0] <= seconds < _YEARS[1] else (None, f"{clean(text, 40)} is no likely time")


def _extra(given: Mapping[str, Any]) -> dict[str, str]:
    # Nobody knows what stands there: a token of a service may.
    extra = {
        clean(key, 100): clean(redact(f"{key}={_shown(value)}")[len(key) + 1 :], _MAX_EXTRA_TEXT)
        for key, value in list(given.items())[:_MAX_EXTRA]
    }
    if len(given) > _MAX_EXTRA:
        extra["…"] = f"{len(given) - _MAX_EXTRA:,} more keys"
    return extra


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (Pairs, list)):
        return _kind(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits, out of "1e5000" as such
        return "a long number"


def _kind(value: Any) -> str:
    if isinstance(value, Pairs):
        return f"an object of {len(value):,} keys"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return f"'{clean(value, 40)}'" if isinstance(value, str) else clean(_shown(value), 40)
