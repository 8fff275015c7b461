"""What a configuration allows and its operator should hear of, before the run and in its stream."""

from __future__ import annotations

from engine.config import RunConfig
from engine.errors import RunError

LONG_RUN_STEPS = 5_000
"""From this many steps on a run is a long one: what it loses is hours."""


def cautions(config: RunConfig) -> list[str]:
    """One sentence for each thing that may be meant and has cost people days."""
    return [*_coarse(config), *_unsaved(config)]


def _coarse(config: RunConfig) -> list[str]:
    teacher, temperature = config.teacher, config.distill.temperature
    if teacher is None or teacher.source != "topk" or temperature <= 1 or config.distill.alpha == 1:
        return []
    return [
        f"teacher.source: topk at distill.temperature {temperature:g}: softened, the {teacher.top_k:,} largest logits "
        "hold less of the probability (the 64 largest of SmolLM2-135M: 0.92 at 1, 0.30 at 2, 0.03 at 4), and the "
        "gradient turns away with it; teacher.source: hidden is exact at any temperature"
    ]


def _unsaved(config: RunConfig) -> list[str]:
    steps, every, evaluate = config.steps_asked, config.checkpoint.every_steps, config.train.evaluate_every
    if config.mode != "train" or steps < LONG_RUN_STEPS or 0 < every < steps:
        return []
    lost = "what came after the best one so far" if 0 < evaluate < steps else "all of them"
    return [f"{steps:,} steps without a periodic checkpoint: a crash loses {lost}; set checkpoint.every_steps"]


def needs_two_models(config: RunConfig) -> bool:
    """Whether a run is too long for a teacher that is its own student, whatever its contract says of it."""
    return config.mode == "train" and config.teacher is not None and config.steps_asked >= LONG_RUN_STEPS


def one_model(config: RunConfig) -> RunError:
    """The refusal of a long run whose teacher and student have the same weights."""
    return RunError(
        f"teacher and student have the same weights, and {config.steps_asked:,} steps were asked for",
        expected="two different models",
        do="check teacher.path and student.path",
    )
