"""`kdconsole evaluate`: what it refuses and how, what it would do, and evaluations of tiny models from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from console.cli import cli
from console.evaluation import Subject, configure, find_subject
from dispatch.manifest import Evaluated, Manifest, Remote, read_manifest, write_manifest
from dispatch.model_files import listed_model, model_digest, model_files
from dispatch.runs import create_run
from dispatch.sums import check_sums, read_sums
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, KdError
from tests.console.test_imports import loaded
from tests.console_rig import Desk, Outcome, RunFiles, processes_of, until, write_corpus
from tests.nursery import Nursery
from tests.problem_files import suite_of

CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 6, batch: 2, sequence: 32, threads: 1, warmup_steps: 2, learning_rate: 1.0e-3}
"""
ALLOWED = "--run-generated-code"
SAMPLED = ("--samples", "6", "--temperature", "0.9", "--max-new-tokens", "64", "--batch", "2", "--seed", "5")


def call(evidence: Path, *arguments: object, **variables: str) -> Result:
    """The command in this process; nothing of it may start an engine."""
    given = ["--headless", "evaluate", "--evidence", str(evidence), *map(str, arguments)]
    return CliRunner().invoke(cli, given, standalone_mode=False, env=variables)


def refused(evidence: Path, *arguments: object, **variables: str) -> str:
    """The message of a call that makes nothing; it would end in exit code 2."""
    before = sorted(evidence.rglob("*"))
    result = call(evidence, *arguments, **variables)
    assert isinstance(result.exception, KdError), result.output or result.exception
    assert result.exception.exit_code == 2
    assert sorted(evidence.rglob("*")) == before, "something was made"
    return str(result.exception)


def made_run(evidence: Path, mode: str = "train") -> Path:
    """A run's directory without a model."""
    config = load_config(template="builtin", sets=["teacher.source=hidden"], overrides={"mode": mode})
    return create_run(config, evidence=evidence, contract_text="falsifiers: []\n").path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[tuple[Desk, RunFiles]]:
    """A desk, and a training of six steps there that has exported its model."""
    desk = Desk(tmp_path_factory.mktemp("trained"), nursery)
    desk.write("config.yaml", CONFIG)
    write_corpus(desk.cwd / "corpus.txt")
    outcome = desk.call("--headless", "train", "config.yaml", "-q")
    assert (outcome.run.path / "model" / "model.safetensors").is_file(), outcome.said
    yield desk, outcome.run
    desk.clear()


def evaluations(desk: Desk) -> set[Path]:
    """The directories of a desk's evaluations."""
    return set(desk.evidence.glob("*-evaluate-*"))


def evaluate(desk: Desk, *arguments: object) -> tuple[Outcome, RunFiles]:
    """An evaluation, to its end."""
    before = evaluations(desk)
    outcome = desk.call("--headless", "evaluate", *map(str, arguments))
    [path] = evaluations(desk) - before
    return outcome, RunFiles(path)


@pytest.fixture(scope="module")
def answered(trained: tuple[Desk, RunFiles]) -> tuple[Outcome, RunFiles]:
    """An evaluation of that training's model, by its directory, on two problems."""
    desk, run = trained
    suite_of(desk.cwd / "own.jsonl", 2)
    return evaluate(desk, run.path / "model", "--suite", "own.jsonl", ALLOWED, *SAMPLED, "--json")


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--suite", "humaneval"), ("its answers are programs that a model wrote", f"expected {ALLOWED}", "seccomp")),
        (("--suite", "humaneval", "--set", "evaluate.run_generated_code=true"), ("--set evaluate.run_generated_code",)),
        (("--suite", "humaneval", ALLOWED, "--data", "x.txt"), ("--data", "of the student alone")),
        (("--suite", "humaneval", ALLOWED, "--teacher", "x"), ("--teacher", "of the student alone")),
        (("--suite", "humaneval", ALLOWED, "--samples", "2"), ("--samples: 2", "greedy answers are the same")),
        (("--suite", "humaneval", ALLOWED, "--samples", "many"), ('--samples: "many"', "an integer")),
        (("--suite", "humaneval", ALLOWED, "--limit", "0"), ("--limit: 0",)),
        (("--suite", "humaneval", ALLOWED, "--top-p", "0"), ("--top-p: 0",)),
        (("--suite", "humaneval", ALLOWED, "--seed", ""), ("--seed",)),
        (("--suite", "missing.jsonl", ALLOWED), ("missing.jsonl", "No such file")),
        (("--suite", "gx10:/problems.jsonl", ALLOWED), ("gx10:/problems.jsonl", "on another machine")),
        ((), ("builtin:student", "--data PATH", "--suite humaneval needs no text")),
        (("--data", "builtin:stdlib", "--limit", "2"), ("--limit", "--suite humaneval")),
        (("--data", "builtin:stdlib", ALLOWED), (ALLOWED, "nothing is generated")),
        (("--data", "nowhere"), ("data.path", "no such file or directory")),
        (("--data", "builtin:stdlib", "--set", "evaluate.sample=2"), ("did you mean evaluate.samples",)),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_cannot_be_evaluated_is_one_clear_message(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused(tmp_path / "evidence", "builtin:student", *arguments)
    for word in words:
        assert word in told, told


def test_a_variable_cannot_allow_generated_code(tmp_path: Path) -> None:
    name = "KDCONSOLE_EVALUATE__RUN_GENERATED_CODE"
    told = refused(tmp_path, "builtin:student", "--suite", "humaneval", ALLOWED, **{name: "true"})
    assert name in told
    assert f"expected {ALLOWED}" in told


def test_a_configuration_cannot_allow_generated_code(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    config = (run / "config.yaml").read_text()
    assert "run_generated_code: false" in config
    (run / "config.yaml").write_text(
        config.replace("run_generated_code: false", "run_generated_code: true").replace("heldout\n", "humaneval\n", 1)
    )
    assert "suite: humaneval" in (run / "config.yaml").read_text()
    assert f"expected {ALLOWED}" in refused(tmp_path, run)


def test_a_bad_line_of_a_suite_is_named(tmp_path: Path) -> None:
    suite = suite_of(tmp_path / "own.jsonl")
    suite.write_text(suite.read_text().replace('"entry_point": "twice"', '"entry_point": "2"'))
    assert f"{suite}:2: entry_point '2'" in refused(tmp_path, "builtin:student", "--suite", suite, ALLOWED)


def test_a_run_that_has_no_model_says_what_makes_one(tmp_path: Path) -> None:
    assert "no such run" in refused(tmp_path, "nothing")
    assert "expected a training run or a model's directory" in refused(tmp_path, "not/there")
    run = made_run(tmp_path)
    assert f"kdconsole train --resume {run.name} goes on to its end" in refused(tmp_path, run.name)
    (run / "checkpoints").mkdir()
    assert f"kdconsole export {run.name}" in refused(tmp_path, run)
    (run / "model.rejected").mkdir()
    assert f"its export was rejected: see kdconsole review {run.name}" in refused(tmp_path, run)
    assert "a smoke, which exports no model" in refused(tmp_path, made_run(tmp_path, "smoke"))
    assert "a prepare, which exports no model" in refused(tmp_path, made_run(tmp_path, "prepare"))


def test_a_run_of_a_host_is_evaluated_there_or_needs_what_is_here(tmp_path: Path) -> None:
    config = load_config(template="builtin", sets=["teacher=/there/big", "data.path=/there/text", "mode=train"])
    remote = Remote(host="gx10", run_dir="/base/runs", python="/py", engine="/base/engine/0")
    made = create_run(config, evidence=tmp_path, contract_text="falsifiers: []\n", remote=remote)
    run = made.path
    there = find_subject(run.name, tmp_path, "gx10")
    assert there.model == f"gx10:/base/runs/{run.name}/model"

    def configured(subject: Subject, host: str | None, *sets: str, **given: str) -> RunConfig:
        keys: dict[str, object] = {"data.path": given.get("data"), "teacher.path": given.get("teacher")}
        return configure(
            subject, host, given=keys, sets=sets, environ={}, run_generated_code=False, walls=lambda: "behind a wall"
        )

    config = configured(there, "gx10")
    assert config.teacher is not None
    assert (config.teacher.path, config.data.path) == ("gx10:/there/big", "gx10:/there/text")
    told = refused(tmp_path, run.name)
    assert f"kdconsole fetch {run.name} --model brings it here, --host gx10 evaluates it there" in told
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    here = find_subject(run.name, tmp_path, None)
    assert here.model == str(run / "model")
    with pytest.raises(ConfigError, match="/there/text is on gx10; expected --host gx10, or --data PATH"):
        configured(here, None)
    with pytest.raises(ConfigError, match="/there/big is on gx10; expected --host gx10, or --teacher DIR"):
        configured(here, None, data="builtin:stdlib")
    config = configured(here, None, "teacher=null", data="builtin:stdlib")
    assert (config.teacher, config.distill.alpha) == (None, 1.0)
    assert "docs/sandbox.md" in refused(tmp_path, run.name, "--suite", "humaneval"), "it needs no text and no teacher"


def test_either_a_model_or_a_run_to_resume(tmp_path: Path) -> None:
    for arguments in ((), ("builtin:student", "--resume", "x")):
        assert "give either RUN|DIR or --resume RUN" in str(call(tmp_path, *arguments).exception)
    assert "leave out --limit" in str(call(tmp_path, "--resume", "x", "--limit", "2").exception)


def test_a_model_that_was_changed_since_its_run_ended_is_not_that_runs(trained: tuple[Desk, RunFiles]) -> None:
    desk, run = trained
    card = run.path / "model" / "README.md"
    before = card.read_bytes()
    try:
        card.write_bytes(before + b"\n")
        told = refused(desk.evidence, run.path.name)
    finally:
        card.write_bytes(before)
    assert "not the model/ that its SHA256SUMS has: README.md" in told
    assert f"kdconsole evaluate {run.path / 'model'}" in told


def test_what_a_console_starts_it_with_has_no_torch(tmp_path: Path) -> None:
    arguments = ["--headless", "evaluate", "builtin:student", "--suite", "humaneval", ALLOWED, "--dry-run", "--json"]
    assert loaded(tmp_path, [], arguments) == "loaded: []"


# What it would do


def planned(evidence: Path, *arguments: object) -> dict[str, Any]:
    result = call(evidence, *arguments, "--dry-run", "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output or result.exception
    assert not list(evidence.glob("*-evaluate-*")), "a dry run made something"
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_dry_run_tells_of_the_problems_and_of_what_contains_the_answers(tmp_path: Path) -> None:
    told = planned(tmp_path, "builtin:student", "--suite", suite_of(tmp_path / "own.jsonl"), ALLOWED, "--limit", "2")
    steps = {step["step"]: step for step in told["steps"]}
    assert told["mode"] == "evaluate"
    assert "the first 2 of 3 problems of" in steps["ask"]["text"]
    assert "1 answer each, greedy, of at most 512 tokens" in steps["ask"]["text"]
    assert "seccomp" in steps["contain"]["text"]
    assert "at most 15 s, 5 s of CPU, 512 MiB" in steps["contain"]["text"]
    assert steps["make"]["files"][-1] == "problems.jsonl"
    assert "Ctrl-C stops the run" in steps["follow"]["text"]
    assert "gate" not in steps


def test_a_dry_run_of_a_training_takes_over_what_it_had(trained: tuple[Desk, RunFiles]) -> None:
    desk, run = trained
    told = planned(desk.evidence, run.path.name)
    steps = {step["step"]: step for step in told["steps"]}
    assert steps["ask"]["text"] == "held-out losses on 4 windows of 32 tokens beside its teacher"
    assert steps["ask"]["run"] == run.path.name
    assert steps["ask"]["model"] == str(run.path / "model")
    assert steps["ask"]["model_sha256"] == model_digest(model_files(run.path / "model"))
    assert steps["ask"]["model_sha256"] == model_digest(listed_model(read_sums(run.path).files))
    assert "contain" not in steps


# What it does


def test_a_trainings_model_is_held_against_its_teacher(trained: tuple[Desk, RunFiles]) -> None:
    desk, run = trained
    outcome, made = evaluate(desk, run.path.name, "--json", "--name", "after six steps")
    assert outcome.rc == 0, outcome.said
    told = json.loads(outcome.out)
    final = run.events("eval")[-1]
    assert told["mode"] == "evaluate"
    names = {"heldout_loss", "heldout_perplexity", "teacher_agreement", "teacher_kl"}
    assert told["evaluation"]["heldout"].keys() == names
    assert told["evaluation"]["heldout"]["heldout_loss"] == pytest.approx(final["ce"], abs=0.02), "bf16 on disk"
    config, trained_with = load_config(made.path / "config.yaml"), load_config(run.path / "config.yaml")
    assert config.student.path == str(run.path / "model")
    assert config.data == trained_with.data
    assert config.teacher == trained_with.teacher
    manifest = read_manifest(made.path)
    assert manifest.evaluated is not None
    assert (manifest.evaluated.run_id, manifest.evaluated.run) == (run.path.name, read_manifest(run.path).run)
    assert manifest.evaluated.sha256 == model_digest(model_files(run.path / "model"))
    assert manifest.name == "after six steps"
    assert check_sums(made.path).problems == ()
    assert f"kdconsole evaluate {run.path.name} makes another one" in refused(desk.evidence, made.path.name)


def test_problems_are_asked_and_every_answer_is_kept(
    trained: tuple[Desk, RunFiles], answered: tuple[Outcome, RunFiles]
) -> None:
    (desk, run), (outcome, made) = trained, answered
    assert outcome.rc == 0, outcome.said
    told, model, suite = json.loads(outcome.out)["evaluation"], run.path / "model", desk.cwd / "own.jsonl"
    assert told["whole"]
    assert told["pass_at"]["1"] == 0
    controls = {"empty": 0, "pass": 0, "constant": 0, "canonical": 1}
    assert {each["name"]: each["observed"] for each in told["controls"]} == controls
    assert (made.path / "problems.jsonl").read_bytes() == suite_of(suite, 2).read_bytes()
    for name in ("completions.jsonl", "results.jsonl"):
        tasks = [json.loads(line)["task"] for line in (made.path / name).read_text().splitlines()]
        assert sorted(tasks) == ["Own/add"] * 6 + ["Own/twice"] * 6
    assert {"problems.jsonl", "completions.jsonl", "results.jsonl"} <= read_sums(made.path).files.keys()
    assert check_sums(made.path).problems == ()
    config, manifest = load_config(made.path / "config.yaml"), read_manifest(made.path)
    assert (config.teacher, config.data.path, config.evaluate.suite) == (None, "builtin:stdlib", str(suite))
    assert manifest.evaluated == Evaluated(model=str(model), sha256=model_digest(model_files(model)))


def test_another_attempt_is_asked_for_by_the_command_that_made_the_first(
    trained: tuple[Desk, RunFiles], answered: tuple[Outcome, RunFiles]
) -> None:
    (desk, run), (_, made) = trained, answered
    before = read_manifest(made.path)
    whole = refused(desk.evidence, "--resume", made.path.name, ALLOWED)
    assert "complete already; start a new run to ask again" in whole
    other = refused(desk.evidence, "--resume", run.path.name)
    assert f"expected an evaluation; kdconsole train --resume {run.path.name}" in other
    given = ["--headless", "train", "--evidence", str(desk.evidence), "--resume", made.path.name]
    wrong = CliRunner().invoke(cli, given, standalone_mode=False).exception
    assert f"expected a training run; kdconsole evaluate --resume {made.path.name} {ALLOWED}" in str(wrong)
    assert read_manifest(made.path) == before, "a refusal changed the evidence"


def test_ctrl_c_stops_it_and_a_resume_ends_where_nothing_had_happened(
    trained: tuple[Desk, RunFiles], answered: tuple[Outcome, RunFiles]
) -> None:
    (desk, run), (_, undisturbed) = trained, answered
    suite, before = suite_of(desk.cwd / "other.jsonl", 2), evaluations(desk)
    model = str(run.path / "model")
    console = desk.start("--headless", "evaluate", model, "--suite", "other.jsonl", ALLOWED, *SAMPLED)
    until(lambda: evaluations(desk) - before, "its directory")
    [path] = evaluations(desk) - before
    made, answers = RunFiles(path), path / "completions.jsonl"
    until(lambda: answers.is_file() and answers.read_bytes().count(b"\n"), "the first answers")
    console.interrupt()
    stopped = console.wait()
    assert stopped.rc == 130, stopped.said
    assert f"it goes on with: kdconsole evaluate --resume {path.name} {ALLOWED}" in stopped.err
    assert made.end["status"] == "STOPPED"
    assert not processes_of(path)
    kept = answers.read_bytes().count(b"\n")
    assert 0 < kept <= 12

    manifest = read_manifest(path)
    unasked = refused(desk.evidence, "--resume", path.name)
    assert "goes on to run generated code; expected your word for it; kdconsole evaluate --resume" in unasked
    assert read_manifest(path) == manifest, "a refusal changed the evidence"

    suite.unlink()  # the run has its problems
    resumed = desk.call("--headless", "evaluate", "--resume", path.name, ALLOWED)
    assert resumed.rc == 0, resumed.said
    assert f"generate: {12 - kept} answers, {kept} are there" in resumed.err or kept == 12, resumed.err
    assert answers.read_bytes() == (undisturbed.path / "completions.jsonl").read_bytes()
    assert judged(made) == judged(undisturbed)
    assert check_sums(path).problems == ()
    assert len(read_manifest(path).attempts) == 2


def judged(run: RunFiles) -> set[tuple[str, int, bool, str]]:
    """What became of each answer."""
    rows = [json.loads(line) for line in (run.path / "results.jsonl").read_text().splitlines()]
    return {(row["task"], row["sample"], row["passed"], row["outcome"]) for row in rows}


# What is read of it


def test_a_manifest_without_the_evaluated_model_is_read_as_before(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    document = json.loads((run / "dispatch.json").read_text())
    assert document.pop("evaluated") is None
    (run / "dispatch.json").write_text(json.dumps(document))
    manifest: Manifest = read_manifest(run)
    assert manifest.evaluated is None
    write_manifest(run, manifest)
    assert read_manifest(run) == manifest
