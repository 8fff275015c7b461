"""Two ways to train one model in several processes: each has all of it (ddp), or each a part of it (fsdp).

Neither is torch's ready-made wrapper around the whole model, because the fused loss makes the head's gradient outside
of the model's forward pass, and a head may be the embedding too:

- ddp: gradients are added up here, in buckets, as autograd completes them, so that the network works while the last
  backward pass still runs. Every process then makes the same step on the same weights.
- fsdp: `fully_shard` (FSDP2) takes every layer, and what is left of the body, apart. The head is gathered whole for
  the loss and its gradient scattered again by autograd, whether it is tied to the embedding or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from engine.bodies import layers_of
from engine.errors import ConfigError
from engine.models import CausalLM
from engine.ranks import Ranks

BUCKET_BYTES = 25 << 20
"""Of gradients sent at once: large enough for the network's full speed, small enough to begin early."""
Way = Literal["single", "ddp", "fsdp"]


class Gradients:
    """Adds gradients up over the processes while the backward pass still runs.

    Args:
        parameters: trained, in the model's order; autograd completes them about the other way round.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._armed, self._sent = False, 0
        self._buckets = list(_buckets(reversed([p for p in parameters if p.requires_grad]), BUCKET_BYTES))
        self._missing: list[set[nn.Parameter]] = []
        self._works: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = []
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        """The next backward pass is the step's last: what it completes is sent."""
        self._armed, self._sent = True, 0
        self._missing = [set(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """All: waits until every gradient is the sum over the processes.

        A parameter that no part of the loss has used keeps no gradient: every process runs the same graph.
        """
        self._armed = False
        self._send(len(self._buckets))
        for work, flat, parameters in self._works:
            work.wait()
            begin = 0
            for parameter in parameters:
                parameter.grad = flat[begin : begin + parameter.numel()].view_as(parameter)
                begin += parameter.numel()
        self._works = []

    def _ready(self, parameter: Tensor) -> None:
        if not self._armed or not isinstance(parameter, nn.Parameter):
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        # In the same order everywhere, whatever order autograd takes: collectives are matched by their order alone.
        ahead = self._sent
        while ahead < len(self._buckets) and not self._missing[ahead]:
            ahead += 1
        self._send(ahead)

    def _send(self, end: int) -> None:
        for bucket in self._buckets[self._sent : end]:
            used = [parameter for parameter in bucket if parameter.grad is not None]
            if used:
                flat = torch.cat([p.grad.reshape(-1) for p in used if p.grad is not None])
                work = dist.all_reduce(flat, async_op=True)
                self._works.append((work, flat, used))
        self._sent = max(self._sent, end)


def _buckets(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, in order, together of about so many bytes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= limit or (bucket[0].dtype, bucket[0].device) != (parameter.dtype, parameter.device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Sharded(CausalLM):
    """A model of which every process holds a part. `head` is whole from a call of `hidden` until `release`."""

    def hidden(self, input_ids: Tensor) -> Tensor:
        """All: as `CausalLM.hidden`; gathers the head, so that the loss that follows finds it whole."""
        state = super().hidden(input_ids)
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, DTensor)
        # The head's gradient is that of this process's tokens alone: its sum over the processes is what is kept.
        head: Tensor = weight.full_tensor(grad_placements=[Partial()])
        object.__setattr__(self, "head", head)
        return state

    def release(self) -> None:
        """Lets go of the whole head."""
        object.__setattr__(self, "head", self.model.get_output_embeddings().weight)


def shard(lm: CausalLM, ranks: Ranks, device: torch.device) -> Sharded:
    """All: takes a model apart, so that every process keeps one part in `world` of it on its device.

    Args:
        lm: whole and the same in every process, on the host or on the device; its modules are changed.
        ranks: of this process.
        device: where it shall compute.

    Raises:
        ConfigError: its head is more than one matrix product, and so would have to run whole.
    """
    if lm.head is None:
        raise ConfigError(
            f"train.parallel: fsdp: {lm.name}: {lm.head_reason}",
            expected="a model whose head is one matrix product",
            do="set train.parallel: ddp",
        )
    model = lm.model
    mesh = init_device_mesh(device.type, (ranks.world,))
    body, output = model.base_model, model.get_output_embeddings()
    tied = any(parameter is output.weight for parameter in body.parameters())
    layers = [layer for layer in layers_of(lm) if layer is not body]
    for part in (*layers, body, *(() if tied else (output,))):
        _divide(part, mesh)
    if tied:  # the module of the head is not below the body, and still holds the whole parameter
        output.weight = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ConfigError(
                f"train.parallel: fsdp: {lm.name}: {name} stands outside of the model's body and head",
                expected="an architecture of one body and one head",
                do="set train.parallel: ddp",
            )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    fields = {name: getattr(lm, name) for name in CausalLM.__dataclass_fields__}
    return Sharded(**{**fields, "head": output.weight})


def _divide(module: nn.Module, mesh: DeviceMesh) -> None:
    # Resharded after the forward pass, the body's rest included: then what the head gathers, and what a checkpoint
    # gathers, is the sharded parameter, and one way serves tied and untied heads.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    assert isinstance(module, FSDPModule)
    # The loss is divided by the tokens of the whole batch already: gradients are added and not averaged.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """All, where the tensor is sharded: the whole of it, on its device."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.detach()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor; of a sharded one, this process's part. No process waits for another."""
    if isinstance(target, DTensor):
        part = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(value)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """All, where they are sharded: scales gradients to a norm of at most `limit` (0: never); the norm before, 0-dim."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


@torch.no_grad()
def gather_into(source: nn.Module, target: nn.Module | None) -> None:
    """All: copies a divided model into a whole one of the same kind, a tensor at a time.

    Args:
        source: divided.
        target: None in a process that only gives.
    """
    theirs = {} if target is None else dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        value = whole(parameter)
        if target is not None:
            theirs[name].copy_(value)
    if target is not None:
        buffers = dict(target.named_buffers())
        for name, buffer in source.named_buffers():
            buffers[name].copy_(buffer)
