"""The README of an exported model: what it was made from, what was measured, what was judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import msgspec

from engine.text import clean


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from, as plain data; numbers are printed as they are given."""

    run: str
    """The run's id."""
    teacher: str | None
    student: str
    data: Sequence[str]
    config: str
    """Fingerprint of the configuration."""
    steps: int
    tokens: int
    temperature: float
    alpha: float
    losses: dict[str, float] = {}
    """Name to nats a token, such as `held-out, last`."""
    verdicts: Sequence[tuple[str, str, str]] = ()
    """Falsifier, verdict, what was observed."""
    versions: dict[str, str] = {}


def model_card(provenance: Provenance, *, architecture: str, parameters: int, dtype: str) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        provenance: of the run.
        architecture: class name of the model.
        parameters: of the model, a tied head counted once.
        dtype: of the weights on disk.
    """
    p = provenance
    teacher = "none: plain training" if p.teacher is None else code(p.teacher)
    facts = [
        ("architecture", f"{code(architecture)}, {parameters:,} parameters, {dtype} weights"),
        ("student started from", code(p.student)),
        ("teacher", teacher),
        ("data", ", ".join(map(code, p.data))),
        ("steps", f"{p.steps:,}, {p.tokens:,} tokens"),
        ("loss", f"temperature {p.temperature:g}, weight of the cross-entropy {p.alpha:g}"),
        ("run", code(p.run)),
        ("configuration", code(p.config)),
        ("versions", ", ".join(code(f"{name} {version}") for name, version in p.versions.items())),
    ]
    losses = [(cell(name), f"{value:.4f}") for name, value in p.losses.items()]
    verdicts = [(cell(id_), cell(verdict), cell(observed)) for id_, verdict, observed in p.verdicts]
    title = "A distilled causal language model" if p.teacher is not None else "A causal language model"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- knowledge-distillation\n---\n",
        f"# {title}\n",
        "Made by kdconsole. The run's evidence directory holds the whole stream, the configuration and the contract.\n",
        table(("what", "value"), facts),
    ]
    if losses:
        parts += ["## Losses\n\nIn nats a token.\n", table(("loss", "value"), losses)]
    if verdicts:
        parts += ["## Verdicts before the export\n", table(("falsifier", "verdict", "observed"), verdicts)]
    parts += [
        "## Use\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```\n',
    ]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the texts are as they are to stand there."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cell(text: str) -> str:
    """Any text as one cell of a table, or as plain words."""
    # What came from a path or a contract stays text: no cell, tag or link of its own.
    safe = clean(text, 500)
    return "".join("\\" + c if c in "\\`*_[]<>|#!&" else c for c in safe)


def code(text: str) -> str:
    """Any text as a code span."""
    safe = clean(text, 500)
    # A backtick would end the code span, a bar the table's cell.
    return f"`{safe}`" if "`" not in safe and "|" not in safe else cell(json.dumps(safe))
