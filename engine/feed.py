"""Batches made ready ahead of the steps that take them, by a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint import OrderState
from engine.windows import Batch, Order

Read = Callable[[Sequence[int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Fed:
    """One batch, with all that its step needs from the disk."""

    windows: Batch
    """Token ids, shape [batch, sequence + 1]: those of every device."""
    mine: slice
    """Which of them this device trains on."""
    indices: tuple[int, ...]
    """Of these windows in the corpus."""
    stored: Mapping[str, Tensor] | None
    """What is stored of the teacher for this device's windows, shape [windows, sequence, …], in CPU memory."""
    order: OrderState
    """Where the order stands after this batch: what a checkpoint keeps once the batch was trained on."""


class Feed:
    """The batches of a run in their order, `ahead` of them fetched before they are asked for.

    What is taken does not depend on `ahead`, and neither does the state of the order that comes with it. An error of
    the thread is raised where the batch that it hit is taken.

    Args:
        order: where to begin; the feed's own from here on.
        batch: windows a batch.
        ahead: batches that may be ready and not yet taken; 0 fetches each when it is taken, without a thread.
        read: reads what is stored of the teacher for windows by index; None where nothing is.
        mine: which windows of a batch this device trains on; `read` is asked for these alone.
        device: that trains; for a GPU what was read is put into pinned memory.
    """

    def __init__(
        self,
        order: Order,
        batch: int,
        *,
        ahead: int,
        read: Read | None = None,
        mine: slice = slice(None),
        device: torch.device | None = None,
    ) -> None:
        self._order, self._batch, self._read, self._mine = order, batch, read, mine
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._ready: queue.SimpleQueue[Fed | BaseException] = queue.SimpleQueue()
        self._room, self._closed = threading.Semaphore(ahead), False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def take(self) -> Fed:
        """The next batch; waits until it is there.

        Raises:
            ValueError: the feed is closed.
        """
        if self._closed:
            raise ValueError("the feed is closed")
        if self._error is not None:
            raise self._error
        if self._thread is None:
            return self._fetch()
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._error = found
            raise found
        self._room.release()
        return found

    def close(self) -> None:
        """Ends the thread, once it is done with the batch in its hands; what was fetched is dropped."""
        self._closed = True
        if self._thread is not None:
            self._room.release()
            self._thread.join()

    def _work(self) -> None:
        try:
            if self._gpu is not None and self._gpu.index is not None:
                torch.cuda.set_device(self._gpu)  # a new thread would make a context on the first GPU
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put(self._fetch())
        except BaseException as error:  # noqa: BLE001 - whatever it is, who takes the batch is to hear of it
            self._ready.put(error)

    def _fetch(self) -> Fed:
        indices = self._order.take(self._batch)
        stored = None if self._read is None else self._read(indices[self._mine])
        if stored is not None and self._gpu is not None:
            stored = {name: tensor.pin_memory() for name, tensor in stored.items()}
        return Fed(self._order.windows.stack(indices), self._mine, indices, stored, self._order.state)
