"""Whole runs in this process: how figures are read, batches fetched and models computed changes no result."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import step
from engine.errors import ExitCode
from engine.stream import Checkpoint, Efficiency, Eval, Log, Measure, Phase, Run, Step
from tests.engine.training_rig import CONTRACT, Desk, Ran, desk, run

__all__ = ["desk"]

PRODUCTION = ("mode=train", "checkpoint.every_steps=2", "train.evaluate_every=3", "train.steps=40")
FATAL = CONTRACT.replace("below: 1.0e+9, severity: gate", "at_most: LIMIT, severity: fatal")


@pytest.fixture(scope="module")
def plain(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A smoke that reads its figures at once and fetches nothing ahead."""
    return run(desk.config("train.prefetch=0"), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are read a step late, as on a GPU."""
    monkeypatch.setitem(step.LAG, "cpu", 1)


def same_weights(left: Ran, right: Ran) -> bool:
    assert left.weights.keys() == right.weights.keys() != set()
    return all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)


def no_feed() -> bool:
    return not any(thread.name == "feed" for thread in threading.enumerate())


@pytest.mark.parametrize("setting", ["train.prefetch=2", "train.prefetch=7", "train.activation_checkpointing=true"])
def test_losses_and_weights_are_the_same_bit_by_bit_with(desk: Desk, plain: Ran, tmp_path: Path, setting: str) -> None:
    ran = run(desk.config(setting), tmp_path)
    assert ran.end.status == plain.end.status == "COMPLETED"
    assert ran.losses == plain.losses
    assert [e.loss for e in ran.of(Eval)] == [e.loss for e in plain.of(Eval)]
    assert same_weights(ran, plain)
    assert no_feed()


@pytest.mark.usefixtures("late")
def test_figures_read_late_leave_the_same_stream_and_the_same_weights(desk: Desk, plain: Ran, tmp_path: Path) -> None:
    ran = run(desk.config(), tmp_path)
    assert ran.losses == plain.losses
    assert [type(event).__name__ for event in ran.events if type(event) in (Step, Eval, Phase)] == [
        type(event).__name__ for event in plain.events if type(event) in (Step, Eval, Phase)
    ]
    assert same_weights(ran, plain)


def test_a_run_whose_loss_is_not_finite_ends_the_same_when_figures_are_read_late(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = desk.config("train.learning_rate=1e38", "train.clip=0")
    prompt = run(config, tmp_path / "prompt")
    monkeypatch.setitem(step.LAG, "cpu", 1)
    late = run(config, tmp_path / "late")
    for ran in (prompt, late):
        assert (ran.end.status, ran.end.exit_code) == ("FAILED", ExitCode.FAILED)
        assert not math.isfinite(ran.of(Step)[-1].loss)
        assert all(math.isfinite(s.loss) for s in ran.of(Step)[:-1])
        assert len(ran.of(Step)) < 6
    assert late.end.reason == prompt.end.reason
    assert str(late.losses) == str(prompt.losses)  # NaN is not equal to itself
    assert str(late.weights) == str(prompt.weights)
    assert no_feed()


def test_a_fatal_verdict_ends_the_stream_at_its_step_though_the_next_one_was_launched(
    desk: Desk, plain: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest = max(loss for _, loss, *_ in plain.losses[:3])
    contract = FATAL.replace("LIMIT", str(np.nextafter(highest, 0)))
    prompt = run(desk.config(), tmp_path / "prompt", contract)
    monkeypatch.setitem(step.LAG, "cpu", 1)
    late = run(desk.config(), tmp_path / "late", contract)
    assert prompt.end.status == late.end.status == "FAILED"
    assert late.losses == prompt.losses != []
    assert len(late.losses) <= 3


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    monkeypatch.setitem(step.LAG, "cpu", lag)
    whole = run(desk.config(*PRODUCTION), tmp_path / "whole", stop_after=7)
    first = run(desk.config(*PRODUCTION), tmp_path / "halves", stop_after=4)
    assert first.end.status == "STOPPED"
    # A stop saves the last step that was launched, so that nothing is lost and nothing is made twice.
    saved = json.loads(
        (tmp_path / "halves" / "checkpoints" / f"ckpt-step-{4 + lag:06d}" / "manifest.json").read_bytes()
    )
    assert (saved["step"], saved["state"]["order"]["position"]) == (4 + lag, 4 * (4 + lag))
    both = run(desk.config(*PRODUCTION), tmp_path / "halves", stop_after=7)
    assert len(both.of(Run)) == 2
    assert both.losses == whole.losses
    assert [s.step for s in both.of(Step)] == list(range(1, 8 + lag))
    assert [e.loss for e in both.of(Eval)] == [e.loss for e in whole.of(Eval)]
    assert same_weights(both, whole)
    assert no_feed()


@pytest.mark.usefixtures("late")
def test_a_step_that_is_evaluated_or_saved_is_the_last_one_made(desk: Desk, tmp_path: Path) -> None:
    ran = run(desk.config(*PRODUCTION), tmp_path, stop_after=7)
    seen = [event for event in ran.events if isinstance(event, Step | Eval)]
    assert [(type(seen[place - 1]), seen[place - 1].step) for place, e in enumerate(seen) if isinstance(e, Eval)][
        1:
    ] == [
        (Step, 3),
        (Step, 6),
    ]
    assert [event.step for event in ran.of(Eval)] == [0, 3, 6]
    assert [event.step for event in ran.of(Checkpoint)][:3] == [2, 3, 4]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_corpus_that_begins_with_useless_batches_is_refused_and_the_thread_ends(
    desk: Desk, tmp_path: Path, ahead: int
) -> None:
    path = tmp_path / "zeros.bin"
    np.zeros(3_000, dtype=np.uint32).tofile(path)
    ran = run(desk.config(f"data.path={path}", f"train.prefetch={ahead}"), tmp_path)
    assert (ran.end.status, ran.end.exit_code) == ("FAILED", ExitCode.USAGE)
    assert "the batch of step 1 is degenerate" in ran.end.reason
    assert ran.losses == []
    assert no_feed()


def test_a_run_says_how_fast_it_went_and_where_its_time_did_go(desk: Desk, tmp_path: Path) -> None:
    ran = run(desk.config("smoke.max_steps=12", "train.steps=12"), tmp_path)
    told = ran.of(Efficiency)
    assert [e.step for e in told] == [10, 12]
    for event in told:
        assert event.peak_source == "measured: a product of 1,024 x 1,024"
        assert event.tokens_per_second > 0
        assert event.mfu is not None
        assert 0 < event.mfu < 1
        assert min(event.split[name] for name in ("teacher", "student", "loss", "backward", "optimizer")) > 0
        made = [s.seconds for s in ran.of(Step) if event.step - event.steps < s.step <= event.step]
        assert sum(event.split.values()) == pytest.approx(sum(made) / len(made), rel=1e-6)


def test_what_fails_to_compile_runs_eagerly_with_one_warning(
    desk: Desk, plain: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(layer: torch.nn.Module, **options: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    ran = run(desk.config("train.compile=on"), tmp_path)
    warnings = [log.message for log in ran.of(Log) if "torch.compile" in log.message]
    assert warnings == ["teacher and student run without torch.compile, which failed: no compiler here"]
    assert ran.losses == plain.losses
    assert "compile" in [phase.name for phase in ran.of(Phase)]


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_models_train_to_the_same_losses_and_are_not_compiled_again_to_be_evaluated(
    desk: Desk, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    eager = run(desk.config("train.evaluate_every=2"), tmp_path / "eager")
    before = counters["stats"]["unique_graphs"]
    settings = ("train.compile=on", "train.activation_checkpointing=true", "train.evaluate_every=2")
    compiled = run(desk.config(*settings), tmp_path / "compiled")
    assert [log.message for log in compiled.of(Log) if "torch.compile" in log.message] == []
    for ours, theirs in zip(compiled.losses, eager.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert [e.loss for e in compiled.of(Eval)] == pytest.approx([e.loss for e in eager.of(Eval)], rel=1e-4)
    assert counters["stats"]["unique_graphs"] - before == 2  # a layer of each model


def test_on_the_cpu_nothing_is_compiled_unless_asked_for(plain: Ran) -> None:
    assert "compile" not in [phase.name for phase in plain.of(Phase)]
    assert any(measure.name == "steps_per_second" for measure in plain.of(Measure))


def test_parts_that_were_found_are_told_and_a_later_attempt_keeps_to_them(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PRODUCTION, "train.accumulation=auto")
    monkeypatch.setattr("engine.sizing.free_host_bytes", lambda *, shared: 1)
    first = run(desk.config(*settings), tmp_path, stop_after=2)
    assert [event.accumulation for event in first.of(Run)] == [4]
    monkeypatch.setattr("engine.sizing.free_host_bytes", lambda *, shared: None)
    second = run(desk.config(*settings), tmp_path, stop_after=4)
    assert [event.accumulation for event in second.of(Run)] == [4, 4]
    assert second.end.status == "STOPPED"
