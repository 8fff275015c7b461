"""`python -P -m engine.verify_export MODEL REFERENCE [CHECKPOINT]`: whether an exported model is what was trained.

MODEL is a directory or an APR file. With the weights of the CHECKPOINT it was made of, tensors are compared by bytes.

A process of its own, so that nothing in the trainer's memory can stand in for what is on disk. It prints one JSON
object, from the names of `engine.export.LIMITS` to value and detail, and exits with 0 where all are within limits.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.apr_values import converted
from engine.errors import ExitCode, KdError
from engine.export import APR_LIMITS, DTYPES, LIMITS, PROBE_TEXT, probe_logits, unique_state, weights_digest
from engine.formats import inspect_model_dir, read_tensors
from engine.models import read_pretrained
from engine.text import clean
from engine.weight_source import open_safetensors, open_weights

Findings = dict[str, tuple[float, str]]
"""Measure to value and detail."""

_NAMED = 3
_STORED = {"bf16": "BF16", "fp32": "F32"}


def verify(model_dir: Path, reference: Path, checkpoint: Path | None = None) -> Findings:
    """Compare a model directory, or an APR file, with what the trainer handed over.

    Args:
        model_dir: the exported model.
        reference: safetensors file with probe ids, the trained model's logits on them, as trained and with its weights
            rounded as they are stored; and, as metadata, the expected tensors and the digest of the initial weights.
        checkpoint: safetensors file of the weights that it was made of; None does not compare them by bytes.

    Returns:
        Every name of `engine.export.LIMITS`, with a checkpoint of `APR_LIMITS`; what could not be told is infinite.
    """
    with safe_open(reference, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
        ids, trained, rounded = (file.get_tensor(name) for name in ("ids", "trained", "rounded"))
    expected: dict[str, tuple[list[int], int]] = json.loads(metadata["expected"])
    findings: Findings = {"export_missing_bytes": _missing_bytes(model_dir, expected)}
    if checkpoint is not None:
        findings["export_different_tensors"] = _different_tensors(model_dir, checkpoint, metadata["dtype"])
    model, loading = _load(model_dir)
    findings["export_missing_tensors"] = _missing_tensors(model, loading, expected)
    failures = [loading["failure"]] if model is None else []
    failed, remark = _tokenizer(model_dir, json.loads(metadata["tokens"]))
    findings["export_load_failures"] = (float(len(failures) + failed), "; ".join(filter(None, [*failures, remark])))
    if model is None:
        return {name: (math.inf, "not loaded") for name in LIMITS} | findings
    state = unique_state(model)
    findings["export_non_finite"] = _non_finite(state)
    same = weights_digest(state, DTYPES[metadata["dtype"]]) == metadata["initial"]
    findings["export_unchanged"] = (float(same), "the weights are the initial ones" if same else "")
    logits = probe_logits(model, ids)
    findings["export_reload_error"] = _difference(logits, rounded, f"to the model with {metadata['dtype']} weights")
    findings["export_logit_error"] = _difference(logits, trained, "to the model as trained")
    return findings


def _missing_bytes(model_dir: Path, expected: Mapping[str, tuple[list[int], int]]) -> tuple[float, str]:
    wanted = sum(size for _, size in expected.values())
    if not wanted:
        return math.inf, "no weights were expected: there is no model to export"
    try:
        files = inspect_model_dir(model_dir, "student").weights
        found = sum(entry.end - entry.begin for file in files for entry in read_tensors(file).values())
    except KdError as error:
        return float(wanted), str(error)
    return float(abs(wanted - found)), f"{found:,} bytes of tensors, expected {wanted:,}"


def _different_tensors(model: Path, checkpoint: Path, dtype: str) -> tuple[float, str]:
    """How many tensors are not the checkpoint's, rounded as they are stored; computed without torch."""
    try:
        ours, theirs = open_weights(inspect_model_dir(model, "student")), open_safetensors([checkpoint])
        different = sorted(ours.tensors.keys() ^ theirs.tensors.keys())
        for name in ours.tensors.keys() & theirs.tensors.keys():
            found, wanted = ours.values(name), converted(theirs.values(name), _STORED[dtype])
            same = found.dtype == wanted.dtype and found.array.shape == wanted.array.shape
            if not same or found.array.tobytes() != wanted.array.tobytes():
                different.append(name)
    except KdError as error:
        return math.inf, str(error)
    named = ", ".join(clean(name, 100) for name in different[:_NAMED])
    return float(len(different)), named or f"{len(theirs.tensors):,} tensors have the checkpoint's bytes, as {dtype}"


def _load(model_dir: Path) -> tuple[PreTrainedModel | None, dict[str, Any]]:
    try:
        if model_dir.is_file():
            return read_pretrained(inspect_model_dir(model_dir, "student"), "student", torch.float32)
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001 - whatever keeps a model from loading is the finding
        return None, {"failure": _said("the model", error)}
    return model, loading


def _missing_tensors(
    model: PreTrainedModel | None, loading: Mapping[str, Any], expected: Mapping[str, tuple[list[int], int]]
) -> tuple[float, str]:
    if not expected:
        return math.inf, "no tensors were expected: there is no model to export"
    if model is None:
        return float(len(expected)), "not loaded"
    shapes = {name: list(tensor.shape) for name, tensor in unique_state(model).items()}
    # A tensor that the files lack is made up by the loader, so that its being there says nothing.
    made_up = set(loading["missing_keys"]) | {key[0] for key in loading["mismatched_keys"]}
    wrong = [name for name, (shape, _) in expected.items() if shapes.get(name) != shape or name in made_up]
    wrong += [name for name in shapes if name not in expected]
    wrong += list(loading["unexpected_keys"])
    named = ", ".join(clean(str(name), 100) for name in sorted(wrong)[:_NAMED])
    return float(len(wrong)), f"{named}{' …' if len(wrong) > _NAMED else ''}"


def _tokenizer(model: Path, tokens: list[int]) -> tuple[int, str]:
    """Whether the tokenizer failed, 0 or 1, and what is to be said of it."""
    model_dir = model.parent if model.is_file() else model
    if not (model_dir / "tokenizer.json").is_file():
        return (1, "no tokenizer.json") if tokens else (0, "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        ids = list(tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
    except Exception as error:  # noqa: BLE001 - as above
        return 1, _said("the tokenizer", error)
    if not ids:
        return 1, "the tokenizer makes no tokens of a line of Python"
    # transformers may build a class of its own instead of reading tokenizer.json as it is: told, and no failure.
    return 0, "" if ids == tokens else "AutoTokenizer makes other ids than tokenizer.json itself"


def _non_finite(state: Mapping[str, Tensor]) -> tuple[float, str]:
    bad = {name: int((~tensor.isfinite()).sum()) for name, tensor in state.items() if tensor.is_floating_point()}
    first = next((name for name, count in bad.items() if count), None)
    return float(sum(bad.values())), "" if first is None else f"first in {clean(first, 100)}"


def _difference(logits: Tensor, reference: Tensor, what: str) -> tuple[float, str]:
    if logits.shape != reference.shape:
        return math.inf, f"logits of shape {list(logits.shape)}, expected {list(reference.shape)}"
    error = float((logits - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
    # NaN is in one of the two, and then nothing is known.
    return (math.inf if math.isnan(error) else error), f"largest difference {what}, over the largest logit"


def _said(what: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return clean(f"{what} does not load: {type(error).__name__}: {lines[0] if lines else ''}", 300)


def main(argv: list[str]) -> int:
    """Prints the findings; returns 0 where all are within limits, 1 where one is not, 2 for wrong usage."""
    if not 2 <= len(argv) <= 3:
        print("usage: python -P -m engine.verify_export MODEL REFERENCE [CHECKPOINT]", file=sys.stderr)
        return ExitCode.USAGE
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    findings = verify(Path(argv[0]), Path(argv[1]), Path(argv[2]) if len(argv) == 3 else None)
    print(json.dumps(findings))
    holds = all(findings[name][0] <= limit for name, limit in APR_LIMITS.items() if name in findings)
    return ExitCode.OK if holds else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
