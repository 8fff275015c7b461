"""What was wrong with how a past run trained: losses, steps, checkpoints, teacher and export."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from console.findings.finding import NOTE, SEVERE, WARNING, Case, Finding, steps_word
from console.irregular import non_finite, spikes
from console.series import Column
from dispatch.evidence import Kind
from dispatch.manifest import CONFIG, MANIFEST
from engine.falsifiers import PASS
from engine.stream import Checkpoint, CheckpointFailed

LONG_STEPS, LONG_SECONDS = 5_000, 7_200.0
"""Beyond so many steps, or so long, a run wants checkpoints on its way, and a teacher that is not its student."""
WINDOW_SHARE, WINDOW_LEAST = 20, 5
"""Losses are held against each other as means of a share of all steps."""
FEWEST_STEPS = 2 * WINDOW_LEAST
STILL = 0.002
"""A loss that changed by less than this fraction did not move."""
REGAINED = 0.5
"""A loss that lost this much of what it had gained did not hold."""
KD_ZERO, KD_DRIFT = 0.01, 0.05
"""Of the cross-entropy: kd below this at the first steps, and in the middle, is that of models that began as equals."""
DIVERGENCE = "F-DISTILL-V2-001-TEACHER-DIVERGENCE"
EMPTY_BYTES = 4_096
"""A file of weights no longer than this holds none."""
_NAMES = {"loss": "loss", "ce": "ce", "kd": "kd", "grad_norm": "gradient norm"}


def non_finites(case: Case) -> Iterator[Finding]:
    """Losses and gradients that are NaN or infinite: when first, how many, and which."""
    numbers = case.state.steps.column("step")
    bad = {name: rows for name in _NAMES if len(rows := non_finite(case.column(name)))}
    held_out = [e for e in case.state.evals if not math.isfinite(e.loss)]
    fatal = next(case.failing("F-FINITE"), None)
    if bad:
        first = min(int(rows[0]) for rows in bad.values())
        which = [name for name, rows in bad.items() if rows[0] == first]
        # A total that is no number is the news; its parts and the gradient are so because of it.
        name = which[0]
        value = float(case.column(name)[first])
        steps = len(np.unique(np.concatenate(list(bad.values()))))
        step, shown = int(numbers[first]), "NaN" if math.isnan(value) else "infinite"
        more = f", and at {steps_word(steps - 1)} more" if steps > 1 else ""
        after = "" if first + 1 < len(numbers) else "; it was the last step"
        severe = SEVERE if "loss" in bad else WARNING
        text = f"{_NAMES[name]} {shown} at step {step:,}{more}{after}"
        verdict = fatal.id if fatal else ""
        yield Finding("non-finite", severe, text, step, case.moment(first), case.source, steps, verdict)
    elif fatal is not None:
        yield Finding("non-finite", SEVERE, fatal.observed, fatal.step, case.when(fatal), case.source, 1, fatal.id)
    if held_out and not bad:
        worst = held_out[0]
        text = f"held-out loss {'NaN' if math.isnan(worst.loss) else 'infinite'} at step {worst.step:,}"
        yield Finding("non-finite", SEVERE, text, worst.step, case.at(worst.t), case.source, len(held_out))


def spiked(case: Case) -> Iterator[Finding]:
    """Losses that stand out from the steps before them: how often, and the worst."""
    losses = case.column("loss")
    found = spikes(losses)
    if found is None:
        return
    row, ratio = int(found.rows[found.worst]), float(found.ratios[found.worst])
    step = int(case.state.steps.column("step")[row])
    loss, usual = float(losses[row]), float(losses[row]) / ratio
    many = "a spike" if found.groups == 1 else f"{found.groups:,} spikes, the worst"
    text = f"{many} of {ratio:,.3g} times the losses before, {usual:.4g} to {loss:.4g}, at step {step:,}"
    yield Finding("spike", WARNING, text, step, case.moment(row), case.source, found.groups)


def trends(case: Case) -> Iterator[Finding]:
    """A loss that rose, never moved, or did not hold what it had gained."""
    told = [*case.failing("F-DISTILL-PIPELINE"), *case.failing("F-DISTILL-SMOKE")]
    verdict = next((v for v in told if v.severity != "warn"), told[0] if told else None)
    severity = NOTE if _made(case) < FEWEST_STEPS else WARNING
    if verdict is not None and verdict.severity != "warn":
        severity = SEVERE
    text = _trend(case)
    step = int(case.state.last_step.step) if case.state.last_step else None
    if text is not None:
        kind, sentence = text
        yield Finding(kind, severity, sentence, step, None, case.source, 1, verdict.id if verdict else "")
    elif verdict is not None:
        which = "held-out" if "eval" in verdict.expected else "training"
        text_of = f"the {which} loss did not fall: {verdict.observed}"
        yield Finding("loss-rose", severity, text_of, verdict.step, None, case.source, 1, verdict.id)


def _trend(case: Case) -> tuple[str, str] | None:
    losses = case.column("loss")
    finite = losses[np.isfinite(losses)]
    if len(finite) >= FEWEST_STEPS:
        window = max(WINDOW_LEAST, len(finite) // WINDOW_SHARE)
        cuts = len(finite) // window
        means = finite[: cuts * window].reshape(cuts, window).mean(axis=1)
        first, last, lowest = float(means[0]), float(finite[-window:].mean()), float(means.min())
        lowest_step = int(case.state.steps.column("step")[np.isfinite(losses)][(int(means.argmin()) + 1) * window - 1])
        of = f"means of {steps_word(window, case.state.source.unit)}"
    else:
        ends = ends_of(case)
        if ends is None:
            return None
        first, last = ends
        lowest, lowest_step, of = min(ends), 0, "first and last"
    if abs(last - first) <= STILL * abs(first) and _made(case) >= FEWEST_STEPS:
        return "loss-never-moved", f"the loss never moved: {first:.4f} to {last:.4f} ({of})"
    if last > first:
        return "loss-rose", f"the loss rose: {first:.4f} to {last:.4f} ({of})"
    if lowest_step and first - lowest > STILL * abs(first) and last - lowest > REGAINED * (first - lowest):
        text = f"the loss did not hold: {first:.4f}, {lowest:.4f} at step {lowest_step:,}, and {last:.4f} in the end"
        return "loss-rose", text
    return None


def ends_of(case: Case) -> tuple[float, float] | None:
    """The first and the last loss, as a log's summary tells them, or the steps; None where nobody does."""
    end, state = case.state.end, case.state
    in_summary = end is not None and {"initial_loss", "final_loss"} <= end.summary.keys()
    if end is not None and in_summary and not case.ours:  # a log may show every tenth step only
        told = end.summary["initial_loss"], end.summary["final_loss"]
    elif state.first_step is not None and state.last_step is not None and len(state.steps) > 1:
        told = state.first_step.loss, state.last_step.loss
    else:
        return None
    return told if all(map(math.isfinite, told)) else None


def _made(case: Case) -> int:
    """Steps that the run made."""
    state = case.state
    last = state.last_step.step if state.last_step else 0
    return max(last, state.end.steps if state.end else 0)


def failed_checkpoints(case: Case) -> Iterator[Finding]:
    """Checkpoints that could not be saved, and the steps that stood unsaved because of it."""
    saved = sorted(c.step for c in case.state.checkpoints if isinstance(c, Checkpoint))
    failed = [c for c in case.state.checkpoints if isinstance(c, CheckpointFailed)]
    if not failed:
        return
    worst = max(failed, key=lambda each: (not any(s >= each.step for s in saved), each.step))
    before = max((s for s in saved if s < worst.step), default=0)
    after = next((s for s in saved if s >= worst.step), None)
    until = _made(case) if after is None else after
    at_risk = max(0, until - before)
    since = f"since step {before:,}" if before else "since its beginning"
    stood = f"{steps_word(at_risk)} {since} stood unsaved" + (
        f" until step {after:,}" if after is not None else ", and no later one was saved"
    )
    many = "" if len(failed) == 1 else f"{len(failed):,} checkpoints failed; "
    text = f"{many}checkpoint at step {worst.step:,} failed: {worst.error}; {stood}"
    severity = WARNING if after is not None else SEVERE
    yield Finding(
        "checkpoint-failed", severity, text, worst.step, case.at(worst.t), case.source, len(failed)
    )  # fmt: skip


def no_checkpoint(case: Case) -> Iterator[Finding]:
    """A long run that saved nothing on its way: a fault at any moment would have cost all of it."""
    made, seconds = _made(case), _trained_seconds(case)
    if case.state.source.unit != "step" or case.loaded.about.mode == "smoke":
        return
    if made <= LONG_STEPS and not (seconds is not None and seconds > LONG_SECONDS):
        return
    # The last one is made with the end; what matters is whether one stood while there was something to lose. One that
    # was tried and failed is told as such.
    if any(c.step < made for c in case.state.checkpoints):
        return
    long = "" if seconds is None else f" and {seconds / 3600:.1f} h"
    completed = case.state.end is not None and case.state.end.status == "COMPLETED"
    lost = "a fault would have cost all of it" if completed else "all of it was lost"
    if not case.over:
        lost = "a fault would cost all of it"
    severity = WARNING if completed or not case.over else SEVERE
    text = f"no intermediate checkpoint in {steps_word(made)}{long}: {lost}"
    yield Finding("no-checkpoint", severity, text, made, None, case.source)


def _trained_seconds(case: Case) -> float | None:
    state = case.state
    told = state.end.summary.get("train_seconds", state.end.seconds) if state.end else math.nan
    if math.isfinite(told):
        return told
    return state.last_t - state.first_t if state.source.timed and state.events else None


def teacher_is_student(case: Case) -> Iterator[Finding]:
    """A teacher that is the student: by name, by hash, or by a kd that is about zero all the way."""
    run, about, manifest = case.state.run, case.loaded.about, case.loaded.manifest
    told = next(case.failing(DIVERGENCE), None)
    why: list[str] = []
    sources: list[str] = []
    teacher, student = about.teacher, about.student
    differ = any(v.id.startswith(DIVERGENCE) and v.verdict == PASS for v in case.state.judged)
    if teacher and teacher == student and not differ:
        why.append(f"both are {teacher}")
        sources.append(MANIFEST if case.loaded.kind in (Kind.OLD, Kind.MANIFEST) else case.source)
    inputs = manifest.inputs if manifest else {}
    if inputs.get("teacher") and inputs.get("teacher") == inputs.get("student"):
        why.append(f"their hashes are the same, {inputs['teacher'][:8]}")
        sources.append(MANIFEST)
    if run is not None and teacher and not run.alpha >= 1 and _kd_is_zero(case.column("kd"), case.column("ce")):
        first, middle = float(case.column("kd")[0]), float(np.nanmedian(case.column("kd")))
        why.append(f"kd is about zero: {first:.2g} nats at the first step, {middle:.2g} in the middle")
        sources.append(case.source)
    if told is not None:
        why.append(f"they differ by {told.observed}")
        sources.append(case.source)
    if why:
        # A short run may try this on purpose; a long one has trained for nothing.
        short = told is None and _made(case) < LONG_STEPS
        text = f"teacher and student are the same model: {', '.join(why)}"
        source = ", ".join(dict.fromkeys(sources))
        verdict = told.id if told else ""
        yield Finding("teacher-is-student", WARNING if short else SEVERE, text, None, None, source, 1, verdict)


def _kd_is_zero(kd: Column, ce: Column) -> bool:
    finite = np.isfinite(kd) & np.isfinite(ce)
    kd, ce = kd[finite], ce[finite]
    if len(kd) < WINDOW_LEAST or not (ce > 0).all():
        return False
    share = np.abs(kd) / ce
    return bool(share[:WINDOW_LEAST].max() <= KD_ZERO and np.median(share) <= KD_DRIFT)


def steps_differ(case: Case) -> Iterator[Finding]:
    """Steps that were asked for and steps that were made, where nothing says why they are not the same."""
    told = next(case.failing("FT-SMOKE-001"), None)
    asked, asked_by = _asked(case)
    state, unit = case.state, case.state.source.unit
    ran = _made(case)
    verdict = told.id if told else ""
    ran_by = case.source if case.ours else f"the log, {case.source}"
    if asked is not None and ran and asked != ran and _meant_whole(case, asked, ran):
        text = f"asked {steps_word(asked, unit)} ({asked_by}), ran {ran:,} ({ran_by})"
        severity = WARNING if told is None else SEVERE
        yield Finding("steps-differ", severity, text, ran, None, f"{asked_by}, {case.source}", 1, verdict)
    elif told is not None:
        text = f"expected {told.expected}, observed {told.observed}"
        yield Finding("steps-differ", SEVERE, text, told.step, None, case.source, 1, verdict)
    last = state.last_step.step if state.last_step else 0
    if case.ours and state.end is not None and last and state.end.steps != last:
        text = f"its end says {steps_word(state.end.steps)}, its last step is {last:,}"
        yield Finding("steps-differ", WARNING, text, last, None, case.source)


def _asked(case: Case) -> tuple[int | None, str]:
    """How many steps were asked for, and the file that says so."""
    old = case.old
    if old is not None:
        asked = old.epochs if case.state.source.unit == "epoch" else old.max_steps or old.steps
        if asked is not None:
            return asked, MANIFEST
    if case.ours and case.state.run is not None:
        return case.state.target_steps, CONFIG if case.loaded.config else case.source
    return (case.state.target_steps or None), case.source


def _meant_whole(case: Case, asked: int, ran: int) -> bool:
    """Whether so many steps were meant to be made, and nothing that is said elsewhere ended it before."""
    state = case.state
    if state.end is None or not case.over:
        return False
    if not case.ours:
        return state.end.status == "COMPLETED" or ran > asked
    by_budget = state.run is not None and state.run.budget_seconds is not None and ran < asked
    return state.end.status == "COMPLETED" and not by_budget


def failed_export(case: Case) -> Iterator[Finding]:
    """A model that was not written, or is not the one that was trained."""
    told = next(case.failing("F-EXPORT"), None)
    if told is not None:
        text = f"the exported model is not the trained one: {told.observed}"
        yield Finding("export-failed", SEVERE, text, told.step, case.when(told), case.source, 1, told.id)
    elif case.ours and case.over and (case.loaded.path / "model.rejected").is_dir():
        yield Finding("export-failed", SEVERE, "an exported model was rejected, and stands in model.rejected/")
    elif case.ours and case.over and case.state.phase == "export" and case.state.end is None:
        text = "it ended while the model was written; kdconsole export makes it from the last checkpoint"
        yield Finding("export-failed", SEVERE, text, None, case.at(case.state.last_t), case.source)
    if case.loaded.kind is Kind.OLD:
        for name, size in _empty_weights(case):
            text = f"{name} has {size:,} bytes: no model is in it"
            yield Finding("export-failed", SEVERE, text, None, None, name)


def _empty_weights(case: Case) -> list[tuple[str, int]]:
    found = []
    for name in ("model.safetensors", "output.apr"):
        path = case.loaded.path / name
        try:
            if path.is_file() and not path.is_symlink() and (size := path.stat().st_size) <= EMPTY_BYTES:
                found.append((name, size))
        except OSError:
            continue
    return found
