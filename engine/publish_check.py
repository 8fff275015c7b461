"""`python -P -m engine.publish_check`: whether what came back of a publication is the model that was exported.

A process of its own, so that nothing in the publisher's memory can stand in for what is on disk. It takes one JSON
object on standard input (`files`: SHA-256 by name, `back`: the directory that came back, `model`: the exported model)
and prints one: each of `publish_files_differ` and `publish_logit_error` to value and detail.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine.errors import ExitCode
from engine.export import probe_logits
from engine.publish_compare import MADE_BY_HUBS
from engine.text import clean

TOKENS: Final = 32
_NAMED: Final = 3


def files_differ(back: Path, files: Mapping[str, str]) -> tuple[float, str]:
    """How many files did not come back as they were sent, or came back and were not sent; the first of them by name."""
    found = {
        path.relative_to(back).as_posix(): path
        for path in back.rglob("*")
        if path.is_file() and path.relative_to(back).as_posix() not in MADE_BY_HUBS
    }
    wrong = [f"{name}: missing" for name in files if name not in found]
    wrong += [f"{name}: was not sent" for name in found if name not in files]
    for name, sent in files.items():
        if name in found:
            with found[name].open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sent:
                    wrong.append(f"{name}: other bytes")
    named = "; ".join(clean(each, 120) for each in sorted(wrong)[:_NAMED])
    return float(len(wrong)), f"{named}{' …' if len(wrong) > _NAMED else ''}" or f"{len(files)} files, byte for byte"


def logit_error(back: Path, model: Path) -> tuple[float, str]:
    """The largest difference of two models' logits on fixed ids, absolute; infinite where one does not load."""
    found = []
    for directory in (model, back):
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # noqa: BLE001 - whatever keeps a model from loading is the finding
            lines = str(error).strip().splitlines() or [""]
            what = "the exported model" if directory == model else "what came back"
            return math.inf, clean(f"{what} does not load: {type(error).__name__}: {lines[0]}", 300)
        lacking = sorted(report["missing_keys"])
        if lacking:
            return math.inf, f"made up by the loader: {clean(', '.join(lacking[:_NAMED]), 200)}"
        rows = int(loaded.get_input_embeddings().weight.shape[0])
        longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or TOKENS
        found.append(probe_logits(loaded, torch.arange(min(TOKENS, longest)) * 7919 % rows))
        del loaded
    one, other = found
    if one.shape != other.shape:
        return math.inf, f"logits of shape {list(other.shape)}, expected {list(one.shape)}"
    largest = float((one - other).abs().max())
    # NaN is in one of the two, and then nothing is known.
    return (math.inf if math.isnan(largest) else largest), f"largest difference over {one.numel():,} logits"


def main() -> int:
    """Answers one question; returns 0 where an answer was printed, whatever it says."""
    asked: dict[str, Any] = json.load(sys.stdin)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    back, model = Path(asked["back"]), Path(asked["model"])
    told = {"publish_files_differ": files_differ(back, asked["files"]), "publish_logit_error": logit_error(back, model)}
    print(json.dumps(told))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
