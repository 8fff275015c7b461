"""What comes after the last step: a smoke's projection, a training's model, the hashes of what was loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.account import provenance
from engine.config import RunConfig
from engine.export import checkpoint_seconds, export
from engine.keeper import Totals
from engine.models import CausalLM
from engine.projection import FixedCosts, project
from engine.recorder import Recorder
from engine.stream import Eval, Projection

_POLL_SECONDS = 0.05


def projected(
    config: RunConfig,
    step_seconds: Sequence[float],
    evals: Sequence[Eval],
    start_seconds: float,
    student: CausalLM,
    run_dir: Path,
) -> Projection | None:
    """The wall time of the training that a smoke rehearsed; None where it made too few steps to tell.

    Args:
        config: of the smoke.
        step_seconds: of each of its steps.
        evals: its evaluations, one at least.
        start_seconds: from the engine's start to the first evaluation.
        student: whose checkpoint is written once, to be timed.
        run_dir: where that is done.
    """
    steps = config.smoke.project_to
    every, eval_every = config.checkpoint.every_steps, config.train.evaluate_every
    fixed = FixedCosts(
        start_seconds=start_seconds,
        evaluation_seconds=sum(e.seconds for e in evals) / len(evals),
        evaluations=2 + (steps // eval_every if eval_every else 0),
        checkpoint_seconds=checkpoint_seconds(student.model, run_dir) if every else 0.0,
        checkpoints=steps // every if every else 0,
    )
    return project(step_seconds, steps, fixed)


def export_model(
    config: RunConfig,
    student: CausalLM,
    tokenizer_dir: Path | None,
    run_dir: Path,
    totals: Totals,
    initial: Mapping[str, str],
    recorder: Recorder,
    poll: Callable[[], None],
) -> None:
    """Writes the trained model, and tells what a fresh process found in it.

    Args:
        config: of the training.
        student: whole, on this process.
        tokenizer_dir: where its tokenizer comes from; None where there is none.
        run_dir: of the run.
        totals: what training did.
        initial: digests of the untrained weights; see `engine.export.weights_digests`.
        recorder: told the measures and whether it holds.
        poll: called between units of work; may raise to stop.
    """
    exported = export(
        student.model,
        run_dir,
        provenance=provenance(config, run_dir.name, totals, recorder.verdicts),
        initial=initial,
        tokenizer_dir=tokenizer_dir,
        poll=poll,
    )
    for measure in exported.measures:
        recorder.emit(measure)
    if exported.ok:
        recorder.log(f"model written and verified by a fresh process: {exported.path.name}")
    else:
        recorder.log(f"the export is not the trained model: {'; '.join(exported.problems)}", "error")


def await_inputs(
    telling: threading.Thread | None, deadline: float, poll: Callable[[], None], recorder: Recorder
) -> None:
    """Waits until what was loaded is told by hash.

    Args:
        telling: the thread that does it; None where it was done before training.
        deadline: `time.monotonic()` up to which it is waited for.
        poll: called meanwhile; may raise to stop.
        recorder: told where the time is over.
    """
    while telling is not None and telling.is_alive():
        poll()
        if time.monotonic() > deadline:
            recorder.log("no time is left to hash what was loaded: the evidence will not tell", "warning")
            break
        telling.join(_POLL_SECONDS)
