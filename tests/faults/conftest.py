"""The trainings that faults are done to: the engine's own small one, and runs of the real command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import command_faults
from command_faults import Stopped, Troubled
from command_rig import Training, end_all
from tally import Tally

from tests.console_rig import Desk, processes_of, write_corpus
from tests.nursery import Nursery

COMMAND_KILLS = 2
"""One of them in a write; `make soak` has twenty."""


@dataclass(frozen=True)
class Killed:
    """A run that was killed and resumed until done."""

    training: Training
    anywhere: Tally
    writing: Tally


def kill_again_and_again(root: Path, corpus: Path) -> Killed:
    anywhere, writing = Tally("at a random moment"), Tally("while a checkpoint is written")
    return Killed(command_faults.killed(root, corpus, COMMAND_KILLS, 0, anywhere, writing), anywhere, writing)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A place to call the command from; what a test that failed leaves running is ended."""
    yield Desk(tmp_path)
    end_all(tmp_path)


@pytest.fixture
def warm_desk(tmp_path: Path, nursery: Nursery) -> Iterator[Desk]:
    """The same, whose engines a nursery forks."""
    yield Desk(tmp_path, nursery)
    end_all(tmp_path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of a pool that wait for each other make a tiny training many times slower beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def series(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[dict[str, Future[Any]]]:
    """The series that the selected tests of a module ask for, started together and made two at a time."""
    root = tmp_path_factory.mktemp("series")
    corpus = write_corpus(root / "corpus.txt")
    series: dict[str, Callable[[Path, Path], Any]] = {
        "killed": kill_again_and_again,
        "undisturbed": partial(command_faults.undisturbed, nursery=nursery),
        "stopped": partial(command_faults.stopped, nursery=nursery),
        "troubled": command_faults.troubled,
    }
    items = [item for item in request.session.items if item.path == request.path]
    wanted = {name for item in items for name in getattr(item, "fixturenames", ())}
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(make, root / name, corpus) for name, make in series.items() if name in wanted}
    pool.shutdown(cancel_futures=True)
    assert not processes_of(root)


@pytest.fixture(scope="module")
def undisturbed(series: dict[str, Future[Any]]) -> Training:
    """A run that ended as it began."""
    training: Training = series["undisturbed"].result()
    return training


@pytest.fixture(scope="module")
def killed(series: dict[str, Future[Any]]) -> Killed:
    """A run whose engine was killed with SIGKILL, and resumed until done."""
    made: Killed = series["killed"].result()
    return made


@pytest.fixture(scope="module")
def stopped(series: dict[str, Future[Any]]) -> Stopped:
    """A run that was stopped in every phase."""
    made: Stopped = series["stopped"].result()
    return made


@pytest.fixture(scope="module")
def troubled(series: dict[str, Future[Any]]) -> Troubled:
    """A run whose directory and clock were not to be relied on."""
    made: Troubled = series["troubled"].result()
    return made
