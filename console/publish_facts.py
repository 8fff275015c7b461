"""What the card of a published model says, read from evidence that was proven."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from console.publish_gate import Proven
from dispatch.manifest import EVENTS
from engine.formats import ModelFiles
from engine.publish_card import Facts, Metric, Result
from engine.publish_licence import Licence, origins
from engine.stream import MAX_LINE_BYTES, Control, Eval, Event, Measure, decode_line

_TOLD: Final = tuple(f'{{"event":"{kind}"'.encode() for kind in ("measure", "eval", "control"))
_HUMANEVAL: Final = "humaneval"
_MEASURES: Final = {
    "heldout_loss": Metric("cross_entropy", "held-out cross-entropy, nats a token", math.nan),
    "heldout_perplexity": Metric("perplexity", "held-out perplexity", math.nan),
    "teacher_agreement": Metric("accuracy", "top-1 agreement with the teacher", math.nan),
    "teacher_kl": Metric("kl_divergence", "KL(teacher || student) at temperature 1, nats a token", math.nan),
    "pass_at_1": Metric("pass@1", "pass@1", math.nan),
    "pass_at_10": Metric("pass@10", "pass@10", math.nan),
    "pass_at_100": Metric("pass@100", "pass@100", math.nan),
    "part_pass_at_1": Metric("", "pass@1 of a part of the problems", math.nan),
    "part_pass_at_10": Metric("", "pass@10 of a part of the problems", math.nan),
    "part_pass_at_100": Metric("", "pass@100 of a part of the problems", math.nan),
}
"""How a measure of an evaluation is told; others are not results."""


def facts_of(
    run: Proven,
    evaluations: Sequence[Proven],
    model: ModelFiles,
    *,
    title: str,
    licence: Licence,
    licences: Mapping[str, Licence],
    base_model: str | None,
) -> Facts:
    """Everything that the card says.

    Args:
        run: the training.
        evaluations: of its exported model.
        model: the exported model.
        title: what it is called.
        licence: of the model itself.
        licences: of what it was made from, of `engine.publish_licence.licences`.
        base_model: the hub's name of the student's origin, as the operator states it.
    """
    config, manifest = run.config, run.run.manifest
    named = {origin.part: origin.name for origin in origins(config)}
    judged = [(each.run.id, verdict) for each in (run, *evaluations) for verdict in each.run.manifest.verdicts]
    found = [_training(run), *map(evaluation_result, evaluations)]
    return Facts(
        title=title,
        architecture=model.architecture or model.model_type,
        parameters=model.parameters,
        dtype=str(model.config.get("dtype", "unknown")),
        run=run.run.id,
        evidence_id=run.evidence_id,
        config=manifest.config_fingerprint,
        steps=manifest.outcome.steps or 0 if manifest.outcome else 0,
        tokens_per_step=config.train.batch * config.train.sequence,
        temperature=config.distill.temperature,
        alpha=config.distill.alpha,
        teacher=named.get("teacher"),
        student=named["student"],
        data=[origin.name for origin in origins(config) if origin.part == "data"],
        inputs=manifest.inputs,
        licence=licence.id,
        licence_source=licence.source,
        licences=licences,
        verdicts=[(v.id, v.severity, v.verdict, v.observed) for _, v in judged],
        results=[result for result in found if result is not None],
        base_model=base_model,
        versions=manifest.engine_versions,
    )


def _training(run: Proven) -> Result | None:
    """What the run's own last look at the held-out part found, of the weights as they were trained."""
    last = None
    for event in _events(run.path / EVENTS):
        last = event if isinstance(event, Eval) else last
    if last is None or not math.isfinite(last.ce):
        return None
    metrics = [Metric("cross_entropy", "held-out cross-entropy, nats a token", last.ce)]
    if last.ce < math.log(1e300):
        metrics.append(Metric("perplexity", "held-out perplexity", math.exp(last.ce)))
    if last.agreement is not None and math.isfinite(last.agreement):
        metrics.append(Metric("accuracy", "top-1 agreement with the teacher", last.agreement))
    names = ", ".join(origin.name for origin in origins(run.config) if origin.part == "data")
    return Result(
        dataset="text",
        name=f"Held-out part of the training data ({names})",
        metrics=tuple(metrics),
        source=run.run.id,
        evidence_id=run.evidence_id,
        remarks=(f"After step {last.step:,}, over {last.tokens:,} tokens, with the weights as they were trained.",),
    )


def evaluation_result(run: Proven) -> Result:
    """What an evaluation found, how it was asked, and its controls."""
    asked, measures, controls = run.config.evaluate, dict[str, float](), dict[str, Control]()
    for event in _events(run.path / EVENTS):
        if isinstance(event, Measure) and math.isfinite(event.value):
            measures[event.name] = event.value
        elif isinstance(event, Control):
            controls[event.name] = event
    metrics = tuple(
        Metric(metric.type, metric.name, measures[name]) for name, metric in _MEASURES.items() if name in measures
    )
    if not asked.runs_code:
        names = ", ".join(origin.name for origin in origins(run.config) if origin.part == "data")
        dataset, name, remarks = "text", f"Held-out text of {names}", ["With the published weights."]
    else:
        human = asked.suite == _HUMANEVAL
        dataset = "openai_humaneval" if human else "other"
        name = "HumanEval" if human else Path(asked.suite).name
        count = max((each.problems for each in controls.values()), default=0)
        how = "greedy" if asked.temperature == 0 else f"temperature {asked.temperature:g}, top-p {asked.top_p:g}"
        answers = f"{asked.samples:,} answer{'s' if asked.samples > 1 else ''} each"
        remarks = [f"{count:,} problems, {answers}, {how}, seed {asked.seed}."]
        if any(measure.startswith("part_") for measure in measures):
            remarks.append("These are the first problems of the suite and not all of them: no result of the suite.")
        if controls:
            scores = ", ".join(f"{each.name} {each.observed:g}" for each in controls.values())
            remarks.append(f"Controls before it: {scores} (expected: canonical 1, all others 0).")
    return Result(dataset, name, metrics, run.run.id, run.evidence_id, tuple(remarks))


def _events(path: Path) -> Iterator[Event]:
    """The few events of a stream that hold results; the stream was proven before."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if line.startswith(_TOLD) and (event := decode_line(line)) is not None:
                yield event
