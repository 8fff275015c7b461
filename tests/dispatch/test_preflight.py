"""The judgement of a pre-flight: what is said of a GB10, an RTX 4090, a CPU box, and of what can be wrong with them."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from dispatch.facts import Facts, Named, parse_facts
from dispatch.preflight import (
    Line,
    Material,
    Needs,
    Preflight,
    device_of,
    judge,
    not_looked_at,
    reserved,
)
from dispatch.tool_client import HostToolError
from dispatch.versions import satisfies, split_requirement
from engine.errors import ExitCode
from engine.estimate import Device, Estimate, Row
from engine.micro_batch import UNIFIED_RESERVE

GIB = 1 << 30
REQUIREMENTS = ("torch<2.14,>=2.8", "transformers<6,>=5", "numpy<3,>=2")
GB10: dict[str, Any] = {
    "hostname": "gx10",
    "arch": "aarch64",
    "system": "Linux-6.14.0-1013-nvidia-aarch64-with-glibc2.39",
    "uid": 1000,
    "cores": 20,
    "time": 1.0,
    "python": "3.12.3",
    "executable": "/home/kd/kdconsole/venv/bin/python",
    "prefix": "/home/kd/kdconsole/venv",
    "torch": {"version": "2.9.1+cu130", "cuda": "13.0"},
    "packages": {"torch": "2.9.1", "transformers": "5.1.0", "numpy": "2.3.5"},
    "devices": [
        {
            "index": 0,
            "uuid": "GPU-10",
            "name": "NVIDIA GB10",
            "driver": "580.95.05",
            "memory_total": None,
            "memory_used": None,
            "memory_free": None,
            "capability": "12.1",
        }
    ],
    "nvidia_smi": None,
    "driver_cuda": "13.0",
    "gpu": "GPU-10",
    "gpu_hidden": False,
    "gpu_nodes": True,
    "lock": {"path": "/run/lock/kdconsole-GPU-10.lock", "held": False, "by": None},
    "processes": [],
    "unified_memory": True,
    "memory": {"total": 120 * GIB, "available": 100 * GIB, "swap_total": 0, "swap_free": 0},
    "base": {
        "path": "/home/kd/kdconsole",
        "exists": True,
        "writable": True,
        "problem": None,
        "disk": {"total": 900 * GIB, "free": 500 * GIB},
    },
    "named": [],
}
RTX4090 = {
    **GB10,
    "hostname": "lambda-vector",
    "arch": "x86_64",
    "system": "Linux-6.8.0-x86_64",
    "torch": {"version": "2.8.0+cu128", "cuda": "12.8"},
    "driver_cuda": "12.8",
    "devices": [
        {
            "index": 0,
            "uuid": "GPU-10",
            "name": "NVIDIA GeForce RTX 4090",
            "driver": "570.1",
            "memory_total": 24 * GIB,
            "memory_used": GIB,
            "memory_free": 23 * GIB,
            "capability": "8.9",
        }
    ],
    "unified_memory": False,
    "memory": {"total": 64 * GIB, "available": 60 * GIB},
}
CPU = {
    **RTX4090,
    "torch": {"version": "2.8.0+cpu", "cuda": None},
    "devices": [],
    "gpu": None,
    "nvidia_smi": "not found",
    "driver_cuda": None,
    "gpu_nodes": False,
    "lock": None,
}


def facts(answer: dict[str, Any], clock: tuple[float, float] | None = (0.1, 0.02), **changed: Any) -> Facts:
    return parse_facts(copy.deepcopy({**answer, **changed}), "gx10", clock)


def estimated(device: Device = "cuda", shared: bool = True, gpu: int = 40, host: int = 20, disk: int = 12) -> Estimate:
    return Estimate(
        device=device,
        shared=shared,
        precision="bf16",
        memory=(
            Row(name="weights", bytes=gpu * GIB, where="device", how=""),
            Row(name="snapshot", bytes=host * GIB, where="host", how=""),
        ),
        disk=(Row(name="checkpoints", bytes=disk * GIB, where="disk", how=""),),
    )


def needs(estimate: Estimate | None = None, **given: Any) -> Needs:
    return Needs(**{"host": "gx10", "requirements": REQUIREMENTS, "estimate": estimate or estimated(), **given})


def lines(answer: dict[str, Any], wants: Needs | None = None, **changed: Any) -> dict[str, Line]:
    found = judge(facts(answer, **changed), wants or needs())
    told = {line.name: line for line in found}
    assert len(told) == len(found)
    for line in found:
        assert line.found, line
        assert (line.outcome not in ("FAIL", "WARN")) or (line.wanted and line.do), line
        assert line.outcome == "FAIL" or line.override is None, line
    return told


def outcomes(told: dict[str, Line]) -> dict[str, str]:
    return {name: line.outcome for name, line in told.items() if line.outcome != "PASS"}


def test_a_gb10_that_is_ready() -> None:
    told = lines(GB10)
    assert outcomes(told) == {}
    assert list(told) == [
        *("python", "torch", "packages", "device", "processes", "lock", "memory", "disk", "access", "clock"),
    ]
    assert told["python"].found == "3.12.3, /home/kd/kdconsole/venv/bin/python"
    assert told["torch"].found == "2.9.1+cu130, built for CUDA 13.0, aarch64"
    assert told["torch"].wanted == ">=2.8,<2.14; CUDA 13.0 at most"
    assert told["device"].found == "NVIDIA GB10, memory shared with the host, driver 580.95.05"
    assert told["clock"].found == "0.10 s ahead, give or take 0.02 s"


def test_a_gb10_keeps_a_part_of_its_one_memory_free() -> None:
    reserve = 120 // UNIFIED_RESERVE
    told = lines(GB10)["memory"]
    assert "60.0 GiB for the run, 15.0 GiB kept free: shared memory that is full hangs the host" in told.wanted
    assert told.found == "100.0 GiB free of 120.0 GiB"
    at_limit = {"total": 120 * GIB, "available": (60 + reserve) * GIB}
    assert lines(GB10, memory=at_limit)["memory"].outcome == "PASS"
    below = lines(GB10, memory={**at_limit, "available": at_limit["available"] - 1})["memory"]
    assert (below.outcome, below.override) == ("FAIL", "room")
    held = [{"pid": 7, "uuid": "GPU-10", "memory": 30 * GIB, "uid": 1001, "user": "ann", "command": "python x"}]
    assert "30.0 GiB held on the GPU" in lines(GB10, processes=held)["memory"].found
    assert "kept free" not in lines(GB10, needs(estimated("cpu"), device="cpu"))["memory"].wanted


def test_what_the_run_settles_on_there_is_told_and_what_would_make_it_smaller() -> None:
    settled = ("train.accumulation: auto: 4 parts of 4 windows",)
    wants = needs(msgspec.structs.replace(estimated(), settled=settled), relief="set train.accumulation: 8")
    assert (
        "60.0 GiB for the run (train.accumulation: auto: 4 parts of 4 windows), 15.0"
        in lines(GB10, wants)["memory"].wanted
    )
    full = lines(GB10, wants, memory={"total": 120 * GIB, "available": GIB})["memory"]
    assert full.do == "set train.accumulation: 8, or end what uses it"


def test_a_run_leaves_a_part_of_shared_memory_and_all_of_its_own() -> None:
    assert reserved(facts(GB10), "auto") == 120 * GIB // UNIFIED_RESERVE
    assert reserved(facts(GB10), "cpu") == reserved(facts(RTX4090), "auto") == 0


def test_an_rtx_4090_has_two_memories() -> None:
    fits = needs(estimated(shared=False, gpu=20, host=40))
    told = lines(RTX4090, fits)
    assert outcomes(told) == {}
    assert told["GPU memory"].found == "23.0 GiB free"
    assert told["memory"].found == "60.0 GiB free"
    assert outcomes(lines(RTX4090, needs(estimated(shared=False, gpu=24, host=40)))) == {"GPU memory": "FAIL"}
    assert outcomes(lines(RTX4090, needs(estimated(shared=False, gpu=20, host=61)))) == {"memory": "FAIL"}


def test_a_cpu_box_is_told_as_such() -> None:
    cpu = estimated("cpu", gpu=0)
    told = lines(CPU, needs(cpu))
    assert outcomes(told) == {"device": "WARN"}
    assert "nvidia-smi: not found: a run trains on 20 CPU cores" in told["device"].found
    assert "processes" not in told
    assert outcomes(lines(CPU, needs(cpu, device="cuda"))) == {"device": "FAIL"}
    assert outcomes(lines(CPU, needs(cpu, device="cpu"))) == {}
    assert outcomes(lines(CPU, needs(cpu, host=None))) == {}, "of this machine one knows that"


@pytest.mark.parametrize(
    "changed", [{"nvidia_smi": "NVIDIA-SMI has failed because it couldn't talk to the driver"}, {"gpu_nodes": True}]
)
def test_a_broken_driver_does_not_lead_to_a_run_on_the_cpu(changed: dict[str, Any]) -> None:
    told = lines(CPU, needs(estimated("cpu", gpu=0)), **changed)["device"]
    assert (told.outcome, told.override) == ("FAIL", None)
    assert str(changed.get("nvidia_smi", "not found")) in told.found


def test_a_gpu_that_a_variable_hides_is_no_broken_one() -> None:
    told = lines(GB10, needs(estimated("cpu", gpu=0)), gpu=None, gpu_hidden=True)["device"]
    assert (told.outcome, "CUDA_VISIBLE_DEVICES hides it" in told.found) == ("WARN", True)


def test_a_device_that_is_not_there_and_a_part_of_one() -> None:
    problem = "CUDA_VISIBLE_DEVICES=7: nvidia-smi knows 0"
    told = lines(GB10, needs(estimated("cpu", gpu=0)), gpu=None, nvidia_smi=problem)["device"]
    assert (told.outcome, told.found) == ("FAIL", problem)
    assert "`gpu` in hosts.yaml" in told.do
    part = lines(RTX4090, needs(estimated(shared=False)), gpu="MIG-1")
    assert part["device"].found.startswith("MIG device")
    assert part["GPU memory"].outcome == "UNKNOWN"


def test_torch_for_the_cpu_on_a_gpu_host_forbids_a_start() -> None:
    told = lines(GB10, torch={"version": "2.9.1+cpu", "cuda": None})["torch"]
    assert (told.outcome, told.override) == ("FAIL", None)
    assert told.found == "2.9.1+cpu, built for the CPU, aarch64"
    assert "the host has NVIDIA GB10" in told.wanted
    assert "/whl/cu130" in told.do
    on_cpu = needs(estimated("cpu", gpu=0), device="cpu")
    assert outcomes(lines(GB10, on_cpu, torch={"version": "2.9.1+cpu", "cuda": None})) == {}


@pytest.mark.parametrize(
    ("cuda", "driver", "outcome"),
    [
        ("13.0", "13.0", "PASS"),
        ("12.9", "13.0", "PASS"),
        ("13.1", "13.0", "WARN"),
        ("13.0", "12.9", "FAIL"),
        ("13.0", None, "UNKNOWN"),
        ("12.6", "13.0", "FAIL"),  # has no code for compute capability 12.1
    ],
)
def test_torch_is_held_against_the_driver_and_the_device(cuda: str, driver: str | None, outcome: str) -> None:
    told = lines(GB10, torch={"version": "2.9.1", "cuda": cuda}, driver_cuda=driver)["torch"]
    assert told.outcome == outcome, told
    assert told.override is None


def test_versions_that_are_missing_or_out_of_range() -> None:
    assert lines(GB10, torch=None)["torch"].found == "not installed"
    old = lines(GB10, torch={"version": "2.7.1+cu130", "cuda": "13.0"})["torch"]
    assert (old.outcome, old.override) == ("FAIL", "versions")
    told = lines(GB10, packages={"transformers": None, "numpy": "1.26.4"})["packages"]
    assert (told.outcome, told.override) == ("FAIL", None)
    assert told.found == "transformers missing, numpy 1.26.4"
    assert told.wanted == "transformers>=5,<6, numpy>=2,<3"
    assert told.do == "kdconsole hosts bootstrap gx10"
    assert lines(GB10, packages={"transformers": "5.9", "numpy": "1.26.4"})["packages"].override == "versions"
    assert "torch" not in lines(GB10)["packages"].found


@pytest.mark.parametrize(
    ("version", "specifier", "good"),
    [
        ("2.9.0a0+nv25", ">=2.8,<2.14", True),
        ("2.14.0", ">=2.8,<2.14", False),
        ("2.8", ">=2.8.0", True),
        ("2.7.9", ">=2.8", False),
        ("5", ">=5,<6", True),
        ("1.4.2", "~=1.4.0", True),
        ("1.5", "~=1.4.0", False),
        ("1.5", "!=1.5", False),
        ("1.5", "==1.5.0", True),
        ("nonsense", ">=1", False),
        ("9" * 5000, ">1", True),
        ("1", "", True),
    ],
)
def test_a_version_is_in_its_range_or_not(version: str, specifier: str, good: bool) -> None:
    assert satisfies(version, specifier) is good


def test_a_requirement_has_a_name_and_a_range() -> None:
    assert split_requirement("Py_YAML<7,>=6") == ("py-yaml", ">=6,<7")


def test_an_old_python_and_none() -> None:
    told = lines(GB10, needs(python_problem="3.9.2, /usr/bin/python3"))
    assert told["python"].found == "3.9.2, /usr/bin/python3"
    assert outcomes(told) == {"python": "FAIL", "torch": "UNKNOWN", "packages": "UNKNOWN"}, "the rest was looked at"
    assert outcomes(lines(GB10, python="3.10.14"))["python"] == "FAIL"
    nothing = judge(None, needs(python_problem="no Python /opt/py"))
    assert [line.outcome for line in nothing] == ["FAIL"] + ["UNKNOWN"] * 8
    assert nothing[0].do == "kdconsole hosts bootstrap gx10"


def test_foreign_processes_are_named() -> None:
    foreign = {"pid": 4242, "uuid": "GPU-10", "memory": 18 * GIB, "uid": 1001, "user": "ann", "command": "python x.py"}
    other = {**foreign, "pid": 1, "uuid": "GPU-11"}
    told = lines(GB10, processes=[foreign, other])["processes"]
    assert (told.outcome, told.found) == ("WARN", "pid 4242 of ann: python x.py, 18.0 GiB")
    nameless = {**foreign, "user": None, "memory": None}
    assert "pid 4242 of uid 1001: python x.py, unknown memory" in lines(GB10, processes=[nameless])["processes"].found
    crowd = [{**foreign, "pid": pid} for pid in range(1, 6)]
    assert lines(GB10, processes=crowd)["processes"].found.endswith("; and 2 more")


def test_a_lock_that_is_held_is_told_with_its_holder() -> None:
    lock = {
        "path": "/run/lock/x",
        "held": True,
        "by": "run 20260102-030405-train-abc (5d1a3c1e-0000-4000-8000-123456789abc) of uid 1000",
    }
    told = lines(GB10, lock=lock)["lock"]
    assert (told.outcome, told.override) == ("FAIL", None)
    assert told.found == "held by run 20260102-030405-train-abc of uid 1000"
    assert "kdconsole stop 20260102-030405-train-abc" in told.do
    assert "just starting" in lines(GB10, lock={**lock, "by": None})["lock"].found
    evil = lines(GB10, lock={**lock, "by": "run -rf;x (y) of uid 0"})["lock"]
    assert "kdconsole stop" not in evil.do
    assert lines(GB10, lock={**lock, "held": None})["lock"].outcome == "UNKNOWN"
    assert lines(GB10, lock={**lock, "held": False})["lock"].outcome == "PASS", "the last holder's name stays"


def test_a_disk_holds_the_run_and_what_is_sent() -> None:
    sent = Material("teacher", "/models/teacher", 3 * GIB, 3 * GIB)
    wants = needs(materials=(sent,))
    base = {**GB10["base"], "disk": {"total": 900 * GIB, "free": 15 * GIB}}
    assert lines(GB10, wants, base=base)["disk"].wanted == "12.0 GiB for the run, 3.0 GiB to be sent"
    base["disk"]["free"] -= 1
    full = lines(GB10, wants, base=base)["disk"]
    assert (full.outcome, full.override) == ("FAIL", "room")
    assert "run_dir in hosts.yaml" in full.do
    assert lines(GB10, base={**base, "disk": None})["disk"].outcome == "UNKNOWN"


def test_a_run_directory_that_cannot_be_written() -> None:
    base = {**GB10["base"], "writable": False, "problem": "/home/kd cannot be written"}
    told = lines(GB10, base=base)["access"]
    assert (told.outcome, told.found, told.override) == ("FAIL", "/home/kd cannot be written", None)


@pytest.mark.parametrize(
    ("clock", "outcome"),
    [((0.0, 0.1), "PASS"), ((-4.9, 0.05), "PASS"), ((4.9, 1.0), "UNKNOWN"), ((-31.0, 1.0), "WARN"), (None, "UNKNOWN")],
)
def test_a_clock_is_off_only_beyond_what_the_way_explains(clock: tuple[float, float] | None, outcome: str) -> None:
    told = next(line for line in judge(facts(GB10, clock), needs()) if line.name == "clock")
    assert told.outcome == outcome
    assert clock is None or ("behind" in told.found) == (clock[0] < 0)


def test_models_are_there_or_sent_or_missing() -> None:
    there = Named(path="/models/t", kind="directory", bytes=3_090_000_000, files=9, config="{}", weights=True)
    wants = needs(
        materials=(
            Material("engine", "here", 5_300_000, 0),
            Material("student", "/m/s", 988_000_000, 988_000_000),
            Material("data", "/d", 2_000_000_000, 500_000_000),
            Material("teacher", "gx10:/models/t", 0, 0, there, True),
        )
    )
    told = lines(GB10, wants)
    assert outcomes(told) == {}
    assert told["engine"].found == "there already, 5.3 MB"
    assert told["student"].found == "988.0 MB to be sent"
    assert told["data"].found == "500.0 MB of 2.00 GB to be sent"
    assert told["teacher"].found == "gx10:/models/t: there, 3.09 GB"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Named(path="/t"), "gx10:/t: not there"),
        (Named(path="/t", kind="other"), "neither file nor directory"),
        (Named(path="/t", kind="directory", problem="Permission denied"), "Permission denied"),
        (Named(path="/t", kind="directory", weights=True), "has no config.json"),
        (Named(path="/t", kind="directory", config="{}"), "has no safetensors weights"),
    ],
)
def test_a_model_that_is_not_on_the_host_forbids_a_start(found: Named, said: str) -> None:
    told = lines(GB10, needs(materials=(Material("teacher", "gx10:/t", 0, 0, found, True),)))["teacher"]
    assert (told.outcome, told.override) == ("FAIL", None)
    assert said in told.found


def test_what_the_run_needs_is_not_made_up() -> None:
    wants = Needs(host="gx10", requirements=REQUIREMENTS, no_estimate="no config.json")
    told = lines(GB10, wants)
    assert outcomes(told) == {"memory": "UNKNOWN", "disk": "UNKNOWN"}
    assert "no config.json" in told["memory"].found
    alone = Needs(host="gx10", requirements=REQUIREMENTS)
    assert outcomes(lines(RTX4090, alone)) == {}
    assert lines(RTX4090, alone)["GPU memory"].found == "23.0 GiB free"


def test_the_device_is_what_the_engine_would_take() -> None:
    assert device_of(facts(GB10), "auto") == "cuda"
    assert device_of(facts(GB10, torch={"version": "2.9", "cuda": None}), "auto") == "cpu"
    assert device_of(facts(CPU), "auto") == "cpu"
    assert device_of(facts(GB10), "cpu") == "cpu"


def test_an_outcome_is_an_exit_code() -> None:
    good, bad = Line("a", "PASS", "x"), Line("b", "FAIL", "x", override="room")
    assert Preflight("h", (good,), 0.1).exit_code == ExitCode.OK
    warned = Preflight("h", (good, Line("c", "WARN", "x"), Line("d", "UNKNOWN", "x")), 0.1)
    assert (warned.ready, warned.exit_code) == (True, ExitCode.OK)
    refused = Preflight("h", (good, bad, bad), 0.1)
    assert (refused.exit_code, refused.forbidden, refused.overrides) == (ExitCode.USAGE, False, ("room",))
    assert Preflight("h", (bad, Line("e", "FAIL", "x")), 0.1).forbidden
    lost = Preflight("h", (Line("host", "FAIL", "x"), *not_looked_at("why")), 0.1, reached=False)
    assert lost.exit_code == ExitCode.CONNECTION


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;owned\x07", "a\nb", "\u202eevil", "\x9b31m"])
def test_hostile_text_is_cleaned_wherever_it_stands(text: str) -> None:
    process = {"pid": 1, "uuid": "GPU-10", "memory": None, "uid": 0, "user": text, "command": text}
    devices = [{**GB10["devices"][0], "name": text, "driver": text}]
    told = lines(
        GB10,
        hostname=text,
        executable=text,
        torch={"version": f"2.9.1{text}", "cuda": "13.0"},
        packages={"transformers": f"5{text}", "numpy": "2.1"},
        processes=[process],
        devices=devices,
        lock={"path": text, "held": True, "by": text},
        base={**GB10["base"], "path": text, "writable": False, "problem": text},
    )
    for line in told.values():
        assert text not in line.found + line.wanted + line.do


@pytest.mark.parametrize(
    "changed",
    [
        {"devices": 3},
        {"devices": [[]]},
        {"uid": "root"},
        {"python": None},
        {"base": None},
        {"memory": {"total": "much"}},
        {"processes": [{"pid": 1}]},
        {"lock": {"held": "yes", "path": "x"}},
        {"torch": "2.9"},
    ],
)
def test_facts_that_are_none_are_one_clear_error(changed: dict[str, Any]) -> None:
    with pytest.raises(HostToolError, match="gx10: its facts cannot be read"):
        facts(GB10, **changed)
    with pytest.raises(HostToolError):
        parse_facts({}, "gx10")


def test_a_config_json_there_is_taken_as_it_is_or_not_at_all() -> None:
    named = [{"path": "/t\x1b", "kind": "directory", "config": '{"a": "\\n"}\n'}, {"path": "/u", "config": "x" * 2**21}]
    told = facts(GB10, named=named).named
    assert told[0].config == '{"a": "\\n"}\n'
    assert "\x1b" not in told[0].path
    assert told[1].config is None
