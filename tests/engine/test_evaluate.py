"""An evaluation from its first phase to its figures: real models, real programs behind real walls."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine import generate, problem_suite, sandbox, stepless
from engine.answers import AnswersError
from engine.errors import ConfigError, ExitCode, KdError, ModelError
from engine.evaluate import Evaluator
from engine.falsifiers import parse_contract
from engine.problems import COMPLETIONS, RESULTS, SuiteError, humaneval_text
from engine.recorder import Recorder
from engine.sandbox import Containment, SandboxError, containment
from engine.stop import StopRequest
from engine.stream import Control, Phase, Progress
from engine.stream import Problem as ProblemEvent
from tests.console_rig import until
from tests.engine.evaluate_rig import (
    LEARNED,
    PROBLEMS_OF_OURS,
    REST,
    Rig,
    as_lines,
    controls_of,
    events_of,
    left_in,
    problems_of,
    progress_of,
    save_learned,
)
from tests.nursery import Forked, Nursery
from tests.streams import RUN

RIGHT = {"empty": 0.0, "pass": 0.0, "constant": 0.0, "canonical": 1.0}
PHASES = ["load-data", "controls", "load-student", "generate", "run", "judge"]
ONE = PROBLEMS_OF_OURS[:1]
ENGINE_SECONDS = 120.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_learned(tmp_path_factory.mktemp("learned") / "model")


@pytest.fixture
def rig(tmp_path: Path, learned: Path) -> Rig:
    """Of the model that knows the answers of the first problems."""
    return Rig(tmp_path, str(learned))


@pytest.fixture
def random_rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def every_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepless, "PROGRESS_SECONDS", 0.0)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, learned: Path) -> Path:
    """A run directory whose evaluation is over, its results in the order of the problems."""
    rig = Rig(tmp_path_factory.mktemp("evaluated"), str(learned))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepless, "PROGRESS_SECONDS", 0.0)
        rig.evaluate("evaluate.workers=1", "evaluate.limit=9")
    return rig.root / "run-1"


@pytest.fixture
def finished(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "finished"
    copy.mkdir()
    for path in evaluated.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_student_that_knows_two_answers_of_three_scores_two_thirds(evaluated: Path) -> None:
    done = left_in(evaluated)
    assert (done.end.status, done.end.exit_code, done.end.reason) == ("COMPLETED", ExitCode.OK, "2 of 3 problems")
    assert done.phases == PHASES
    assert controls_of(done) == RIGHT
    assert done.measures == {f"control_{name}": score for name, score in RIGHT.items()} | {"pass_at_1": 2 / 3}
    assert set(done.verdicts.values()) == {"PASS"}
    assert [answer.completion for answer in done.answers] == [
        *(problem.canonical for problem in PROBLEMS_OF_OURS[:LEARNED]),
        REST,
    ]
    assert {answer.finish for answer in done.answers} == {"stop"}
    told = problems_of(done)
    assert {key: (event.passed, event.outcome) for key, event in told.items()} == done.scores
    assert [done.scores[problem.task, 0] for problem in PROBLEMS_OF_OURS] == [
        *[(True, "passed")] * LEARNED,
        (False, "wrong"),
    ]
    assert all(told[answer.key].tokens == answer.tokens and not told[answer.key].again for answer in done.answers)
    figures = done.end.summary
    assert (figures["pass_at_1"], figures["problems"], figures["passed"]) == (2 / 3, 3, 2)
    assert figures["tokens"] == sum(answer.tokens for answer in done.answers)
    assert figures["tokens_per_second"] > 0
    units = {(event.unit, event.total) for event in done.of(Progress)}
    assert units == {("programs", 12), ("completions", 3), ("programs", 3)}
    assert done.logs.count("warning:") == len(containment().missing)


def test_humaneval_s_first_20_a_random_student_solves_none_and_the_controls_stand(random_rig: Rig) -> None:
    done = random_rig.evaluate("evaluate.limit=20", "evaluate.batch=20", suite="humaneval", problems=humaneval_text())
    assert controls_of(done) == RIGHT
    assert done.measures["part_pass_at_1"] == 0
    assert not [name for name in done.measures if name.startswith("pass_at")]
    assert (done.end.status, done.end.exit_code) == ("COMPLETED", ExitCode.UNDECIDED)
    assert done.end.reason == "0 of 20 problems, the first of 164"
    assert {id_: v for id_, v in done.verdicts.items() if "CONTROL" not in id_} == {
        "F-DISTILL-HUMANEVAL-001": "UNKNOWN",
        "F-HUMANEVAL-V2-001": "UNKNOWN",
        "F-HUMANEVAL-V2-002": "UNKNOWN",
    }
    assert {v for id_, v in done.verdicts.items() if "CONTROL" in id_} == {"PASS"}
    assert len(done.answers) == len(done.results) == 20


@pytest.mark.slow
def test_humaneval_whole_the_controls_stand_and_a_random_student_solves_none(random_rig: Rig) -> None:
    done = random_rig.evaluate("evaluate.batch=41", suite="humaneval", problems=humaneval_text())
    assert controls_of(done) == RIGHT
    assert {event.problems for event in done.of(Control)} == {164}
    assert done.measures["pass_at_1"] == 0
    assert (done.end.status, done.end.exit_code) == ("FAILED", ExitCode.FAILED)
    assert done.verdicts["F-HUMANEVAL-V2-001"] == "FAIL"
    assert done.end.summary["phase_controls_seconds"] < 300


@pytest.mark.parametrize(
    ("change", "off", "named"),
    [
        ({"test": "def check(candidate):\n    pass\n"}, {"empty", "pass", "constant"}, "own/first (passed)"),
        ({"test": "def check(candidate):\n    assert candidate([3])\n"}, {"constant"}, "own/first (passed)"),
        ({"test": "def check(candidate):\n    assert not candidate([0])\n"}, {"empty", "pass"}, "own/first (passed)"),
        ({"canonical": "    return items[-1]\n"}, {"canonical"}, "own/first (wrong"),
        ({"canonical": "    return items[\n"}, {"canonical"}, "own/first (error: SyntaxError"),
    ],
)
def test_a_control_that_is_off_ends_the_run_before_anything_is_generated(
    rig: Rig, change: dict[str, str], off: set[str], named: str
) -> None:
    done = rig.evaluate(problems=[replace(PROBLEMS_OF_OURS[1], **change)])
    assert (done.end.status, done.end.exit_code) == ("FAILED", ExitCode.UNDECIDED)
    assert done.end.reason.startswith("controls: ")
    assert done.end.reason.endswith(": the result is unknown")
    assert done.phases == ["load-data", "controls", "judge"]
    assert {name for name, score in controls_of(done).items() if score != RIGHT[name]} == off
    assert {f"control_{name}" for name in RIGHT} == set(done.measures)
    assert set(done.verdicts.values()) == {"PASS", "FAIL"}
    for name in off:
        assert f"{name} scored {1 - RIGHT[name]:g} and not" in done.end.reason
        assert f"error: control {name}: {named}" in done.logs
    assert done.answers == []


def test_controls_that_are_off_are_unknown_even_where_a_contract_calls_them_fatal(rig: Rig) -> None:
    problems = [replace(PROBLEMS_OF_OURS[0], test="def check(candidate):\n    pass\n")]
    contract = rig.contract(rig.config()).replace("at_most: 0", "at_most: 0\n    severity: fatal")
    done = rig.evaluate(problems=problems, contract=contract)
    assert done.end.exit_code == ExitCode.UNDECIDED
    assert done.verdicts["F-EVALUATE-CONTROL-001"] == "FAIL"


def test_a_part_of_a_file_brings_another_measure(rig: Rig) -> None:
    done = rig.evaluate("evaluate.limit=1")
    assert (done.measures["part_pass_at_1"], done.end.reason) == (1.0, "1 of 1 problems, the first of 3")
    assert "pass_at_1" not in done.measures
    assert len(done.answers) == 1


def test_what_is_not_humaneval_is_not_judged_as_humaneval(rig: Rig) -> None:
    done = rig.evaluate(suite="humaneval", problems=ONE)
    assert "warning: problems.jsonl is not HumanEval as it was published: 1 problems" in done.logs
    assert "pass_at_1" not in done.measures
    assert done.measures["part_pass_at_1"] == 1
    assert done.end.exit_code == ExitCode.UNDECIDED


def test_several_answers_a_problem_bring_pass_at_ten_by_the_estimator(rig: Rig) -> None:
    done = rig.evaluate("evaluate.samples=11", "evaluate.temperature=1.2", "evaluate.batch=4", problems=ONE)
    right = sum(passed for passed, _ in done.scores.values())
    assert 0 < right < 11
    assert done.measures["pass_at_1"] == pytest.approx(right / 11)
    assert done.measures["pass_at_10"] == pytest.approx(10 / 11 if right == 1 else 1)
    assert "pass_at_100" not in done.measures
    assert len({answer.seed for answer in done.answers}) == 3
    assert len({answer.completion for answer in done.answers}) > 1
    assert done.end.reason == "1 of 1 problems solved by one of 11 answers at least"


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_ends_with_130(rig: Rig, phase: str) -> None:
    done = rig.evaluate(problems=ONE, stop_when=lambda event: isinstance(event, Phase) and event.name == phase)
    assert (done.end.status, done.end.exit_code) == ("STOPPED", ExitCode.INTERRUPTED)
    assert done.end.reason.startswith(f"SIGTERM in phase {phase}")
    assert done.phases == PHASES[: PHASES.index(phase) + 1]
    if phase != "load-data":
        made, judged = int(PHASES.index(phase) > 3), int(phase == "judge")
        assert f"of 1 answers {made} are generated and {judged} judged" in done.end.reason


def test_what_was_stopped_goes_on_and_comes_to_the_same(
    rig: Rig, every_progress: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("evaluate.samples=5", "evaluate.temperature=1.2", "evaluate.batch=2")
    whole = rig.evaluate(*sets, problems=ONE)
    made: list[int] = []
    plain = generate.Generator.complete

    def counted(self: generate.Generator, *arguments: Any, **more: Any) -> list[generate.Completion]:
        completions = plain(self, *arguments, **more)
        made.append(len(completions))
        return completions

    monkeypatch.setattr(generate.Generator, "complete", counted)
    run_dir = rig.run_dir()
    first = rig.evaluate(
        *sets, problems=ONE, run_dir=run_dir, stop_when=lambda event: progress_of(event, "completions") == 2
    )
    assert "of 5 answers 2 are generated and 0 judged" in first.end.reason
    assert first.answers == whole.answers[:2]
    second = rig.evaluate(*sets, problems=ONE, run_dir=run_dir, stop_when=lambda event: isinstance(event, ProblemEvent))
    assert 1 <= len(second.results) < 5
    last = rig.evaluate(*sets, problems=ONE, run_dir=run_dir)
    assert made == [2, 2, 1]
    assert last.answers == whole.answers
    assert last.scores == whole.scores
    assert len(last.results) == len(last.of(ProblemEvent)) == 5
    assert last.measures["pass_at_1"] == whole.measures["pass_at_1"]
    assert last.end.exit_code == whole.end.exit_code
    assert last.phases.count("controls") == 3
    assert last.phases.count("load-student") == 2


def test_a_result_that_the_stream_lacks_is_told_again_and_no_other(rig: Rig, finished: Path) -> None:
    stream = finished / "events.jsonl"
    lines = stream.read_bytes().splitlines(keepends=True)
    first_result = next(place for place, text in enumerate(lines) if b'"event":"problem"' in text)
    stream.write_bytes(b"".join(lines[: first_result + 1]))
    again = rig.evaluate(run_dir=finished)
    assert [event.again for event in again.of(ProblemEvent)] == [False, True, True]
    assert again.end.reason == "2 of 3 problems"
    assert again.phases[-3:] == ["controls", "run", "judge"]


def test_half_a_line_and_half_a_batch_are_made_again(rig: Rig, finished: Path) -> None:
    whole = left_in(finished)
    answers, results = finished / COMPLETIONS, finished / RESULTS
    cut = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(cut[0] + cut[1][:-9])
    results.write_bytes(b'{"task": "ow')
    done = rig.evaluate(run_dir=finished)
    assert [event.detail for event in done.of(Phase) if event.name == "generate"] == ["3 answers"] * 2
    assert done.answers == whole.answers
    assert done.scores == whole.scores


def _other(line: bytes, **changes: object) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(line) | changes) + b"\n"


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            COMPLETIONS,
            lambda a: [a[1], a[0], *a[2:]],
            "completions.jsonl:1: task own/first sample 0; expected task own/d",
        ),
        (
            COMPLETIONS,
            lambda a: [*a, _other(a[0], sample=1)],
            "completions.jsonl:4: task own/double sample 1; expected",
        ),
        (
            COMPLETIONS,
            lambda a: [_other(a[0], seed=1)],
            "completions.jsonl:1: task own/double sample 0 has seed 1;",
        ),
        (COMPLETIONS, lambda a: [a[0], b"\n", a[1]], "completions.jsonl:2: "),
        (COMPLETIONS, lambda a: [_other(a[0], extra=1)], "completions.jsonl:1: Object contains unknown field `extra`"),
        (COMPLETIONS, lambda a: [_other(a[0], finish="bored")], "completions.jsonl:1: Invalid enum value 'bored'"),
        (COMPLETIONS, lambda a: a[:2], "results.jsonl:3: task own/shout sample 0; expected a result of an answer"),
        (RESULTS, lambda r: [r[0], r[0]], "results.jsonl:2: task own/double sample 0 for the second time"),
        (
            RESULTS,
            lambda r: [_other(r[0], passed=False)],
            "results.jsonl:1: passed is False and outcome passed;",
        ),
        (RESULTS, lambda r: [_other(r[0], task="own/\x1b")], "results.jsonl:1: task own/\\x1b sample 0; expected"),
    ],
)
def test_answers_and_results_of_something_else_are_refused_by_name(
    rig: Rig, finished: Path, file: str, edit: object, message: str
) -> None:
    path = finished / file
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(edit(lines)))  # type: ignore[operator]
    with pytest.raises(AnswersError) as refused:
        rig.evaluate(run_dir=finished)
    assert str(refused.value).startswith(message)
    assert refused.value.exit_code == ExitCode.UNDECIDED
    assert [event.name for event in events_of(finished) if isinstance(event, Phase)] == [*PHASES, "load-data"]


def test_answers_of_another_student_or_to_other_problems_are_refused(rig: Rig, random_rig: Rig, finished: Path) -> None:
    others = [replace(problem, prompt=problem.prompt.replace("x", "y")) for problem in PROBLEMS_OF_OURS]
    with pytest.raises(AnswersError, match=r"made with other problems: SHA-256 [0-9a-f]{11}… then"):
        rig.evaluate(run_dir=finished, problems=others)
    with pytest.raises(AnswersError, match=r"completions\.jsonl: made with another student"):
        random_rig.evaluate(run_dir=finished)


def test_without_consent_no_engine_runs_code(rig: Rig, tmp_path: Path) -> None:
    config = rig.config()
    refused = msgspec.structs.replace(
        config, evaluate=msgspec.structs.replace(config.evaluate, run_generated_code=False)
    )
    run_dir = rig.run_dir()
    (run_dir / "problems.jsonl").write_bytes(as_lines(ONE))
    recorder = Recorder(run_dir / "events.jsonl", RUN, parse_contract(rig.contract(config), "contract.yaml"))
    try:
        with pytest.raises(ConfigError, match=r"its answers are programs.*say --run-generated-code"):
            Evaluator(refused, run_dir, recorder, StopRequest(), 0.0, "0" * 64).run()
    finally:
        recorder.machine.close()
    assert left_in(run_dir).phases == []


def test_where_a_program_cannot_be_contained_none_is_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Containment((), ("no seccomp: a program can reach the network",), False, "nothing stands", "go elsewhere")
    for module in (sandbox, problem_suite):
        monkeypatch.setattr(module, "containment", lambda: none)
    run_dir = rig.run_dir()
    with pytest.raises(SandboxError, match=r"so none is run: nothing stands.*go elsewhere"):
        rig.evaluate(run_dir=run_dir)
    left = left_in(run_dir)
    assert left.phases == PHASES[:2]
    assert "warning: generated code: no seccomp: a program can reach the network" in left.logs


def test_a_prompt_that_leaves_too_little_room_is_told(rig: Rig) -> None:
    done = rig.evaluate(
        "evaluate.max_new_tokens=250",
        problems=ONE,
        stop_when=lambda event: isinstance(event, Phase) and event.name == "generate",
    )
    assert "warning: 1 prompts leave less than evaluate.max_new_tokens (250) in the model's context of 256" in done.logs


@pytest.mark.parametrize(
    ("sets", "problems", "error", "message"),
    [
        ((), b'{"task_id": 1}\n', SuiteError, "problems.jsonl:1: Expected `str`"),
        ((), None, SuiteError, "problems.jsonl: cannot be read: No such file"),
        (("student.path=/nowhere",), as_lines(ONE), ModelError, "/nowhere"),
    ],
)
def test_what_is_missing_or_wrong_is_refused_before_the_controls(
    rig: Rig, sets: tuple[str, ...], problems: bytes | None, error: type[KdError], message: str
) -> None:
    run_dir = rig.run_dir()
    with pytest.raises(error, match=message):
        rig.evaluate(*sets, problems=problems, run_dir=run_dir)
    assert left_in(run_dir).phases == ["load-data"]


def test_a_student_without_a_tokenizer_says_where_one_may_be_named(rig: Rig, learned: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in learned.iterdir():
        if path.name != "tokenizer.json":
            (bare / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=r"no tokenizer.json.*set data.tokenizer to its directory"):
        rig.evaluate(f"student.path={bare}", problems=ONE)
    done = rig.evaluate(f"student.path={bare}", "data.tokenizer=builtin", problems=ONE)
    assert done.measures["pass_at_1"] == 1


def test_held_out_text_brings_loss_perplexity_and_what_the_teacher_thinks(random_rig: Rig) -> None:
    done = random_rig.evaluate(suite="heldout", problems=None)
    assert done.phases == ["load-student", "load-data", "load-teacher", "evaluate", "judge"]
    assert set(done.measures) == {"heldout_loss", "heldout_perplexity", "teacher_agreement", "teacher_kl"}
    assert 6 < done.measures["heldout_loss"] < 12
    assert done.measures["teacher_kl"] > 1
    assert 0 <= done.measures["teacher_agreement"] < 0.2
    assert done.end.summary["heldout_loss"] == done.measures["heldout_loss"]
    assert done.end.summary["tokens"] == 4 * 32
    assert done.verdicts == {"F-EVALUATE-HELDOUT-001": "PASS", "F-DISTILL-V2-001": "FAIL"}
    assert (done.end.status, done.end.exit_code) == ("COMPLETED", ExitCode.OK)
    alone = random_rig.evaluate("teacher=null", "distill.alpha=1", suite="heldout", problems=None)
    assert set(alone.measures) == {"heldout_loss", "heldout_perplexity"}
    assert alone.measures["heldout_loss"] == done.measures["heldout_loss"]
    assert "load-teacher" not in alone.phases


def test_a_teacher_on_held_out_text_agrees_with_itself(random_rig: Rig) -> None:
    done = random_rig.evaluate("student.path=builtin:teacher", suite="heldout", problems=None)
    assert done.measures["teacher_agreement"] == 1
    assert abs(done.measures["teacher_kl"]) < 1e-5


@pytest.mark.parametrize("phase", ["load-data", "evaluate"])
def test_a_stop_on_held_out_text_ends_with_130(random_rig: Rig, phase: str) -> None:
    done = random_rig.evaluate(
        suite="heldout", problems=None, stop_when=lambda event: isinstance(event, Phase) and event.name == phase
    )
    assert (done.end.status, done.end.exit_code) == ("STOPPED", ExitCode.INTERRUPTED)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Engine:
    """The engine's own process on a run directory."""

    def __init__(self, nursery: Nursery, run_dir: Path) -> None:
        self.process: Forked = nursery.fork("engine", str(run_dir), cwd=run_dir, log=run_dir / "launch.log")

    def when_there_are(self, path: Path, lines: int, number: signal.Signals) -> int:
        """Sends a signal as soon as a file has so many lines; the exit code."""
        until(lambda: lines_in(path) >= lines, f"{lines} lines in {path.name}", ENGINE_SECONDS)
        os.kill(self.process.pid, number)
        return self.process.wait()


def test_an_engine_that_is_killed_twice_comes_to_what_an_undisturbed_one_comes_to(rig: Rig, nursery: Nursery) -> None:
    """SIGKILL while it generates and while programs run: the real process, and the same answers and results."""
    sets = ("evaluate.samples=8", "evaluate.temperature=1.2", "evaluate.batch=1", "evaluate.max_new_tokens=40")
    whole = rig.evaluate(*sets, problems=ONE)
    run_dir = rig.create(*sets, problems=ONE)
    killed = Engine(nursery, run_dir).when_there_are(run_dir / COMPLETIONS, 1, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    first = left_in(run_dir)
    assert first.phases[-1] == "generate"
    assert first.answers == whole.answers[: len(first.answers)]
    Engine(nursery, run_dir).when_there_are(run_dir / RESULTS, 1, signal.SIGKILL)
    second = left_in(run_dir)
    assert second.phases[-1] == "run"
    assert 1 <= len(second.results) < 8
    assert Engine(nursery, run_dir).process.wait() == whole.end.exit_code
    last = left_in(run_dir)
    assert last.answers == whole.answers
    assert last.scores == whole.scores
    assert len(last.of(ProblemEvent)) == 8
    assert last.measures["pass_at_1"] == whole.measures["pass_at_1"]


@pytest.mark.parametrize(("file", "phase"), [(COMPLETIONS, "generate"), (RESULTS, "run")])
def test_sigterm_ends_the_engine_with_130_and_what_is_there_stays(
    rig: Rig, nursery: Nursery, file: str, phase: str
) -> None:
    run_dir = rig.create("evaluate.samples=8", "evaluate.temperature=0.9", "evaluate.batch=1", problems=ONE)
    assert Engine(nursery, run_dir).when_there_are(run_dir / file, 1, signal.SIGTERM) == ExitCode.INTERRUPTED
    left = left_in(run_dir)
    assert left.end.status == "STOPPED"
    assert left.end.reason.startswith(f"SIGTERM in phase {phase}; of 8 answers {len(left.answers)} are generated and")
    assert f"{len(left.results)} judged" in left.end.reason
