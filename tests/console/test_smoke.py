"""The product's main job, end to end: real processes, the built-in models, a few steps."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatch.sums import check_sums, read_sums
from engine.config import fingerprint, gate_fingerprint, load_config
from tests.console_rig import ROOT, Desk, Outcome, RunFiles, side_by_side, until, write_corpus
from tests.nursery import Nursery

SMOKE_LINE = re.compile(
    r"\[SMOKE\] 12 steps in \d+\.\d{2}s: initial_loss=\d+\.\d{4}, final_loss=\d+\.\d{4}, throughput=\d+\.\d{2} step/s"
)
PROJECTED_LINE = re.compile(
    r"\[SMOKE\] projected full-run wall time \(50000 steps\): \d+\.\d{2}h / \d+\.\d min / \d+\.\ds"
)
FILES = {
    *("config.yaml", "contract.yaml", "dispatch.json", "events.jsonl"),
    *("launch.log", "supervisor.jsonl", "exit.json", "SHA256SUMS"),
}
NUMBER = (int, float)
DOCUMENT = {
    "schema": str,
    "run": str,
    "status": str,
    "steps": int,
    "seconds": NUMBER,
    "initial_loss": NUMBER,
    "final_loss": NUMBER,
    "heldout_initial": NUMBER,
    "heldout_final": NUMBER,
    "throughput": NUMBER,
    "tokens_per_second": NUMBER,
    "verdicts": list,
    "evidence": str,
    "evidence_id": str,
}
TRAIN_CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: CORPUS, heldout_windows: 4}
train: {steps: 40, batch: 2, sequence: 32, warmup_steps: 2, learning_rate: 3.0e-3, threads: 1}
"""
WITHOUT_US = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer(prompt, return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=16, do_sample=False)
assert not {"engine", "console", "dispatch"} & {name.partition(".")[0] for name in sys.modules}
print(tokenizer.decode(made[0], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> dict[str, Future[Outcome]]:
    """The runs that all tests here look at, each made once and only where a test wants it.

    Where a test looks at how the engine starts and how long that takes, it is a new process; else it is forked.
    """
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")

    def desk(nursery: Nursery | None = None) -> Desk:
        return Desk(tmp_path_factory.mktemp("desk"), nursery)

    def train() -> Outcome:
        config = desk().write("config.yaml", TRAIN_CONFIG.replace("CORPUS", str(corpus)))
        place = desk(nursery)
        outcome = place.call("--headless", "train", str(config), "--max-steps", "12")
        place.is_quiet()
        return outcome

    def unsaved() -> Outcome:
        place = desk(nursery)
        config = place.write("config.yaml", TRAIN_CONFIG.replace("CORPUS", str(corpus)))
        long = ("--set", "train.steps=20000", "--set", "checkpoint.every_steps=0", "--quiet")
        ungated = ("--no-gate", "what is told of checkpoints is looked at")
        going = place.start("--headless", "train", str(config), *long, *ungated)
        until(lambda: place.run.has("step"), "a step")
        stopped = place.call("stop", place.run.path.name)
        assert stopped.rc == 0, stopped.said
        outcome = going.wait()
        place.is_quiet()
        return outcome

    jobs: dict[str, Callable[[], Outcome]] = {
        "good": lambda: desk().smoke("--max-steps", "12", "--name", "a good one", corpus=corpus),
        "seven": lambda: desk(nursery).smoke("--max-steps", "7", "--json", corpus=corpus),
        "hurried": lambda: desk().smoke("--budget", "3", corpus=corpus),
        "train": train,
        "unsaved": unsaved,
    }
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    return side_by_side({name: job for name, job in jobs.items() if name in wanted})


@pytest.fixture(scope="module")
def good(runs: dict[str, Future[Outcome]]) -> Outcome:
    return runs["good"].result()


@pytest.fixture(scope="module")
def seven(runs: dict[str, Future[Outcome]]) -> Outcome:
    return runs["seven"].result()


@pytest.fixture(scope="module")
def hurried(runs: dict[str, Future[Outcome]]) -> Outcome:
    return runs["hurried"].result()


@pytest.fixture(scope="module")
def train(runs: dict[str, Future[Outcome]]) -> Outcome:
    return runs["train"].result()


@pytest.fixture(scope="module")
def unsaved(runs: dict[str, Future[Outcome]]) -> Outcome:
    return runs["unsaved"].result()


@pytest.fixture(scope="module")
def attached(good: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The good run, reported on again from what it wrote."""
    return Desk(tmp_path_factory.mktemp("desk")).call("--headless", "attach", str(good.run.path), "--json")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def last_verdicts(run: RunFiles) -> dict[str, str]:
    return {event["id"]: event["verdict"] for event in run.events("verdict")}


def built_in_falsifiers() -> list[str]:
    contract = yaml.safe_load((ROOT / "engine/assets/contracts/smoke.yaml").read_text())
    return [falsifier["id"] for falsifier in contract["falsifiers"]]


def test_a_good_smoke_says_go_and_exits_0(good: Outcome) -> None:
    assert good.rc == 0, good.said
    assert re.search(r"✔ GO\b", good.out), good.out
    assert "NO-GO" not in good.out


def test_it_prints_the_two_smoke_lines_exactly_as_old_logs_have_them(good: Outcome) -> None:
    first, second = (line for line in good.out.splitlines() if line.startswith("[SMOKE]"))
    assert SMOKE_LINE.fullmatch(first), first
    assert PROJECTED_LINE.fullmatch(second), second
    log = (good.run.path / "launch.log").read_text().splitlines()
    assert first in log
    assert second in log


def test_the_report_has_a_line_for_each_falsifier(good: Outcome) -> None:
    for identifier in built_in_falsifiers():
        [line] = [line for line in good.out.splitlines() if f" {identifier} " in line]
        assert line.startswith("✔ PASS"), line


def test_the_report_has_phases_losses_speed_projection_and_the_way_to_the_evidence(good: Outcome) -> None:
    for words in ("import ", "load-teacher", "final-evaluation", "held-out", "top-1", "tokens/s", "memory peak", "GiB"):
        assert words in good.out, words
    assert str(good.run.path) in good.out


def test_narration_goes_to_standard_error(good: Outcome) -> None:
    assert "phase load-teacher" in good.err
    assert "phase load-teacher" not in good.out
    assert "Traceback" not in good.err


def test_loss_ce_and_kd_each_fall_on_the_held_out_part(good: Outcome) -> None:
    first, last = good.run.events("eval")[0], good.run.events("eval")[-1]
    assert (first["step"], last["step"]) == (0, 12)
    for part in ("loss", "ce", "kd"):
        assert last[part] < first[part], part
    assert last["agreement"] > first["agreement"]


def test_the_evidence_directory_is_complete_and_has_no_weights(good: Outcome) -> None:
    found = {path.name for path in good.run.path.iterdir() if path.name != ".lock"}
    assert found == FILES
    assert not list(good.run.path.rglob("*.safetensors"))


def test_evidence_is_for_its_owner_alone(good: Outcome) -> None:
    for path in (good.evidence, good.run.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in good.run.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_checksums_hold_and_cover_every_file(good: Outcome) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=good.run.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == FILES - {"SHA256SUMS"}


def test_the_stream_has_no_gap_and_one_run(good: Outcome) -> None:
    events = good.run.events()
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert len({event["run"] for event in events}) == 1
    assert {event["v"] for event in events} == {1}
    assert events[-1]["event"] == "end"
    assert [event["step"] for event in good.run.events("step")] == list(range(1, 13))


def test_stream_and_heartbeat_stand_before_torch_is_imported(good: Outcome) -> None:
    kinds = [event["event"] for event in good.run.events()]
    assert kinds[:2] == ["phase", "heartbeat"]
    assert good.run.events("phase")[0]["name"] == "import"
    assert good.run.events("run")[0]["seq"] > 1


def test_the_engine_ends_with_its_exit_code_on_record_and_no_orphan(good: Outcome) -> None:
    record = json.loads((good.run.path / "exit.json").read_text())
    assert record["exit_code"] == 0
    assert record["orphans"] == []
    assert good.run.end["status"] == "COMPLETED"


def test_the_manifest_keeps_the_name_and_no_variable(good: Outcome) -> None:
    manifest = json.loads((good.run.path / "dispatch.json").read_text())
    assert manifest["name"] == "a good one"
    assert manifest["outcome"] == {
        "status": "COMPLETED", "reason": "max_steps is reached", "exit_code": 0, "signal": None, "steps": 12,
    }  # fmt: skip
    assert {v["id"]: v["verdict"] for v in manifest["verdicts"]} == last_verdicts(good.run)
    assert [attempt["end"] for attempt in manifest["attempts"]] == ["exit code 0"]
    assert set(manifest["inputs"]) == {"teacher", "student", "tokenizer", "data"}
    assert manifest["id"] == good.run.path.name
    assert "PYTHONPATH" not in json.dumps(manifest)


def test_attach_judges_the_written_stream_again_and_agrees(good: Outcome, attached: Outcome) -> None:
    assert attached.rc == 0, attached.said
    document = json.loads(attached.out)
    assert {v["id"]: v["verdict"] for v in document["verdicts"]} == last_verdicts(good.run)
    assert document["disagreements"] == []
    assert document["decision"] == "GO"


def test_the_json_document_has_every_key_with_its_type(attached: Outcome, good: Outcome) -> None:
    document: dict[str, Any] = json.loads(attached.out)
    for key, kind in DOCUMENT.items():
        assert isinstance(document[key], kind), key
        assert not isinstance(document[key], bool), key
    assert document["schema"] == "kdconsole.run/1"
    assert document["steps"] == 12
    assert Path(document["evidence"]) == good.run.path
    evidence_id = hashlib.sha256((good.run.path / "SHA256SUMS").read_bytes()).hexdigest()
    assert document["evidence_id"] == evidence_id
    assert f"evidence id {evidence_id}" in good.text
    projection = document["projection"]
    assert projection["target_steps"] == 50_000
    assert 0 < projection["p10_seconds"] <= projection["p50_seconds"] <= projection["p90_seconds"]
    for verdict in document["verdicts"]:
        assert [type(verdict[key]) for key in ("id", "verdict", "expected", "observed", "step")] == [str] * 4 + [int]


def test_the_json_document_has_the_numbers_of_the_stream(attached: Outcome, good: Outcome) -> None:
    document = json.loads(attached.out)
    steps, evals = good.run.events("step"), good.run.events("eval")
    assert (document["initial_loss"], document["final_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert (document["heldout_initial"], document["heldout_final"]) == (evals[0]["loss"], evals[-1]["loss"])
    assert document["tokens_per_second"] == pytest.approx(document["throughput"] * 2 * 32)


@pytest.mark.parametrize("identifier", ["F-DISTILL-SMOKE-001", "F-DISTILL-KDSTEP-001"])
def test_a_verdict_changed_afterwards_is_named_and_exits_5(good: Outcome, desk: Desk, identifier: str) -> None:
    copy = RunFiles(shutil.copytree(good.run.path, desk.cwd / "doctored"))
    lines = copy.stream.read_text().splitlines(keepends=True)
    [index] = [i for i, line in enumerate(lines) if f'"id":"{identifier}"' in line]
    lines[index] = lines[index].replace('"verdict":"PASS"', '"verdict":"FAIL"')
    copy.stream.write_text("".join(lines))
    outcome = desk.call("--headless", "attach", str(copy.path))
    assert outcome.rc == 5, outcome.said
    assert f"{identifier}: the engine says FAIL, the stream says PASS" in outcome.text


def test_a_loss_changed_afterwards_is_noticed(good: Outcome, desk: Desk) -> None:
    copy = RunFiles(shutil.copytree(good.run.path, desk.cwd / "doctored"))
    lines = copy.stream.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"event":"eval"' in line)
    event = json.loads(lines[last])
    lines[last] = json.dumps({**event, "loss": 99.0}, separators=(",", ":")) + "\n"
    copy.stream.write_text("".join(lines))
    outcome = desk.call("--headless", "attach", str(copy.path))
    assert outcome.rc == 5, outcome.said
    assert "F-DISTILL-SMOKE-001: the engine says PASS, the stream says FAIL" in outcome.text


@pytest.mark.parametrize("name", ["launch.log", "dispatch.json", "config.yaml"])
def test_one_byte_changed_afterwards_is_named_and_exits_1(good: Outcome, desk: Desk, name: str) -> None:
    copy = RunFiles(shutil.copytree(good.run.path, desk.cwd / "doctored"))
    raw = bytearray((copy.path / name).read_bytes())
    raw[raw.rindex(b"0")] = ord("1")
    (copy.path / name).write_bytes(raw)
    outcome = desk.call("--headless", "attach", str(copy.path))
    assert outcome.rc == 1, outcome.said
    assert f"since the run ended: {name}: changed" in outcome.err
    assert f"✘ NO-GO not as it was when the run ended: {name}: changed" in outcome.text
    document = json.loads(desk.call("--headless", "attach", str(copy.path), "--json", "--quiet").out)
    assert (document["status"], document["decision"], document["exit_code"]) == ("CHANGED", "NO-GO", 1)
    assert name in document["reason"]


def test_attach_leaves_the_checksums_of_a_finished_run_alone(good: Outcome, desk: Desk) -> None:
    copy = RunFiles(shutil.copytree(good.run.path, desk.cwd / "doctored"))
    sums = (copy.path / "SHA256SUMS").read_text()
    with (copy.path / "launch.log").open("a") as log:
        log.write("added afterwards\n")
    outcome = desk.call("--headless", "attach", str(copy.path))
    assert outcome.rc == 1, outcome.said
    assert (copy.path / "SHA256SUMS").read_text() == sums


def test_max_steps_makes_exactly_that_many_steps(seven: Outcome) -> None:
    assert [event["step"] for event in seven.run.events("step")] == list(range(1, 8))
    assert last_verdicts(seven.run)["FT-SMOKE-001"] == "PASS"


def test_fewer_than_ten_steps_leave_verdicts_undecided_and_exit_5(seven: Outcome) -> None:
    assert seven.rc == 5, seven.said
    document = json.loads(seven.out)
    assert (document["steps"], document["decision"], document["exit_code"]) == (7, "NO-GO", 5)
    undecided = {v["id"] for v in document["verdicts"] if v["verdict"] == "UNKNOWN"}
    assert "F-DISTILL-PIPELINE-001" in undecided
    assert document["projection"] is None


def test_json_is_one_document_and_narration_stays_on_standard_error(seven: Outcome) -> None:
    assert seven.out.startswith("{")
    assert isinstance(json.loads(seven.out), dict)
    assert "phase train" in seven.err


def test_a_budget_that_ends_before_the_tenth_step_is_a_no_go_with_exit_4(hurried: Outcome) -> None:
    assert hurried.rc == 4, hurried.said
    assert "NO-GO" in hurried.out
    assert "budget" in hurried.text
    end = hurried.run.end
    assert (end["status"], end["exit_code"]) == ("TIMEOUT", 4)
    assert "budget" in end["reason"]


def test_the_engine_ends_within_five_seconds_of_its_budget(hurried: Outcome) -> None:
    assert hurried.run.end["seconds"] <= 3 + 5
    assert json.loads((hurried.run.path / "exit.json").read_text())["seconds"] <= 3 + 5


def test_train_with_max_steps_makes_exactly_that_many_and_is_complete(train: Outcome) -> None:
    assert train.rc == 0, train.said
    assert "✔ COMPLETED max_steps is reached" in train.text
    assert [event["step"] for event in train.run.events("step")] == list(range(1, 13))
    [run] = train.run.events("run")
    assert (run["target_steps"], run["max_steps"]) == (40, 12)
    [last] = train.run.events("checkpoint")[-1:]
    assert (last["step"], "final" in last["kind"]) == (12, True)
    verdicts = last_verdicts(train.run)
    assert (verdicts["FT-SMOKE-001"], verdicts["F-EXPORT-001"]) == ("PASS", "PASS")


def test_its_learning_rate_is_that_of_the_whole_run(train: Outcome) -> None:
    from engine.optimizer import learning_rate

    config = load_config(train.run.path / "config.yaml")
    told = [event["lr"] for event in train.run.events("step")]
    assert told == [learning_rate(step, config.train, config.train.warmup_steps) for step in range(1, 13)]
    assert told[-1] > config.train.learning_rate / 2, "not near the end of its schedule"


def test_it_shares_its_gate_fingerprint_with_the_run_that_it_shortens(train: Outcome) -> None:
    [run] = train.run.events("run")
    whole = load_config(train.run.path / "config.yaml", sets=["train.max_steps=null"])
    assert run["gate"] == gate_fingerprint(whole)
    assert run["config"] != fingerprint(whole)


def test_train_writes_a_model_that_transformers_loads(train: Outcome) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(train.run.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(train.run.path / "model")
    ids = torch.tensor([tokenizer("def f1(x): return x + 1\n")["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    # Trained: better than knowing nothing, which costs log(vocabulary).
    assert loss < math.log(model.config.vocab_size) - 1


@pytest.mark.slow
def test_the_model_continues_a_line_where_nothing_of_ours_is_installed(train: Outcome, tmp_path: Path) -> None:
    model = shutil.copytree(train.run.path / "model", tmp_path / "model")
    prompt = "def f1(x):"
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, str(model), prompt],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.startswith(prompt)
    assert len(done.stdout.strip()) > len(prompt)


def test_a_long_run_that_nothing_is_saved_of_is_told_before_launch_and_in_the_stream(unsaved: Outcome) -> None:
    words = "20,000 steps without a periodic checkpoint: a crash loses all of them"
    assert unsaved.rc == 130, unsaved.said
    [line] = unsaved.err.splitlines()
    assert line.startswith(f"warning: {words}"), "whatever --quiet leaves out"
    [log] = [event for event in unsaved.run.events("log") if event["level"] == "warning"]
    assert log["message"].startswith(words)
    assert f"warning: {words}" in (unsaved.run.path / "launch.log").read_text()
    [step] = unsaved.run.events("step")[:1]
    assert log["seq"] < step["seq"]


def test_vitals_of_a_run_on_the_cpu_are_the_hosts_and_the_disks(good: Outcome) -> None:
    first = good.run.events("vitals")[0]
    assert first["t"] - good.run.events()[0]["t"] < 10
    assert 0 <= first["cpu_percent"] <= 100
    assert 0 < first["host_free_bytes"] < first["host_total_bytes"]
    assert 0 < first["disk_free_bytes"] <= first["disk_total_bytes"]
    assert {first[key] for key in first if key.startswith("gpu_")} == {None}
    assert first["unified_memory"] is False


def test_train_leaves_the_same_evidence_as_a_smoke_and_the_model_beside_it(train: Outcome) -> None:
    assert {path.name for path in train.run.path.iterdir() if path.name != ".lock"} == FILES | {"model", "checkpoints"}
    evidence = check_sums(train.run.path)
    assert (evidence.problems, evidence.absent) == ((), ())
    listed = set(read_sums(train.run.path).files)
    weights = {str(path.relative_to(train.run.path)) for path in train.run.path.rglob("*.safetensors")}
    assert weights < listed
    assert {"model/tokenizer.json", "checkpoints/LATEST"} < listed
    digests = json.loads(next(train.run.path.glob("checkpoints/*/manifest.json")).read_text())["state"]["digests"]
    inputs = json.loads((train.run.path / "dispatch.json").read_text())["inputs"]
    assert {name: digests[name] for name in ("teacher", "tokenizer", "data")} == {
        name: digest for name, digest in inputs.items() if name != "student"
    }


def test_runs_lists_what_there_is(good: Outcome, desk: Desk) -> None:
    shown = desk.call("runs", "--evidence", str(good.evidence))
    assert shown.rc == 0
    [line] = shown.out.splitlines()
    assert line.startswith(good.run.path.name)
    assert line.endswith("exit code 0")
    document = json.loads(desk.call("runs", "--evidence", str(good.evidence), "--json").out)
    [run] = document["runs"]
    assert (run["id"], run["mode"], run["state"]) == (good.run.path.name, "smoke", "ended")


def test_attach_takes_the_beginning_of_an_id(good: Outcome, desk: Desk) -> None:
    beginning = good.run.path.name[:8]
    outcome = desk.call("--headless", "attach", beginning, "--evidence", str(good.evidence))
    assert outcome.rc == 0, outcome.said
    assert SMOKE_LINE.search(outcome.out)


def test_stop_says_that_a_run_has_ended(good: Outcome, desk: Desk) -> None:
    outcome = desk.call("stop", good.run.path.name, "--evidence", str(good.evidence))
    assert outcome.rc == 0, outcome.said
    assert outcome.out == f"{good.run.path.name}: had ended already: exit code 0\n"
