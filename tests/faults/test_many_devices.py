"""Runs of several processes, as the supervisor starts them: stopped, killed one by one, resumed by other numbers.

Where nothing hangs on how a process loads torch it is forked (see `tests.nursery`); torchrun itself never is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from console.launch import Job, create
from engine.checkpoint import committed, read_manifest, verify
from engine.config import fingerprint, load_config
from engine.rank_process import read_records, start_ticks
from engine.resume import RESUME, Resume
from tests.console_rig import ROOT, Desk, RunFiles, processes_of, until, write_corpus
from tests.nursery import Nursery

SECONDS = 240.0
STEPS = 40
CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: CORPUS, heldout_windows: 4}
train: {steps: 40, batch: 4, accumulation: 2, sequence: 32, warmup_steps: 5, learning_rate: 6.0e-3,
        min_learning_rate: 3.0e-4, evaluate_every: 20, threads: 1, devices: DEVICES, parallel: PARALLEL}
checkpoint: {every_steps: 10}
"""
IMPATIENT = """
import sys
from engine import __main__, launcher
launcher.LOST_SECONDS = {seconds}
sys.exit(__main__.main(sys.argv[1:]))
"""


class Run:
    """One run directory, and the processes of the attempt that is under way; with a nursery, that forks them."""

    def __init__(self, files: RunFiles, nursery: Nursery | None = None) -> None:
        self.files = files
        self._python_path = nursery.python_path if nursery else str(ROOT)
        self.before = 0

    def start(self, devices: int | None = None, patience: float | None = None) -> None:
        """An attempt; where a number of devices is given, it stands where a resume leaves it."""
        if self.files.stream.exists():
            (self.files.path / RESUME).write_bytes(msgspec.json.encode(Resume((), devices)))
        self.before = len(self.files.events())
        command = ["-P", "-m", "engine", str(self.files.path)]
        if patience is not None:
            command = ["-P", "-c", IMPATIENT.format(seconds=patience), str(self.files.path)]
        with (self.files.path / "launch.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | {"PYTHONPATH": self._python_path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.files.events()[self.before :]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def until_steps(self, count: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.log
            return len(self.of("step")) >= count

        until(there, f"{count} steps", SECONDS)

    def pid_of(self, rank: int) -> int:
        return read_records(self.files.path)[rank].pid

    def torchrun(self) -> int:
        return int(Path(f"/proc/{self.pid_of(1)}/stat").read_bytes().rpartition(b")")[2].split()[1])

    def end(self) -> int:
        """The exit code, once nothing of it is left."""
        code = self.process.wait(SECONDS)
        until(lambda: not processes_of(self.files.path), "nothing left", 30.0)
        return code

    def finish(self, devices: int | None = None) -> None:
        self.start(devices)
        assert self.end() == 0, self.log

    @property
    def log(self) -> str:
        logs = [self.files.path / "launch.log", *sorted((self.files.path / "ranks").glob("*.log"))]
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in logs if path.exists())

    @property
    def kept(self) -> int:
        """Step of the newest checkpoint; all of them are verified."""
        return max((verify(path).step for path in committed(self.files.path)), default=0)

    def losses(self) -> list[float]:
        """Of every step, as the last attempt that made it left it."""
        found = {event["step"]: event["loss"] for event in self.files.events("step")}
        return [found[step] for step in range(1, STEPS + 1)]

    def heldout(self) -> float:
        return float(self.files.events("eval")[-1]["loss"])

    def clear(self) -> None:
        for pid in processes_of(self.files.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def written(root: Path, corpus: Path, devices: int, parallel: str, nursery: Nursery | None = None) -> tuple[Desk, Path]:
    """A desk, and the configuration on it."""
    root.mkdir()
    desk = Desk(root, nursery)
    text = CONFIG.replace("CORPUS", str(corpus)).replace("DEVICES", str(devices)).replace("PARALLEL", parallel)
    return desk, desk.write("config.yaml", text)


def made_for(root: Path, corpus: Path, devices: int, parallel: str = "auto", nursery: Nursery | None = None) -> Run:
    """A run that has not begun yet."""
    desk, config = written(root, corpus, devices, parallel, nursery)
    create(Job(load_config(config), desk.evidence))
    return Run(desk.run, nursery)


def alone(root: Path, corpus: Path, nursery: Nursery) -> Run:
    run = made_for(root, corpus, 1, nursery=nursery)
    run.finish()
    return run


def stopped_and_resumed_by_one(root: Path, corpus: Path, nursery: Nursery) -> dict[str, Any]:
    """As an operator does it: `--devices 2` for a new run, `--resume RUN --devices 1` for an attempt of it."""
    desk, config = written(root, corpus, 1, "auto", nursery)
    alone = {"OMP_NUM_THREADS": "1"}
    first = desk.start("--headless", "train", str(config), "--devices", "2", variables=alone)
    run = Run(desk.run)
    try:
        until(lambda: len(run.of("step")) >= 5, "5 steps", SECONDS)
        records = read_records(run.files.path)
        desk.call("stop", run.files.path.name)
        code = first.wait().rc
        until(lambda: not processes_of(run.files.path), "nothing left", 30.0)
        seen = {"code": code, "end": run.of("end")[-1], "kept": run.kept, "records": records, "log": run.log}
        seen |= {"run": run.of("run")[-1], "steps": len(run.of("step"))}
        config, resume = run.files.path / "config.yaml", ("--headless", "train", "--resume", run.files.path.name)
        before = config.read_bytes()
        seen["refused"] = desk.call(*resume, "--devices", "3")
        seen["resumed"] = desk.call(*resume, "--devices", "1", variables=alone)
        seen["unchanged"] = config.read_bytes() == before
        seen["worlds"] = [event["world_size"] for event in run.of("run")]
        seen["verified"] = desk.call("verify", run.files.path.name)
    finally:
        run.clear()
    return seen | {"losses": run.losses(), "heldout": run.heldout(), "files": run.files}


def one_killed(root: Path, corpus: Path, nursery: Nursery) -> dict[str, Any]:
    run = made_for(root, corpus, 2, nursery=nursery)
    try:
        run.start()
        run.until_steps(3)
        both = run.pid_of(0), run.pid_of(1)
        os.kill(both[1], signal.SIGKILL)
        code = run.end()
        until(partial(all_gone, both), "the end of both", 10.0)
        made = max(event["step"] for event in run.of("step"))
        seen: dict[str, Any] = {"code": code, "ends": run.of("end"), "made": made, "kept": run.kept, "log": run.log}
        run.finish()
    finally:
        run.clear()
    return seen | {"losses": run.losses(), "heldout": run.heldout()}


def begun_by_one_and_divided(root: Path, corpus: Path) -> dict[str, Any]:
    run = made_for(root, corpus, 1, "fsdp")
    run.start()
    try:
        run.until_steps(5)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 130, run.log
        run.start(2)
        run.until_steps(3)
        os.kill(run.process.pid, signal.SIGINT)
        code, end, kept = run.end(), run.of("end")[-1], run.kept
        made = max(event["step"] for event in run.of("step"))
        run.finish(2)
        logs = [event["message"] for event in run.of("log")]
    finally:
        run.clear()
    seen = {"code": code, "end": end, "kept": kept, "made": made, "logs": logs}
    return seen | {"losses": run.losses(), "heldout": run.heldout(), "files": run.files}


def all_gone(pids: tuple[int, ...]) -> bool:
    return not any(map(start_ticks, pids))


def killed_one_by_one(root: Path, corpus: Path) -> dict[str, Any]:
    run = made_for(root, corpus, 2)
    seen: dict[str, Any] = {}
    try:
        for who in ("rank 1", "rank 0", "torchrun", "launcher"):
            run.start()
            run.until_steps(3)
            pids = {
                "rank 1": run.pid_of(1),
                "rank 0": run.pid_of(0),
                "torchrun": run.torchrun(),
                "launcher": run.process.pid,
            }
            os.kill(pids[who], signal.SIGKILL)
            code = run.end()
            until(partial(all_gone, tuple(pids.values())), "the end of all", 10.0)
            made = max(event["step"] for event in run.of("step"))
            seen[who] = {"code": code, "ends": run.of("end"), "made": made, "kept": run.kept}
            seen[who]["log"] = run.log
        run.start(patience=1.0)
        run.until_steps(3)
        os.kill(run.pid_of(0), signal.SIGSTOP)  # as in a collective of a GPU that nobody answers any more
        os.kill(run.pid_of(1), signal.SIGKILL)
        seen["hung"] = {"code": run.end(), "ends": run.of("end"), "log": run.log}
        run.finish()
    finally:
        run.clear()
    return seen | {"losses": run.losses(), "heldout": run.heldout()}


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[dict[str, Future[Any]]]:
    """The series of the tests that are selected, started together and made two at a time."""
    root = tmp_path_factory.mktemp("many")
    corpus = write_corpus(root / "corpus.txt")
    series: dict[str, Callable[[Path, Path], Any]] = {
        "alone": partial(alone, nursery=nursery),
        "stopped_and_resumed_by_one": partial(stopped_and_resumed_by_one, nursery=nursery),
        "one_killed": partial(one_killed, nursery=nursery),
    }
    if any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items):
        series |= {"begun_by_one_and_divided": begun_by_one_and_divided, "killed_one_by_one": killed_one_by_one}
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(job, root / name, corpus) for name, job in series.items()}
    pool.shutdown(cancel_futures=True)
    assert not processes_of(root)


@pytest.fixture(scope="module")
def one(made: dict[str, Future[Any]]) -> Run:
    run: Run = made["alone"].result()
    return run


def same(seen: dict[str, Any], one: Run) -> None:
    """Checks that a run went as the one of a single process did."""
    assert seen["losses"] == pytest.approx(one.losses(), rel=1e-4)
    assert seen["heldout"] == pytest.approx(one.heldout(), rel=1e-4)


@pytest.mark.timeout(900)
def test_two_processes_are_stopped_with_a_checkpoint_and_one_goes_on(made: dict[str, Future[Any]], one: Run) -> None:
    seen = made["stopped_and_resumed_by_one"].result()
    assert (seen["code"], seen["end"]["status"], seen["end"]["exit_code"]) == (130, "STOPPED", 130), seen["log"]
    assert "SIGTERM in phase train" in seen["end"]["reason"]
    assert seen["kept"] == seen["steps"] == seen["end"]["steps"] > 0
    assert seen["run"]["world_size"] == 2
    assert set(seen["records"]) == {0, 1}
    assert "Traceback" not in seen["log"]
    refused, resumed = seen["refused"], seen["resumed"]
    assert refused.rc == 2, refused.said
    assert "--devices: 3: expected a divisor of train.batch (4)" in refused.err
    assert resumed.rc == 0, resumed.said
    assert seen["worlds"] == [2, 1]
    same(seen, one)
    assert (seen["files"].path / "model" / "model.safetensors").exists()


@pytest.mark.timeout(900)
def test_verify_holds_on_a_run_that_went_on_with_another_number(made: dict[str, Future[Any]]) -> None:
    seen = made["stopped_and_resumed_by_one"].result()
    verified, path = seen["verified"], seen["files"].path
    assert verified.rc == 0, verified.said
    assert seen["unchanged"]
    assert load_config(path / "config.yaml").train.devices == 2
    digest = fingerprint(load_config(path / "config.yaml"))
    assert {event["config"] for event in seen["files"].events("run")} == {digest}
    assert {read_manifest(each, None).state.digests["config"] for each in committed(path)} == {digest}
    assert digest in (path / "model" / "README.md").read_text()


@pytest.mark.timeout(900)
def test_a_rank_that_is_killed_ends_the_other_saves_what_was_made_and_the_run_goes_on(
    made: dict[str, Future[Any]], one: Run
) -> None:
    seen = made["one_killed"].result()
    check_crash_of_a_rank(seen, "rank 1")
    check_saved_by_rank_0(seen)
    same(seen, one)


def check_crash_of_a_rank(seen: dict[str, Any], who: str) -> None:
    [end] = seen["ends"]
    assert (seen["code"], end["status"], end["exit_code"]) == (5, "CRASHED", 5), seen["log"]
    assert f"{who} (pid " in end["reason"]
    assert "is gone without a word, as if killed" in end["reason"]


def check_saved_by_rank_0(seen: dict[str, Any]) -> None:
    """It has whole weights, and saved them when another was gone."""
    [end] = seen["ends"]
    assert seen["kept"] == seen["made"] == end["steps"], seen["log"]
    assert f"step {seen['made']} is saved" in end["reason"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_one_process_began_a_divided_model_goes_on_with(made: dict[str, Future[Any]], one: Run) -> None:
    seen = made["begun_by_one_and_divided"].result()
    assert (seen["code"], seen["end"]["status"]) == (130, "STOPPED")
    assert seen["kept"] == seen["made"]
    assert any("each with a part of the models (fsdp)" in line for line in seen["logs"])
    same(seen, one)
    assert (seen["files"].path / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("who", ["rank 1", "rank 0", "torchrun", "launcher"])
def test_a_process_that_is_killed_ends_all_and_leaves_a_checkpoint(made: dict[str, Future[Any]], who: str) -> None:
    seen = made["killed_one_by_one"].result()[who]
    if who == "launcher":  # as with a single process: nobody is left to say anything, the supervisor sees it
        assert (seen["code"], seen["ends"]) == (-signal.SIGKILL, [])
        return
    if who == "torchrun":
        [end] = seen["ends"]
        assert (seen["code"], end["status"], end["exit_code"]) == (5, "CRASHED", 5), seen["log"]
        assert end["reason"] == "torchrun was ended by SIGKILL, and the processes of the run with it"
        return
    check_crash_of_a_rank(seen, who)
    if who == "rank 1":
        check_saved_by_rank_0(seen)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_hangs_because_another_is_gone_is_ended(made: dict[str, Future[Any]]) -> None:
    seen = made["killed_one_by_one"].result()["hung"]
    [end] = seen["ends"]
    assert (seen["code"], end["status"]) == (5, "CRASHED"), seen["log"]
    assert "rank 1 (pid " in end["reason"]
    assert "rank 0" not in end["reason"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_lost_each_of_its_processes_goes_on_as_if_it_had_not(made: dict[str, Future[Any]], one: Run) -> None:
    same(made["killed_one_by_one"].result(), one)


def test_the_record_of_a_run_of_one_process_is_what_it_was(one: Run) -> None:
    assert not (one.files.path / "ranks").exists()
    assert one.files.events("run")[-1]["world_size"] == 1
