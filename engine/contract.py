"""Contracts: what a run is to be judged by, as a YAML file of falsifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import msgspec.inspect as ms

from engine.errors import ConfigError
from engine.schema import alternatives, expected, nearest, show
from engine.sections import SUITES, RunConfig
from engine.stream import Eval, Event, Projection, Step
from engine.text import clean
from engine.yaml_io import parse_document

HEADER_FIELDS = frozenset(Event.__struct_fields__)
PRECISIONS = ("fp32", "bf16")
LIMITS = {"at_most": "<=", "at_least": ">=", "below": "<", "above": ">"}
"""Keys that hold a limit, and how a message writes them."""
METRICS = (
    *(
        f"{kind.__name__.lower()}.{name}"
        for kind in (Step, Eval, Projection)
        for name in kind.__struct_fields__
        if name not in HEADER_FIELDS
    ),
    "efficiency.mfu",
    "efficiency.tokens_per_second",
)
"""What a falsifier can look at apart from `measure.<name>`; of those `engine.measures` knows what a run brings."""

_HELP = "see docs/falsifiers.md for kinds and keys"


def _described(text: str, pattern: str | None = None) -> msgspec.Meta:
    return msgspec.Meta(pattern=pattern, extra_json_schema={"description": text})


Text = Annotated[str, msgspec.Meta(min_length=1)]
Identifier = Annotated[
    str, _described("3 to 64 capitals, digits and dashes such as F-MINE-001", r"\A[A-Z][A-Z0-9-]{2,63}\Z")
]
Metric = Annotated[
    str,
    _described(
        "a metric such as step.loss, eval.ce or measure.NAME",
        r"\A(step|eval|measure|projection|efficiency)\.[a-z0-9_]+\Z",
    ),
]
Limit = Annotated[float | dict[str, float], _described("a finite number, or one for each of fp32 and bf16")]
Limits = Annotated[
    dict[Metric, float], msgspec.Meta(min_length=1), _described("a mapping of metrics to their largest allowed value")
]
Needs = Annotated[list[Literal["teacher", "max_steps"]], _described("a list of teacher and max_steps")]


class Falsifier(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """One acceptance check. `needs` names what a run must have for the check to apply to it at all."""

    id: Identifier
    claim: Text
    severity: Literal["fatal", "gate", "warn"] = "gate"
    needs: Needs = []


class Threshold(Falsifier, frozen=True, kw_only=True, tag="threshold"):
    """A metric stays on the right side of a limit; exactly one limit. A mapping gives one limit for each precision.

    `over` says which values count: `each` (judged as they come), or the `last`, `min` or `max` of them at the end.
    """

    metric: Metric
    at_most: Limit | None = None
    at_least: Limit | None = None
    below: Limit | None = None
    above: Limit | None = None
    over: Literal["each", "last", "min", "max"] = "each"


class Trend(Falsifier, frozen=True, kw_only=True, tag="trend"):
    """A metric's last values stand below (or above) its first, each end averaged over `window` values.

    `by` is the fraction of the first value by which they must differ.
    """

    metric: Metric
    direction: Literal["falls", "rises"]
    window: Annotated[int, msgspec.Meta(ge=1)] = 1
    by: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


class ExactSteps(Falsifier, frozen=True, kw_only=True, tag="exact_steps"):
    """A run with max_steps = N makes N steps, unless its time budget ended it first. Applies where N was given."""


class NoStall(Falsifier, frozen=True, kw_only=True, tag="no_stall"):
    """No wait for a step longer than `seconds` and `factor` times the mean step; no phase over its own budget."""

    seconds: Annotated[float, msgspec.Meta(gt=0)]
    factor: Annotated[float, msgspec.Meta(ge=1)] = 20.0


class Finite(Falsifier, frozen=True, kw_only=True, tag="finite"):
    """Every value of a metric is a number, neither NaN nor infinite."""

    metric: Metric


class Present(Falsifier, frozen=True, kw_only=True, tag="present"):
    """Each of these metrics has a finite value by the end."""

    metrics: Annotated[list[Metric], msgspec.Meta(min_length=1, extra_json_schema={"description": "a list of metrics"})]


class AllAtMost(Falsifier, frozen=True, kw_only=True, tag="all_at_most"):
    """Each of these metrics, by its last value, is at most its limit; one that is never seen leaves it undecided."""

    limits: Limits


Kind = Threshold | Trend | ExactSteps | NoStall | Finite | Present | AllAtMost


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named list of falsifiers."""

    version: Literal[1]
    name: Text
    falsifiers: Annotated[list[Kind], msgspec.Meta(min_length=1)]


_KINDS: dict[str, type[Kind]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Threshold, Trend, ExactSteps, NoStall, Finite, Present, AllAtMost)
}


def parse_contract(text: str, source: str) -> Contract:
    """Reads a contract.

    Args:
        text: YAML.
        source: how messages call it, such as the file's name.

    Raises:
        ConfigError: not YAML, an unknown key, kind or metric, a value that does not fit, a limit missing or doubled,
            or an identifier that stands twice; with the line, and the falsifier that it is about.
    """
    document = parse_document(text, source)
    place = _Place(clean(source), document.lines)
    top = place.mapping(document.value, "version, name and falsifiers")
    place.only(top, tuple(Contract.__struct_fields__))
    for name in ("version", "name"):
        place.field(top, Contract, name)
    entries = top.get("falsifiers")
    if not isinstance(entries, list) or not entries:
        shown = show(entries) if "falsifiers" in top else "missing"
        raise place.at("falsifiers").wrong(shown, "a list of at least one falsifier")
    seen: set[str] = set()
    falsifiers: list[Kind] = []
    for index, entry in enumerate(entries):
        each = place.at(f"falsifiers[{index}]")
        falsifier = _falsifier(entry, each)
        if falsifier.id in seen:
            raise each.wrong(f"{falsifier.id} stands twice", "each identifier once")
        seen.add(falsifier.id)
        falsifiers.append(falsifier)
    return Contract(version=1, name=str(top["name"]), falsifiers=falsifiers)


def builtin_contract(name: str) -> str:
    """Text of a contract that ships; see `contract_name`."""
    return (Path(__file__).parent / "assets" / "contracts" / f"{name}.yaml").read_text(encoding="utf-8")


def contract_name(config: RunConfig) -> str:
    """The contract that ships for a configuration: its mode's, and of an evaluation its suite's."""
    if config.mode != "evaluate":
        return config.mode
    return f"evaluate-{config.evaluate.suite if config.evaluate.suite in SUITES else 'problems'}"


def limit_of(threshold: Threshold, precision: str) -> tuple[str, float]:
    """Which limit a threshold has, and its value at a precision; NaN where it gives none for that precision."""
    name = next(name for name in LIMITS if getattr(threshold, name) is not None)
    limit = getattr(threshold, name)
    return name, float(limit.get(precision, math.nan) if isinstance(limit, dict) else limit)


class _Place:
    """Where in a contract we are, for messages."""

    def __init__(self, source: str, lines: Mapping[str, int], path: str = "", label: str = "") -> None:
        self._source, self._lines, self._path = source, lines, path
        self.label = label

    def at(self, path: str) -> _Place:
        return _Place(self._source, self._lines, path, path)

    def wrong(self, what: str, wanted: str | None = None, key: str = "") -> ConfigError:
        full = f"{self._path}.{key}" if self._path and key else self._path or key
        line = self._lines.get(full, self._lines.get(self._path))
        label = f"{self.label}.{clean(key, 80)}" if self.label and key else self.label or clean(key, 80)
        where = [self._source] + ([f"line {line}"] if line else []) + ([label] if label else [])
        return ConfigError(": ".join([*where, what]), expected=wanted, do=_HELP)

    def mapping(self, value: object, wanted: str) -> dict[str, object]:
        if not isinstance(value, dict):
            raise self.wrong("empty" if value is None else show(value), f"a mapping with {wanted}")
        return value

    def only(self, raw: Mapping[str, object], known: tuple[str, ...]) -> None:
        for key in raw:
            if key not in known:
                near = nearest(key, "", known, {})
                hint = f"; did you mean {alternatives(near)}?" if near else ""
                raise self.wrong(f"unknown key{hint}", None if near else alternatives(known), key)

    def field(self, raw: Mapping[str, object], kind: type[msgspec.Struct], name: str) -> None:
        """Holds one key against the field of its name."""
        info = next(f for f in _fields(kind) if f.encode_name == name)
        wanted = expected(ms.type_info(info.type))
        if name not in raw:
            if info.required:
                raise self.wrong("missing", wanted, name)
            return
        try:
            msgspec.convert(raw[name], info.type)
        except msgspec.ValidationError:
            raise self.wrong(show(raw[name]), wanted, name) from None
        value = raw[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong(show(value), wanted, name)
        if isinstance(value, str) and clean(value, len(value) + 1) != value:
            raise self.wrong(show(value), "text without control characters", name)


def _falsifier(entry: object, place: _Place) -> Kind:
    raw = place.mapping(entry, "id, claim, kind and its keys")
    if isinstance(raw.get("id"), str):
        place.label += f" ({clean(str(raw['id']), 64)})"
    tag = raw.get("kind")
    if not isinstance(tag, str) or tag not in _KINDS:
        near = nearest(tag, "", tuple(_KINDS), {}) if isinstance(tag, str) else []
        what = (show(tag) if "kind" in raw else "missing") + (f"; did you mean {near[0]}?" if near else "")
        raise place.wrong(what, alternatives(tuple(_KINDS)), "kind")
    kind = _KINDS[tag]
    place.only(raw, ("kind", *kind.__struct_fields__))
    for name in kind.__struct_fields__:
        place.field(raw, kind, name)
    falsifier: Kind = msgspec.convert(raw, kind)
    for metric in metrics_of(falsifier):
        if metric not in METRICS and not metric.startswith("measure."):
            section, _, leaf = metric.partition(".")
            near = nearest(leaf, section, METRICS, {})
            hint = f"; did you mean {alternatives(near)}?" if near else ""
            raise place.wrong(f"unknown metric {metric}{hint}", None if near else alternatives(METRICS))
    if isinstance(falsifier, Threshold):
        _check_limit(falsifier, place)
    if isinstance(falsifier, AllAtMost) and not all(map(math.isfinite, falsifier.limits.values())):
        raise place.wrong("a limit that is not finite", "finite numbers", "limits")
    return falsifier


def metrics_of(falsifier: Kind) -> list[str]:
    """The metrics that a falsifier looks at."""
    if isinstance(falsifier, Present):
        return falsifier.metrics
    if isinstance(falsifier, AllAtMost):
        return list(falsifier.limits)
    return [falsifier.metric] if isinstance(falsifier, Threshold | Trend | Finite) else []


def _check_limit(threshold: Threshold, place: _Place) -> None:
    given = [name for name in LIMITS if getattr(threshold, name) is not None]
    if len(given) != 1:
        raise place.wrong(f"{len(given) or 'no'} limits", f"exactly one of {', '.join(LIMITS)}")
    limit = getattr(threshold, given[0])
    values = limit if isinstance(limit, dict) else {"": limit}
    fits = values and all(math.isfinite(value) for value in values.values())
    if not fits or (isinstance(limit, dict) and not set(limit) <= set(PRECISIONS)):
        raise place.wrong(show(limit), "a finite number, or a mapping of fp32 and bf16 to finite numbers", given[0])


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    # Looking at a type takes longer than reading the contract.
    return msgspec.structs.fields(kind)
