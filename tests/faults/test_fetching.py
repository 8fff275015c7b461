"""A real training on a host, by the real command: fetched while it goes on and when it is over, found, cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts import add_host
from engine import checkpoint
from tests import ssh_rig
from tests.console_rig import Desk, Outcome, RunFiles, processes_of, until, write_corpus
from tests.nursery import Nursery

pytestmark = pytest.mark.skipif(ssh_rig.MISSING is not None and "CI" not in os.environ, reason=str(ssh_rig.MISSING))
CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 4000, batch: 2, sequence: 32, threads: 1, warmup_steps: 5, learning_rate: 1.0e-3}
checkpoint: {every_steps: 25, keep_last: 2}
"""


@dataclass
class Afar:
    """A desk, a host that it reaches, and a training there that goes on."""

    desk: Desk
    rig: ssh_rig.Rig
    base: Path
    run: RunFiles

    @property
    def variables(self) -> dict[str, str]:
        return {"HOME": self.rig.environ["HOME"], "KDCONSOLE_HOSTS": self.rig.environ["KDCONSOLE_HOSTS"]}

    @property
    def there(self) -> Path:
        return self.base / "runs" / self.run.path.name

    def call(self, *arguments: str, rc: int = 0, evidence: Path | None = None) -> Outcome:
        mine = {} if evidence is None else {"KDCONSOLE_EVIDENCE": str(evidence)}
        outcome = self.desk.call(*arguments, variables={**self.variables, **mine})
        assert outcome.rc == rc, outcome.said
        assert "Traceback" not in outcome.err
        return outcome

    def told(self, *arguments: str, evidence: Path | None = None) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.call(*arguments, "--json", evidence=evidence).out)
        return document


@pytest.fixture(scope="module")
def afar(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Afar]:
    root = tmp_path_factory.mktemp("fetching")
    desk, base = Desk(root), root / "base"
    write_corpus(desk.cwd / "corpus.txt")
    desk.write("config.yaml", CONFIG)
    (root / "host").mkdir()
    with ssh_rig.running_sshd(root / "host") as rig:
        rig.trusted()
        given = {"address": "127.0.0.1", "port": rig.port, "identity": str(rig.identity)}
        add_host("gx10", {**given, "python": str(nursery.python(root / "python")), "run_dir": str(base)}, rig.environ)
        variables = {"HOME": rig.environ["HOME"], "KDCONSOLE_HOSTS": rig.environ["KDCONSOLE_HOSTS"]}
        try:
            watching = desk.start("--headless", "train", "config.yaml", "--host", "gx10", variables=variables)
            run = desk.run
            until(lambda: run.has("checkpoint"), "a checkpoint")
            watching.interrupt()
            assert watching.wait().rc == 0
            yield Afar(desk, rig, base, run)
        finally:
            for pid in processes_of(base):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_from_the_first_fetch_to_the_last_of_it(afar: Afar, tmp_path: Path) -> None:
    name, run = afar.run.path.name, afar.run
    # While it goes on.
    first = afar.told("fetch", name, "--checkpoints", "latest")
    assert (first["state"], first["refused"]) == ("running", [])
    [path] = first["checkpoints"]
    assert checkpoint.verify(run.path / path).step >= 25
    [row] = afar.told("runs", "--host", "gx10")["runs"]
    assert (row["id"], row["state"], row["here"]) == (name, "running", str(run.path))
    kept = afar.call("clean", "--host", "gx10", "--older-than", "0", "--unfetched", "--yes")
    assert "is running" in kept.out
    assert "nothing to remove" in kept.out
    assert afar.there.is_dir()
    # It is stopped: what it had done is told, and is fetched.
    stopped = afar.told("stop", name)
    assert (stopped["cancelled"], stopped["killed"]) == (True, False)
    assert stopped["saved_step"] == stopped["step"]
    assert f"steps saved in {stopped['checkpoint']}" in stopped["told"]
    last = afar.call("fetch", name, "--checkpoints", "all", "--model")
    assert f"{stopped['checkpoint']}: whole and verified" in last.out
    assert "note: no model on gx10" in last.out
    for file in (*(afar.there / "checkpoints").rglob("*.safetensors"), afar.there / "events.jsonl"):
        assert (run.path / file.relative_to(afar.there)).read_bytes() == file.read_bytes()
    again = afar.told("fetch", name, "--checkpoints", "all")
    assert again["moved_bytes"] == 0
    # From another laptop, which never saw it.
    mine = tmp_path / "mine"
    assert "made from" in afar.call("runs", "--host", "gx10", evidence=mine).out
    found = afar.call("--headless", "attach", f"gx10:{name}", rc=130, evidence=mine)
    assert "STOPPED" in found.text
    assert afar.told("fetch", name, evidence=mine)["checkpoints"]
    shutil.rmtree(mine)
    # It goes, but not before somebody said yes.
    planned = afar.told("clean", "--host", "gx10", "--older-than", "0", "--dry-run")
    assert [each["goes"] for each in planned["runs"]] == [True]
    assert afar.there.is_dir()
    cleaned = afar.told("clean", "--host", "gx10", "--older-than", "0", "--yes")
    assert (cleaned["removed"], cleaned["freed_bytes"]) == ([f"runs/{name}"], planned["bytes"])
    assert os.listdir(afar.base / "runs") == []
    assert "no such run there; it may have been cleaned up" in afar.call("fetch", name, rc=2).err


def test_a_host_that_cannot_be_reached_is_unknown_and_not_failed(afar: Afar) -> None:
    afar.rig.end()
    try:
        asked = afar.call("runs", "--host", "gx10", rc=3)
        assert asked.err.startswith("error: gx10: ")
        assert asked.err.count("unknown") == 1
        assert "error: gx10: " in afar.call("clean", "--host", "gx10", "--dry-run", rc=3).err
    finally:
        afar.rig.restart()
