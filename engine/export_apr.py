"""The trained student as an APR file, which counts after a fresh process has read and compared it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor
from transformers import PreTrainedModel

from engine.apr_load import bytes_of
from engine.apr_writer import Outlines, metadata_of, write_apr
from engine.convert import require_free
from engine.durable import discard, partial_of, sync_directory
from engine.export import (
    APR_LIMITS,
    DTYPES,
    TOKENIZER_FILES,
    Dtype,
    Exported,
    run_verification,
    stored,
    take_place,
    unique_state,
    write_reference,
    writing,
)

FILE: Final = "model.apr"
_STORED: Final[dict[str, str]] = {"bf16": "BF16", "fp32": "F32"}


def export_apr(
    model: PreTrainedModel,
    directory: Path,
    checkpoint: Path,
    *,
    run: str,
    initial: Mapping[str, str],
    tokenizer_dir: Path | None = None,
    dtype: Dtype = "bf16",
    poll: Callable[[], None] = lambda: None,
) -> Exported:
    """Write `model.apr` and its tokenizer, have them verified by a fresh process, and only then give it its name.

    The directory is no part of the run: a run that has ended is sealed, and nothing may come into it. What does not
    pass gets the name with `.rejected`.

    Args:
        model: of the checkpoint, on any device; left as it was.
        directory: to be made.
        checkpoint: its weights' safetensors file, with which every tensor is compared by its bytes.
        run: its name, which the metadata keeps.
        initial: `weights_digests` of the student before its first step.
        tokenizer_dir: where its tokenizer files are; None leaves them out.
        dtype: of the weights on disk.
        poll: called between the writes, and often while the verification runs; may raise to stop.

    Raises:
        ModelError: an architecture that APR files are not written of, or something is there already.
        RunError: the directory cannot be written.
    """
    require_free(directory)
    partial = partial_of(directory)
    reference = partial.with_suffix(".reference.safetensors")
    try:
        with writing(directory):
            discard(partial)
            partial.mkdir()
            _write(model, partial, run, tokenizer_dir, dtype)
            poll()
            write_reference(model, reference, tokenizer_dir, initial.get(dtype, ""), dtype)
        measures = run_verification(partial / FILE, reference, poll, checkpoint=checkpoint)
        exported = Exported(partial, measures, APR_LIMITS)
        target = directory if exported.ok else directory.with_name(f"{directory.name}.rejected")
        with writing(directory):
            take_place(partial, target)
        return Exported(target, measures, APR_LIMITS)
    finally:
        with contextlib.suppress(OSError):
            discard(partial)
            discard(reference)


def _write(model: PreTrainedModel, directory: Path, run: str, tokenizer_dir: Path | None, dtype: Dtype) -> None:
    state: dict[str, Tensor] = unique_state(model)
    outlines: Outlines = {name: (_STORED[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    metadata = metadata_of(config, outlines, directory / FILE) | {"name": run, "source": f"kdconsole run {run}"}
    write_apr(
        directory / FILE, metadata, outlines, lambda name: bytes_of(stored(state[name], DTYPES[dtype]).contiguous())
    )
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(directory))
    for name in TOKENIZER_FILES:
        if tokenizer_dir is not None and (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    for file in directory.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(directory)
