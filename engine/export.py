"""The trained student as a Hugging Face directory, read back before it counts; and what writing it costs."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine.errors import RunError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_PROBE_BYTES = 256 << 20
_WEIGHTS = "model.safetensors"


def export_model(model: PreTrainedModel, tokenizer_dir: Path | None, run_dir: Path) -> Path:
    """Writes `run_dir/model`, bf16, beside any earlier one's place and renames it there once it was read back.

    Args:
        model: the trained student.
        tokenizer_dir: where its tokenizer files are; None leaves them out.
        run_dir: of this run.

    Raises:
        RunError: what stands on disk is not what is in memory.
    """
    target, temporary = run_dir / "model", run_dir / ".model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}  # a tied head is written once, as the embedding
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    previous, model.config.dtype = model.config.dtype, torch.bfloat16
    try:
        model.save_pretrained(temporary, state_dict=dict(state))  # it empties the mapping that it is given
    finally:
        model.config.dtype = previous
    for name in TOKENIZER_FILES:
        if tokenizer_dir is not None and (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, temporary / name)
    written: dict[str, torch.Tensor] = {}
    for file in sorted(temporary.glob("*.safetensors")):
        written |= load_file(file)
    missing = [name for name in state if name not in written]
    wrong = [name for name, tensor in written.items() if name not in state or not torch.equal(tensor, state[name])]
    if missing or wrong or not written:
        raise RunError(
            f"the exported model reads back wrong: missing {missing[:3]}, different {wrong[:3]}",
            expected=f"{len(state)} tensors as in memory",
        )
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    _fsync(run_dir)
    return target


def checkpoint_seconds(model: torch.nn.Module, directory: Path) -> float:
    """Seconds that writing a checkpoint of this model costs here, by writing one and deleting it.

    A checkpoint holds the weights and two moments of the same size, is hashed and synced. Of a large model at most
    256 MiB are written and the time is scaled by bytes.
    """
    tensors: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, parameter in model.named_parameters():
        total += 3 * parameter.numel() * 4
        for copy in range(3):
            if size < _PROBE_BYTES:
                tensors[f"{name}.{copy}"] = parameter.detach().float().cpu().clone()
                size += parameter.numel() * 4
    path = directory / ".checkpoint-probe"
    started = time.monotonic()
    try:
        save_file(tensors, path)
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return (time.monotonic() - started) * total / max(1, size)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
