"""Who ran what, where, with what and how long: the facts at the top of a review, a name and a text each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from console import efficiency
from console.report import duration
from console.review.past import Review, known
from console.stored import store_of
from console.times import date
from console.without_steps import came
from dispatch.evidence import Kind
from dispatch.old_manifest import OldManifest
from engine.stream import Projection
from engine.text import clean

NOT_SAID = "not said"
SHORT = 8
"""Characters of a hash that are shown."""
_PHASES = {
    "1": "teacher backend", "2": "student and KD step", "3": "end-to-end smoke", "3b": "check of scale",
    "4": "production run", "5": "HumanEval", "6": "publish",
}  # fmt: skip


def facts(review: Review) -> list[tuple[str, str]]:
    """The facts, in the order in which one asks for them; what nobody said is left out, or said to be so."""
    old = review.loaded.evidence.old if review.loaded.evidence else None
    made = came(review.state)
    found = [
        ("run", _run(review)),
        ("campaign", _campaign(review)),
        ("asked", _asked(old) if old is not None else ""),
        ("steps", _steps(review)) if made is None else (made.name, made.text or NOT_SAID),
        ("store", store_of(review.state)),
        ("where", _where(review) or NOT_SAID),
        ("when", _when(review) or NOT_SAID),
        ("made by", _made_by(review)),
        ("versions", _versions(review)),
        ("inputs", _inputs(review)),
        ("config", _config(review)),
        ("files", _files(review)),
        *_attempts(review),
        ("phases (s)", _phases(review)),
        ("speed", _speed(review)),
        *efficiency.facts(review.state.pace.mean),
        *_projection(review),
    ]
    return [(name, text) for name, text in found if text]


def _run(review: Review) -> str:
    about, run = review.loaded.about, review.state.run
    models = f"{about.student or 'a student that is not said'} on "
    no_teacher = review.loaded.kind is Kind.RUN and run is not None and run.teacher is None
    models += "no teacher" if no_teacher else about.teacher or "a teacher that is not said"
    made = came(review.state)
    if made is not None:
        models = made.of
    told = [f"{about.mode or 'a run'} of {models}" if about.student or about.teacher or run else about.mode or NOT_SAID]
    if run is not None:
        heated = known(run.temperature) is not None and (made is None or made.name == "stored")
        told += [f"T {run.temperature:g}"] if heated else []
        told += [f"alpha {run.alpha:g}"] if known(run.alpha) is not None and made is None else []
        told += [f"{run.tokens_per_step:,} tokens a step"] if run.tokens_per_step and made is None else []
    return ", ".join(told)


def _campaign(review: Review) -> str:
    about = review.loaded.about
    phase = about.phase and f"phase {about.phase}" + (f" ({_PHASES[about.phase]})" if about.phase in _PHASES else "")
    ticket = about.ticket and f"ticket {about.ticket}"
    falsifier = about.falsifier and f"falsifier {about.falsifier}"
    return ", ".join(each for each in (phase, ticket, falsifier) if each)


def _asked(old: OldManifest) -> str:
    """What the predecessor's manifest wanted, beside teacher and student."""
    named: list[tuple[str, object]] = [
        ("steps", old.steps), ("max_steps", old.max_steps), ("epochs", old.epochs), ("batch", old.batch_size),
        ("learning rate", old.learning_rate), ("T", old.temperature), ("alpha", old.alpha),
        ("checkpoint every", old.checkpoint_every), ("backend", old.backend), ("data", old.dataset_dir),
    ]  # fmt: skip
    return ", ".join(f"{name} {_plain(value)}" for name, value in named if value not in (None, ""))


def _plain(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else clean(str(value), 200)


def _steps(review: Review) -> str:
    made, asked, unit = review.steps, review.asked, f"{review.state.source.unit}s"
    if made is None:
        return f"{asked:,} {unit} were asked for; how many ran is not said" if asked else NOT_SAID
    return f"{made:,} {unit}" + (f" of {asked:,} asked for" if asked and asked != made else "")


def _where(review: Review) -> str:
    about, run, manifest = review.loaded.about, review.state.run, review.loaded.manifest
    device = ""
    if run is not None:
        device = ", ".join(each for each in (f"{run.device} {run.device_name}".strip(), run.precision) if each)
    elif manifest is not None and manifest.device:
        device = manifest.device
    host = about.host
    if manifest is not None and manifest.ran_on is not None and manifest.ran_on.hostname not in ("", host):
        host += f" ({manifest.ran_on.hostname})"
    return ": ".join(each for each in (host, device) if each)


def _when(review: Review) -> str:
    about, state = review.loaded.about, review.state
    took = "" if review.seconds is None else duration(review.seconds)
    if not state.source.timed and review.seconds is not None and review.seconds > 60:
        took += f" ({review.seconds:,.1f} s)"  # as the log has it: somebody will look for that number
    if not about.created:
        return f"{took}; at what time is {NOT_SAID}" if took else ""
    begun, ended = date(about.created), ""
    if state.source.timed and state.events and not review.open and not review.loaded.problem:
        day, _, hour = date(state.last_t).rpartition(" ")
        ended = f" to {hour}" if begun.startswith(day) else f" to {day} {hour}"
    return f"{begun}{ended}" + (f", {took}" if took else "")


def _made_by(review: Review) -> str:
    manifest = review.loaded.manifest
    if manifest is None:
        return ""
    version = manifest.versions.get("kdconsole")
    who = f"{clean(manifest.operator, 80)} on " if manifest.operator else ""
    told = [f"{who}{manifest.host.hostname}"]
    told += [f"ran as {clean(manifest.ran_as, 80)}"] if manifest.ran_as and manifest.ran_as != manifest.operator else []
    told += [f"kdconsole {version}"] if version else []
    return ", ".join(told)


def _versions(review: Review) -> str:
    run, manifest = review.state.run, review.loaded.manifest
    stated = manifest.engine_versions if manifest else {}
    told = dict(run.versions if run is not None and run.versions else stated)
    first = [name for name in ("torch", "transformers", "python") if name in told]
    return ", ".join(f"{name} {told[name]}" for name in [*first, *sorted(told.keys() - set(first))])


def _inputs(review: Review) -> str:
    manifest = review.loaded.manifest
    inputs = manifest.inputs if manifest else {}
    return ", ".join(f"{name} {digest[:SHORT]}" for name, digest in inputs.items())


def _config(review: Review) -> str:
    manifest = review.loaded.manifest
    if manifest is None:
        return ""
    told = [("", manifest.config_fingerprint), ("gate ", manifest.gate_fingerprint)]
    told += [("contract ", manifest.contract_sha256), ("engine ", manifest.engine_sha256 or "")]
    return ", ".join(f"{name}{digest[:SHORT]}" for name, digest in told if digest)


def _files(review: Review) -> str:
    checked = review.checked
    if checked is None:
        return ""
    if checked.problems:
        count = len(checked.problems)
        are = "1 file is not as it was sealed" if count == 1 else f"{count:,} files are not as they were sealed"
        return f"{are}: {', '.join(checked.problems[:3])}" + (", …" if count > 3 else "")
    absent = f"; {len(checked.absent):,} listed weights are not here" if checked.absent else ""
    return f"as they were sealed{absent} (kdconsole verify reads weights too)"


def _attempts(review: Review) -> Iterator[tuple[str, str]]:
    attempts = review.attempts
    if len(attempts) < 2:
        return
    for each in attempts[-6:]:
        begun = date(each.started) if each.started is not None else "at a time that is not known"
        took = ""
        if each.started is not None and each.ended is not None:
            took = f", {duration(max(0.0, each.ended - each.started))}"
        yield f"attempt {each.number}", f"{begun}{took}, {clean(each.end, 300) if each.end else 'nobody saw its end'}"


def _phases(review: Review) -> str:
    state = review.state
    return "  ".join(f"{p.name} {p.seconds:.1f}" for p in state.phases[-24:]) if state.source.timed else ""


def _speed(review: Review) -> str:
    made = came(review.state)
    told = [made.speed] if made is not None and made.speed else []
    if review.steps_per_second is not None:
        told.append(f"{review.steps_per_second:.2f} steps/s")
    tokens = known(review.summary("tokens_per_second"))
    told += [f"{tokens:,.0f} tokens/s"] if tokens is not None else []
    device, process = (known(review.summary(name)) for name in ("peak_device_bytes", "peak_rss_bytes"))
    peak = device or process
    told += [f"memory peak {peak / 2**30:.2f} GiB"] if peak else []
    return ", ".join(told)


def _projection(review: Review) -> Iterator[tuple[str, str]]:
    projection, seconds = review.state.projection, review.seconds
    if projection is not None:
        said = _projected(projection)
        # Only a run that made all of those steps can be held against it.
        same = review.loaded.about.mode != "smoke" and (review.steps or 0) >= projection.target_steps > 0
        yield "projection", said + (_against(seconds, projection.p50_seconds) if same else "")
    if review.smoke is not None:
        p10, p50, p90 = review.smoke
        said = f"{duration(p50)} ({duration(p10)} to {duration(p90)})"
        if not review.whole or seconds is None:
            yield "smoke said", f"{said} for all its steps; it did not make them all"
        else:
            inside = "" if p10 <= seconds <= p90 else ", outside its range"
            inside += f", in {len(review.attempts)} attempts" if len(review.attempts) > 1 else ""
            yield "smoke said", f"{said}{_against(seconds, p50)}{inside}"


def _projected(projection: Projection) -> str:
    text = f"{projection.target_steps:,} steps in {duration(projection.p50_seconds)}"
    if math.isfinite(projection.p10_seconds) and math.isfinite(projection.p90_seconds):
        text += f" ({duration(projection.p10_seconds)} to {duration(projection.p90_seconds)})"
    if math.isfinite(projection.step_seconds):
        text += f", {projection.step_seconds:.3f} s a step"
    if math.isfinite(projection.fixed_seconds):
        text += f", {duration(projection.fixed_seconds)} around them"
    return text


def _against(seconds: float | None, said: float) -> str:
    if seconds is None or not said > 0 or not math.isfinite(said):
        return ""
    return f"; it took {duration(seconds)}, {100 * (seconds - said) / said:+.1f}%"
