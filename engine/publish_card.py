"""The README of a published model: licence, origin and results as model hubs read them, each from proven evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from engine.model_card import cell, code, table
from engine.publish_licence import HUB_IDS, Licence

MARK: Final = "Published by kdconsole"
"""Stands in every card: a directory with it was made by this command."""
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class _Dumper(yaml.SafeDumper):
    """Quotes what is no plain word: 1e3 is a text to PyYAML, and a number to the YAML 1.2 that hubs read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"')


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class Metric:
    """One number of a result."""

    type: str
    """As hubs name it, such as pass@1 or perplexity; empty: of the text alone, and not for `model-index`."""
    name: str
    value: float


@dataclass(frozen=True)
class Result:
    """What one evaluation found, in numbers, and what they stand on."""

    dataset: str
    """Type of the dataset, such as openai_humaneval."""
    name: str
    """The dataset for people."""
    metrics: tuple[Metric, ...]
    source: str
    """The run that found them."""
    evidence_id: str
    remarks: tuple[str, ...] = ()
    """How it was asked and what makes it to be believed, a sentence each."""


@dataclass(frozen=True)
class Facts:
    """What a card says; nothing of the machine that the run was made on but names."""

    title: str
    architecture: str
    parameters: int
    dtype: str
    run: str
    evidence_id: str
    config: str
    """Fingerprint of the run's configuration."""
    steps: int
    tokens_per_step: int
    temperature: float
    alpha: float
    teacher: str | None
    student: str
    data: Sequence[str]
    inputs: Mapping[str, str]
    """SHA-256 of teacher, student, tokenizer and data, as the run's evidence has them."""
    licence: str
    licence_source: str
    licences: Mapping[str, Licence]
    verdicts: Sequence[tuple[str, str, str, str]]
    """Falsifier, severity, verdict, what was observed; of the run and of each evaluation that is given."""
    results: Sequence[Result] = ()
    base_model: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card(facts: Facts, repo: str | None) -> str:
    """The card as Markdown with front matter.

    Args:
        facts: what it says.
        repo: ORG/NAME, for the lines that load the model; None for a directory.
    """
    place = repo or "DIRECTORY"
    rows = [
        ("architecture", f"{code(facts.architecture)}, {facts.parameters:,} parameters, {cell(facts.dtype)} weights"),
        ("teacher", "none: plain training" if facts.teacher is None else code(facts.teacher)),
        ("student started from", code(facts.base_model or facts.student)),
        ("training data", ", ".join(map(code, facts.data))),
        ("steps", f"{facts.steps:,} of {facts.tokens_per_step:,} tokens"),
        ("loss", f"temperature {facts.temperature:g}, weight of the cross-entropy {facts.alpha:g}"),
        ("run", code(facts.run)),
        ("evidence id", code(facts.evidence_id)),
        ("configuration", code(facts.config)),
        *((f"SHA-256 of the {cell(name)}", code(digest)) for name, digest in facts.inputs.items()),
        *((cell(name), code(version)) for name, version in facts.versions.items()),
    ]
    origin = [(cell(name), code(each.id), cell(each.source)) for name, each in facts.licences.items()]
    verdicts = [tuple(map(cell, each)) for each in facts.verdicts]
    parts = [
        f"---\n{yaml.dump(front_matter(facts), Dumper=_Dumper, sort_keys=False, allow_unicode=True)}---\n",
        f"# {cell(facts.title)}\n",
        f"{MARK}, from evidence that was proven before: the whole stream of the run, its configuration and its "
        "contract stand in an evidence directory with the id below.\n",
        table(("what", "value"), rows),
        "## Results\n",
        *(_result(each) for each in facts.results),
        "## Verdicts\n",
        "Each was stated before the run, as a check that the run could fail.\n",
        table(("falsifier", "severity", "verdict", "observed"), verdicts),
        "## Licence\n",
        f"This model: {code(facts.licence)} ({cell(facts.licence_source)}); the text is in `LICENSE`. It was made "
        "from:\n",
        table(("what", "licence", "who says so"), origin),
        "## Use\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```\n',
    ]
    return "\n".join(parts)


def front_matter(facts: Facts) -> dict[str, Any]:
    """What hubs read: licence, base model, tags, and `model-index` with every result."""
    known = facts.licence in HUB_IDS
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"license": facts.licence if known else "other"}
    if not known:
        front |= {"license_name": facts.licence, "license_link": "LICENSE"}
    if facts.base_model is not None:
        front["base_model"] = facts.base_model
    front["tags"] = [*(["knowledge-distillation"] if facts.teacher is not None else []), "kdconsole"]
    results = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": result.dataset, "name": result.name},
            "metrics": [
                {"type": metric.type, "name": metric.name, "value": metric.value, "verified": False}
                for metric in result.metrics
                if metric.type
            ],
        }
        for result in facts.results
        if any(metric.type for metric in result.metrics)
    ]
    if results:
        front["model-index"] = [{"name": facts.title, "results": results}]
    return front


def _result(result: Result) -> str:
    rows = [(cell(metric.name), f"{metric.value:.4f}") for metric in result.metrics]
    said = " ".join((*map(cell, result.remarks), f"Run {code(result.source)}, evidence id {code(result.evidence_id)}."))
    return f"### {cell(result.name)}\n\n{table(('metric', 'value'), rows)}\n{said}\n"
