"""The feed: batches ahead of their steps, the same ones in the same order, and an end that always comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from engine.errors import DataError
from engine.feed import Fed, Feed
from engine.windows import Order, Windows

WINDOWS = Windows([np.arange(61, dtype=np.uint16)], 4)  # 15 windows: a batch of 4 crosses an epoch's end


def order() -> Order:
    return Order(WINDOWS, seed=5)


def taken(feed: Feed, count: int) -> list[Fed]:
    try:
        return [feed.take() for _ in range(count)]
    finally:
        feed.close()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def feeding() -> bool:
    return any(thread.name == "feed" for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_and_states_are_those_of_the_order_however_far_ahead(ahead: int) -> None:
    plain = order()
    for fed in taken(Feed(order(), 4, ahead=ahead), 9):
        assert fed.windows.tolist() == plain.next(4).tolist()
        assert fed.windows.tolist() == WINDOWS.stack(fed.indices).tolist()
        assert fed.order == plain.state
    assert plain.epoch == 2


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_state_of_a_batch_goes_on_with_the_next_one(ahead: int) -> None:
    first, second = taken(Feed(order(), 4, ahead=ahead), 2)
    [again] = taken(Feed(Order.at(WINDOWS, first.order), 4, ahead=ahead), 1)
    assert again.indices == second.indices


def test_as_many_batches_as_were_asked_for_are_fetched_ahead_and_no_more() -> None:
    asked: list[Sequence[int]] = []

    def read(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        asked.append(indices)
        return {}

    feed = Feed(order(), 4, ahead=3, read=read)
    try:
        until(lambda: len(asked) == 3)
        feed.take()
        until(lambda: len(asked) == 4)
        time.sleep(0.05)
        assert len(asked) == 4
    finally:
        feed.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_stored_is_read_for_this_devices_windows_alone(ahead: int) -> None:
    feed = Feed(order(), 4, ahead=ahead, read=lambda indices: {"ids": torch.tensor(indices)}, mine=slice(2, 4))
    [fed] = taken(feed, 1)
    assert fed.stored is not None
    assert fed.stored["ids"].tolist() == list(fed.indices[2:])
    assert len(fed.windows) == 4


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_is_raised_where_its_batch_is_taken_and_from_then_on(ahead: int) -> None:
    reads = iter(range(100))

    def read(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        if next(reads) >= 2:
            raise DataError("a shard is gone")
        return {}

    feed = Feed(order(), 4, ahead=ahead, read=read)
    feed.take()
    feed.take()
    for _ in range(2):
        with pytest.raises(DataError, match="a shard is gone"):
            feed.take()
    feed.close()
    assert not feeding()


def test_closing_ends_the_thread_while_nobody_takes_anything() -> None:
    feed = Feed(order(), 4, ahead=2)
    assert feeding()
    feed.close()
    assert not feeding()
    with pytest.raises(ValueError, match="closed"):
        feed.take()


def test_without_anything_ahead_there_is_no_thread() -> None:
    feed = Feed(order(), 4, ahead=0)
    assert not feeding()
    feed.close()
