"""A review as one JSON document: everything that the report has, null for what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from console import efficiency
from console.findings.rules import Finding
from console.loss_curve import points
from console.review.past import Loss, Losses, Range, Review, heldout_losses, known, train_losses, waited_for_checkpoints
from console.scored import document as scored_document
from console.stored import prepares, store_of, stored_bytes, work_done
from dispatch.evidence import Kind
from engine.stream import Checkpoint, CheckpointFailed
from engine.text import clean

SCHEMA = "kdconsole.review/1"
SEVERAL = "kdconsole.reviews/1"


def several(documents: Sequence[dict[str, Any]], unread: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Many reviews as one document.

    Args:
        documents: as from `document`.
        unread: a path and why it cannot be read, of each that cannot.
    """
    failed = [{"path": clean(path, 4096), "problem": clean(problem, 500)} for path, problem in unread]
    return {"schema": SEVERAL, "runs": list(documents), "unread": failed}


def document(review: Review) -> dict[str, Any]:
    """Everything of one review; numbers that are NaN or infinite as the strings that the stream uses."""
    loaded, state = review.loaded, review.state
    train, held = train_losses(state), heldout_losses(state)
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "path": clean(str(loaded.path), 4096),
        "kind": loaded.kind.value,
        "id": clean(loaded.path.name, 200),
        "run": state.run.run if state.run is not None and loaded.kind is Kind.RUN else None,
        **_about(review),
        "status": review.conclusion.status,
        "reason": review.conclusion.reason,
        "decision": review.decision or None,
        "exit_code": int(review.conclusion.exit_code),
        "exit_meaning": review.meaning,
        "over": not review.open,
        "unit": state.source.unit,
        "timed": state.source.timed,
        "steps_asked": review.asked,
        "steps": review.steps,
        "seconds": review.seconds,
        "train_seconds": review.train_seconds,
        "steps_per_second": review.steps_per_second,
        "tokens_per_second": known(review.summary("tokens_per_second")),
        "efficiency": efficiency.document(state.pace.mean),
        "peak_memory_bytes": known(review.summary("peak_device_bytes") or review.summary("peak_rss_bytes")),
        "attempts": [asdict_struct(each) for each in review.attempts],
        "phases": [
            {"name": each.name, "seconds": each.seconds, "budget_seconds": each.budget_seconds}
            for each in (state.phases if state.source.timed else ())
        ],
        "train": _losses(train),
        "heldout": _losses(held),
        "agreement": _agreement(review),
        "curve": _curve(review),
        "heldout_curve": _heldout_curve(review),
        "checkpoints": [_checkpoint(each) for each in state.checkpoints],
        "checkpoint_wait_seconds": waited_for_checkpoints(state),
        "stored": _stored(review),
        "evaluation": scored_document(review.state),
        "projection": _projection(review),
        "smoke_promised": _range(review.smoke),
        "verdicts": [
            {
                "id": each.verdict.id,
                "verdict": each.verdict.verdict,
                "severity": each.verdict.severity,
                "claim": each.verdict.claim or None,
                "expected": each.verdict.expected or None,
                "observed": each.verdict.observed,
                "step": each.verdict.step,
                "basis": each.basis,
            }
            for each in review.judgements()
        ],
        "disagreements": list(state.disagreements),
        "findings": [_finding(each) for each in review.findings],
        "remarks": list(loaded.remarks),
        "problem": loaded.problem or None,
        **_files(review),
    }
    plain: dict[str, Any] = _plain(told)
    return plain


def _about(review: Review) -> dict[str, Any]:
    """Who, where and with what."""
    loaded, about, run = review.loaded, review.loaded.about, review.state.run
    manifest, old = loaded.manifest, loaded.evidence.old if loaded.evidence else None
    timed = review.state.source.timed
    told: dict[str, Any] = {
        "name": about.name or None,
        "mode": about.mode or None,
        "campaign_phase": about.phase or None,
        "ticket": about.ticket or None,
        "falsifier": about.falsifier or None,
        "host": about.host or None,
        "created": about.created,
        "teacher": about.teacher or None,
        "student": about.student or None,
        "operator": manifest.operator if manifest else None,
        "ran_as": manifest.ran_as if manifest else None,
        "overrides": list(manifest.overrides) if manifest else [],
        "device": {"type": run.device or None, "name": run.device_name or None} if run else None,
        "precision": (run.precision or None) if run else None,
        "temperature": known(run.temperature) if run else None,
        "alpha": known(run.alpha) if run else None,
        "tokens_per_step": (run.tokens_per_step or None) if run and timed else None,
        "versions": dict(run.versions) if run and run.versions else dict(manifest.engine_versions) if manifest else {},
        "console_versions": dict(manifest.versions) if manifest else {},
        "inputs": dict(manifest.inputs) if manifest else {},
        "config_fingerprint": manifest.config_fingerprint if manifest else (run.config or None) if run else None,
        "gate_fingerprint": manifest.gate_fingerprint if manifest else (run.gate or None) if run else None,
        "contract_sha256": manifest.contract_sha256 if manifest else (run.contract or None) if run else None,
        "engine_sha256": manifest.engine_sha256 if manifest else None,
        "stated": None,
    }
    if old is not None:
        stated = asdict(old)
        told["stated"] = {key: value if value != "" else None for key, value in stated.items()}
        told["temperature"] = old.temperature
        told["alpha"] = old.alpha
    return told


def asdict_struct(struct: Any) -> dict[str, Any]:
    """A msgspec struct as a mapping."""
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _losses(losses: Losses) -> dict[str, Any]:
    def one(loss: Loss | None) -> dict[str, Any] | None:
        return None if loss is None else {"step": loss.step, "total": loss.total, "ce": loss.ce, "kd": loss.kd}

    return {"first": one(losses.first), "last": one(losses.last), "best": one(losses.best)}


def _agreement(review: Review) -> dict[str, Any]:
    told = [each.agreement for each in review.state.evals]
    return {"first": told[0] if told else None, "last": told[-1] if len(told) > 1 else None}


def _curve(review: Review) -> dict[str, Any]:
    """Columns of equal length: a program draws the area from low to high, and a line through last."""
    return _columns(review.state.steps.column("step"), review.state.steps.column("loss"))


def _heldout_curve(review: Review) -> dict[str, Any]:
    evals = review.state.evals
    steps, losses = (np.array([getattr(e, name) for e in evals], np.float64) for name in ("step", "loss"))
    return _columns(steps, losses)


def _columns(steps: Any, losses: Any) -> dict[str, Any]:
    found = points(steps, losses)
    return {
        "first_step": [each.first for each in found],
        "last_step": [each.last for each in found],
        "low": [known(each.low) for each in found],
        "high": [known(each.high) for each in found],
        "last": [known(each.end) for each in found],
        "non_finite": [each.bad for each in found],
    }


def _checkpoint(mark: Checkpoint | CheckpointFailed) -> dict[str, Any]:
    told: dict[str, Any] = dict.fromkeys(("error", "path", "bytes", "sha256", "waited_seconds"))
    if isinstance(mark, CheckpointFailed):
        told["error"] = mark.error
    else:
        told |= {"path": mark.path, "bytes": mark.bytes or None, "sha256": mark.sha256 or None}
        told["waited_seconds"] = known(mark.waited_seconds)
    head = {"step": mark.step, "kind": mark.kind, "saved": isinstance(mark, Checkpoint)}
    return {**head, "seconds": known(mark.seconds), **told}


def _projection(review: Review) -> dict[str, Any] | None:
    projection = review.state.projection
    if projection is None:
        return None
    seconds = _range((projection.p10_seconds, projection.p50_seconds, projection.p90_seconds))
    step, fixed = known(projection.step_seconds), known(projection.fixed_seconds)
    return {"target_steps": projection.target_steps, **(seconds or {}), "step_seconds": step, "fixed_seconds": fixed}


def _stored(review: Review) -> dict[str, Any] | None:
    """Of a run that stores a teacher how much was stored and how true it is; null of any other."""
    if not prepares(review.state):
        return None
    made, measures = work_done(review.state), review.state.measures.values()
    return {
        "done": made.done if made else None,
        "total": made.total if made else None,
        "unit": made.unit if made else None,
        "bytes": stored_bytes(review.state),
        "store": store_of(review.state) or None,
        "measures": [{"name": each.name, "value": each.value, "detail": each.detail or None} for each in measures],
    }


def _range(seconds: Range | None) -> dict[str, Any] | None:
    if seconds is None:
        return None
    p10, p50, p90 = map(known, seconds)
    return {"p10_seconds": p10, "p50_seconds": p50, "p90_seconds": p90}


def _finding(finding: Finding) -> dict[str, Any]:
    told = asdict(finding)
    return {**told, "verdict": finding.verdict or None, "source": finding.source or None}


def _files(review: Review) -> dict[str, Any]:
    checked = review.checked
    return {
        "evidence_id": checked.evidence_id if checked else None,
        "files": None
        if checked is None
        else {"problems": list(checked.problems), "absent_weights": list(checked.absent), "weights_read": False},
        "unchecked": review.unchecked or None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
