"""`kdconsole publish` on real runs: trained, judged, exported and sealed by the real command before."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from console.publish_command import publish_command
from console.publish_facts import evaluation_result
from console.publish_gate import NotAccepted, Proven, prove, require_same_model
from console.publish_plan import Asked, make_plan
from console.publish_run import publish
from console.verify.directory import verify
from dispatch.runs import RunDir, open_run
from engine.errors import KdError
from engine.formats import inspect_model_dir
from engine.publish_files import CARD, LICENCE
from engine.stream import Control, Measure, encode
from tests.console_rig import Desk, Outcome, RunFiles, until, write_corpus
from tests.hub_rig import TOKEN, HubRig, holds_token, running_hub
from tests.nursery import Nursery

REPO = "my-org/my-model"
STATED = ("--license-of", "data=cc0-1.0", "--license", "psf-2.0")
"""The corpus states no licence of its own."""
CONTRACT = """\
version: 1
name: few
falsifiers:
  - {{id: F-FEW-001, claim: the loss stays low, kind: threshold, metric: step.loss, below: {limit}, severity: gate}}
  - {{id: F-FEW-002, claim: nothing is lost, kind: threshold, metric: measure.export_missing_tensors, at_most: 0}}
"""
JUDGED = """\
version: 1
name: judged
falsifiers:
  - {id: F-MINE-003, claim: the loss stays low, kind: threshold, metric: measure.heldout_loss, below: 100}
"""
CONFIG = """\
mode: train
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 12, batch: 2, sequence: 32, warmup_steps: 2, device: cpu, threads: 1}
checkpoint: {every_steps: 0}
"""


class Trained:
    """A desk with runs that were made once; every test publishes from its own copy or leaves them as they are."""

    def __init__(self, root: Path, nursery: Nursery) -> None:
        self.desk, self.python_path = Desk(root, nursery), nursery.python_path
        write_corpus(self.desk.cwd / "corpus.txt", 1_000)
        self.desk.write("train.yaml", CONFIG)
        self.desk.write("good.yaml", CONTRACT.format(limit=100))
        self.desk.write("bad.yaml", CONTRACT.format(limit=0.001))
        self.desk.write("judged.yaml", JUDGED)
        train = ("--headless", "train", "train.yaml", "-q")
        self.good = self._made(*train, "--contract", "good.yaml", rc=0)
        self.bad = self._made(*train, "--contract", "bad.yaml", "--set", "train.seed=1", rc=1)
        evaluate = ("--headless", "evaluate", "-q", "--contract", "judged.yaml", "--set", "data.heldout_windows=2")
        self.evaluation = self._made(*evaluate, self.good.name, rc=0)

    def _made(self, *arguments: str, rc: int) -> Path:
        before = set(self.runs())
        done = self.desk.call(*arguments)
        assert done.rc == rc, done.said
        [run] = set(self.runs()) - before
        return run

    def runs(self) -> list[Path]:
        return sorted(self.desk.evidence.iterdir()) if self.desk.evidence.is_dir() else []

    def publish(self, *arguments: str | Path, run: Path | None = None, **variables: str) -> Outcome:
        return self.desk.call("publish", str(run or self.good), *map(str, arguments), "-q", variables=variables)

    def published(self, *arguments: str | Path, rc: int = 0, **options: Any) -> tuple[RunFiles, dict[str, Any]]:
        """The publication's run directory, and what the command told; the run is proven."""
        before = set(self.runs())
        done = self.publish(*arguments, "--json", **options)
        assert done.rc == rc, done.said
        [made] = set(self.runs()) - before
        proven = verify(made)
        assert proven.exit_code == 0, proven.differences + proven.unproven
        return RunFiles(made), json.loads(done.out)

    def refused(self, *arguments: str | Path, rc: int, run: Path | None = None) -> str:
        """Why, as one line; nothing was made. In this process, which saves half a second of imports each time."""
        before = self.runs()
        argv = [str(run or self.good), *map(str, arguments), "-q", "--evidence", str(self.desk.evidence)]
        done = CliRunner().invoke(publish_command, argv)
        assert isinstance(done.exception, KdError), (done.exception, done.output)
        assert done.exception.exit_code == rc, done.exception
        assert self.runs() == before
        assert done.output == ""
        assert "\n" not in str(done.exception)
        return str(done.exception)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Trained:
    return Trained(tmp_path_factory.mktemp("publish"), nursery)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they were: the command in this process sets its own, and takes the token out of the environment."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def hub() -> Iterator[HubRig]:
    with running_hub() as rig:
        yield rig


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / run.name)
    return to / run.name


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


# Into a directory


def test_a_directory_is_whole_compared_and_on_record(trained: Trained, tmp_path: Path) -> None:
    before = stamps(trained.good)
    target = tmp_path / "deep" / "release"
    twice = ("--evaluation", trained.evaluation, "--evaluation", os.path.relpath(trained.evaluation, trained.desk.cwd))
    run, told = trained.published("--to", target, *STATED, *twice)
    assert stamps(trained.good) == before
    assert sorted(os.listdir(target)) == sorted(file["name"] for file in told["files"])
    assert {CARD, LICENCE, "config.json", "tokenizer.json", "model.safetensors"} <= set(os.listdir(target))
    assert os.listdir(target.parent) == ["release"]
    assert (target / "model.safetensors").read_bytes() == (trained.good / "model/model.safetensors").read_bytes()
    verdicts = {event["id"]: (event["verdict"], event["observed"]) for event in run.events("verdict")}
    assert verdicts == {"F-DISTILL-PUBLISH-001": ("PASS", "0"), "F-DISTILL-PUBLISH-002": ("PASS", "0")}
    manifest = json.loads((run.path / "dispatch.json").read_text())
    hashes = {file["name"]: file["sha256"] for file in told["files"]}
    assert manifest["mode"] == "publish"
    assert manifest["inputs"] == {
        f"run {trained.good.name}": told["evidence_id"],
        f"evaluation {trained.evaluation.name}": told["evaluations"][trained.evaluation.name],
        **hashes,
    }
    assert str(target) in manifest["outcome"]["reason"]
    assert json.loads((run.path / "publication.json").read_text())["to"] == {"directory": str(target)}
    assert not list(run.path.glob(".*partial*"))
    card = (target / CARD).read_text()
    for words in (told["evidence_id"], "cc0-1.0", "held-out perplexity", trained.evaluation.name, "F-MINE-003"):
        assert words in card, words
    assert card.count("With the published weights.") == 1
    assert str(trained.desk.cwd) not in card

    held = trained.refused("--to", target, *STATED, rc=2)
    assert "holds a publication already" in held
    (target / "model.safetensors").write_bytes(b"")
    trained.published("--to", target, *STATED, "--force")
    assert (target / "model.safetensors").stat().st_size > 0
    assert os.listdir(target.parent) == ["release"]


def test_a_rehearsal_shows_everything_and_does_nothing(trained: Trained, hub: HubRig, tmp_path: Path) -> None:
    before = trained.runs()
    done = trained.publish("--to", tmp_path / "to", *STATED, "--dry-run")
    assert done.rc == 0, done.said
    assert os.listdir(tmp_path) == []
    sums = dict(reversed(line.split("  ", 1)) for line in (trained.good / "SHA256SUMS").read_text().splitlines())
    assert re.search(rf"model\.safetensors +[0-9,]+ +{sums['model/model.safetensors']}", done.out)
    for words in ("every gating verdict is PASS: F-FEW-001", "its evidence holds", "model-index:", "nothing was sent"):
        assert words in done.out, words
    done = trained.publish("--repo", REPO, *STATED, "--dry-run", "--json", HF_TOKEN=TOKEN, **hub.environ())
    told = json.loads(done.out)
    assert "token: found in HF_TOKEN" in told["checks"]
    assert TOKEN not in done.out + done.err
    assert hub.requests == []
    assert trained.runs() == before


# What is refused


def test_a_failed_verdict_is_named(trained: Trained, tmp_path: Path) -> None:
    before = trained.runs()
    done = trained.publish("--to", tmp_path / "to", *STATED, run=trained.bad)
    assert (done.rc, done.out, trained.runs()) == (1, "", before), done.said
    assert os.listdir(tmp_path) == []
    [line] = done.err.splitlines()
    assert line.startswith("error: ")
    assert "F-FEW-001 is FAIL" in line
    assert "expected step.loss < 0.001" in line


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "model/config.json"])
def test_a_doctored_file_of_the_model_is_named(trained: Trained, tmp_path: Path, name: str) -> None:
    run = copied(trained.good, tmp_path)
    data = bytearray((run / name).read_bytes())
    data[-1] ^= 1
    (run / name).write_bytes(data)
    line = trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=1)
    assert f"its evidence does not hold: {name}: " in line


def test_a_doctored_verdict_is_found(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained.bad, tmp_path)
    manifest = run / "dispatch.json"
    text = manifest.read_text().replace('"FAIL"', '"PASS"').replace('"status": "FAILED"', '"status": "COMPLETED"')
    manifest.write_text(text)
    line = trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=1)
    assert "its evidence does not hold: dispatch.json" in line


def test_a_run_without_seal_or_end_or_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained.good, tmp_path)
    shutil.rmtree(run / "model")
    assert "its model stayed on" in trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=2)
    (run / "SHA256SUMS").unlink()
    line = trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=5)
    assert "its evidence cannot be proven" in line
    manifest = json.loads((run / "dispatch.json").read_text())
    for outcome, words in (
        ({**manifest["outcome"], "status": "STOPPED"}, "it ended STOPPED"),
        (None, "it has not ended, or was never sealed"),
    ):
        (run / "dispatch.json").write_text(json.dumps({**manifest, "outcome": outcome}))
        assert words in trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=5)


@pytest.mark.parametrize("verdict", ["PENDING", "UNKNOWN"])
def test_a_gating_verdict_that_is_open_is_named(trained: Trained, tmp_path: Path, verdict: str) -> None:
    run = copied(trained.good, tmp_path)
    text = (run / "dispatch.json").read_text()
    (run / "dispatch.json").write_text(text.replace('"verdict": "PASS"', f'"verdict": "{verdict}"', 1))
    line = trained.refused("--to", tmp_path / "to", *STATED, run=run, rc=5)
    assert f"F-FEW-001 is {verdict}" in line


def test_a_licence_that_nobody_states_is_named(trained: Trained, tmp_path: Path) -> None:
    line = trained.refused("--to", tmp_path / "to", rc=2)
    assert "corpus.txt" in line
    assert "its licence is unknown" in line
    assert "--license-of data=ID" in line
    line = trained.refused("--to", tmp_path / "to", "--license-of", "data=mit", rc=2)
    assert "made from several (teacher builtin:teacher psf-2.0" in line
    line = trained.refused("--to", tmp_path / "to", "--license-of", "data=mit", "--license", "mit", rc=2)
    assert "there is no text of the licence mit" in line
    text = trained.desk.write("MIT.txt", "MIT License\n\nCopyright (c) somebody\n")
    stated = ("--license-of", "data=mit", "--license", "mit", "--license-file", text)
    done = trained.publish("--to", tmp_path / "to", *stated, "--dry-run", "--json")
    assert json.loads(done.out)["licence"] == {"id": "mit", "source": "stated by the operator"}


def test_an_evaluation_of_another_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    evaluation = prove(open_run(trained.evaluation), "evaluate", print)
    run = open_run(trained.bad)
    with pytest.raises(NotAccepted, match=f"evaluation {trained.evaluation.name}: it is of another model"):
        require_same_model(evaluation, inspect_model_dir(trained.bad / "model", "student"), run)
    line = trained.refused("--to", tmp_path / "to", *STATED, "--evaluation", trained.good, rc=2)
    assert "expected an evaluation" in line


def test_a_foreign_directory_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    line = trained.refused("--to", tmp_path, *STATED, "--force", rc=2)
    assert "holds thesis.tex, which is of no publication" in line
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_nothing_is_put_into_the_evidence_of_a_run(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained.good, tmp_path)
    (tmp_path / "link").symlink_to(run / "model")
    for to in (run / "to", run / "model" / "deep" / "to", tmp_path / "link" / "to"):
        line = trained.refused("--to", to, *STATED, rc=2, run=run)
        assert f"inside the evidence of run {run.name}" in line
    assert verify(run).exit_code == 0


def test_what_came_to_stand_there_meanwhile_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    to = tmp_path / "to"

    def tell(line: str) -> None:
        if line.startswith("compare"):
            to.mkdir()
            (to / "thesis.tex").write_text("mine")

    asked = Asked(None, to, "main", False, False, "psf-2.0", {"data": "cc0-1.0"}, None, None)
    plan = make_plan(open_run(trained.good), [], asked, tell)
    with pytest.raises(KdError, match=r"holds thesis.tex, which is of no publication"):
        publish(plan, None, None, trained.desk.evidence, None, tell)
    assert (os.listdir(tmp_path), os.listdir(to)) == (["to"], ["thesis.tex"])


def comparing(pid: int) -> list[int]:
    """The process that compares, below a publication's."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if "publish_check" in Path(f"/proc/{child}/cmdline").read_text()]
    return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_leaves_nothing_half_written(
    trained: Trained, tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal sends it: to the comparing process too, unless that has a group of its own."""
    command = [sys.executable, "-m", "console", "publish", str(trained.good), "--to", str(tmp_path / "to"), *STATED]
    command += ["--evidence", str(tmp_path / "evidence")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as started:
        assert started.stderr is not None
        said = next(line for line in started.stderr if line.startswith("compare"))
        until(lambda: comparing(started.pid), "the comparing process")
        assert os.getpgid(comparing(started.pid)[0]) != started.pid
        os.killpg(started.pid, number)
        out, rest = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, ""), said + rest
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == ["evidence"]
    [run] = (tmp_path / "evidence").iterdir()
    assert verify(run).exit_code == 0
    assert RunFiles(run).end["status"] == "STOPPED"


def test_wrong_usage_is_told(trained: Trained, tmp_path: Path) -> None:
    to = str(tmp_path / "to")
    for arguments in (["--to", to, "--repo", REPO], [], ["--to", to, "--private"], ["--to", to, "--revision", "v1"]):
        assert CliRunner().invoke(publish_command, [str(trained.good), *arguments]).exit_code == 2
    assert "no such user's home" in trained.refused("--to", "~nobody-of-that-name/to", rc=2)
    before = trained.runs()
    for variables, words in (({}, "there is no token"), ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "OFFLINE is set")):
        done = trained.publish("--repo", REPO, *STATED, **variables)
        assert (done.rc, done.out, trained.runs()) == (2, "", before), done.said
        assert words in done.err
        assert TOKEN not in done.err


# To a hub


SPY = """\
import os, sys
path = os.path.join({directory!r}, f"{{os.getpid()}}")
with open(path, "w") as file:
    file.write(repr(sys.orig_argv) + "\\n" + repr(dict(os.environ)))
exec(open({hook!r}).read())
"""


def spied(trained: Trained, root: Path) -> tuple[Path, str]:
    """A PYTHONPATH with which every Python that starts leaves its arguments and variables, and where it does."""
    hooks, seen = root / "hooks", root / "seen"
    hooks.mkdir()
    seen.mkdir()
    path = trained.python_path.split(os.pathsep)
    hook = Path(path[0]) / "sitecustomize.py"
    (hooks / "sitecustomize.py").write_text(SPY.format(directory=str(seen), hook=str(hook)))
    return seen, os.pathsep.join((str(hooks), *path[1:]))


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_token_is_nowhere_but_in_the_requests(trained: Trained, hub: HubRig, tmp_path: Path, stored: bool) -> None:
    seen, path = spied(trained, tmp_path)
    variables = {**hub.environ(), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": path}
    if stored:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "token").write_text(TOKEN)
    else:
        variables |= {"HF_TOKEN": TOKEN, "KDCONSOLE_DEBUG": "1"}
    before = set(trained.runs())
    done = trained.publish("--repo", REPO, *STATED, "--private", **variables)
    assert done.rc == 0, done.said
    [run] = set(trained.runs()) - before
    assert verify(run).exit_code == 0
    assert hub.repos[REPO].private
    commit = hub.repos[REPO].branches["main"]
    manifest = json.loads((run / "dispatch.json").read_text())
    assert f"{hub.url}/{REPO}/tree/{commit}" in manifest["outcome"]["reason"]
    assert commit in done.out
    sent = {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert sent["model.safetensors"] == (trained.good / "model/model.safetensors").read_bytes()
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for headers in _lowered(hub))

    assert TOKEN not in done.out + done.err
    assert holds_token(trained.desk.evidence) == []
    assert holds_token(trained.desk.home) == []
    assert all(TOKEN.encode() not in data for data in sent.values())
    children = [text for file in seen.iterdir() if "engine.publish_check" in (text := file.read_text())]
    assert len(children) == 1
    assert TOKEN not in children[0]
    if stored:
        (tmp_path / "hf" / "token").unlink()
        assert holds_token(tmp_path / "hf") == []


def _lowered(hub: HubRig) -> list[dict[str, str]]:
    return [{name.lower(): value for name, value in headers.items()} for _, _, headers in hub.requests]


def test_what_the_hub_gives_back_decides(trained: Trained, hub: HubRig) -> None:
    hub.flipped = {"model.safetensors"}
    run, told = trained.published("--repo", REPO, *STATED, rc=1, HF_TOKEN=TOKEN, **hub.environ())
    assert told["verdicts"]["F-DISTILL-PUBLISH-002"] == "FAIL"
    assert told["to"]["commit"] == hub.repos[REPO].branches["main"]
    assert "model.safetensors: other bytes" in (run.path / "events.jsonl").read_text()
    assert run.end["status"] == "FAILED"
    assert told["to"]["commit"] in run.end["reason"]


def test_a_hub_that_refuses_or_holds_other_things_leaves_a_record(trained: Trained, hub: HubRig) -> None:
    variables = {"HF_TOKEN": TOKEN, **hub.environ()}
    hub.made(REPO, {"pytorch_model.bin": b"of somebody"})
    before = set(trained.runs())
    done = trained.publish("--repo", REPO, *STATED, **variables)
    assert done.rc == 2
    assert "holds 1 files that this publication does not have: pytorch_model.bin" in done.err
    hub.answers["POST", "/commit/"] = 403
    hub.echo = TOKEN
    done = trained.publish("--repo", "my-org/another", *STATED, **variables)
    assert done.rc == 2, done.said
    assert "403" in done.err
    assert TOKEN not in done.said
    for path in set(trained.runs()) - before:
        assert verify(path).exit_code == 0
        assert RunFiles(path).end["status"] == "FAILED"
    assert holds_token(trained.desk.evidence) == []
    assert set(hub.files(REPO)) == {".gitattributes", "pytorch_model.bin"}


def test_a_publication_can_be_stopped_and_made_again(trained: Trained, hub: HubRig) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(method: str, path: str) -> None:
        if method == "PUT":
            reached.set()
            go_on.wait(60)

    hub.on_request = wait
    before = set(trained.runs())
    variables = {"HF_TOKEN": TOKEN, **hub.environ()}
    started = trained.desk.start("publish", str(trained.good), "--repo", REPO, *STATED, "-q", variables=variables)
    until(reached.is_set, "an upload")
    started.interrupt()
    until(lambda: bool(set(trained.runs()) - before), "a run directory")
    go_on.set()
    done = started.wait()
    assert done.rc == 130, done.said
    [run] = set(trained.runs()) - before
    assert verify(run).exit_code == 0
    assert RunFiles(run).end["status"] == "STOPPED"
    assert set(hub.files(REPO)) == {".gitattributes"}
    trained.published("--repo", REPO, *STATED, **variables)
    assert "model.safetensors" in hub.files(REPO)


def test_a_score_stands_beside_its_problems_and_controls_and_a_part_is_no_result(
    trained: Trained, tmp_path: Path
) -> None:
    proven = prove(open_run(trained.evaluation), "evaluate", print)
    asked = msgspec.structs.replace(proven.config.evaluate, suite="humaneval", run_generated_code=True, samples=2)
    config = msgspec.structs.replace(proven.config, evaluate=asked)
    run = RunDir(tmp_path, proven.run.manifest)
    controls = [
        Control(name=name, expected=e, observed=e, problems=164) for name, e in (("empty", 0), ("canonical", 1))
    ]
    for name, shown in (("pass_at_1", ["pass@1"]), ("part_pass_at_1", [])):
        events = [*controls, Measure(name=name, value=0.25), Measure(name="control_empty", value=0)]
        stamped = [msgspec.structs.replace(each, v=1, run="r", seq=seq) for seq, each in enumerate(events)]
        (tmp_path / "events.jsonl").write_bytes(b"".join(map(encode, stamped)))
        result = evaluation_result(Proven(run, config, "e" * 64, {}))
        assert (result.dataset, result.name) == ("openai_humaneval", "HumanEval")
        assert [metric.type for metric in result.metrics if metric.type] == shown
        assert "164 problems, 2 answers each, greedy, seed 0." in result.remarks
        assert "Controls before it: empty 0, canonical 1 (expected: canonical 1, all others 0)." in result.remarks
