"""What processes of one run agree on, and how one that is gone is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_rig import Together

from engine.errors import ConfigError, ExitCode
from engine.rank_process import (
    FirstStop,
    Record,
    Seat,
    forget_records,
    read_records,
    record_path,
    seat_of,
    start_ticks,
    started_at,
    write_record,
)
from engine.ranks import ALONE, Lost, Ranks, device_of, join

CPU = torch.device("cpu")


def test_one_process_is_a_world_of_its_own_without_a_group() -> None:
    ranks = join(None, 1, CPU, Path("/nowhere"))
    assert ranks is ALONE
    assert ranks.main
    assert (ranks.agree(2), ranks.share(7), ranks.mine(3)) == (2, 7, slice(0, 3))
    assert ranks.sum(torch.ones(2)).tolist() == [1, 1]
    assert ranks.lost() is None
    assert not torch.distributed.is_initialized()


def _meet(ranks: Ranks) -> list[object]:
    return [
        ranks.rank,
        ranks.sum(torch.tensor([1.0 + ranks.rank])).item(),
        ranks.agree(2 * ranks.rank),
        ranks.share(10 + ranks.rank),
        list(range(6)[ranks.mine(6)]),
        ranks.lost() is None,
    ]


def test_processes_add_agree_share_and_divide(tmp_path: Path) -> None:
    assert Together(3, tmp_path, _meet).results() == [
        [0, 6.0, 4, 10, [0, 1], True],
        [1, 6.0, 4, 10, [2, 3], True],
        [2, 6.0, 4, 10, [4, 5], True],
    ]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="5 cannot be divided among 2"):
        Ranks(0, 2).mine(5)


def test_a_process_that_ends_before_all_have_met_is_named(tmp_path: Path) -> None:
    write_record(tmp_path, 1, "STOPPED", "SIGTERM in phase import", ExitCode.INTERRUPTED)
    with pytest.raises(Lost, match="rank 1 ended: STOPPED: SIGTERM in phase import"):
        join(Seat(0, 2, 0), 2, CPU, tmp_path)


def test_a_stop_is_heard_while_the_others_are_waited_for(tmp_path: Path) -> None:
    def poll() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        join(Seat(0, 2, 0), 2, CPU, tmp_path, poll)


def _leave(ranks: Ranks, how: str, run_dir: Path) -> str:
    ranks.agree(0)
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        write_record(run_dir, 1, "FAILED", "no room", ExitCode.UNDECIDED)
        os._exit(0)
    try:
        ranks.agree(0)
    except RuntimeError:
        return str(ranks.lost())
    return "nobody noticed"


@pytest.mark.parametrize(("how", "said"), [("killed", "is gone without a word, as if killed"), ("failed", "no room")])
def test_a_process_that_left_is_named(tmp_path: Path, how: str, said: str) -> None:
    together = Together(2, tmp_path, _leave, how, tmp_path)
    try:
        told = together.result(0)
    finally:
        together.close()
    assert told.startswith("rank 1 ")
    assert said in told


def test_a_record_names_a_process_and_no_later_one_of_its_pid(tmp_path: Path) -> None:
    write_record(tmp_path, 3)
    record = read_records(tmp_path)[3]
    assert (record.pid, record.alive, record.status) == (os.getpid(), True, "")
    assert not Record(3, os.getpid(), record.start_ticks - 1).alive
    assert str(record).endswith("runs")
    write_record(tmp_path, 3, "CRASHED", "a\x1b[31mb", ExitCode.UNDECIDED)
    assert "\x1b" not in read_records(tmp_path)[3].reason
    record_path(tmp_path, 4).write_text('{"rank": 4')
    assert list(read_records(tmp_path)) == [3]
    forget_records(tmp_path)
    assert read_records(tmp_path) == {}


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is not None
    assert start_ticks(child.pid) == 0
    child.wait()


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
    ],
)
def test_a_place_that_is_none_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"RANK .*WORLD_SIZE .*expected the three numbers that torchrun sets"):
        seat_of(environ)


def test_a_place_comes_from_torchruns_variables() -> None:
    assert seat_of({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Seat(3, 4, 1)
    assert seat_of({"WORLD_SIZE": "4"}) is None


def test_other_than_the_processes_asked_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.devices: 2: torchrun started 4 processes"):
        join(Seat(0, 4, 0), 2, CPU, Path("/nowhere"))


def test_more_devices_than_there_are_are_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.devices: 4: this machine has 2 GPUs; expected at most 2"):
        device_of(Seat(0, 4, 0), torch.device("cuda"), 4)
    with pytest.raises(ConfigError, match=r"train\.devices: 2: this machine has 1 GPU;"):
        device_of(Seat(0, 2, 0), torch.device("mps"), 2)
    assert device_of(Seat(1, 64, 1), CPU, 64) == CPU


def test_a_budget_counts_from_the_launchers_start() -> None:
    now = time.monotonic()
    assert started_at({"KD_RUN_STARTED": repr(now - 5)}) == pytest.approx(now - 5)
    for nonsense in ({}, {"KD_RUN_STARTED": "soon"}, {"KD_RUN_STARTED": repr(now + 1e6)}):
        assert started_at(nonsense) == pytest.approx(now, abs=5)


def test_a_process_under_a_launcher_remembers_the_first_signal_alone() -> None:
    stop = FirstStop()
    stop(signal.SIGINT, None)
    stop._asked -= 60
    stop(signal.SIGTERM, None)  # a process of its own would end here at once
    assert stop.signal == "SIGINT"


def test_a_record_says_its_end_as_json(tmp_path: Path) -> None:
    write_record(tmp_path, 0, "STOPPED", "SIGTERM in phase train", ExitCode.INTERRUPTED)
    written = json.loads(record_path(tmp_path, 0).read_text())
    assert (written["status"], written["exit_code"], written["pid"]) == ("STOPPED", 130, os.getpid())
