"""`kdconsole verify` on what the predecessor left: no hashes, but numbers and verdicts that are stated twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from console.cli import cli
from console.verify.claims import Claim, Mark
from console.verify.directory import Verified, verify
from engine.errors import ExitCode, RunError

STEPS = 62


def losses(steps: int = STEPS) -> list[str]:
    return [f"  Step {step}/{steps}: loss: {9 - step * 0.1:.4f}" for step in range(1, steps + 1)]


COMPLETE = "✓ Distillation complete: initial_loss=8.9000 → final_loss=2.8000 (62 steps, 120.0s)"
SMOKE = "[SMOKE] 62 steps in 31.00s: initial_loss=8.9000, final_loss=2.8000, throughput=2.00 step/s"
PASSED = "F-DISTILL-PIPELINE-001 DISCHARGED"


def old_run(root: Path, *lines: str, **manifest: object) -> Path:
    """A directory of the predecessor's: its flat manifest beside a log."""
    path = root / "run"
    path.mkdir()
    told = {"ticket": "T-1", "run_name": "old", "host": "gx10", "learning_rate": "1.5e-5", "steps": str(STEPS)}
    (path / "dispatch.json").write_text(json.dumps(told | manifest))
    (path / "launch-victory.txt").write_text("\n".join(("GPU: NVIDIA GB10 (128.5 GB)", *lines, "")))
    return path


def claim(verified: Verified, name: str) -> Claim:
    return next(each for each in verified.claims if each.name == name)


def test_what_agrees_holds_and_is_still_not_proven_for_there_are_no_hashes(tmp_path: Path) -> None:
    verified = verify(old_run(tmp_path, *losses(), COMPLETE, PASSED))
    assert verified.exit_code == ExitCode.UNDECIDED
    assert [each.name for each in verified.unproven] == ["hashes"]
    held = {each.name for each in verified.claims if each.mark is Mark.SAME}
    assert {"steps asked for", "steps", "initial_loss", "final_loss", "F-DISTILL-PIPELINE-001"} <= held


@pytest.mark.parametrize(
    ("lines", "manifest", "name", "told"),
    [
        ((*losses(), COMPLETE), {"steps": "50"}, "steps asked for", "asks for 50 steps, the log ran 62"),
        ((*losses(), COMPLETE.replace("8.9000", "7.9000")), {}, "initial_loss", "contradicts itself"),
        ((*losses(), COMPLETE.replace("2.8000", "2.7000")), {}, "final_loss", "contradicts itself"),
        ((*losses(), COMPLETE.replace("62 steps", "61 steps")), {}, "steps", "its last step is 62"),
        ((*losses(), SMOKE.replace("2.00 step", "3.00 step")), {}, "steps_per_second", "contradicts itself"),
        ((*losses(), COMPLETE, "F-DISTILL-PIPELINE-001 FAIL"), {}, "F-DISTILL-PIPELINE-001", "PASS"),
    ],
)
def test_a_contradiction_is_named(
    tmp_path: Path, lines: tuple[str, ...], manifest: dict[str, object], name: str, told: str
) -> None:
    verified = verify(old_run(tmp_path, *lines, **manifest))
    assert verified.exit_code == ExitCode.FAILED
    assert told in claim(verified, name).why
    assert claim(verified, name).mark is Mark.DIFFERS


def test_throughput_agrees_within_its_two_digits(tmp_path: Path) -> None:
    verified = verify(old_run(tmp_path, *losses(), SMOKE))
    assert claim(verified, "steps_per_second").mark is Mark.SAME


def test_a_run_that_broke_off_is_told_and_not_called_a_difference(tmp_path: Path) -> None:
    verified = verify(old_run(tmp_path, *losses()[:20], "thread 'main' panicked at src/train.rs:1"))
    assert not verified.differences
    assert "the log ran 20" in claim(verified, "steps asked for").why


def test_steps_that_are_not_printed_are_no_difference(tmp_path: Path) -> None:
    verified = verify(old_run(tmp_path, *losses()[4:61:5], COMPLETE))
    assert not verified.differences
    assert {claim(verified, name).mark for name in ("steps", "initial_loss", "final_loss")} == {Mark.UNTOLD}


def test_a_named_falsifier_without_a_verdict_is_told(tmp_path: Path) -> None:
    verified = verify(old_run(tmp_path, *losses(), COMPLETE, falsifier="F-NOBODY-001"))
    assert "neither states a verdict" in claim(verified, "F-NOBODY-001").why


def test_a_bare_log_is_held_against_itself(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("\n".join([*losses(), COMPLETE.replace("2.8000", "1.8000"), ""]))
    verified = verify(log)
    assert (verified.kind, verified.exit_code) == ("log", ExitCode.FAILED)


def test_it_has_no_evidence_id(tmp_path: Path) -> None:
    path = old_run(tmp_path, *losses(), COMPLETE)
    result = CliRunner().invoke(cli, ["verify", str(path), "--id", "0" * 12])
    assert result.exit_code == 1
    assert "made without checksums" in result.output


def test_a_text_without_a_training_is_nothing_to_verify(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader,\n" * 50)
    with pytest.raises(RunError):
        verify(tmp_path / "letter.txt")
