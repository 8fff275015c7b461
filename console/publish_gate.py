"""Whether a run may be published: its verdicts, its evidence, its evaluations, each refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from console.verify.claims import Claim
from console.verify.directory import verify_run
from dispatch.manifest import CONFIG, MANIFEST, SUMS
from dispatch.runs import RunDir
from dispatch.sums import read_sums
from engine.config import RunConfig, load_config
from engine.errors import ExitCode, RunError
from engine.falsifiers import FAIL, PASS
from engine.formats import ModelFiles, inspect_model_dir
from engine.store_format import files_digest
from engine.text import clean

MODEL = "model"
Say = Callable[[str], object]


class NotAccepted(RunError):
    """A gating verdict is FAIL, or evidence does not hold."""

    exit_code = ExitCode.FAILED


class NotDecided(RunError):
    """A gating verdict was never reached, or the evidence cannot be proven."""

    exit_code = ExitCode.UNDECIDED


@dataclass(frozen=True)
class Proven:
    """A run that ended well and whose evidence holds."""

    run: RunDir
    config: RunConfig
    evidence_id: str
    hashes: Mapping[str, str]
    """SHA-256 by name, of every file of the run."""

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.run.path


def prove(run: RunDir, mode: str, say: Say) -> Proven:
    """Looks at everything that speaks against a run.

    Args:
        run: a training, or an evaluation.
        mode: which of the two it has to be.
        say: told every few seconds how far it is.

    Raises:
        RunError: it is a run of another mode.
        NotAccepted: a gating verdict is FAIL, or a file or a claim is not what the evidence states.
        NotDecided: it was not completed, a gating verdict is missing, or the evidence cannot be proven.
    """
    what = f"run {clean(run.id, 200)}"
    if run.manifest.mode != mode:
        wanted = {"train": "a training", "evaluate": "an evaluation"}[mode]
        raise RunError(f"{what}: its mode is {clean(run.manifest.mode, 40)}", expected=wanted)
    _require_verdicts(run, what)
    verified = verify_run(Path(os.path.abspath(run.path)), None, say)
    if verified.differences:
        raise _differs(what, run, verified.differences)
    if verified.unproven or verified.evidence_id is None:
        why = verified.unproven[0].why if verified.unproven else f"there is no {SUMS}"
        raise NotDecided(
            f"{what}: its evidence cannot be proven: {why}", do=f"kdconsole --headless attach {run.id} seals it"
        )
    config = load_config(run.path / CONFIG)
    return Proven(run, config, verified.evidence_id, read_sums(run.path).files)


def _require_verdicts(run: RunDir, what: str) -> None:
    manifest = run.manifest
    gating = [each for each in manifest.verdicts if each.severity in ("gate", "fatal")]
    failed = next((each for each in gating if each.verdict == FAIL), None)
    if failed is not None:
        raise NotAccepted(
            f"{what}: {failed.id} is FAIL: {failed.observed}",
            expected=failed.expected,
            do="publish a run whose gating verdicts are all PASS; kdconsole review shows why this one is not",
        )
    outcome = manifest.outcome
    if outcome is None:
        raise NotDecided(
            f"{what}: it has not ended, or was never sealed", do=f"kdconsole --headless attach {run.id}, then try again"
        )
    if outcome.status != "COMPLETED":
        raise NotDecided(
            f"{what}: it ended {outcome.status}: {clean(outcome.reason, 300)}",
            expected="a run that was COMPLETED",
            do=f"kdconsole {manifest.mode} --resume {run.id}" if manifest.mode == "train" else "do it again",
        )
    open_ = next((each for each in gating if each.verdict != PASS), None)
    if open_ is not None:
        raise NotDecided(
            f"{what}: {open_.id} is {open_.verdict}: {open_.observed}",
            expected=f"PASS: {open_.expected}",
            do="publish a run whose gating verdicts are all PASS",
        )
    if not gating:
        raise NotDecided(
            f"{what}: it has no gating verdict, so nothing was ever required of it",
            expected="a contract with a falsifier of severity gate or fatal",
        )


def _differs(what: str, run: RunDir, differences: list[Claim]) -> NotAccepted:
    # A changed file makes other claims differ too; it is what the operator has to hear of.
    first = min(differences, key=lambda claim: (claim.part != "files", not claim.name.startswith(f"{MODEL}/")))
    many = f", and {len(differences) - 1:,} more" if len(differences) > 1 else ""
    why = f" ({first.why})" if first.why else ""
    return NotAccepted(
        f"{what}: its evidence does not hold: {first.name}: {first.recomputed}{why}{many}",
        expected=f"{first.stated}, as the evidence states",
        do=f"kdconsole verify {run.id} names everything; nothing of it is published",
    )


def exported(proven: Proven) -> ModelFiles:
    """The exported model of a run that was proven.

    Raises:
        RunError: it is not here.
        ModelError: it cannot be used.
    """
    run = proven.run
    if not any(name.startswith(f"{MODEL}/") for name in proven.hashes):
        raise RunError(
            f"run {clean(run.id, 200)}: it has no exported model among its evidence",
            expected=f"{MODEL}/, written by the training itself",
            do="publish a training that ended with an export",
        )
    if not (run.path / MODEL).is_dir():
        raise RunError(
            f"run {clean(run.id, 200)}: its model stayed on {clean(run.manifest.where, 100)}",
            do=f"kdconsole fetch {run.id} --model, then publish again",
        )
    return inspect_model_dir(run.path / MODEL, "student")


def require_outside_runs(target: Path) -> None:
    """Refuses a directory inside a run's own: its evidence would no longer hold.

    Raises:
        RunError: it is inside one, by whatever links.
    """
    real = Path(os.path.realpath(target.parent))
    run = next((each for each in (real, *real.parents) if (each / MANIFEST).is_file()), None)
    if run is not None:
        raise RunError(
            f"--to {clean(str(target), 300)}: inside the evidence of run {clean(run.name, 200)}, which would not hold "
            "with it",
            do="choose a directory outside",
        )


def require_same_model(evaluation: Proven, model: ModelFiles, run: RunDir) -> None:
    """Refuses an evaluation of other weights than those that are to be published.

    Raises:
        NotAccepted: they are others.
        NotDecided: the evaluation does not say which weights it was of.
    """
    what = f"evaluation {clean(evaluation.run.id, 200)}"
    stated, found = evaluation.run.manifest.inputs.get("student"), files_digest(model.weights)
    if stated is None:
        raise NotDecided(f"{what}: does not say which model it was of", do="evaluate the exported model again")
    if stated != found:
        raise NotAccepted(
            f"{what}: it is of another model: SHA-256 {clean(stated, 80)}",
            expected=f"{found}, that of {clean(run.id, 200)}/{MODEL}",
            do=f"kdconsole evaluate {run.id} makes one of this model",
        )
