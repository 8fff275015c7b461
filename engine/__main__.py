"""`python -P -m engine RUN_DIR`: one training run in its run directory.

Signal handlers, stream and heartbeat stand before torch is imported, so that a run is heard of from its first second
and can be stopped in every phase. With more than one device this process launches others of its kind (see
`engine.launcher`), which find their places in the environment; rank 0 among them is the run that the stream tells of.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from engine.config import RunConfig, load_config
from engine.errors import ExitCode, KdError
from engine.falsifiers import FIRST_PHASE, parse_contract
from engine.launcher import Launcher
from engine.micro_batch import relief
from engine.rank_process import (
    DIRECTORY,
    STARTED_VARIABLE,
    FirstStop,
    Seat,
    die_with_parent,
    log_of_its_own,
    seat_of,
    started_at,
    write_record,
)
from engine.recorder import Recorder, Unwritten
from engine.resume import RESUME, read_resume
from engine.stop import StopNow, StopRequest
from engine.stream import End

_GRACE_SECONDS = 2.0
"""A smoke that ends by itself may overrun its budget by this much before it is ended."""


def main(argv: list[str]) -> int:
    """Runs the engine; returns its exit code (see `engine.errors.ExitCode`)."""
    started = time.monotonic()
    if len(argv) != 1 or not Path(argv[0]).is_absolute():
        print("usage: python -P -m engine RUN_DIR   (an absolute path)", file=sys.stderr)
        return ExitCode.USAGE
    # Threads that spin at a barrier make steps much slower beside another busy process; threads that sleep make the
    # steps of a tiny model slower on an idle machine (bench/wait_policy.py). Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_dir = Path(argv[0])
    try:
        seat = seat_of(os.environ)
    except KdError as error:
        print(f"error: {run_dir}: {error}", file=sys.stderr)
        return ExitCode.USAGE
    stop = StopRequest() if seat is None else FirstStop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # stacks of a hung run, into launch.log
    if seat is not None:
        die_with_parent()
        started = started_at(os.environ)
        if seat.rank:
            log_of_its_own(run_dir, seat.rank)
        write_record(run_dir, seat.rank)
    try:
        given = load_config(run_dir / "config.yaml")
        config = load_config(
            run_dir / "config.yaml",
            overrides={"train.devices": read_resume(run_dir).devices},
            options={"train.devices": f"{RESUME}: devices"},
        )
        text = (run_dir / "contract.yaml").read_text(encoding="utf-8")
        contract = parse_contract(text, "contract.yaml")
        run = json.loads((run_dir / "dispatch.json").read_text(encoding="utf-8"))["run"]
        if seat is None and config.train.devices > 1 and config.makes_steps:
            return Launcher(run_dir, run, contract, config.train.devices, started).run()
        if seat is None or seat.rank == 0:
            recorder = Recorder(run_dir / "events.jsonl", run, contract)
        else:
            recorder = Recorder(run_dir / DIRECTORY / "no-past", run, contract, Unwritten(run))
    except (KdError, OSError, ValueError, KeyError) as error:
        print(f"error: {run_dir}: {error}", file=sys.stderr)
        return ExitCode.USAGE
    budget = config.smoke.budget_seconds if config.mode == "smoke" else None
    recorder.enter(FIRST_PHASE)
    if seat is None or seat.rank == 0:
        recorder.start_heartbeat(None if budget is None else started + budget + _GRACE_SECONDS, started)
    digest = hashlib.sha256(text.encode()).hexdigest()
    end = _train(config, given, run_dir, recorder, stop, started, digest, seat)
    try:
        recorder.finish(end)
    except OSError as error:
        with contextlib.suppress(OSError):  # standard error is a file on the same disk
            print(f"error: {run_dir / 'events.jsonl'}: {error}", file=sys.stderr)
    code = ExitCode.UNDECIDED if end.exit_code is None else end.exit_code
    if seat is not None:
        write_record(run_dir, seat.rank, end.status, end.reason, code)
        if seat.rank or STARTED_VARIABLE in os.environ:
            # Rank 0 has said what the run comes to, and the launcher reads it. Any other code is a failure to torchrun,
            # and fills the log.
            code = ExitCode.OK
    if seat is not None or "engine.trainer" not in sys.modules:
        sys.stdout.flush()
        # Half of torch is loaded, or its connections are broken: it is not to be trusted to clean up.
        os._exit(code)
    return code


def _train(
    config: RunConfig,
    given: RunConfig,
    run_dir: Path,
    recorder: Recorder,
    stop: StopRequest,
    started: float,
    contract_digest: str,
    seat: Seat | None,
) -> End:
    """The trainer's own end, or the one that its failure makes; `given` is what config.yaml says by itself."""

    def ended(status: str, reason: str, code: ExitCode) -> End:
        seconds = time.monotonic() - started
        return End(status=status, reason=reason, exit_code=code, steps=recorder.step, seconds=seconds)

    try:
        with stop.raising():  # torch is imported here
            if config.mode == "prepare":
                from engine.prepare import Preparer
            elif config.mode == "evaluate":
                from engine.evaluate import Evaluator
            else:
                from engine.trainer import Trainer

        if config.mode == "prepare":
            return Preparer(config, run_dir, recorder, stop, started, contract_digest).run()
        if config.mode == "evaluate":
            return Evaluator(config, run_dir, recorder, stop, started, contract_digest).run()
        return Trainer(config, run_dir, recorder, stop, started, contract_digest, seat, given).run()
    except StopNow:
        return ended("STOPPED", f"{stop.signal} in phase {recorder.phase}", ExitCode.INTERRUPTED)
    except KdError as error:
        return ended("FAILED", str(error), error.exit_code)
    except MemoryError:
        return ended("FAILED", _too_little("memory", config, recorder), ExitCode.UNDECIDED)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run must end in an event and an exit code
        with contextlib.suppress(OSError):
            traceback.print_exc()
        if type(error).__name__ == "OutOfMemoryError":
            return ended("FAILED", _too_little("device memory", config, recorder), ExitCode.UNDECIDED)
        return ended("CRASHED", f"{type(error).__name__} in phase {recorder.phase}: {error}", ExitCode.UNDECIDED)


def _too_little(what: str, config: RunConfig, recorder: Recorder) -> str:
    return f"out of {what} in phase {recorder.phase} after {recorder.step} steps; {relief(config, recorder.parts)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
