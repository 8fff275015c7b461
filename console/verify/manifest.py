"""The manifest held against everything that it speaks of: configuration, contract, stream, journal and exit record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from console.run_files import read_small
from console.verify.claims import Claim, compared, differs, flat, same, untold
from console.verify.fold import Fold
from dispatch.ended import JOURNAL, completed
from dispatch.manifest import CONFIG, CONTRACT, MANIFEST, ExitRecord, Manifest, decode, iso_utc
from dispatch.redaction import REDACTED
from dispatch.supervisor import MAX_JOURNAL_BYTES
from engine.config import RunConfig, fingerprint, gate_fingerprint, parse_config
from engine.errors import ConfigError, RunError
from engine.stream import Run
from engine.yaml_io import parse_yaml

PART = "manifest"
COMPLETED_VERSION = 2
"""Of manifests: from it on they say how a run ended."""
_MAX_NESTED = 200
"""Lists and objects in one record; those of runs have a handful, and deep ones are no record."""
_ATTEMPT = re.compile(r"exit(-[0-9]{1,9})?\.json")


def manifest_claims(directory: Path, manifest: Manifest, fold: Fold | None, *, plain: bool) -> Iterator[Claim]:
    """What the manifest says, as its files make it.

    Args:
        directory: of the run.
        manifest: its own.
        fold: of the whole stream; None where there is none.
        plain: every small file is a regular one; else the manifest cannot be completed anew.
    """
    with contextlib.suppress(OverflowError, ValueError, OSError):
        yield compared(PART, "created", manifest.created, iso_utc(manifest.created_unix))
    allowed = allowed_changes(directory)
    yield from _config(directory, manifest, allowed)
    config = None
    with contextlib.suppress(RunError, ConfigError, UnicodeDecodeError):
        config = parse_config((read_small(directory / CONFIG) or b"").decode(), source=CONFIG, base=directory)
    contract = _sha256(directory, CONTRACT)
    if contract is not None:
        yield compared(PART, "contract_sha256", manifest.contract_sha256, contract, f"{CONTRACT} is another one")
    for number, attempt in enumerate([] if fold is None else fold.attempts, 1):
        if attempt.run is not None:
            yield from _run(f"run event of attempt {number}", attempt.run, manifest, config, allowed)
    if plain:
        yield from _fixed_point(directory, manifest)


def allowed_changes(directory: Path) -> frozenset[str]:
    """What a resume was allowed to find changed."""
    try:
        given = json.loads(read_small(directory / "resume.json") or b"{}")
        return frozenset(str(name) for name in given["allow_changed"])
    except (RunError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


def _sha256(directory: Path, name: str) -> str | None:
    try:
        raw = read_small(directory / name)
    except RunError:
        return None
    return None if raw is None else hashlib.sha256(raw).hexdigest()


def _config(directory: Path, manifest: Manifest, allowed: frozenset[str]) -> Iterator[Claim]:
    """Both fingerprints, over the values as they stand in config.yaml: a later version may know more of them."""
    stated = {"config_fingerprint": manifest.config_fingerprint, "gate_fingerprint": manifest.gate_fingerprint}
    try:
        text = (read_small(directory / CONFIG) or b"").decode()
        tree = parse_yaml(text, CONFIG)
        found = dict(zip(stated, _fingerprints(tree), strict=True))
    except (RunError, ConfigError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        for name, value in stated.items():
            yield differs(PART, name, value, "cannot be computed", f"{CONFIG}: {error}")
        return
    with contextlib.suppress(ConfigError):  # its values may be written otherwise, and mean the same
        config = parse_config(text, source=CONFIG, base=directory)
        meant = {"config_fingerprint": fingerprint(config), "gate_fingerprint": gate_fingerprint(config)}
        found = {name: meant[name] if meant[name] == stated[name] else value for name, value in found.items()}
    for name, value in stated.items():
        if value != found[name] and "config" in allowed:
            yield untold(PART, name, value, f"{CONFIG} was changed for a resume, which resume.json allows")
        else:
            yield compared(PART, name, value, found[name], f"{CONFIG} is another one")


def _fingerprints(tree: object) -> tuple[str, str]:
    """Both fingerprints of a configuration as it is written, in the first form of `engine.config.fingerprint`.

    Raises:
        TypeError, ValueError: it is no configuration.
    """
    if not isinstance(tree, dict):
        raise TypeError("not a mapping")
    common = {name: part for name, part in tree.items() if name not in ("mode", "smoke", "checkpoint", "supervise")}
    if isinstance(common.get("train"), dict):
        common["train"] = {k: v for k, v in common["train"].items() if k not in ("steps", "max_steps")}
    texts = [json.dumps(each, sort_keys=True, separators=(",", ":"), allow_nan=False) for each in (tree, common)]
    whole, gate = (hashlib.sha256(f"kdconsole-config-1\n{text}".encode()).hexdigest() for text in texts)
    return whole, gate


def _run(
    where: str, run: Run, manifest: Manifest, config: RunConfig | None, allowed: frozenset[str]
) -> Iterator[Claim]:
    """The engine's own word on what it ran."""
    wanted: dict[str, tuple[object, object]] = {
        "mode": (run.mode, manifest.mode),
        "config": (run.config, manifest.config_fingerprint),
        "gate": (run.gate, manifest.gate_fingerprint),
        "contract": (run.contract, manifest.contract_sha256),
    }
    if config is not None:
        wanted |= {
            "teacher": (run.teacher, config.teacher.path if config.teacher else None),
            "student": (run.student, config.student.source),
            "target_steps": (run.target_steps, config.train.steps),
            "max_steps": (run.max_steps, config.max_steps),
            "budget_seconds": (run.budget_seconds, config.smoke.budget_seconds if config.mode == "smoke" else None),
            "temperature": (run.temperature, config.distill.temperature),
            "alpha": (run.alpha, config.distill.alpha),
            "tokens_per_step": (run.tokens_per_step, config.train.batch * config.train.sequence),
        }
    different = {name: pair for name, pair in wanted.items() if pair[0] != pair[1]}
    if not different:
        yield same("stream", where, f"{len(wanted)} fields", "as configuration and manifest have them")
    for name, (stated, found) in different.items():
        if "config" in allowed and name not in ("mode", "contract"):
            why = "the configuration was changed for a resume, which resume.json allows"
            yield untold("stream", f"{where}: {name}", stated, why)
        else:
            yield differs("stream", f"{where}: {name}", stated, found)


def _fixed_point(directory: Path, manifest: Manifest) -> Iterator[Claim]:
    """What the manifest was completed with, computed from the files once more: each field that comes out otherwise."""
    if manifest.v < COMPLETED_VERSION:
        why = f"version {manifest.v} of {MANIFEST} does not say how a run ended"
        yield untold(PART, "outcome, attempts and verdicts", "nothing", why)
        return
    if manifest.outcome is None:
        why = f"{MANIFEST} was never completed: the run was not sealed"
        yield untold(PART, "outcome, attempts and verdicts", "nothing", why, essential=True)
        return
    try:
        again = decode(Manifest, msgspec.json.encode(completed(directory, manifest)), MANIFEST)
    except (RunError, OverflowError, ValueError) as error:
        yield differs(PART, "what the files say", "a manifest", "cannot be computed", str(error))
        return
    stated, found = _fields(manifest), _fields(again)
    different = [name for name in {**stated, **found} if not _agree(stated.get(name), found.get(name))]
    if not different:
        yield same(PART, "outcome, attempts, inputs, device, verdicts", f"{len(stated)} fields", "the same")
    for name in different:
        yield differs(PART, name, stated.get(name, "missing"), found.get(name, "missing"), f"{MANIFEST}: {name}")


def _fields(manifest: Manifest) -> dict[str, object]:
    """Every field by its path; verdicts by their names."""
    tree: dict[str, Any] = msgspec.to_builtins(manifest)
    tree["verdicts"] = {verdict["id"]: verdict for verdict in tree["verdicts"]}
    return flat(tree)


def _agree(stated: object, found: object) -> bool:
    """Whether two values are equal; what looked like a secret was taken out of the stated one."""
    if isinstance(stated, str) and isinstance(found, str) and REDACTED in stated and stated != found:
        pattern = ".+".join(re.escape(part) for part in stated.split(REDACTED))
        return re.fullmatch(pattern, found, re.DOTALL) is not None
    return stated == found


def exit_claims(directory: Path, run: str | None) -> Iterator[Claim]:
    """The records of how its processes ended, held against the supervisor's journal.

    Args:
        directory: of the run.
        run: uuid that every record must carry.
    """
    entries, torn = _journal(directory)
    strange = [number for number, entry in entries if entry.get("run", run) != run]
    if strange:
        where = ", ".join(map(str, strange[:5]))
        yield differs(PART, JOURNAL, f"of run {run}", "of another one", f"{JOURNAL}: line {where}")
    elif entries:
        yield same(PART, JOURNAL, f"of this run in each of {len(entries):,} records")
    if torn:
        why = f"line {', '.join(map(str, torn[:5]))} is no record; a full disk tears lines"
        yield untold(PART, f"{JOURNAL}: every line", "a record", why)
    for name in sorted(path.name for path in directory.glob("exit*.json") if _ATTEMPT.fullmatch(path.name)):
        yield from _exit(directory, name, run, [entry for _, entry in entries if entry.get("event") == "exited"])


def _exit(directory: Path, name: str, run: str | None, exited: list[dict[str, Any]]) -> Iterator[Claim]:
    try:
        raw = _object(read_small(directory / name) or b"")
        record = msgspec.convert(raw, ExitRecord)
    except (RunError, ValueError, RecursionError, msgspec.ValidationError) as error:
        yield differs(PART, name, "how a process ended", "cannot be read", str(error))
        return
    if run is not None and record.run != run:
        yield differs(PART, f"{name}: run", record.run, run)
    if abs(record.ended - record.started - record.seconds) > 1e-3:
        yield differs(PART, f"{name}: seconds", record.seconds, record.ended - record.started, f"{name}: seconds")
    told = next((entry for entry in exited if entry.get("started") == record.started), None)
    if told is None:
        yield untold(PART, name, record.describe(), f"{JOURNAL} does not tell of this end")
        return
    one = flat(_bare(raw))
    other = flat(_bare(told))
    different = [field for field in {**one, **other} if one.get(field) != other.get(field)]
    for field in different:
        why = f"{name} and {JOURNAL}: {field}"
        yield differs(PART, f"{name}: {field}", one.get(field, "missing"), other.get(field, "missing"), why)
    if not different:
        yield same(PART, name, record.describe(), f"as {JOURNAL} has it")


def _bare(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("v", "t", "event")}


def _journal(directory: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[int]]:
    """The supervisor's records with the numbers of their lines, and the numbers of lines that are none."""
    try:
        raw = read_small(directory / JOURNAL, MAX_JOURNAL_BYTES) or b""
    except RunError:
        return [], []
    entries, torn = [], []
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n") if raw else [], 1):
        try:
            entries.append((number, _object(line)))
        except (ValueError, RecursionError):
            torn.append(number)
    return entries, torn


def _object(raw: bytes) -> dict[str, Any]:
    """A record as JSON.

    Raises:
        ValueError, RecursionError: it is none, or nested as no record is.
    """
    if raw.count(b"[") + raw.count(b"{") > _MAX_NESTED:
        raise ValueError("not a record")
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("not a record")
    return value
