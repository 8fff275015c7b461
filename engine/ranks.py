"""The processes that train one run together: what they add up, agree on, and tell of each other.

One process is a world of its own: it has no process group, and nothing here costs it anything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ConfigError
from engine.rank_process import Record, Seat, read_records, write_record

TIMEOUT = timedelta(hours=2)
"""After which a collective that nobody answers ends the run: longer than rank 0 takes for any checkpoint. A process
that is gone is noticed at once on the CPU; NCCL notices it here."""
MEET_SECONDS = 900.0
"""From the first process that has loaded torch to the last one."""
LOST_SECONDS = 3.0
"""After a collective broke: so long for the record of whoever left it."""
_POLL_SECONDS = 0.05


class Lost(RuntimeError):
    """A process was gone before all had met."""

    def __init__(self, record: Record) -> None:
        super().__init__(str(record))
        self.record = record


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together.

    Every method that says "all" is a collective: every process calls it, in the same order.
    """

    rank: int = 0
    world: int = 1
    run_dir: Path | None = None
    """Where the records of the processes are; None for a single one."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes stream, checkpoints and model."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All: the tensor's sum over the processes, in place and returned."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, flag: int) -> int:
        """All: the largest flag of any process. On the host: a GPU is not waited for."""
        if self.world == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return int(flags)

    def share(self, number: int) -> int:
        """All: the number that rank 0 gives."""
        if self.world == 1:
            return number
        numbers = torch.tensor(number, dtype=torch.int64)
        dist.broadcast(numbers, src=0)
        return int(numbers)

    def mine(self, count: int) -> slice:
        """This process's share of so many: `count / world` neighbours, in the order of the ranks.

        Raises:
            ValueError: the number does not divide.
        """
        size, rest = divmod(count, self.world)
        if rest:
            raise ValueError(f"{count} cannot be divided among {self.world} processes")
        return slice(self.rank * size, (self.rank + 1) * size)

    def lost(self) -> Record | None:
        """Who left the others, after a collective broke; None where all are still there, and the fault is our own.

        Waits a little, because a broken connection is quicker than what a process says of its end.
        """
        if self.world == 1 or self.run_dir is None:
            return None
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            alive = {rank for rank, record in read_records(self.run_dir).items() if record.alive}
            # Read again after the look: who ends in good order says so before it goes.
            for rank, record in sorted(read_records(self.run_dir).items()):
                if rank != self.rank and (record.status or rank not in alive):
                    return record
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Leaves the group in good order; whoever waits for this process from now on waits for nothing."""
        if self.world > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


ALONE = Ranks()


def join(
    seat: Seat | None, devices: int, device: torch.device, run_dir: Path, poll: Callable[[], None] = lambda: None
) -> Ranks:
    """Meets the other processes of the run, on this machine.

    Args:
        seat: of this process; None where it is the only one.
        devices: `train.devices`.
        device: that this process trains on, its number included.
        run_dir: of the run.
        poll: called often while the others are not there yet; may raise to stop.

    Raises:
        Lost: one of them ended first.
        ConfigError: more or fewer processes than the configuration says, or fewer devices than processes.
    """
    if seat is None:
        return ALONE
    if seat.world != devices:
        raise ConfigError(
            f"train.devices: {devices}: torchrun started {seat.world} processes",
            expected="one process a device",
            do="start it by kdconsole, or with --nproc-per-node as train.devices says",
        )
    if seat.world == 1:
        return ALONE
    _await_others(seat, run_dir, poll)
    # Decisions are made on the host, over gloo; gradients go where they are.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    return Ranks(seat.rank, seat.world, run_dir)


def _await_others(seat: Seat, run_dir: Path, poll: Callable[[], None]) -> None:
    """Waits for the others by their records: torch's own wait hears of no signal, and of nobody's end."""
    write_record(run_dir, seat.rank, ready=True)
    deadline = time.monotonic() + MEET_SECONDS
    while time.monotonic() < deadline:
        poll()
        records = read_records(run_dir)
        if gone := next((record for record in records.values() if record.status or not record.alive), None):
            raise Lost(gone)
        if sum(record.ready for record in records.values()) == seat.world:
            return
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"not all {seat.world} processes of the run came to meet within {MEET_SECONDS:g} s")


def device_of(seat: Seat | None, device: torch.device, devices: int) -> torch.device:
    """The device of this process among those of its kind.

    Raises:
        ConfigError: there are fewer than `train.devices`.
    """
    if devices == 1:
        return device
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type)
    if there is not None and devices > there:
        raise ConfigError(
            f"train.devices: {devices}: this machine has {there} {'GPU' if there == 1 else 'GPUs'}",
            expected=f"at most {there}",
            do=f"set train.devices: {there}, or CUDA_VISIBLE_DEVICES",
        )
    if device.type != "cuda" or seat is None:
        return device
    chosen = torch.device("cuda", seat.local)
    torch.cuda.set_device(chosen)
    return chosen
