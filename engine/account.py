"""What is told of a run as a whole: its first event, the summary of its last one, why it failed, its model's origin."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

from engine.config import RunConfig, fingerprint, gate_fingerprint
from engine.device import Placement
from engine.keeper import Totals
from engine.model_card import Provenance
from engine.recorder import peak_rss_bytes
from engine.stream import Run, Verdict


def run_event(
    config: RunConfig,
    placement: Placement,
    contract_digest: str,
    *,
    accumulation: int | None = None,
    world_size: int = 1,
) -> Run:
    """What is about to run, on what; the recorder knows which attempt it is.

    Args:
        config: as it was given: neither `train.accumulation: auto` nor the devices of a resume are put into it, or its
            digests would be others.
        placement: what computes.
        contract_digest: SHA-256 of the contract.
        accumulation: what `auto` came to (`engine.micro_batch`); None: what the configuration says.
        world_size: how many processes there are.
    """
    smoke = config.mode == "smoke"
    return Run(
        attempt=1,
        mode=config.mode,
        config=fingerprint(config),
        gate=gate_fingerprint(config),
        contract=contract_digest,
        teacher=config.teacher.path if config.teacher else None,
        student=config.student.source,
        host=platform.node(),
        device=str(placement.device),
        device_name=placement.name,
        precision=placement.precision,
        world_size=world_size,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")}
        | {"python": platform.python_version()},
        target_steps=config.train.steps,
        max_steps=config.max_steps,
        budget_seconds=config.smoke.budget_seconds if smoke else None,
        temperature=config.distill.temperature,
        alpha=config.distill.alpha,
        tokens_per_step=config.train.batch * config.train.sequence,
        accumulation=config.train.parts if accumulation is None else accumulation,
        teacher_source=config.teacher.source if config.teacher else "online",
    )


def summary(totals: Totals, phase_seconds: Mapping[str, float], device_peak: int | None) -> dict[str, float]:
    """What the `end` event sums up: this attempt's phases and memory, the whole run's losses and speed."""
    told = {f"phase_{name}_seconds": seconds for name, seconds in phase_seconds.items() if name}
    told["peak_rss_bytes"] = float(peak_rss_bytes())
    if device_peak is not None:
        told["peak_device_bytes"] = float(device_peak)
    if totals.step:
        seconds = max(totals.train_seconds, 1e-9)
        told |= {
            "train_seconds": totals.train_seconds,
            "initial_loss": _or_nan(totals.initial_loss),
            "final_loss": _or_nan(totals.final_loss),
            "steps_per_second": totals.step / seconds,
            "tokens_per_second": totals.tokens / seconds,
        }
    if totals.heldout_initial is not None and totals.heldout_final is not None:
        told |= {"heldout_initial": totals.heldout_initial, "heldout_final": totals.heldout_final}
    return told


def against(verdicts: Sequence[Verdict]) -> str:
    """Why a run failed: each verdict that stands against it, as what does not hold."""
    return "; ".join(
        f"{v.id} is FAIL: not so that {v.claim} (expected {v.expected}, observed {v.observed})" for v in verdicts
    )


def provenance(config: RunConfig, run: str, totals: Totals, verdicts: Sequence[Verdict]) -> Provenance:
    """What the model card says of the run."""
    return Provenance(
        run=run,
        teacher=config.teacher.path if config.teacher else None,
        student=config.student.source,
        data=config.data.paths,
        config=fingerprint(config),
        steps=totals.step,
        tokens=totals.tokens,
        temperature=config.distill.temperature,
        alpha=config.distill.alpha,
        losses={
            "train, first step": _or_nan(totals.initial_loss),
            "train, last step": _or_nan(totals.final_loss),
            "held-out, before": _or_nan(totals.heldout_initial),
            "held-out, after": _or_nan(totals.heldout_final),
        },
        verdicts=[(v.id, v.verdict, v.observed) for v in verdicts if v.verdict != "PENDING"],
        versions={name: metadata.version(name) for name in ("torch", "transformers")},
    )


def _or_nan(loss: float | None) -> float:
    return math.nan if loss is None else loss
