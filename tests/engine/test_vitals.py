"""What is told of the machine while a run goes on, and that nothing which hangs is waited for."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.vitals import GPU_FIELDS, Gpu, Machine, Smi, cpu_percent, parse_gpu, proc_bytes

GIB = 1 << 30
Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a script in nvidia-smi's place."""

    def put(script: str) -> Path:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return program

    return put


@pytest.mark.parametrize(
    ("line", "gpu"),
    [
        pytest.param(
            "97, 61423, 81559, 64, 612.34", Gpu(97.0, 61_423 << 20, 81_559 << 20, 64.0, 612.34, False), id="H100"
        ),
        pytest.param(
            "100, 22115, 24564, 71, 438.20", Gpu(100.0, 22_115 << 20, 24_564 << 20, 71.0, 438.2, False), id="RTX 4090"
        ),
        pytest.param("96, [N/A], [N/A], 78, 45.61", Gpu(96.0, None, None, 78.0, 45.61, True), id="GB10"),
        pytest.param(
            "[N/A], 3300, 40960, 41, [Not Supported]", Gpu(None, 3_300 << 20, 40_960 << 20, 41.0, None, False), id="MIG"
        ),
        pytest.param(
            "0, [Unknown Error], [Unknown Error], [GPU is lost], -1",
            Gpu(0.0, None, None, None, None, False),
            id="a lost one",
        ),
    ],
)
def test_a_line_of_nvidia_smi_is_read_as_it_is_meant(line: str, gpu: Gpu) -> None:
    assert parse_gpu(line) == gpu


@pytest.mark.parametrize(
    "line",
    ["", "97", "97, 1, 2, 3", "1, 2, 3, 4, 5, 6", "No devices were found", 'Field "power.drow" is not a valid field'],
)
def test_a_line_that_is_no_answer_is_no_gpu(line: str) -> None:
    assert parse_gpu(line) is None


@pytest.mark.parametrize("cell", ["nan", "inf", "1e9", "9" * 400, "97 %", "0x10", "", "\x1b[31m5"])
def test_a_cell_that_is_no_plain_number_is_no_figure(cell: str) -> None:
    gpu = parse_gpu(f"{cell}, {cell}, {cell}, {cell}, {cell}")
    assert gpu == Gpu(None, None, None, None, None, False)


def test_the_gpu_that_trains_is_asked_for_by_its_uuid(install: Install, tmp_path: Path) -> None:
    install(f"echo \"$@\" > {tmp_path}/asked\necho '97, 61423, 81559, 64, 612.34'")
    machine = Machine(tmp_path)
    machine.gpu = "GPU-11111111-2222-3333-4444-555555555555"
    told = machine.look()
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [
        f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits",
        "-i", "GPU-11111111-2222-3333-4444-555555555555",
    ]  # fmt: skip
    assert (told.gpu_percent, told.gpu_temperature_c, told.gpu_power_watts) == (97.0, 64.0, 612.34)
    assert (told.gpu_memory_used_bytes, told.gpu_memory_total_bytes) == (61_423 << 20, 81_559 << 20)
    assert not told.unified_memory


def test_a_gpu_that_shares_the_hosts_memory_has_the_hosts_figures(install: Install, tmp_path: Path) -> None:
    install("echo '96, [N/A], [N/A], 78, 45.61'")
    machine = Machine(tmp_path)
    machine.gpu = "0"
    told = machine.look()
    assert told.unified_memory
    assert told.gpu_memory_total_bytes == told.host_total_bytes == proc_bytes("/proc/meminfo", "MemTotal")
    assert told.host_total_bytes is not None
    assert told.host_free_bytes is not None
    assert told.gpu_memory_used_bytes == told.host_total_bytes - told.host_free_bytes
    assert (told.gpu_percent, told.gpu_power_watts) == (96.0, 45.61)


def test_where_no_gpu_trains_nvidia_smi_is_not_asked(install: Install, tmp_path: Path) -> None:
    install(f"touch {tmp_path}/asked; echo '1, 1, 1, 1, 1'")
    told = Machine(tmp_path).look()
    assert not (tmp_path / "asked").exists()
    figures = (told.gpu_percent, told.gpu_memory_used_bytes, told.gpu_temperature_c, told.gpu_power_watts)
    assert (figures, told.unified_memory) == ((None,) * 4, False)
    assert told.host_total_bytes


@pytest.mark.parametrize("script", ["exit 9", "echo '1, 1, 1, 1, 1'; exit 1", "echo", "printf '\\377\\376'", "echo no"])
def test_an_answer_that_is_none_leaves_the_other_figures(install: Install, tmp_path: Path, script: str) -> None:
    install(script)
    machine = Machine(tmp_path)
    machine.gpu = "0"
    told = machine.look()
    assert (told.gpu_percent, told.gpu_memory_total_bytes, told.unified_memory) == (None, None, False)
    assert told.disk_free_bytes


def test_without_nvidia_smi_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Smi().ask(GPU_FIELDS, "0") is None


@pytest.mark.parametrize("script", ["exec sleep 60", "sleep 60", "trap '' TERM INT HUP; while :; do :; done"])
def test_an_nvidia_smi_that_hangs_is_ended_and_costs_no_more_than_its_time(
    install: Install, tmp_path: Path, script: str
) -> None:
    install(f"echo $$ > {tmp_path}/pid\n{script}")
    smi, started = Smi(1.0), time.monotonic()
    assert smi.ask(GPU_FIELDS, "0") is None
    assert time.monotonic() - started < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_while_one_is_not_done_no_other_is_started(install: Install, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    install(f"echo one >> {tmp_path}/started; read line < {tmp_path}/gate; echo '1, 1, 1, 1, 1'")
    smi, answers = Smi(60.0), list[str | None]()
    first = threading.Thread(target=lambda: answers.append(smi.ask(GPU_FIELDS)))
    first.start()
    gate = os.open(tmp_path / "gate", os.O_WRONLY)  # returns once the script reads
    assert smi.ask(GPU_FIELDS) is None
    os.write(gate, b"go\n")
    os.close(gate)
    first.join(30)
    assert answers == ["1, 1, 1, 1, 1"]
    assert (tmp_path / "started").read_text() == "one\n"


def test_at_the_end_what_is_being_asked_is_ended_and_nothing_is_asked_any_more(
    install: Install, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "gate")
    install(f"echo one >> {tmp_path}/started; exec sleep 60 > {tmp_path}/gate")
    smi, answers = Smi(60.0), list[str | None]()
    first = threading.Thread(target=lambda: answers.append(smi.ask(GPU_FIELDS)))
    first.start()
    gate = os.open(tmp_path / "gate", os.O_RDONLY)  # returns once the script has it open
    smi.close()
    first.join(30)
    os.close(gate)
    assert answers == [None]
    assert smi.ask(GPU_FIELDS) is None
    assert (tmp_path / "started").read_text() == "one\n"


def test_host_and_disk_are_this_machines(tmp_path: Path) -> None:
    told = Machine(tmp_path).look()
    usage = shutil.disk_usage(tmp_path)
    assert told.disk_total_bytes == usage.total
    assert told.disk_free_bytes is not None
    assert abs(told.disk_free_bytes - usage.free) < 1 * GIB
    assert told.host_total_bytes is not None
    assert told.host_free_bytes is not None
    assert 0 < told.host_free_bytes < told.host_total_bytes


def test_a_directory_that_is_gone_has_no_disk(tmp_path: Path) -> None:
    told = Machine(tmp_path / "gone").look()
    assert (told.disk_free_bytes, told.disk_total_bytes) == (None, None)
    assert told.host_total_bytes


def test_a_busy_core_shows_in_the_processors_share(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    share = machine.look().cpu_percent
    assert share is not None
    assert 100 / (os.cpu_count() or 1) / 4 < share <= 100


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [
        ((1000, 800), (1400, 900), 75.0),
        ((1000, 800), (1400, 1200), 0.0),
        ((1000, 800), (1400, 800), 100.0),
        ((1000, 800), (1400, 1300), 0.0),
        ((1000, 800), (1400, 700), 100.0),
        ((1000, 800), (1000, 800), None),
        ((1000, 800), (900, 700), None),
        (None, (1000, 800), None),
        ((1000, 800), None, None),
    ],
    ids=["three quarters", "idle", "busy", "idle ran ahead", "idle ran back", "too soon", "reset", "first", "gone"],
)
def test_the_processors_share_is_what_was_not_idle(
    before: tuple[int, int] | None, after: tuple[int, int] | None, percent: float | None
) -> None:
    assert cpu_percent(before, after) == percent


def test_a_figure_that_proc_does_not_give_is_none(tmp_path: Path) -> None:
    (tmp_path / "odd").write_text("MemTotal: much\nMemFree:\n")
    for key in ("MemTotal", "MemFree", "Absent"):
        assert proc_bytes(str(tmp_path / "odd"), key) is None
    assert proc_bytes(str(tmp_path / "gone"), "MemTotal") is None
