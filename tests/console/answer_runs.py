"""Evaluations that never were: what their streams and files hold, for every test that needs one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.falsifiers import JUDGE_PHASE, Contract, builtin_contract, parse_contract
from engine.pass_at_k import mean_pass_at_k
from engine.stream import Control, End, Event, Heartbeat, Inputs, Measure, Phase, Problem, Progress
from tests.console.run_dirs import live, make_run, shifted
from tests.streams import run_event, stamped, with_verdicts

GOOD = {"empty": 0.0, "pass": 0.0, "constant": 0.0, "canonical": 1.0}
ENDS = ("passed", "wrong", "passed", "error", "passed", "time", "wrong", "memory", "passed", "gone")
"""What becomes of answers, over and over."""
DETAILS = {
    "wrong": "AssertionError",
    "error": "NameError: name 'foo' is not defined",
    "time": "ended after 15 s of wall time",
    "memory": "MemoryError",
    "gone": "its process ended without a word",
}
STUDENT = "/models/students/smollm2-135m-distilled/model"
HUMANEVAL = ["evaluate.suite=humaneval", "evaluate.run_generated_code=true"]


def problems_contract() -> Contract:
    """What an evaluation on HumanEval is judged by."""
    return parse_contract(builtin_contract("evaluate-humaneval"), "contract.yaml")


def outcome(problem: int, sample: int) -> str:
    """What became of an answer."""
    return ENDS[(problem * 7 + sample * 3) % len(ENDS)]


def controls(scores: Mapping[str, float], problems: int) -> list[Event]:
    """What the controls told."""
    told: list[Event] = []
    for name, score in scores.items():
        named = "" if score == GOOD.get(name) else "HumanEval/3 (passed), HumanEval/7 (passed) and 23 more"
        told.append(Control(name=name, expected=GOOD[name], observed=score, problems=problems, detail=named))
        told.append(
            Measure(name=f"control_{name}", value=score, detail=f"{problems * score:.0f} of {problems} problems")
        )
    return told


def answered(problems: int, samples: int, first: int = 0) -> list[Event]:
    """Answers as they were judged."""
    return [
        Problem(
            task=f"HumanEval/{problem}",
            sample=sample,
            passed=outcome(problem, sample) == "passed",
            outcome=outcome(problem, sample),
            detail=DETAILS.get(outcome(problem, sample), ""),
            tokens=40 + problem,
            seconds=0.03,
        )
        for problem in range(first, problems)
        for sample in range(samples)
    ]


def beginning(problems: int, scores: Mapping[str, float], attempt: int = 1) -> list[Event]:
    """Everything before the first answer is generated."""
    about = {"mode": "evaluate", "teacher": None, "student": STUDENT, "target_steps": 0, "budget_seconds": None}
    return [
        Phase(name="import"),
        run_event(**about, tokens_per_step=0, attempt=attempt),
        Phase(name="load-data", detail="problems.jsonl"),
        Inputs(digests={"student": "a" * 64, "tokenizer": "b" * 64, "problems": "c" * 64}),
        Phase(name="controls", detail=f"{problems} problems, 4 programs each"),
        Progress(done=4 * problems, total=4 * problems, unit="programs", seconds=40.0, seconds_left=0.0),
        *controls(scores, problems),
    ]


def generating(problems: int, samples: int, done: int) -> list[Event]:
    """Answers being generated."""
    total = problems * samples
    reports = [
        Progress(done=at, total=total, unit="completions", seconds=at * 0.5, seconds_left=(total - at) * 0.5)
        for at in sorted({*range(0, done, max(1, total // 8)), done})
    ]
    beat = Heartbeat(phase="generate", step=0, rss_bytes=2 << 30)
    return [Phase(name="load-student"), Phase(name="generate", detail=f"{total} answers"), *reports, beat]


def evaluation(problems: int = 164, samples: int = 1, *, part: bool = False) -> list[Event]:
    """An evaluation that came to its end, stamped, without verdicts and end."""
    answers = [each for each in answered(problems, samples) if isinstance(each, Problem)]
    right = [sum(a.passed for a in answers if a.task == f"HumanEval/{p}") for p in range(problems)]
    name = "part_pass_at" if part else "pass_at"
    scores = [(k, mean_pass_at_k([(samples, c) for c in right], k)) for k in (1, 10, 100)]
    solved = f"{sum(c > 0 for c in right)} of {problems} problems"
    return stamped(
        [
            *beginning(problems, GOOD),
            *generating(problems, samples, problems * samples),
            Phase(name="run", detail=f"{problems * samples} programs"),
            *answers,
            Progress(done=len(answers), total=len(answers), unit="programs", seconds=30.0, seconds_left=None),
            *(Measure(name=f"{name}_{k}", value=value, detail=solved) for k, value in scores if value is not None),
            Phase(name=JUDGE_PHASE, detail=solved),
        ]
    )


def ending(reason: str, exit_code: int = 0, status: str = "COMPLETED", **figures: float) -> End:
    """The end of an evaluation."""
    summary = {"peak_rss_bytes": float(1 << 30), **figures}
    return End(status=status, reason=reason, exit_code=exit_code, steps=0, seconds=130.0, summary=summary)


def evaluated(evidence: Path, problems: int = 164, samples: int = 1, *, part: bool = False, **options: object) -> Path:
    """An evaluation that came to its end, with its files."""
    events = evaluation(problems, samples, part=part)
    solved = next(each.detail for each in reversed(events) if isinstance(each, Phase))
    judged = with_verdicts(events, problems_contract(), ending(solved, 5 if part else 0))
    sets = [*HUMANEVAL, *([f"evaluate.samples={samples}", "evaluate.temperature=0.8"] if samples > 1 else [])]
    path = make_run(evidence, judged, 5 if part else 0, "evaluate", contract="evaluate-humaneval", sets=sets, **options)  # type: ignore[arg-type]
    write_files(path, problems, [each for each in events if isinstance(each, Problem)])
    return path


def evaluating(evidence: Path, last_t: float, judged: int | None = None, problems: int = 164) -> Path:
    """An evaluation that goes on: it generates, or has judged so many answers."""
    events: list[Event] = beginning(problems, GOOD)
    if judged is None:
        events += generating(problems, 1, problems // 2)
    else:
        events += [*generating(problems, 1, problems), Phase(name="run"), *answered(judged, 1)]
        events.append(Progress(done=judged, total=problems, unit="programs", seconds=8.0, seconds_left=21.0))
    told = live(stamped(events), problems_contract())
    moved = shifted(told, last_t - told[-1].t)
    return make_run(
        evidence, moved, None, "evaluate", contract="evaluate-humaneval", living=True, sets=HUMANEVAL, name="humaneval"
    )


def broken_evaluation(evidence: Path, problems: int = 164) -> Path:
    """An evaluation whose empty answers solve something: nothing that it says can be believed."""
    scores = GOOD | {"empty": 25 / 164}
    reason = f"controls: empty scored 0.152 and not 0 on {problems} problems: the result is unknown"
    events = stamped([*beginning(problems, scores), Phase(name=JUDGE_PHASE, detail=reason)])
    judged = with_verdicts(events, problems_contract(), ending(reason, 5, "FAILED"))
    path = make_run(evidence, judged, 5, "evaluate", contract="evaluate-humaneval", sets=HUMANEVAL)
    write_files(path, problems, [])
    return path


def held_out_evaluation(evidence: Path) -> Path:
    """An evaluation on the held-out part."""
    about = {"mode": "evaluate", "student": STUDENT, "target_steps": 0, "budget_seconds": None, "tokens_per_step": 0}
    figures = {"heldout_loss": 2.8714, "heldout_perplexity": 17.6617, "teacher_agreement": 0.4123, "teacher_kl": 0.9377}
    told = (Progress(done=n, total=64, unit="windows", seconds=n / 4, seconds_left=(64 - n) / 4) for n in (0, 32, 64))
    events = stamped(
        [
            *(Phase(name="import"), run_event(**about), Phase(name="load-student"), Phase(name="evaluate")),
            *told,
            *(Measure(name=name, value=value, detail="16,384 tokens") for name, value in figures.items()),
            Phase(name=JUDGE_PHASE, detail="held-out loss 2.8714 over 16,384 tokens"),
        ]
    )
    contract = parse_contract(builtin_contract("evaluate-heldout"), "contract.yaml")
    end = ending("held-out loss 2.8714 over 16,384 tokens", 0, **figures)
    judged = with_verdicts(events, contract, end)
    return make_run(evidence, judged, 0, "evaluate", contract="evaluate-heldout", sets=["evaluate.suite=heldout"])


def write_files(path: Path, problems: int, answers: Sequence[Problem]) -> None:
    """The files that an evaluation on problems leaves."""
    asked = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def f{n}(x):\n    """Return x + {n}."""\n',
            "entry_point": f"f{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        }
        for n in range(problems)
    ]
    made = [
        {
            "task": each.task,
            "sample": each.sample,
            "completion": "    # [red]not markup[/]\n    return \x1b[31m x + 1\n",
            "tokens": each.tokens,
            "finish": "stop",
            "seed": 7,
        }
        for each in answers
    ]
    results = [
        {
            "task": each.task,
            "sample": each.sample,
            "passed": each.passed,
            "outcome": each.outcome,
            "detail": each.detail,
            "seconds": each.seconds,
        }
        for each in answers
    ]
    for name, rows in (("problems", asked), ("completions", made), ("results", results)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
