"""`kdconsole preflight` against a real sshd: what is found there, what forbids a start, and what it says of it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from console.preflight import preflight, require
from console.preflight_command import preflight_command
from console.preflight_table import Table
from dispatch.hosts import add_host
from dispatch.places import Reach
from dispatch.preflight import Line, Preflight
from dispatch.supervisor import LOCK_DIRECTORIES
from dispatch.transport import TransportError
from engine.config import load_config
from engine.errors import ConfigError, ExitCode
from engine.formats import ASSETS
from tests.console_rig import ROOT
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd

needs_sshd = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))

# nvidia-smi of the host; what it says stands in files beside it.
SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) file=devices ;;
--query-compute-apps=*) file=processes ;;
*) file=head ;;
esac
cat "$(dirname "$0")/$file" 2>/dev/null || { echo "NVIDIA-SMI has failed: no answer of the driver"; exit 9; }
"""
GB10 = "0, {gpu}, NVIDIA GB10, 580.95, [N/A], [N/A], 12.1, [N/A]\n"
RTX4090 = "0, {gpu}, NVIDIA GeForce RTX 4090, 570.1, 24564, 1024, 8.9, 23000\n"
TORCH = {
    "torch/version.py": "__version__ = '2.9.1+cu130'\ncuda: Optional[str] = '13.0'\n",
    "torch/__init__.py": "raise SystemExit('imported')\n",
    "torch-2.9.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cu130\n",
}


class There:
    """The host, and what one finds on it."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig, self.root, self.bin = rig, root, root / "bin"
        self.gpu = f"GPU-{uuid.uuid4()}"

    def has(self, devices: str, processes: str = "") -> None:
        """Gives it a GPU."""
        program = self.bin / "nvidia-smi"
        program.write_text(SMI)
        program.chmod(0o755)
        (self.bin / "devices").write_text(devices.format(gpu=self.gpu))
        (self.bin / "processes").write_text(processes.format(gpu=self.gpu))
        (self.bin / "head").write_text("| NVIDIA-SMI 580.95   Driver Version: 580.95   CUDA Version: 13.0 |\n")

    def clear(self) -> None:
        shutil.rmtree(self.bin)
        self.bin.mkdir()

    @property
    def lock(self) -> Path:
        return Path(next(d for d in LOCK_DIRECTORIES if os.access(d, os.W_OK)), f"kdconsole-{self.gpu}.lock")


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    root = tmp_path_factory.mktemp("far")
    (root / "bin").mkdir()
    for name, text in TORCH.items():
        (root / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "site" / name).write_text(text)
    python = root / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={root}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"SetEnv SHLVL=1 PATH={root}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
    with running_sshd(root / "sshd", path) as rig:
        yield There(rig, root)


@pytest.fixture
def there(far: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    """The host as gx10 of hosts.yaml, whose key is trusted, and with a second lane."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    for name in ("SSH_AUTH_SOCK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("KDCONSOLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KDCONSOLE_HOSTS", str(home / "kd" / "hosts.yaml"))
    monkeypatch.chdir(tmp_path)
    known = far.rig.seen_from(tmp_path / "other").trusted()
    (home / "kd").mkdir()
    shutil.copy(known.hosts_file.parent / "known_hosts", home / "kd" / "known_hosts")
    settings(there=far, python=str(far.root / "python"), run_dir=str(tmp_path / "base"))
    yield far
    far.clear()


def settings(there: There, **given: object) -> None:
    """Writes hosts.yaml anew."""
    Path(os.environ["KDCONSOLE_HOSTS"]).unlink(missing_ok=True)
    here = {"address": "127.0.0.1", "port": there.rig.port, "identity": str(there.rig.identity)}
    add_host("gx10", {**here, **given})
    add_host("lambda-vector", {"address": "192.0.2.1"})
    with Path(os.environ["KDCONSOLE_HOSTS"]).open("a") as file:
        file.write("lanes: [gx10, lambda-vector]\n")


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(preflight_command, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "\x1b" not in result.output
    return result.exit_code, result.stdout


def look(*arguments: str, code: int = 0) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The document and its lines by name."""
    got, out = call("--host", "gx10", "--json", *arguments)
    found = json.loads(out)
    assert got == found["exit_code"] == code, out
    return found, {line["name"]: line for line in found["lines"]}


@needs_sshd
def test_a_host_that_is_ready_is_told_in_a_table_whose_last_line_is_the_verdict(there: There, tmp_path: Path) -> None:
    there.has(GB10)
    code, out = call("--host", "gx10")
    assert code == 0, out
    lines = out.rstrip().splitlines()
    assert lines[-1].startswith("✔ gx10 is READY")
    assert lines[0].split() == ["check", "found", "wanted"]
    assert not (tmp_path / "base").exists(), "nothing was written there"
    assert all(line == line.rstrip() for line in lines)
    for name in (
        *("host", "python", "torch", "packages", "device", "processes", "lock", "memory", "disk", "access", "clock"),
        "engine",
    ):
        assert any(line.startswith(f"✔ {name} ") for line in lines), name


@needs_sshd
def test_its_document_has_everything(there: There, tmp_path: Path) -> None:
    there.has(GB10)
    before = there.rig.log.count("Accepted publickey")
    found, lines = look()
    assert there.rig.log.count("Accepted publickey") == before + 1, "one connection for everything"
    assert (found["schema"], found["host"], found["reached"]) == ("kdconsole.preflight/1", "gx10", True)
    assert (found["ready"], found["next_lane"], found["overrides"]) == (True, None, [])
    assert 0 < found["seconds"] < 60
    for line in found["lines"]:
        assert list(line) == ["name", "outcome", "found", "wanted", "do", "override"]
    facts = found["facts"]
    assert (facts["torch"], facts["torch_cuda"], facts["driver_cuda"]) == ("2.9.1+cu130", "13.0", "13.0")
    assert facts["devices"][0]["name"] == "NVIDIA GB10"
    assert facts["unified_memory"] is True
    assert abs(facts["clock_ahead_seconds"]) <= facts["clock_bound_seconds"] + 0.05, "it is this machine's"
    assert "ssh-ed25519 SHA256:" in lines["host"]["found"]
    assert lines["torch"]["found"].startswith("2.9.1+cu130, built for CUDA 13.0")
    assert "kept free" in lines["memory"]["wanted"]
    assert "GPU memory" not in lines, "it has none of its own"
    assert lines["engine"]["found"].endswith("MB to be sent")
    assert lines["access"]["found"] == f"{tmp_path}/base: can be made"


@needs_sshd
def test_on_an_rtx_4090_its_own_memory_is_looked_at(there: There) -> None:
    there.has(RTX4090)
    _, lines = look()
    assert lines["GPU memory"]["found"] == "22.5 GiB free"
    assert "kept free" not in lines["memory"]["wanted"]
    found, lines = look("--set", "train.batch=65536", code=2)
    assert lines["GPU memory"]["outcome"] == "FAIL"
    assert found["overrides"] == ["room"]


@needs_sshd
def test_torch_for_the_cpu_on_a_gpu_host_and_the_next_lane(there: There, tmp_path: Path) -> None:
    there.has(GB10)
    site = tmp_path / "cpu"
    shutil.copytree(there.root / "site", site)
    (site / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda = None\n")
    python = tmp_path / "cpu-python"
    python.write_text((there.root / "python").read_text().replace(f"{there.root}/site", str(site)))
    python.chmod(0o755)
    settings(there, python=str(python), run_dir=str(tmp_path / "base"))
    code, out = call("--host", "gx10")
    assert code == 2
    assert "✘ torch" in out
    verdict = out[out.index("✘ gx10 is NOT READY: torch") :]
    assert "next lane: kdconsole preflight --host lambda-vector" in verdict
    assert "--force" not in verdict
    _, lines = look("--set", "train.device=cpu")
    assert lines["torch"]["outcome"] == "PASS"


@needs_sshd
def test_who_holds_the_gpu_and_who_computes_on_it_is_named(there: There) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    there.has(GB10, f"{stranger.pid}, {{gpu}}, 2048, sleep\n4, GPU-other, 1, x\n")
    try:
        with there.lock.open("w") as file:
            file.write(f"run 20260102-030405-train-abc ({uuid.uuid4()}) of uid 1000\n")
            file.flush()
            _, lines = look()
            assert lines["lock"]["outcome"] == "PASS", "what the file says of a run that is gone does not count"
            fcntl.flock(file, fcntl.LOCK_EX)
            found, lines = look(code=2)
        assert lines["lock"]["found"] == "held by run 20260102-030405-train-abc of uid 1000"
        assert f"pid {stranger.pid} of " in lines["processes"]["found"]
        assert lines["processes"]["found"].endswith(": sleep 600, 2.0 GiB")
        assert lines["processes"]["outcome"] == "WARN"
        assert found["verdict"] == "gx10 is NOT READY: lock"
        assert "processes" not in found["facts"], "it stands in manifests"
    finally:
        there.lock.unlink()
        stranger.kill()
        stranger.wait()


@needs_sshd
def test_a_driver_that_does_not_answer_forbids_a_start(there: There) -> None:
    there.has(GB10)
    (there.bin / "devices").unlink()
    _, lines = look(code=2)
    assert lines["device"]["outcome"] == "FAIL"
    assert "NVIDIA-SMI has failed: no answer of the driver" in lines["device"]["found"]


@needs_sshd
def test_hostile_text_of_a_host_steers_no_terminal(there: There) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    there.has(GB10.replace("GB10", f"GB10{evil}"), f"1, {{gpu}}, 1, {evil}\n999999999, {{gpu}}, 1, {evil}\n")
    with there.lock.open("w") as file:
        file.write(f"run {evil} (x) of uid 0\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        code, out = call("--host", "gx10")
        found, _ = look(code=2)
    there.lock.unlink()
    assert code == 2
    assert r"\x1b]0;owned\x07" in out.replace("\n", "")
    for text in (out, json.dumps(found, ensure_ascii=False)):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


@needs_sshd
@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "no Python "),
        ('case "$*" in *python_version*) echo 3.9.1;; *) exit 2;; esac', "3.9.1, "),
        ("echo boo >&2; exit 1", "does not work: boo"),
    ],
)
def test_without_its_python_the_rest_is_looked_at_with_another(
    there: There, tmp_path: Path, program: str | None, said: str
) -> None:
    there.has(GB10)
    python = tmp_path / "no-python"
    if program is not None:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    settings(there, python=str(python), run_dir=str(tmp_path / "base"))
    found, lines = look(code=2)
    assert said in lines["python"]["found"]
    assert str(python) in lines["python"]["found"]
    assert lines["python"]["do"] == "kdconsole hosts bootstrap gx10"
    assert lines["torch"]["outcome"] == lines["packages"]["outcome"] == "UNKNOWN"
    assert lines["device"]["found"].startswith("NVIDIA GB10")
    assert found["verdict"] == "gx10 is NOT READY: python"


@needs_sshd
def test_a_run_directory_that_cannot_be_written_is_told(there: There, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run_dir, said in (("/proc/kdconsole", "/proc"), (f"{tmp_path}/file/base", "is no directory")):
        settings(there, python=sys.executable, run_dir=run_dir)
        _, lines = look(code=2)
        assert (lines["access"]["outcome"], said in lines["access"]["found"]) == ("FAIL", True)


@needs_sshd
def test_models_are_to_be_sent_or_named_on_the_host_and_the_estimate_knows_them(there: There, tmp_path: Path) -> None:
    there.has(RTX4090)
    model, data = tmp_path / "there" / "model", tmp_path / "corpus.txt"
    model.parent.mkdir()
    shutil.copytree(ASSETS / "teacher", model)
    data.write_text("def f(x): return x\n" * 1000)
    config = tmp_path / "config.yaml"
    config.write_text(f"teacher: gx10:{model}\nstudent: {ASSETS / 'teacher'}\ndata: {{path: corpus.txt}}\n")
    _, lines = look("--config", str(config))
    assert lines["teacher"]["found"] == f"gx10:{model}: there, 5.3 MB"
    assert lines["student"]["found"] == "5.3 MB to be sent"
    assert lines["data"]["found"] == "0.0 MB to be sent"
    assert "to be sent" in lines["disk"]["wanted"]
    before = lines["GPU memory"]["wanted"]

    told = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**told, "num_hidden_layers": 300, "hidden_size": 2048}))
    _, lines = look("--config", str(config))
    assert lines["GPU memory"]["wanted"] != before, "counted from the config.json that is there"

    (model / "config.json").write_text("{")
    _, lines = look("--config", str(config))
    assert lines["memory"]["outcome"] == "UNKNOWN"
    assert f"gx10:{model}" in lines["memory"]["found"]
    shutil.rmtree(model)
    found, lines = look("--config", str(config), code=2)
    assert lines["teacher"]["found"] == f"gx10:{model}: not there"
    assert found["verdict"] == "gx10 is NOT READY: teacher"


@needs_sshd
def test_a_model_that_is_nowhere_is_told_beside_all_the_rest(there: There, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("teacher: nowhere\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n")
    _, lines = look("--config", str(config), code=2)
    assert (lines["models"]["outcome"], "nowhere" in lines["models"]["found"]) == ("FAIL", True)
    assert lines["access"]["outcome"] == "PASS"


@needs_sshd
def test_a_key_that_is_not_trusted_or_was_changed_is_a_hard_stop(there: There, tmp_path: Path) -> None:
    known = tmp_path / "home" / "kd" / "known_hosts"
    place, kind, key = known.read_text().split()[:3]
    known.unlink()
    found, lines = look(code=3)
    assert "not trusted yet" in lines["host"]["found"]
    assert found["facts"] is None
    make_key(tmp_path / "another")
    known.write_text(f"{place} {' '.join((tmp_path / 'another.pub').read_text().split()[:2])}\n")
    found, lines = look(code=3)
    assert lines["host"]["found"].count("SHA256:") == 2
    assert {line["outcome"] for name, line in lines.items() if name != "host"} == {"UNKNOWN"}
    assert (kind, key) == tuple((there.rig.directory / "host_key.pub").read_text().split()[:2])


@needs_sshd
def test_a_host_that_is_not_reached_is_a_line_and_code_3(there: There, tmp_path: Path) -> None:
    settings(there, port=1)
    code, out = call("--host", "gx10")
    assert code == ExitCode.CONNECTION
    assert "Traceback" not in out
    assert "✘ host" in out
    assert out.count("not looked at") >= 8
    assert "gx10 was NOT REACHED" in out
    assert "next lane: kdconsole preflight --host lambda-vector" in out
    found, _ = look(code=3)
    assert (found["reached"], found["ready"], found["facts"]) == (False, False, None)


@needs_sshd
def test_a_host_that_is_lost_in_the_middle_is_not_reached(there: There, tmp_path: Path) -> None:
    python = tmp_path / "killer"
    python.write_text('#!/bin/sh\nkill -9 "$PPID"\n')  # sshd's process of this session
    python.chmod(0o755)
    settings(there, python=str(python), run_dir=str(tmp_path / "base"))
    _, lines = look(code=3)
    assert lines["host"]["outcome"] == "FAIL"


@needs_sshd
def test_a_name_that_can_be_no_hosts_is_refused_before_anything_is_sent(there: There) -> None:
    result = CliRunner().invoke(preflight_command, ["--host", "-oProxyCommand=x"])
    assert isinstance(result.exception, ConfigError)


@needs_sshd
def test_a_variable_that_the_host_is_given_chooses_the_gpu(there: There, tmp_path: Path) -> None:
    there.has(GB10 + "1, GPU-second, NVIDIA RTX 6000, 580.95, 48000, 0, 8.9, 47000\n")
    settings(there, python=str(there.root / "python"), run_dir=str(tmp_path / "base"), gpu=1)
    _, lines = look()
    assert lines["device"]["found"].startswith("NVIDIA RTX 6000")
    assert "GPU memory" in lines


# This machine


def test_this_machine_is_looked_at_without_a_host_and_in_a_pipe(tmp_path: Path) -> None:
    script = "import sys, console.cli as c\ntry: c.main()\nfinally: assert not {'torch', 'asyncssh'} & set(sys.modules)"
    argv = [sys.executable, "-c", script, "preflight", "--evidence", str(tmp_path / "evidence")]
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert time.monotonic() - began < 60
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("looking at this machine …")
    assert "\x1b" not in done.stdout
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith(("✔ this machine is READY", "✘ this machine is NOT READY")), done.stdout
    assert (done.returncode == 0) == last.startswith("✔")
    assert "  clock" not in done.stdout
    assert not (tmp_path / "evidence").exists()


def test_a_start_without_enough_room_here_is_refused_unless_forced(tmp_path: Path) -> None:
    config = load_config(None, template="builtin", sets=["train.batch=65536", "train.device=cpu"])

    async def asked() -> Preflight:
        async with Reach() as reach:
            return await preflight(reach, None, config, tmp_path)

    found = asyncio.run(asked())
    assert [line.name for line in found.failed] == ["memory"]
    with pytest.raises(ConfigError, match=r"this machine is not ready: memory: .*--force starts it all the same"):
        require(found, False)
    assert require(found, True) == ["room"]


# What is made of a table


def made(*lines: Line, **given: Any) -> Preflight:
    return Preflight("gx10", (Line("host", "PASS", "reached"), *lines), 0.5, **given)


def test_what_cannot_be_forced_stays_refused() -> None:
    room, lock = Line("disk", "FAIL", "full", "room", "make room", "room"), Line("lock", "FAIL", "held", "free", "wait")
    assert require(made(), False) == []
    with pytest.raises(ConfigError) as refused:
        require(made(room, lock, next_lane="lambda-vector"), True)
    assert str(refused.value) == (
        "gx10 is not ready: disk: full; lock: held; disk: make room; lock: wait; "
        "or take the next lane: --host lambda-vector"
    )
    with pytest.raises(TransportError, match="refused"):
        require(Preflight("gx10", (Line("host", "FAIL", "refused"),), 0.1, reached=False), True)


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_the_table_fits_its_width_and_says_everything(width: int) -> None:
    long = Line("memory", "FAIL", "50 GiB free of 120 GiB " * 3, "much more than that " * 4, "lower it " * 12, "room")
    wide = Line("device", "WARN", "漢字" * 40, "", "x" * 90)
    found = made(long, wide, next_lane="lambda-vector")
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Table(found))
    text = console.export_text()
    assert width < 40 or max(map(console_width, text.splitlines())) <= width
    squeezed = "".join(text.split())
    for each in (
        "漢字" * 3,
        "→loweritlowerit",
        "✘gx10isNOTREADY:memory",
        "nextlane:kdconsolepreflight--hostlambda-vector",
    ):
        assert width < 80 or each in squeezed, (each, text)


def console_width(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line)


def test_help_has_examples_and_fits_80_columns() -> None:
    text = CliRunner().invoke(preflight_command, ["--help"]).stdout
    assert "kdconsole preflight --host gx10 --config config.yaml" in text
    assert max(map(len, text.splitlines())) <= 80
