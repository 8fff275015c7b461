"""A publication as a run: its own directory, stream, verdicts and evidence, made by the process that publishes.

No supervisor starts it: this process is on record in the place of one, so that a publication can be found, stopped and
told from a lost one as any other run. It stays in the foreground because it holds the token, which goes to no child.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from console.publish_plan import Plan
from dispatch.manifest import CONTRACT, EVENTS, EXIT, versions
from dispatch.places import Place
from dispatch.runs import RunDir, create_run
from dispatch.seal import seal
from dispatch.supervisor import identify, note, open_regular, write_atomic
from dispatch.transport import LocalTransport
from engine.config import fingerprint, gate_fingerprint
from engine.contract import builtin_contract, parse_contract
from engine.durable import discard
from engine.errors import ExitCode, KdError
from engine.falsifiers import FIRST_PHASE, JUDGE_PHASE, exit_code_of
from engine.publish_compare import compare
from engine.publish_files import cannot_write, put_in_place, require_ours, require_room, stage, staging_of
from engine.publish_hub import Commit, Hub
from engine.recorder import Recorder
from engine.sections import Contract, RunConfig
from engine.stream import End, Inputs, Run, Verdict
from engine.text import clean

RECORD: Final = "publication.json"
LAUNCH_LOG: Final = "launch.log"
_WORK: Final = ".publish.partial"
"""Below the run's directory: what is sent and what comes back; gone when the run is sealed."""
Tell = Callable[[str], object]


@dataclass
class Published:
    """What a publication came to."""

    plan: Plan
    run_dir: RunDir
    commit: Commit | None = None
    """Of the hub, from the moment that it stands there."""
    in_place: bool = False
    """The directory stands, whole."""
    measures: dict[str, float] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    end: End | None = None
    evidence_id: str | None = None

    @property
    def place(self) -> str:
        """Where it is to be found."""
        asked = self.plan.asked
        return self.commit.url if self.commit else str(asked.directory or f"hub {asked.repo}")

    def document(self) -> dict[str, Any]:
        """What becomes `publication.json`."""
        asked = self.plan.asked
        to: dict[str, Any] = {"directory": None if asked.directory is None else str(asked.directory)}
        if asked.repo is not None:
            to = {"repo": asked.repo, "revision": asked.revision, "private": asked.private}
            to |= {"commit": self.commit.id, "url": self.commit.url} if self.commit else {"commit": None, "url": None}
        return {
            "schema": "kdconsole.publication/1",
            **self.plan.document(),
            "to": to,
            "measures": {name: value if value < float("inf") else None for name, value in self.measures.items()},
        }


def publish(plan: Plan, hub: Hub | None, token: str | None, evidence: Path, name: str | None, tell: Tell) -> Published:
    """Publishes, loads back, judges, and seals the evidence of it.

    Args:
        plan: of `console.publish_plan`.
        hub: the repository; None for a directory.
        token: kept out of the environment of what is started.
        evidence: where run directories live.
        name: what the operator calls it.
        tell: told what is being done.

    Raises:
        KdError: it could not be done; the run's end says so too, and is sealed.
    """
    asked = plan.asked
    config = msgspec.structs.replace(plan.run.config, mode="publish", contract=Contract())
    text = builtin_contract("publish")
    run_dir = create_run(
        config,
        evidence=evidence,
        contract_text=text,
        name=name or f"{plan.run.run.id} to {asked.repo or asked.directory}",
        overrides=["--force"] if asked.force else [],
    )
    done = Published(plan, run_dir)
    work = run_dir.path / _WORK
    try:
        with _on_record(run_dir) as attempt, contextlib.ExitStack() as cleared:
            recorder = attempt.recorder(text)
            cleared.callback(discard, work)
            if asked.directory is not None:
                cleared.callback(discard, staging_of(asked.directory))
            try:
                recorder.emit(_run_event(config, text))
                _Work(plan, hub, token, done, recorder, work, tell).do()
            except KeyboardInterrupt:
                attempt.end = _end(done, "STOPPED", f"interrupted in phase {recorder.phase}", ExitCode.INTERRUPTED)
                raise
            except KdError as error:
                attempt.end = _end(done, "FAILED", str(error), error.exit_code)
                raise
            except OSError as error:
                told = cannot_write(error, run_dir.path)
                attempt.end = _end(done, "FAILED", str(told), told.exit_code)
                raise told from None
            except Exception as error:
                said = clean(f"{type(error).__name__} in phase {recorder.phase}", 300)
                attempt.end = _end(done, "CRASHED", said, ExitCode.UNDECIDED)
                raise
            else:
                attempt.end = done.end
            finally:
                done.verdicts = recorder.verdicts
                record = json.dumps(done.document(), indent=2, allow_nan=False)
                write_atomic(run_dir.path / RECORD, record.encode() + b"\n")
    finally:
        sealed = asyncio.run(seal(run_dir, Place(LocalTransport(), str(run_dir.path)), tell))
        done.evidence_id = sealed.evidence_id
    return done


class _Work:
    """Phase after phase of one publication."""

    def __init__(
        self,
        plan: Plan,
        hub: Hub | None,
        token: str | None,
        done: Published,
        recorder: Recorder,
        work: Path,
        tell: Tell,
    ) -> None:
        self.plan, self.hub, self.token, self.done = plan, hub, token, done
        self.recorder, self.work, self.tell = recorder, work, tell

    def do(self) -> None:
        """All of it; `done` has what came of it."""
        plan, asked = self.plan, self.plan.asked
        digests = {f"run {plan.run.run.id}": plan.run.evidence_id}
        digests |= {f"evaluation {each.run.id}": each.evidence_id for each in plan.evaluations}
        self.recorder.emit(Inputs(digests=digests | plan.hashes))
        self.work.mkdir()
        require_room(self.work, plan.bytes, 2)
        staged = self.work / "sent"
        if asked.directory is not None:
            asked.directory.parent.mkdir(parents=True, exist_ok=True)
            staged = staging_of(asked.directory)
            require_room(asked.directory.parent, plan.bytes, 1)
        self._enter("gather", f"{len(plan.files)} files, {plan.bytes:,} bytes")
        stage(staged, plan.model, plan.files, plan.texts)
        back = self._there_and_back(staged)
        self._enter("compare", "a fresh process hashes every file and loads both models")
        for measure in compare(back, plan.model, plan.hashes, self.token):
            self.recorder.emit(measure)
            self.done.measures[measure.name] = measure.value
        self.recorder.enter(JUDGE_PHASE, "what came back was compared")
        code = exit_code_of(self.recorder.verdicts)
        against = "; ".join(
            f"{each.id} is {each.verdict}: {each.observed}" for each in self.recorder.verdicts if each.verdict != "PASS"
        )
        if asked.directory is not None and code == ExitCode.OK:
            require_ours(asked.directory, asked.force)  # minutes may have passed since it was looked at
            put_in_place(staged, asked.directory)
            self.done.in_place = True
        status = "FAILED" if code == ExitCode.FAILED else "COMPLETED"
        self.done.end = _end(self.done, status, against or f"published: {self.done.place}", code)

    def _there_and_back(self, staged: Path) -> Path:
        """Sends what was gathered, and returns a directory with what came back."""
        plan, asked = self.plan, self.plan.asked
        if self.hub is None:
            self._enter("copy", "what was gathered, read back into a fresh copy")
            back = self.work / "back"
            stage(back, staged, plan.files, {})
            return back
        names = frozenset(plan.hashes)
        self._enter("upload", f"{asked.repo}, {asked.revision}")
        ready = self.hub.prepare(names, private=asked.private, revision=asked.revision)
        if ready.others and not asked.force:
            some = ", ".join(ready.others[:3]) + (" …" if len(ready.others) > 3 else "")
            raise NotOurs(
                f"hub {self.hub.host}: {asked.repo} holds {len(ready.others):,} files that this publication does not "
                f"have: {some}",
                do="choose another --repo, or remove them in the same commit with --force",
            )
        message = f"Publish {plan.run.run.id}"
        description = f"Evidence id {plan.run.evidence_id}"
        commit = self.hub.upload(staged, names, ready, message, description, asked.revision)
        self.done.commit = commit
        for remark in self.hub.remarks:
            self.recorder.log(f"the hub remarks: {remark}", "warning")
        self.recorder.log(f"published as commit {commit.id}: {commit.url}")
        self._enter("download", f"commit {commit.id} into an empty cache")
        return self.hub.download(commit, self.work / "cache")

    def _enter(self, phase: str, detail: str) -> None:
        self.tell(f"{phase}: {detail}")
        self.recorder.enter(phase, detail)


class NotOurs(KdError):
    """Something else stands where it would be published."""


def _run_event(config: RunConfig, contract: str) -> Run:
    """What is about to be done; the numbers of the training are those of the configuration."""
    return Run(
        attempt=1,
        mode=config.mode,
        config=fingerprint(config),
        gate=gate_fingerprint(config),
        contract=hashlib.sha256(contract.encode()).hexdigest(),
        teacher=config.teacher.path if config.teacher else None,
        student=config.student.source,
        host=platform.node(),
        device="cpu",
        device_name=platform.processor() or platform.machine(),
        precision="fp32",
        world_size=1,
        versions={
            name: version
            for name, version in versions(("torch", "transformers", "safetensors", "huggingface_hub")).items()
            if version is not None
        }
        | {"python": platform.python_version()},
        target_steps=config.train.steps,
        max_steps=config.max_steps,
        budget_seconds=None,
        temperature=config.distill.temperature,
        alpha=config.distill.alpha,
        tokens_per_step=config.train.batch * config.train.sequence,
        accumulation=config.train.parts,
        teacher_source=config.teacher.source if config.teacher else "online",
    )


def _end(done: Published, status: str, reason: str, code: ExitCode) -> End:
    if done.commit is not None and done.commit.id not in reason:
        reason = f"{reason}; commit {done.commit.id} stands at {done.commit.url}"
    return End(status=status, reason=reason, exit_code=int(code), steps=0, seconds=0.0)


class _Attempt:
    """This process, on record as the one that does the run."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.started, self.clock = time.time(), time.monotonic()
        self.times = os.times()
        self.end: End | None = None
        self._recorder: Recorder | None = None

    def recorder(self, contract: str) -> Recorder:
        """Where everything goes, with its heartbeat."""
        made = Recorder(self.run_dir.path / EVENTS, self.run_dir.run, parse_contract(contract, CONTRACT))
        made.enter(FIRST_PHASE)
        made.start_heartbeat(None, self.clock)
        self._recorder = made
        return made

    def close(self) -> None:
        """The stream's end, then the record of the process's, as a supervisor would write it."""
        seconds = time.monotonic() - self.clock
        end = self.end or End(status="CRASHED", reason="no end", exit_code=int(ExitCode.UNDECIDED), steps=0, seconds=0)
        if self._recorder is not None:
            # A full disk must not keep the record of the end from being tried.
            with contextlib.suppress(OSError):
                self._recorder.finish(msgspec.structs.replace(end, seconds=seconds))
        now = os.times()
        record: dict[str, object] = {
            "run": self.run_dir.run,
            "exit_code": end.exit_code,
            "signal": None,
            "stall": None,
            "wrote": self._recorder is not None,
            "orphans": [],
            "user_seconds": now.user + now.children_user - self.times.user - self.times.children_user,
            "system_seconds": now.system + now.children_system - self.times.system - self.times.children_system,
            "started": self.started,
            "ended": self.started + seconds,
            "seconds": seconds,
        }
        note(self.run_dir.path, "exited", **record)
        write_atomic(self.run_dir.path / EXIT, json.dumps({"v": 1, **record}).encode() + b"\n")


@contextlib.contextmanager
def _on_record(run_dir: RunDir) -> Iterator[_Attempt]:
    """Makes this process the run's; what a run prints goes to launch.log meanwhile."""
    us = identify(os.getpid(), run_dir.run)
    record = {"run": run_dir.run, "supervisor": us, "session": os.getsid(0), "gpu": None}
    note(run_dir.path, "starting", **record, subreaper=False)
    attempt = _Attempt(run_dir)
    note(run_dir.path, "started", **record, trainer=us)
    descriptor = open_regular(run_dir.path / LAUNCH_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            yield attempt
        finally:
            attempt.close()
