"""Sections of a report that prove it: verdicts, findings, where everything comes from, and how to check it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from console.differences import asked
from console.findings.rules import Finding
from console.outlook import by_urgency
from console.palette import verdict_mark
from console.run_reader import LoadedRun
from console.run_report.model import NOT_SAID, Facts, Paragraph, Said, Section, Table, Verbatim, marked, said
from console.widgets.layout import size
from dispatch.evidence import Kind
from dispatch.facts import HostFacts
from dispatch.manifest import EXIT, MANIFEST, SMALL_FILES, SUMS
from dispatch.sums import Checked, check_sums, is_weight, read_sums, sha256_told
from engine.errors import RunError
from engine.text import clean

JUDGED = "judged"
"""The basis of a verdict that the run's own contract stands behind, judged by the engine and again by the console."""
MOST_FILES = 40


@dataclass(frozen=True)
class Proof:
    """What can be checked of the files.

    `evidence_id` is empty where there is no SHA256SUMS; `problems` say which files are not as that has them; `files`
    are names and SHA-256, `weights` how many more are listed.
    """

    evidence_id: str = ""
    problems: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    weights: int = 0
    left_out: int = 0
    checked: Checked | None = None


def proof_of(loaded: LoadedRun) -> Proof:
    """Holds the files against their checksums, or hashes them where there are none. Weights are not read."""
    if loaded.kind is Kind.RUN and not loaded.going_on:
        try:
            checked, sums = check_sums(loaded.path, weights=False), read_sums(loaded.path)
        except RunError:
            return _hashed(loaded)
        light = [(clean(name, 200), digest) for name, digest in sums.files.items() if not is_weight(name)]
        weights = len(sums.files) - len(light)
        shown = tuple(light[:MOST_FILES])
        return Proof(checked.evidence_id, checked.problems, shown, weights, len(light) - len(shown), checked)
    return _hashed(loaded)


def _hashed(loaded: LoadedRun) -> Proof:
    found = loaded.evidence
    if loaded.kind is Kind.LOG and found is not None and found.logs == (loaded.path,):
        paths = [loaded.path]
    else:
        names = SMALL_FILES if loaded.kind is Kind.RUN else (MANIFEST, EXIT)
        paths = [loaded.path / name for name in names]
        paths += [*found.logs, *found.notes] if found else []
    files = []
    for path in dict.fromkeys(paths):
        try:
            name = clean(path.name, 200)
            files.append((name, sha256_told(path, name, lambda name, count: None)))
        except OSError:  # it is not there, or no file
            continue
    return Proof(files=tuple(files[:MOST_FILES]), left_out=max(0, len(files) - MOST_FILES))


def verdict_section(loaded: LoadedRun) -> Section:
    """The verdicts, the worst first, each with what was expected and observed and what stands behind it."""
    state = loaded.state
    rows = []
    for v in by_urgency(state.judged):
        warn = " (warn)" if v.severity == "warn" else ""
        basis = state.bases.get(v.id, JUDGED)
        step = Said("–", "muted") if v.verdict == "PENDING" else said(f"{v.step:,}")
        expected = Said(clean(f"{v.claim}: {v.expected}" if v.claim else v.expected, 600))
        rows.append(
            (
                marked(verdict_mark(v.verdict), warn),
                said(v.id, code=True),
                expected,
                said(v.observed),
                step,
                said(basis),
            )
        )
    blocks: list[Paragraph | Table] = []
    for line in state.disagreements:
        blocks.append(Paragraph(said(f"≠ stated and judged differently: {line}", "bad")))
    if rows:
        header = ("verdict", "falsifier", "expected", "observed", "step", "basis")
        blocks.append(Table(header, tuple(rows), frozenset((4,))))
    else:
        blocks.append(Paragraph(said("Nothing was judged, and nothing stated.", "muted")))
    return Section("verdicts", "Verdicts", tuple(blocks))


def finding_section(found: Sequence[Finding]) -> Section:
    """What went wrong, or has to be known."""
    words = {"severe": ("✘ severe", "bad"), "warning": ("⚠ warning", "warn"), "note": ("· note", "")}
    rows = []
    for each in found:
        word, tone = words.get(each.severity, (each.severity, ""))
        step = Said("–", "muted") if each.step is None else said(f"{each.step:,}")
        where = said(each.source, code=True) if each.source else Said("–", "muted")
        rows.append((said(word, tone), said(each.text), step, where))  # type: ignore[arg-type]
    if not rows:
        return Section("findings", "Findings", (Paragraph(said("None.", "good")),))
    return Section(
        "findings", "Findings", (Table(("", "what was found", "step", "where"), tuple(rows), frozenset((2,))),)
    )


# Where it comes from


def provenance_section(loaded: LoadedRun, proof: Proof, made_by: str) -> Section:
    """Who, where, with which versions and from which inputs; and by what the evidence can be known again."""
    manifest = loaded.manifest
    rows: list[tuple[str, Said]] = [
        ("evidence id", said(proof.evidence_id, code=True) if proof.evidence_id else said("none: it was not sealed")),
        ("directory", said(loaded.path.name, code=True)),
    ]
    if manifest is not None:
        ran_as = f", ran as {manifest.ran_as}" if manifest.ran_as and manifest.ran_as != manifest.operator else ""
        rows += [
            ("run", said(manifest.run, code=True)),
            ("operator", said(f"{manifest.operator}{ran_as}" if manifest.operator else None)),
            (
                "started from",
                said(f"{manifest.host.hostname}, {manifest.host.platform}, Python {manifest.host.python}"),
            ),
            ("ran on", said(_host(manifest.ran_on, manifest.where))),
            ("device", said(manifest.device or (loaded.state.run.device_name if loaded.state.run else None))),
            ("versions", said(_versions(loaded))),
            ("configuration", said(manifest.config_fingerprint, code=True)),
            ("part a smoke vouches for", said(manifest.gate_fingerprint, code=True)),
            ("contract", said(manifest.contract_sha256, code=True)),
            ("engine", said(manifest.engine_sha256, code=True)),
            *((f"{name}, SHA-256", said(manifest.inputs.get(name), code=True)) for name in _inputs(loaded)),
            ("overridden", said(", ".join(manifest.overrides) or "nothing")),
        ]
    elif loaded.evidence is not None and (old := loaded.evidence.old) is not None:
        rows += [
            ("host", said(old.host)),
            ("dispatched", said(old.dispatched_at)),
            ("run directory there", said(old.remote_run_dir, code=True)),
            ("log there", said(old.remote_log, code=True)),
            ("operator", said(None)),
            ("versions", said(None)),
            ("hashes of inputs", said(None)),
        ]
    else:
        rows.append(("who, where, with what", said("not said: there is no manifest", "muted")))
    rows.append(("this report", said(f"kdconsole {made_by}, from the evidence alone")))
    return Section("provenance", "Provenance", (Facts(tuple(rows)),))


def _inputs(loaded: LoadedRun) -> list[str]:
    told = loaded.manifest.inputs if loaded.manifest else {}
    return list(dict.fromkeys(("teacher", "student", "tokenizer", "data", *told)))


def _versions(loaded: LoadedRun) -> str:
    manifest, run = loaded.manifest, loaded.state.run
    told = {**(manifest.versions if manifest else {}), **(run.versions if run else {})}
    return ", ".join(f"{name} {version}" for name, version in told.items() if version)


def _host(facts: HostFacts | None, where: str) -> str:
    if facts is None:
        return where
    name = facts.hostname if facts.hostname == where else f"{where} ({facts.hostname})"
    parts = [name, f"{facts.system} {facts.arch}"]
    parts += [f"{facts.cores} cores"] if facts.cores else []
    parts += [f"{size(facts.memory_total)} memory"] if facts.memory_total else []
    parts += [f"{device.name} {device.uuid}" for device in facts.devices]
    return ", ".join(parts)


def checking_section(loaded: LoadedRun, proof: Proof) -> Section:
    """Commands that check the evidence, and the hashes of its files."""
    name = clean(loaded.path.name, 200)
    quoted = shlex.quote(name)
    lines = []
    if proof.evidence_id:
        lines += [
            f"sha256sum SHA256SUMS                        # {proof.evidence_id}",
            "sha256sum -c --ignore-missing SHA256SUMS    # in the directory",
            f"kdconsole verify {quoted} --id {proof.evidence_id}",
        ]
    else:
        lines += [f"kdconsole verify {quoted}"]
    blocks: list[Paragraph | Verbatim] = [Verbatim(tuple(lines))]
    if proof.files:
        blocks.append(Verbatim(tuple(f"{digest}  {file}" for file, digest in proof.files)))
    notes = []
    if proof.weights:
        notes.append(f"{proof.weights:,} files of weights are listed in {SUMS} and were not read for this report.")
    if proof.left_out:
        notes.append(f"{proof.left_out:,} more files are not shown.")
    if not proof.evidence_id:
        notes.append(f"There is no {SUMS}: the hashes were computed for this report.")
    blocks += [Paragraph(said(" ".join(notes), "muted"))] if notes else []
    return Section("check", "How to check", tuple(blocks))


def configuration_section(loaded: LoadedRun) -> Section:
    """Every key and value that the run was given."""
    told = asked(loaded)
    if not told:
        why = loaded.config_problem or NOT_SAID
        return Section("configuration", "Configuration", (Paragraph(said(f"Not known: {why}.", "muted")),), folded=True)
    lines = (clean(f"{key}: {'null' if value is None else value}", 600) for key, value in told.items())
    title = "Configuration, resolved" if loaded.config else "Configuration, as the predecessor's manifest has it"
    return Section("configuration", title, (Verbatim(tuple(lines)),), folded=True)
