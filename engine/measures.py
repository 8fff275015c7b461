"""What a run brings for its falsifiers to look at: a claim about anything else could never be judged."""

from __future__ import annotations

from collections.abc import Mapping

from engine.config import RunConfig
from engine.contract import Contract, Falsifier, metrics_of
from engine.errors import ConfigError
from engine.schema import alternatives, nearest
from engine.text import clean

ALWAYS = (
    "ce_gradient_error",
    "kd_gradient_error",
    "model_files",
    "self_gradient",
    "smallest_kd_growth",
    "smallest_logit_rise",
    "steps_per_second",
    "student_logit_error",
    "ten_step_loss_ratio",
)
WITH_TEACHER = ("teacher_logit_error", "teacher_student_distance")
OF_A_TRAINING = (
    "export_load_failures",
    "export_logit_error",
    "export_missing_bytes",
    "export_missing_tensors",
    "export_non_finite",
    "export_reload_error",
    "export_unchanged",
)
FIDELITY_TEMPERATURES = (1.0, 2.0, 4.0)
FIDELITY_COUNTS = (64, 128, 256, 512, 1024)
"""Temperatures and numbers of logits that a preparation of source topk tells of, as far as the vocabulary goes."""


def fidelity_names(temperature: float, k: int) -> tuple[str, str]:
    """What mass and cosine of the gradient are called, of one temperature and number of logits."""
    where = f"t{f'{temperature:g}'.replace('.', '_')}_k{k}"
    return f"topk_mass_{where}", f"topk_cosine_{where}"


OF_A_PREPARATION = ("store_cosine", "store_ids_differ")
OF_TOPK = (
    "topk_gradient_cosine",
    "topk_mass",
    *(name for t in FIDELITY_TEMPERATURES for k in FIDELITY_COUNTS for name in fidelity_names(t, k)),
)
OF_HELDOUT = ("heldout_loss", "heldout_perplexity")
OF_HELDOUT_WITH_TEACHER = ("teacher_agreement", "teacher_kl")
"""Of an evaluation on the held-out part: nats a token and its exponential; top-1 agreement and KL(teacher || student)
at temperature 1, nats a token."""
CONTROLS = ("control_canonical", "control_constant", "control_empty", "control_pass")
PASS_AT = (1, 10, 100)
OF_PROBLEMS = (*CONTROLS, *(f"pass_at_{k}" for k in PASS_AT))
"""Of an evaluation on problems: the controls' scores, and the unbiased pass@k of the whole suite as far as there are k
answers a problem. A part of a suite brings `part_pass_at_…` instead, which no claim about the suite is judged on."""
OF_A_PART = tuple(f"part_pass_at_{k}" for k in PASS_AT)
OF_A_PUBLICATION = ("publish_files_differ", "publish_logit_error")
_WHAT = {"prepare": "a preparation", "evaluate": "an evaluation", "publish": "a publication"}
_PREPARED = ("teacher_logit_error", *OF_A_PREPARATION)
_EVERY = {
    *(*ALWAYS, *WITH_TEACHER, *OF_A_TRAINING, *_PREPARED, *OF_TOPK),
    *(*OF_HELDOUT, *OF_HELDOUT_WITH_TEACHER, *OF_PROBLEMS, *OF_A_PART, *OF_A_PUBLICATION),
}
EVALUATED_WITH_TEACHER = ("eval.agreement", "eval.cosine")
MEASURES = tuple(f"measure.{name}" for name in sorted(_EVERY))
"""Every measure that the engine ever emits."""


def measures_of(config: RunConfig) -> frozenset[str]:
    """The names of the measures that a whole run of a configuration emits."""
    if config.mode == "prepare":
        topk = config.teacher is not None and config.teacher.source == "topk"
        return frozenset((*_PREPARED, *(OF_TOPK if topk else ())))
    if config.mode == "evaluate":
        if config.evaluate.runs_code:
            return frozenset((*OF_PROBLEMS, *OF_A_PART))
        return frozenset((*OF_HELDOUT, *(OF_HELDOUT_WITH_TEACHER if config.teacher else ())))
    if config.mode == "publish":
        return frozenset(OF_A_PUBLICATION)
    return frozenset(
        (*ALWAYS, *(WITH_TEACHER if config.teacher else ()), *(OF_A_TRAINING if config.mode == "train" else ()))
    )


def require_measured(contract: Contract, config: RunConfig, source: str) -> None:
    """Refuses a falsifier that looks at what no part of such a run brings, and so could not be judged at its end.

    A contract of a run that was made is not held against this: what brought its metrics may be another version.

    Args:
        contract: of the run that is to be made.
        config: of that run.
        source: how the message calls the contract.

    Raises:
        ConfigError: the first such falsifier, and why nothing brings its metric.
    """
    brought = measures_of(config)
    has: Mapping[str, bool] = {"teacher": config.teacher is not None, "max_steps": config.max_steps is not None}
    for falsifier in contract.falsifiers:
        if not all(has[need] for need in falsifier.needs):
            continue
        for metric in metrics_of(falsifier):
            if why := _unbrought(metric, config, brought):
                raise _refusal(falsifier, metric, why, source)


def _unbrought(metric: str, config: RunConfig, brought: frozenset[str]) -> str:
    """Why nothing brings a metric; empty where something does."""
    kind, _, name = metric.partition(".")
    if not config.makes_steps and kind in ("step", "eval", "efficiency"):
        return f"{_WHAT[config.mode]} makes no steps"
    if kind == "projection":
        return "" if config.mode == "smoke" else "only a smoke brings it"
    if metric in EVALUATED_WITH_TEACHER:
        return "" if config.teacher is not None else "only a run with a teacher brings it"
    if kind != "measure" or name in brought:
        return ""
    if name in OF_A_TRAINING:
        return "only a training brings it"
    if name in OF_TOPK:
        return "only a preparation with teacher.source topk brings it"
    if name in OF_A_PREPARATION:
        return "only a preparation brings it"
    if name in OF_A_PUBLICATION:
        return "only a publication brings it"
    if name in (*OF_PROBLEMS, *OF_A_PART):
        return "only an evaluation on problems brings it"
    if name in (*OF_HELDOUT, *OF_HELDOUT_WITH_TEACHER):
        return "only an evaluation on the held-out part brings it"
    if not config.makes_steps and name in (*ALWAYS, *WITH_TEACHER):
        return f"{_WHAT[config.mode]} does not bring it"
    return "only a run with a teacher brings it" if name in WITH_TEACHER else "nothing brings it"


def _refusal(falsifier: Falsifier, metric: str, why: str, source: str) -> ConfigError:
    near = nearest(metric.partition(".")[2], "measure", MEASURES, {}) if why.startswith("nothing") else []
    hint = f"; did you mean {alternatives(near)}?" if near else ""
    return ConfigError(
        f"{clean(source, 300)}: {falsifier.id}: {metric}: {why}{hint}",
        expected="a metric that this run has, or the claim could never be judged",
        do="see docs/falsifiers.md for all of them",
    )
