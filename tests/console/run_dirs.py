"""Run directories of runs that never were: what the console finds on a disk, for every test that needs one.

All of it is deterministic: names, uuids, times and losses follow from the events and the arguments.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dispatch.manifest import EVENTS, EXIT, Host, Manifest, iso_utc, write_manifest
from dispatch.runs import create_run
from dispatch.supervisor import boot_id, identify
from engine.config import load_config
from engine.falsifiers import JUDGE_PHASE, Contract, builtin_contract, parse_contract
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Heartbeat,
    Log,
    Measure,
    Phase,
    Run,
    Step,
    Vitals,
    encode,
)
from tests.streams import EPOCH, SELF_CHECKS, end_event, run_event, smoke_events, stamped, with_verdicts

STEP_SECONDS = 0.5
EXPORT_CHECKS = (
    *("export_missing_tensors", "export_missing_bytes", "export_load_failures", "export_non_finite"),
    *("export_unchanged", "export_reload_error", "export_logit_error"),
)
ENDINGS = {0: "COMPLETED", 1: "FAILED", 2: "FAILED", 4: "TIMEOUT", 5: "COMPLETED", 130: "STOPPED"}
GIB = 1 << 30


def make_run(
    evidence: Path,
    events: Sequence[Event],
    exit_code: int | None = 0,
    mode: str = "smoke",
    *,
    name: str | None = None,
    created: float | None = None,
    host: str = "box",
    sets: Sequence[str] = (),
    signal: int | None = None,
    living: bool = False,
    lost: bool = False,
    torn: bytes = b"",
    contract: str | None = None,
) -> Path:
    """Writes a run directory as the engine and the supervisor leave it.

    Args:
        evidence: where run directories live; made if missing.
        events: the stream, whole: `with_verdicts(...)`, or `live(...)` for one that goes on.
        exit_code: what exit.json says; None writes none, so the run goes on or was lost.
        mode: smoke or train; chooses the contract and the configuration.
        name: what the operator calls the run.
        created: Unix seconds; one second before the first event by default.
        host: the host, in the manifest and in the stream.
        sets: changes to the built-in configuration, `KEY=VALUE` each.
        signal: the signal that ended the trainer, in place of an exit code.
        living: supervisor.jsonl names this very process, so that the host says "running".
        lost: supervisor.jsonl names a process that is gone, so that the host says "lost".
        torn: bytes of a last line that was not written whole.
        contract: the built-in contract; by default the one that is called as the mode is.

    Returns:
        The directory; its name holds the time, the mode and a digest of all that was given.
    """
    started = events[0].t if events else EPOCH
    created = started - 1.0 if created is None else created
    given = (events, exit_code, mode, name, created, host, sets, signal, living, lost, torn)
    digest = hashlib.sha256(repr(given).encode()).hexdigest()
    run = str(uuid.UUID(digest[:32], version=4))
    config = load_config(template="builtin", sets=sets, overrides={"mode": mode})
    made = create_run(config, evidence=evidence, contract_text=builtin_contract(contract or mode), name=name)
    stem = iso_utc(created).replace("-", "").replace(":", "").replace("T", "-").rstrip("Z")
    path = evidence / f"{stem}-{mode}-{digest[:6]}"
    os.rename(made.path, path)
    manifest = msgspec.structs.replace(
        made.manifest,
        run=run,
        id=path.name,
        created=iso_utc(created),
        created_unix=created,
        host=Host(hostname=host, platform="Linux-6.12-x86_64", machine="x86_64", python="3.12.3", cpus=16),
        versions={"kdconsole": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "msgspec": "0.22.0"},
    )
    write_manifest(path, manifest)
    lines = b"".join(map(encode, events_of(manifest, events, host)))
    (path / EVENTS).write_bytes(lines + torn)
    if living or lost or exit_code is not None or signal is not None:
        _supervised(path, run, started, alive=living)
    if exit_code is not None or signal is not None:
        ended = events[-1].t + 0.5 if events else started
        record = {"v": 1, "run": run, "exit_code": None if signal else exit_code, "signal": signal, "orphans": []}
        record |= {"started": started, "ended": ended, "seconds": ended - started}
        (path / EXIT).write_text(json.dumps(record) + "\n")
    return path


def events_of(manifest: Manifest, events: Sequence[Event], host: str = "box") -> list[Event]:
    """The events as this run's own: with its uuid, and what its `run` event says taken from the manifest."""
    own: list[Event] = []
    for event in events:
        changes: dict[str, object] = {"run": manifest.run}
        if isinstance(event, Run):
            changes |= {"mode": manifest.mode, "config": manifest.config_fingerprint, "host": host}
            changes |= {"gate": manifest.gate_fingerprint, "contract": manifest.contract_sha256}
        own.append(msgspec.structs.replace(event, **changes))
    return own


def append(path: Path, events: Sequence[Event], torn: bytes = b"") -> None:
    """Appends events to the stream of a run that goes on; their `seq` must go on too."""
    manifest = msgspec.json.decode((path / "dispatch.json").read_bytes(), type=Manifest)
    with (path / EVENTS).open("ab") as file:
        file.write(b"".join(map(encode, events_of(manifest, events))) + torn)


def _supervised(path: Path, run: str, t: float, *, alive: bool) -> None:
    me = dict(identify(os.getpid(), run))
    who = me if alive else me | {"boot_id": f"not {boot_id()}"}
    line = {"v": 1, "t": t, "event": "started", "run": run, "supervisor": who, "trainer": who, "session": 1}
    (path / "supervisor.jsonl").write_text(json.dumps(line) + "\n")


# Streams


def train_contract() -> Contract:
    """What a full run is judged by."""
    return parse_contract(builtin_contract("train"), "train.yaml")


def falling(step: int) -> float:
    """A loss of a healthy run: from 9 to about 2.5, with a little noise that is the same every time."""
    return 2.5 + 6.5 * math.exp(-step / 40) + 0.05 * math.sin(step * 1.7) + 0.03 * math.sin(step * 0.31)


def train_step(step: int, loss: float, *, again: bool = False, seconds: float = STEP_SECONDS) -> Step:
    rate = 6e-3 * min(1.0, step / 20)
    return Step(
        step=step,
        loss=loss,
        ce=loss - 0.4,
        kd=loss + 0.2,
        lr=rate,
        grad_norm=1.0 + 0.2 * math.sin(step),
        tokens=1_024,
        seconds=seconds,
        again=again,
    )


def held_out(step: int, loss: float) -> Eval:
    learnt = 1 - math.exp(-step / 150)
    return Eval(
        step=step,
        loss=loss + 0.1,
        ce=loss,
        kd=loss + 0.3,
        agreement=0.001 + 0.4 * learnt,
        cosine=0.85 * learnt,
        tokens=6_144,
        seconds=0.5,
    )


def saved(step: int, kind: str = "periodic") -> Checkpoint:
    return Checkpoint(
        step=step,
        kind=kind,
        path=f"checkpoints/step-{step:08d}",
        bytes=988 << 20,
        tensors=291,
        sha256=hashlib.sha256(str(step).encode()).hexdigest(),
        seconds=4.1,
        waited_seconds=0.2,
    )


def beat(step: int, phase: str = "train") -> list[Event]:
    """A heartbeat and what the machine is doing."""
    return [
        Heartbeat(phase=phase, step=step, rss_bytes=2 * GIB, host_free_bytes=60 * GIB),
        Vitals(
            cpu_percent=14.0,
            host_total_bytes=128 * GIB,
            host_free_bytes=60 * GIB,
            disk_free_bytes=412 * GIB,
            disk_total_bytes=1024 * GIB,
            gpu_percent=97.0,
            gpu_temperature_c=71.0,
            gpu_power_watts=64.0,
            unified_memory=True,
        ),
    ]


def opening(target: int, *, attempt: int = 1, **run: object) -> list[Event]:
    """Everything before the first step of a full run."""
    about = {"mode": "train", "target_steps": target, "budget_seconds": None, "tokens_per_step": 1_024}
    events: list[Event] = [Phase(name="import"), run_event(**{**about, "attempt": attempt, **run})]
    events += [Phase(name="self-check", budget_seconds=1_800.0)]
    events += [Measure(name=name, value=value) for name, value in SELF_CHECKS.items()]
    events += [Phase(name="load-teacher", detail="builtin:teacher"), Phase(name="load-student")]
    events += [Measure(name="teacher_logit_error", value=0.0), Measure(name="teacher_student_distance", value=1.0)]
    events += [Measure(name="student_logit_error", value=0.0), Log(level="info", message="198 files")]
    return events


def steps_between(
    first: int,
    last: int,
    loss: Callable[[int], float] = falling,
    *,
    evaluate_every: int = 50,
    save_every: int = 100,
    failed: Sequence[int] = (),
    again_to: int = 0,
) -> list[Event]:
    """Steps with what comes between them: heartbeats, evaluations, checkpoints.

    Args:
        first: number of the first step.
        last: number of the last one.
        loss: total loss of a step, in nats per token.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints.
        failed: steps whose checkpoint fails.
        again_to: steps up to this one were made before, by an earlier attempt.
    """
    events: list[Event] = []
    for step in range(first, last + 1):
        events.append(train_step(step, loss(step), again=step <= again_to))
        if step % 10 == 0:
            events += beat(step)
        if step % evaluate_every == 0:
            events.append(held_out(step, falling(step)))
        if step in failed:
            error = "No space left on device: 412 MB free, 988 MB needed"
            events.append(CheckpointFailed(step=step, kind="periodic", error=error, seconds=0.8))
        elif step % save_every == 0:
            events.append(saved(step, "periodic+best" if step == 2 * save_every else "periodic"))
    return events


def closing(step: int, reason: str = "steps") -> list[Event]:
    """Everything after the last step of a full run, up to the judgement."""
    events: list[Event] = [Phase(name="final-evaluation"), held_out(step, falling(step)), saved(step, "final")]
    events += [Measure(name="steps_per_second", value=2.0), Phase(name="export")]
    values = dict.fromkeys(EXPORT_CHECKS, 0.0)
    events += [Measure(name=name, value=value) for name, value in values.items()]
    return [*events, Phase(name=JUDGE_PHASE, detail=reason)]


def ending(step: int, exit_code: int = 0, reason: str = "every step is done", last_loss: float | None = None) -> End:
    """The `end` of a run after so many steps."""
    summary = end_event().summary | {"train_seconds": step * STEP_SECONDS, "initial_loss": falling(1)}
    summary |= {"final_loss": falling(step) if last_loss is None else last_loss, "steps_per_second": 2.0}
    summary["tokens_per_second"] = 2_048.0
    status = ENDINGS[exit_code]
    return end_event(step, status=status, reason=reason, exit_code=exit_code, seconds=step * 0.7, summary=summary)


def train_events(
    steps: int = 200, loss: Callable[[int], float] = falling, target: int | None = None, **run: object
) -> list[Event]:
    """A full run that ends well, stamped, without verdicts and without `end`."""
    events = [*opening(target or steps, **run), Phase(name="baseline-evaluation"), held_out(0, 9.0)]
    return stamped([*events, Phase(name="train"), *steps_between(1, steps, loss), *closing(steps)])


def live(events: Sequence[Event], contract: Contract | None = None) -> list[Event]:
    """The stream with its verdicts and without an end: the run goes on."""
    return with_verdicts(list(events), contract)[:-1]


def shifted(events: Sequence[Event], seconds: float) -> list[Event]:
    """The same events so many seconds later."""
    return [msgspec.structs.replace(event, t=event.t + seconds) for event in events]


# Runs, ready made


def good_smoke(evidence: Path, steps: int = 30, **options: object) -> Path:
    """A smoke that passed."""
    events = with_verdicts(smoke_events(steps), end=end_event(steps))
    return make_run(evidence, events, 0, "smoke", **options)  # type: ignore[arg-type]


def good_train(evidence: Path, steps: int = 200, **options: object) -> Path:
    """A full run that passed."""
    events = with_verdicts(train_events(steps), train_contract(), ending(steps))
    return make_run(evidence, events, 0, "train", **options)  # type: ignore[arg-type]


def spike_run(evidence: Path, at: int = 120, steps: int = 200) -> Path:
    """One step whose loss is five times that of its neighbours."""
    events = train_events(steps, lambda step: falling(step) * (5.0 if step == at else 1.0))
    return make_run(evidence, with_verdicts(events, train_contract(), ending(steps)), 0, "train", name="spike")


def nan_run(evidence: Path, at: int = 60) -> Path:
    """The loss becomes NaN, a fatal verdict FAILs, and the run ends there."""
    begin = [*opening(200), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    steps = steps_between(1, at, lambda step: math.nan if step == at else falling(step))
    end = ending(at, 1, "F-FINITE-001: expected step.loss always finite, observed NaN at step 60", math.nan)
    events = with_verdicts(stamped([*begin, *steps]), train_contract(), end)
    return make_run(evidence, events, 1, "train", name="nan")


def failed_checkpoint_run(evidence: Path, at: int = 100, steps: int = 200) -> Path:
    """A checkpoint finds the disk full; training goes on and ends well."""
    begin = [*opening(steps), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    events = stamped([*begin, *steps_between(1, steps, failed=[at]), *closing(steps)])
    return make_run(evidence, with_verdicts(events, train_contract(), ending(steps)), 0, "train", name="full disk")


def failed_verdict_run(evidence: Path, steps: int = 30, **options: object) -> Path:
    """A smoke whose losses rise: two gate verdicts FAIL, exit code 1."""
    events = smoke_events(steps, loss=lambda step: 5.0 + 0.05 * step)
    reason = "F-DISTILL-SMOKE-001: expected eval.loss falls, observed 5 to 6.5"
    end = end_event(steps, status="FAILED", exit_code=1, reason=reason)
    return make_run(evidence, with_verdicts(events, end=end), 1, "smoke", **options)  # type: ignore[arg-type]


def live_run(evidence: Path, steps: int = 120, target: int = 50_000, *, last_t: float | None = None) -> Path:
    """A full run that is training; its last line was written at `last_t` (Unix seconds)."""
    begin = [*opening(target), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    events = live(stamped([*begin, *steps_between(1, steps)]), train_contract())
    moved = shifted(events, 0.0 if last_t is None else last_t - events[-1].t)
    return make_run(evidence, moved, None, "train", living=True)


def stalled_run(evidence: Path, steps: int = 120) -> Path:
    """A full run whose process lives, without exit.json, and whose last line is long ago."""
    return live_run(evidence, steps)


def lost_run(evidence: Path, steps: int = 120) -> Path:
    """A full run without exit.json whose processes are gone: nobody will know how it ended."""
    begin = [*opening(50_000), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    events = live(stamped([*begin, *steps_between(1, steps)]), train_contract())
    return make_run(evidence, events, None, "train", lost=True)


def crashed_run(evidence: Path, steps: int = 80) -> Path:
    """Killed by SIGKILL in the middle of writing a line: an exit record, and no `end`."""
    begin = [*opening(200), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    events = live(stamped([*begin, *steps_between(1, steps)]), train_contract())
    return make_run(evidence, events, None, "train", signal=9, torn=b'{"event":"step","v":1,"run":"')


def resumed_events(steps: int = 200, died: int = 130, kept: int = 100) -> list[Event]:
    """An attempt that died at step `died` and one that went on from the checkpoint of step `kept`; with verdicts."""
    first = [*opening(steps), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    first += steps_between(1, died)
    second: list[Event] = [*opening(steps, attempt=2), Phase(name="resume")]
    second.append(Log(level="info", message=f"resumed from checkpoints/step-{kept:08d}"))
    second += [Phase(name="train"), *steps_between(kept + 1, steps, again_to=died), *closing(steps)]
    # Five minutes between the two: the second one began when somebody had seen that the first was dead.
    begun = stamped(first)
    later = stamped(second, start=begun[-1].t + 300.0)
    return with_verdicts([*begun, *later], train_contract(), ending(steps))


def resumed_run(evidence: Path, steps: int = 200) -> Path:
    """A full run in two attempts; the second makes some steps of the first again."""
    return make_run(evidence, resumed_events(steps), 0, "train", name="resumed")


READY: dict[str, Callable[[Path], Path]] = {
    "good_smoke": good_smoke,
    "good_train": good_train,
    "spike": spike_run,
    "nan": nan_run,
    "failed_checkpoint": failed_checkpoint_run,
    "failed_verdict": failed_verdict_run,
    "stalled": stalled_run,
    "lost": lost_run,
    "crashed": crashed_run,
    "resumed": resumed_run,
}
"""Every kind of run once; each value makes it in an evidence directory and returns the run's."""
