"""Weights and optimizer state between memory and checkpoint: the one buffer that is written from, and the way back."""

from __future__ import annotations

import base64
import binascii
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import FILES, MODEL, OPTIMIZER, CheckpointError, RandomState, State, TensorRow, verify
from engine.checkpoint_writer import Image
from engine.parallel import put, whole
from engine.sniff import say

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
_ALIGNMENT = 64
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Snapshot:
    """A copy of parameters, buffers and AdamW's state in one buffer, laid out as the files of a checkpoint will be.

    The buffer is allocated and touched here, before the first step: a run that has no room for it fails at its start
    and not at its first checkpoint. On CUDA it is pinned, so that a copy runs at the bus's speed.

    Where the model is divided among processes, only rank 0 has a snapshot, and the others call `gather` whenever it
    is filled: the files are those of the whole model, whatever number of processes made them.

    Args:
        model: trained; parameters that it uses twice (a tied head) are copied once, under their first name.
        optimizer: AdamW over parameters of the model.

    Raises:
        ValueError: no parameter, one that is not the model's, or a dtype that cannot be stored.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._trained = _trained(model, optimizer)
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        layouts = {file: _Layout(dict(tensors)) for file, tensors in _tensors(model, self._trained, optimizer).items()}
        starts, size = {}, 0
        for file in FILES:
            starts[file], size = size, -(-(size + layouts[file].nbytes) // _ALIGNMENT) * _ALIGNMENT
        # zeros() would leave the pages to be found at the first write; fill_ makes them real.
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=bool(self._devices)).fill_(0)
        self._views: dict[str, dict[str, Tensor]] = {}
        self.files: dict[str, Image] = {}
        for file in FILES:
            layout = layouts[file]
            part = self._buffer[starts[file] : starts[file] + layout.nbytes]
            self._views[file] = layout.views(part)
            self.files[file] = Image(header=layout.header, data=part.numpy().data, tensors=layout.rows)

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return self._buffer.numel()

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the present state into the buffer; no other thread may be reading it.

        Raises:
            ValueError: a tensor has another shape or dtype than at the start, or the optimizer's state is not AdamW's.
        """
        for file, tensors in _tensors(self._model, self._trained, self._optimizer).items():
            views = dict(self._views[file])
            for name, tensor in tensors:
                view = views.pop(name, None)
                # copy_ would broadcast and cast without a word.
                if view is None or view.shape != tensor.shape or view.dtype != tensor.dtype:
                    raise ValueError(f"{name}: {tensor.dtype} of shape {list(tensor.shape)} was not there at the start")
                view.copy_(whole(tensor), non_blocking=tensor.device.type == "cuda")
            if views:
                raise ValueError(f"{next(iter(views))}: was there at the start and is missing")
        for device in self._devices:
            torch.cuda.synchronize(device)

    def weights_sha256(self) -> str:
        """Digest of the model's present parameters: the SHA-256 that their `model.safetensors` has."""
        self.fill()
        return self.files[MODEL].sha256()


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the other processes do while rank 0 fills its snapshot of a divided model: one tensor is whole at a time."""
    for tensors in _tensors(model, _trained(model, optimizer), optimizer).values():
        for _, tensor in tensors:
            whole(tensor)


def _tensors(
    model: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Iterator[tuple[str, Tensor]]]:
    return {MODEL: iter(model.named_parameters()), OPTIMIZER: _training_tensors(model, trained, optimizer)}


def _training_tensors(
    model: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and of every trained parameter its moments and step counter: zero before its first step."""
    for name, buffer in model.named_buffers():
        yield f"buffer/{name}", buffer
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter) or {}
        if state and set(state) != {_STEP, *_MOMENTS}:
            raise ValueError(f"{name}: optimizer state {sorted(state)} is not AdamW's")
        for moment in _MOMENTS:
            # One zero seen as many: nothing is allocated for what is not there yet.
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            yield f"{moment}/{name}", state[moment] if state else zero
        yield f"{_STEP}/{name}", state[_STEP] if state else torch.zeros(())


class _Layout:
    """Where each tensor of a safetensors file stands: widest dtype first, so that every one is aligned."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError("no tensor to save")
        if odd := next((t.dtype for t in tensors.values() if t.dtype not in _DTYPES), None):
            raise ValueError(f"{odd} cannot be stored")
        self.rows: dict[str, TensorRow] = {}
        self._kinds: dict[str, torch.dtype] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.nbytes = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            nbytes = tensor.numel() * tensor.element_size()
            row = TensorRow(dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape), bytes=nbytes)
            self.rows[name], self._kinds[name] = row, tensor.dtype
            offsets = [self.nbytes, self.nbytes + nbytes]
            header[name] = {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": offsets}
            self.nbytes += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    def views(self, part: Tensor) -> dict[str, Tensor]:
        """The tensors as views into their part of the buffer."""
        result, begin = {}, 0
        for name, row in self.rows.items():
            result[name] = part[begin : begin + row.bytes].view(self._kinds[name]).view(row.shape)
            begin += row.bytes
        return result


def load(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, run: str | None = None
) -> State:
    """Verifies a checkpoint and puts it back, in place, so that training goes on as if it had never stopped.

    Args:
        path: the checkpoint's directory.
        model: gets the parameters and buffers.
        optimizer: AdamW over parameters of the model; gets its moments and step counters, and the random generators
            get their states. None restores the model alone, for an export or an evaluation.
        run: uuid of the run that the checkpoint must be of; None takes any.

    Raises:
        CheckpointError: the checkpoint is damaged, or is not of this model and optimizer; the latter is found before
            anything is changed.
    """
    manifest = verify(path, run)
    trained = {} if optimizer is None else _trained(model, optimizer)
    parameters = dict(model.named_parameters())
    buffers = {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    moments = {f"{moment}/{name}": p for name, p in trained.items() for moment in _MOMENTS}
    counters = {f"{_STEP}/{name}": torch.zeros(()) for name in trained}
    stored = manifest.files[OPTIMIZER].tensors
    if optimizer is None:
        stored = {name: row for name, row in stored.items() if name.startswith("buffer/")}
    _same(path / MODEL, manifest.files[MODEL].tensors, parameters)
    _same(path / OPTIMIZER, stored, buffers | moments | counters)
    with torch.no_grad():
        with safe_open(path / MODEL, framework="pt", device="cpu") as file:
            for name, parameter in parameters.items():
                put(parameter, file.get_tensor(name))
        with safe_open(path / OPTIMIZER, framework="pt", device="cpu") as file:
            for name, buffer in buffers.items():
                buffer.copy_(file.get_tensor(name))
            if optimizer is not None:
                fused = _fused(optimizer)
                for name, parameter in trained.items():
                    counter = file.get_tensor(f"{_STEP}/{name}")
                    slots = {_STEP: counter.to(parameter.device) if parameter in fused else counter}
                    for moment in _MOMENTS:
                        slots[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                        put(slots[moment], file.get_tensor(f"{moment}/{name}"))
                    optimizer.state[parameter] = slots
    if optimizer is not None:
        restore_random_state(manifest.state.random, next(model.parameters()).device)
    return manifest.state


def capture_random_state(device: torch.device) -> RandomState:
    """The states of Python's, NumPy's and torch's generators, on the CPU and on the device."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    on_device = None
    if device.type in ("cuda", "mps"):
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()
    return RandomState(
        python=(version, tuple(internal), gauss),
        numpy=(str(name), tuple(int(key) for key in keys), int(position), int(has_gauss), float(cached)),
        torch=_text(torch.get_rng_state()),
        device=None if on_device is None else _text(on_device),
    )


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Puts every generator back to where `capture_random_state` found it.

    A device of another kind than the one captured keeps its own state: there is nothing to give it.

    Raises:
        CheckpointError: a state that a generator does not take.
    """
    try:
        random.setstate(state.python)
        name, keys, position, has_gauss, cached = state.numpy
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_tensor(state.torch))
        if state.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(state.device), device)
        elif state.device is not None and device.type == "mps":
            torch.mps.set_rng_state(_tensor(state.device))
    except (ValueError, TypeError, RuntimeError, binascii.Error) as error:
        what = f"the random states of the checkpoint cannot be restored: {say(error)}"
        raise CheckpointError(what, do="resume with the versions that its run recorded") from None


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter not in names for parameter in grouped):
        raise ValueError("the optimizer trains a parameter that is not the model's")
    return {names[parameter]: parameter for parameter in grouped}


def _fused(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """Parameters whose step counter AdamW keeps on their own device."""
    on_device = [g["params"] for g in optimizer.param_groups if g.get("fused") or g.get("capturable")]
    return {parameter for group in on_device for parameter in group}


def _same(path: Path, stored: Mapping[str, TensorRow], wanted: Mapping[str, Tensor]) -> None:
    """Refuses a file whose tensors are not exactly those that are to be filled."""
    for name in sorted(stored.keys() | wanted.keys()):
        tensor, row = wanted.get(name), stored.get(name)
        here = "none of that name" if tensor is None else f"{_DTYPES.get(tensor.dtype)} of shape {list(tensor.shape)}"
        there = "missing" if row is None else f"{row.dtype} of shape {list(row.shape)}"
        if here != there:
            raise CheckpointError(
                f"{say(path)}: tensor {say(name)}: {there}",
                expected=f"{here}, as the model in memory has it",
                do="resume with the configuration that the run began with",
            )


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8).clone()
