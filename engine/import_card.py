"""The README of an imported model: where it comes from, what it was, what was checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import yaml

from engine.text import clean

_LICENCE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}", re.IGNORECASE)
_README_CAP: Final = 1 << 20


def model_card(record: dict[str, Any]) -> str:
    """The card as Markdown with the front matter that model hubs read.

    What a stranger's file says stands in one block of JSON, where no text of it can become markup.

    Args:
        record: of the import, as `engine.import_model` keeps it.
    """
    licence = record["source"]["states"].get("licence") or ""
    front = licence if _LICENCE.fullmatch(licence) else "other" if licence else "unknown"
    gguf = record["source"]["format"] == "GGUF"
    rounded = "rounded to bfloat16" if record["dtype"] == "bf16" else "kept in float32"
    made = (
        f"The weights were dequantised from a GGUF file and {rounded}: they are the quantised model's, and not those "
        "of the model that was quantised."
        if gguf
        else f"The weights are those of a Hugging Face directory, {rounded}."
    )
    return "\n".join(
        [
            f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {front}\n---\n",
            "# An imported causal language model\n",
            f"Made by `kdconsole import`. {made} Nothing was trained.\n",
            "The licence is what the source states of itself: the terms of the model's makers hold, and this copy is "
            "a changed one.\n"
            if licence
            else "The source states no licence: ask its makers before you pass it on.\n",
            "`import.json` holds this too, and the SHA-256 of every file.\n",
            f"```json\n{json.dumps(record, indent=2)}\n```\n",
        ]
    )


def licence_of(readme: Path) -> str:
    """What the front matter of a model card states as `license`; empty where it does not."""
    try:
        if readme.stat().st_size > _README_CAP:
            return ""
        text = readme.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    if not text.startswith("---"):
        return ""
    try:
        front = yaml.safe_load(text[3:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return ""
    licence = front.get("license") if isinstance(front, dict) else None
    return clean(licence, 100) if isinstance(licence, str) else ""
