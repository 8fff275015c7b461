"""The trained student as a Hugging Face directory, which counts after a fresh process has loaded and compared it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from engine.durable import discard, partial_of, sync_directory
from engine.errors import RunError
from engine.model_card import Provenance, model_card
from engine.parallel import local
from engine.stream import Measure
from engine.text import clean

Dtype = Literal["bf16", "fp32"]

DTYPES: Final[dict[str, torch.dtype]] = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS: Final[dict[str, float]] = {
    "export_missing_tensors": 0,
    "export_missing_bytes": 0,
    "export_load_failures": 0,
    "export_non_finite": 0,
    "export_unchanged": 0,
    "export_reload_error": 1e-3,
    "export_logit_error": 2e-2,
}
"""What the verification measures, and the largest value of each that passes; F-EXPORT-001 has the same limits."""

PROBE_TEXT: Final = "def add(a, b):\n    return a + b\n"
"""Plain ASCII: what a tokenizer class adds of its own, a normaliser for instance, changes nothing in it."""

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
APR_LIMITS: Final[dict[str, float]] = LIMITS | {"export_different_tensors": 0}
"""As `LIMITS`, for an APR file, whose every tensor is compared with the checkpoint's by its bytes."""
_PROBE_TOKENS = 32
_PROBE_BYTES = 256 << 20
_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 3_600.0


@dataclass(frozen=True)
class Exported:
    """An export that was written and looked at by a fresh process."""

    path: Path
    """`model/` where everything held, else `model.rejected/`."""
    measures: list[Measure]
    """One for each of the limits; the details say what was found."""
    limits: Mapping[str, float] = field(default_factory=lambda: LIMITS)

    @property
    def problems(self) -> list[str]:
        """What does not hold, in words; empty for a good export."""
        return [
            f"{measure.name} {measure.value:g}, at most {self.limits[measure.name]:g}"
            + (f": {measure.detail}" if measure.detail else "")
            for measure in self.measures
            if measure.name in self.limits and not measure.value <= self.limits[measure.name]
        ]

    @property
    def ok(self) -> bool:
        """Whether every measure is there and within its limit."""
        return not self.problems and {measure.name for measure in self.measures} >= set(self.limits)


def export(
    model: PreTrainedModel,
    run_dir: Path,
    *,
    provenance: Provenance,
    initial: Mapping[str, str],
    tokenizer_dir: Path | None = None,
    dtype: Dtype = "bf16",
    poll: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the model, have it verified by a fresh process, and only then call it `run_dir/model`.

    An earlier `model/` stays until the new one has passed. One that does not pass becomes `model.rejected/`.

    Args:
        model: the trained student, on any device; left as it was.
        run_dir: of this run.
        provenance: for the model card.
        initial: `weights_digests` of the student before its first step.
        tokenizer_dir: where its tokenizer files are; None leaves them out.
        dtype: of the weights on disk.
        poll: called between the writes, and often while the verification runs; may raise to stop, which leaves no
            model behind.

    Raises:
        RunError: the directory cannot be written.
    """
    partial, reference = partial_of(run_dir / "model"), run_dir / ".model.reference.safetensors"
    try:
        with writing(run_dir):
            discard(partial)
            _write(model, partial, provenance, tokenizer_dir, dtype)
            poll()
            write_reference(model, reference, tokenizer_dir, initial.get(dtype, ""), dtype)
        exported = Exported(partial, run_verification(partial, reference, poll))
        target = run_dir / ("model" if exported.ok else "model.rejected")
        with writing(run_dir):
            take_place(partial, target)
        return Exported(target, exported.measures)
    finally:
        with contextlib.suppress(OSError):
            discard(partial)
            discard(reference)


def unique_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state by name, detached and live, each tied tensor once (a tied head as the embedding)."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def weights_digests(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 over all weights as each dtype would store them: taken before training, it shows later what did not move.

    Returns:
        `bf16` and `fp32` to a digest in hex.
    """
    state = unique_state(model)
    return {name: weights_digest(state, dtype) for name, dtype in DTYPES.items()}


def weights_digest(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 in hex over names, shapes and bytes of all tensors, floating-point ones rounded to `dtype`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(stored(tensor, dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def probe_logits(model: PreTrainedModel, ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Float32 logits of one window of ids on the CPU, shape [tokens, vocabulary], by a plain forward pass.

    Args:
        model: on any device; its mode is left as it was.
        ids: shape [tokens].
        weights: tensors to compute with in place of the model's own, by name.
    """
    training = model.training
    model.eval()
    try:
        arguments = {"input_ids": ids.to(model.device)[None], "use_cache": False, "return_dict": True}
        if weights is None:
            output = model(**arguments)
        else:
            output = torch.func.functional_call(model, dict(weights), (), arguments)
        logits: Tensor = output.logits[0].float().cpu()
        return logits
    finally:
        model.train(training)


def run_verification(
    model_dir: Path,
    reference: Path,
    poll: Callable[[], None] = lambda: None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
    checkpoint: Path | None = None,
) -> list[Measure]:
    """Have a fresh process load a model directory or an APR file and compare it; see `engine.verify_export`.

    Args:
        model_dir: the exported model.
        reference: what `export` handed over: expected tensors, initial digest, logits.
        poll: called often; may raise to stop, which ends the process.
        timeout_seconds: after which the process is ended and nothing counts as verified.
        checkpoint: the weights that it was made of, to be compared by their bytes as well.

    Returns:
        One measure for each of `LIMITS`, or with a checkpoint of `APR_LIMITS`; infinite where there was no answer.
    """
    home = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the device's memory is still the trainer's
    }
    command = [sys.executable, "-P", "-m", "engine.verify_export", str(model_dir), str(reference)]
    command += [] if checkpoint is None else [str(checkpoint)]
    names = LIMITS if checkpoint is None else APR_LIMITS
    started = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as child:
        try:
            while True:
                poll()
                try:
                    output, _ = child.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() - started > timeout_seconds:
                        return _unverified(names, f"no answer after {timeout_seconds:g} s")
        finally:
            if child.poll() is None:
                child.kill()
    try:
        told = json.loads(output.splitlines()[-1])
        return [Measure(name=name, value=float(told[name][0]), detail=str(told[name][1])) for name in names]
    except (ValueError, LookupError, TypeError):
        return _unverified(names, f"the verifying process ended with exit code {child.returncode} and no answer")


def _unverified(names: Iterable[str], why: str) -> list[Measure]:
    return [Measure(name=name, value=math.inf, detail=why) for name in names]


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turns what a disk or a serialiser raises into one line that names the run's directory."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{run_dir}: the model cannot be written: {clean(reason, 300)}",
            expected="a directory with room for it",
            do="make room and export again from the last checkpoint",
        ) from error


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU as it is stored: floating-point ones in `dtype`."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _write(
    model: PreTrainedModel, directory: Path, provenance: Provenance, tokenizer_dir: Path | None, dtype: Dtype
) -> None:
    state = {name: stored(tensor, DTYPES[dtype]) for name, tensor in unique_state(model).items()}
    count = sum(tensor.numel() for tensor in state.values())
    # save_pretrained empties the mapping that it is given, and writes the dtype of the model in memory to the config.
    previous = model.config.dtype
    try:
        model.save_pretrained(directory, state_dict=dict(state))
    finally:
        model.config.dtype = previous
    config = directory / "config.json"
    document = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    config.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if tokenizer_dir is not None and (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    card = model_card(provenance, architecture=type(model).__name__, parameters=count, dtype=dtype)
    (directory / "README.md").write_text(card, encoding="utf-8")
    for file in directory.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(directory)


def write_reference(model: PreTrainedModel, path: Path, tokenizer_dir: Path | None, initial: str, dtype: Dtype) -> None:
    """Writes what `engine.verify_export` compares with: ids, logits, expected tensors, the initial weights' digest."""
    # What is expected comes from the live parameters, never from the mapping that was written.
    parameters = dict(model.named_parameters())
    expected = {
        name: [list(tensor.shape), _stored_bytes(tensor, DTYPES[dtype])]
        for name, tensor in (parameters | unique_state(model)).items()
    }
    rows = int(model.get_input_embeddings().weight.shape[0])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROBE_TOKENS
    ids = torch.arange(min(_PROBE_TOKENS, longest)) * 7919 % rows
    rounded = {
        name: tensor.detach().to(DTYPES[dtype]).to(tensor.dtype)
        for name, tensor in parameters.items()
        if tensor.is_floating_point()
    }
    tokens: list[int] = []
    if tokenizer_dir is not None and (tokenizer_dir / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        tokens = list(tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids)
    save_file(
        {"ids": ids, "trained": probe_logits(model, ids), "rounded": probe_logits(model, ids, rounded)},
        path,
        metadata={
            "expected": json.dumps(expected),
            "initial": initial,
            "dtype": dtype,
            "tokens": json.dumps(tokens),
        },
    )


def _stored_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize)


def take_place(source: Path, target: Path) -> None:
    """Gives a directory its name; what had the name before goes when that is done."""
    retired = target.with_name(f".{target.name}.old")
    discard(retired)
    if target.exists():
        os.rename(target, retired)
    os.rename(source, target)
    sync_directory(target.parent)
    discard(retired)


def checkpoint_seconds(model: torch.nn.Module, directory: Path) -> float:
    """Seconds that writing a checkpoint of this model costs here, by writing one and deleting it.

    A checkpoint holds the weights and two moments of the same size, is hashed and synced. Of a large model, or of one
    that is divided among processes, at most 256 MiB of what is here are written and the time is scaled by bytes.
    """
    tensors: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, parameter in model.named_parameters():
        total += 3 * parameter.numel() * 4
        for copy in range(3):
            if size < _PROBE_BYTES:
                here = local(parameter.detach()).float().cpu()
                tensors[f"{name}.{copy}"] = here.clone()
                size += here.numel() * 4
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
