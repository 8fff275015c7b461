"""Several processes of one test that meet in a gloo group, each forked from one that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 180.0


class Together:
    """Processes that run the same work, each with its rank."""

    def __init__(self, world: int, run_dir: Path, work: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "engine.parallel", "engine.snapshot", "engine.step"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
            process = context.Process(target=_child, args=(there, variables, run_dir, work, arguments), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def result(self, rank: int) -> Any:
        """What the work of a rank returned; a failure there is one here."""
        assert self.pipes[rank].poll(SECONDS), f"rank {rank} does not answer"
        ok, value = pickle.loads(self.pipes[rank].recv_bytes())
        assert ok, value
        return value

    def results(self) -> list[Any]:
        try:
            return [self.result(rank) for rank in range(len(self.processes))]
        finally:
            self.close()

    def kill(self, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _child(pipe: Connection, variables: dict[str, Any], run_dir: Path, work: Callable[..., Any], args: Any) -> None:
    import torch

    from engine.rank_process import seat_of, write_record
    from engine.ranks import join

    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    write_record(run_dir, variables["RANK"])
    try:
        ranks = join(seat_of(os.environ), variables["WORLD_SIZE"], torch.device("cpu"), run_dir)
        answer = True, work(ranks, *args)
        ranks.close()
    except BaseException:  # noqa: BLE001 - the test is to see it
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))  # not send: it would share the tensors of a process that is ending
