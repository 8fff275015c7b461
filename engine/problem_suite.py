"""An evaluation on problems: controls, answers, programs, pass@k. It goes on where an earlier attempt stopped."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from engine.answers import Answer, AnswersError, Key, Result, Rows, check_answers, check_results, plan
from engine.controls import EXPECTED, program, reason_of, run_controls
from engine.errors import ExitCode, ModelError
from engine.falsifiers import JUDGE_PHASE
from engine.formats import ModelFiles, inspect_model_dir, resolve_builtin
from engine.generate import Completion, Generator, Sampling, batch_seed
from engine.loading import load_the_student
from engine.measures import PASS_AT
from engine.pass_at_k import mean_pass_at_k
from engine.problems import COMPLETIONS, HUMANEVAL, PROBLEMS, RESULTS, file_bytes, is_humaneval, read_problems
from engine.sandbox import Limits, Sandbox, containment
from engine.stepless import Stepless
from engine.stop import StopRequest
from engine.store_format import files_digest
from engine.stream import Control, End, Inputs, decode_line
from engine.stream import Problem as ProblemEvent
from engine.text import clean

_OTHER: Final = {"student": "another student", "tokenizer": "another tokenizer", "problems": "other problems"}
_DETAIL: Final = 500
"""Characters of what a program's end is told by."""


class ProblemSuite:
    """What `problems.jsonl` asks of a student.

    Args:
        work: the run that this is of.
    """

    def __init__(self, work: Stepless) -> None:
        self.work, self.config, self.recorder = work, work.config, work.recorder
        self.planned: list[Key] = []
        self._files: list[Rows[Answer] | Rows[Result]] = []

    def phases(self) -> End:
        """Every phase in turn."""
        config, evaluate = self.config, self.config.evaluate
        self.work.enter("load-data", PROBLEMS)
        data = file_bytes(self.work.run_dir / PROBLEMS)
        every = read_problems(data, PROBLEMS)
        self.asked = every[: evaluate.limit]
        files = inspect_model_dir(
            resolve_builtin(config.student.source), "student", need_weights=not config.student.starts_random
        )
        self.tokenizer = self._tokenizer_of(files)
        told = self._take_up(data, files)
        whole = len(self.asked) == len(every)
        if evaluate.suite == HUMANEVAL and not is_humaneval(data):
            whole = False
            self.recorder.log(
                f"{PROBLEMS} is not HumanEval as it was published: {len(every):,} problems, another SHA-256; no claim "
                "about HumanEval is judged on it",
                "warning",
            )
        if (wrong := self._controls()) is not None:
            return wrong
        self._generate()
        self._run(told)
        return self._score(len(every), whole)

    def left(self) -> str:
        """What an attempt that is ended early has done."""
        if not self._files:
            return ""
        return (
            f"; of {len(self.planned):,} answers {len(self.answers):,} are generated and {len(self.results):,} judged, "
            "and an evaluation that is resumed goes on from there"
        )

    def close(self) -> None:
        """Closes the files of answers and results."""
        for rows in self._files:
            rows.close()

    def _tokenizer_of(self, files: ModelFiles) -> Path:
        """The directory of the tokenizer: `data.tokenizer`, or what lies beside the student."""
        chosen = self.config.data.tokenizer
        if chosen is not None:
            return resolve_builtin("builtin:teacher") if chosen == "builtin" else Path(chosen)
        if files.tokenizer_dir is None:
            raise ModelError(
                f"student {clean(str(files.directory), 300)}: no tokenizer.json",
                expected="the tokenizer that it was trained with beside it",
                do="set data.tokenizer to its directory",
            )
        return files.tokenizer_dir

    def _take_up(self, data: bytes, files: ModelFiles) -> set[Key]:
        """Opens what earlier attempts left, and refuses what this evaluation cannot have made.

        Returns:
            The answers whose results the stream has told already.
        """
        evaluate = self.config.evaluate
        digests = student_digests(files, self.tokenizer, self.config.train.seed, self.work.stop)
        digests["problems"] = hashlib.sha256(data).hexdigest()
        told, before = _past(self.work.run_dir / "events.jsonl")
        self.planned = plan(self.asked, evaluate.samples)
        seeds = [batch_seed(evaluate.seed, place // evaluate.batch) for place in range(len(self.planned))]
        self.answers = answers = Rows(self.work.run_dir / COMPLETIONS, Answer)
        self._files.append(answers)
        self.results = results = Rows(self.work.run_dir / RESULTS, Result)
        self._files.append(results)
        for name, digest in digests.items() if answers.rows else ():
            if (then := before.get(name, digest)) != digest:
                raise AnswersError(
                    f"{COMPLETIONS}: made with {_OTHER[name]}: SHA-256 {clean(then, 12)} then, {digest[:11]}… now",
                    do="evaluate into a new run",
                )
        self.recorder.emit(Inputs(digests=digests))
        check_answers(answers.name, answers.rows, self.planned, seeds)
        if len(answers) < len(self.planned):  # a batch is made as a whole, or its answers would be others
            answers.cut(len(answers) // evaluate.batch * evaluate.batch)
        check_results(results.name, results.rows, {answer.key for answer in answers.rows})
        return told

    def _sandbox(self) -> Sandbox:
        evaluate = self.config.evaluate
        limits = Limits(
            wall_seconds=evaluate.wall_seconds,
            cpu_seconds=evaluate.cpu_seconds,
            memory_bytes=evaluate.memory_mib << 20,
        )
        return Sandbox(limits, evaluate.workers)

    def _controls(self) -> End | None:
        """Puts answers of a known score through the sandbox; the end where one of them got another score."""
        work = self.work
        work.enter("controls", f"{len(self.asked):,} problems, {len(EXPECTED)} programs each")
        walls = containment()
        for missing in walls.missing:
            self.recorder.log(f"generated code: {clean(missing, 300)}", "warning")
        with self._sandbox() as sandbox:
            self.recorder.log(f"generated code runs behind: {clean(', '.join(walls.walls), 300)}")
            work.begin_work()
            scores = run_controls(
                self.asked, sandbox, work.poll, lambda done, total: work.progress(0, done, total, "programs")
            )
        for score in scores:
            self.recorder.emit(
                Control(
                    name=score.name,
                    expected=score.expected,
                    observed=score.observed,
                    problems=score.problems,
                    detail=clean(score.detail, 2 * _DETAIL),
                )
            )
            work.measure(f"control_{score.name}", score.observed, f"{score.passed:,} of {score.problems:,} problems")
        if (reason := reason_of(scores)) is None:
            return None
        for score in scores:
            if score.off:
                self.recorder.log(f"control {score.name}: {clean(score.detail, 2 * _DETAIL)}", "error")
        # Not polled: whatever a contract makes of it, the answer to what was asked is that nobody knows.
        self.recorder.enter(JUDGE_PHASE, reason)
        return work.end("FAILED", reason, ExitCode.UNDECIDED)

    def _generate(self) -> None:
        """Every answer that is not there yet, a batch at a time."""
        work, evaluate, answers, total = self.work, self.config.evaluate, self.answers, len(self.planned)
        if (before := len(answers)) < total:
            student = load_the_student(self.config, work.placement, self.recorder, work.enter)
            sampling = Sampling(evaluate.temperature, evaluate.top_p, evaluate.max_new_tokens, evaluate.seed)
            generator = Generator(student, self.tokenizer, sampling, work.placement.autocast)
            self._tell_room(generator)
            work.enter("generate", f"{total - before:,} answers" + (f", {before:,} are there" if before else ""))
            work.begin_work()
            self._complete(generator)
            seconds = time.monotonic() - work.work_started
            made = sum(answer.tokens for answer in answers.rows[before:])
            work.figures["tokens_per_second"] = made / max(seconds, 1e-9)
            del student, generator
            gc.collect()  # programs are to have the machine's memory
        ends = {finish: sum(answer.finish == finish for answer in answers.rows) for finish in ("stop", "end", "length")}
        tokens = sum(answer.tokens for answer in answers.rows)
        work.figures["tokens"] = tokens
        self.recorder.log(
            f"{total:,} answers, {tokens:,} tokens: {ends['stop']:,} ended at a stop text, {ends['end']:,} at an end "
            f"token, {ends['length']:,} at the limit"
        )

    def _complete(self, generator: Generator) -> None:
        evaluate, answers, total, before = self.config.evaluate, self.answers, len(self.planned), len(self.answers)
        prompts = {problem.task: problem.prompt for problem in self.asked}

        def poll() -> None:
            self.work.poll()
            done = len(answers) - before + generator.ended
            self.work.progress(before, done, total - before, "completions")

        for begin in range(before, total, evaluate.batch):
            keys = self.planned[begin : begin + evaluate.batch]
            seed = batch_seed(evaluate.seed, begin // evaluate.batch)
            made = generator.complete([prompts[task] for task, _ in keys], seed, poll=poll)
            answers.add([_answer(key, one) for key, one in zip(keys, made, strict=True)])
            self.work.progress(before, len(answers) - before, total - before, "completions")

    def _tell_room(self, generator: Generator) -> None:
        most = self.config.evaluate.max_new_tokens
        short = [problem.task for problem in self.asked if generator.room(problem.prompt) < most]
        if short:
            self.recorder.log(
                f"{len(short):,} prompts leave less than evaluate.max_new_tokens ({most:,}) in the model's context of "
                f"{generator.context or 0:,} tokens, {short[0]} the first: their answers end where it ends",
                "warning",
            )

    def _run(self, told: set[Key]) -> None:
        """Every answer that was not judged yet, as a program."""
        work, results, tokens = self.work, self.results, {answer.key: answer.tokens for answer in self.answers.rows}
        for result in results.rows:
            if result.key not in told:
                self._tell(result, tokens[result.key], again=True)
        judged = {result.key for result in results.rows}
        waiting = [answer for answer in self.answers.rows if answer.key not in judged]
        before, problems = len(results), {problem.task: problem for problem in self.asked}
        work.enter("run", f"{len(waiting):,} programs" + (f", {before:,} are judged" if before else ""))
        if not waiting:
            return
        programs = ((answer.key, program(problems[answer.task], answer.completion)) for answer in waiting)
        with self._sandbox() as sandbox:
            work.begin_work()
            for done, ((task, sample), outcome) in enumerate(sandbox.run_all(programs, work.poll), 1):
                result = Result(
                    task=task,
                    sample=sample,
                    passed=outcome.passed,
                    outcome=outcome.outcome,  # type: ignore[arg-type] # one of those that a result may have
                    detail=clean(outcome.detail, _DETAIL),
                    seconds=outcome.seconds,
                )
                results.add([result])
                self._tell(result, tokens[result.key])
                work.progress(before, done, len(waiting), "programs")

    def _tell(self, result: Result, tokens: int, again: bool = False) -> None:
        self.recorder.emit(
            ProblemEvent(
                task=result.task,
                sample=result.sample,
                passed=result.passed,
                outcome=result.outcome,
                detail=clean(result.detail, _DETAIL),
                tokens=tokens,
                seconds=result.seconds,
                again=again,
            )
        )

    def _score(self, every: int, whole: bool) -> End:
        """pass@k for each k that there are answers for; of a part of the suite by a name that no claim is about."""
        right = dict.fromkeys((problem.task for problem in self.asked), 0)
        for result in self.results.rows:
            right[result.task] += result.passed
        samples, solved = self.config.evaluate.samples, sum(count > 0 for count in right.values())
        detail = f"{solved:,} of {len(right):,} problems"
        if samples > 1:
            detail += f" solved by one of {samples:,} answers at least"
        if len(right) < every:
            detail += f", the first of {every:,}"
        counts = [(samples, count) for count in right.values()]
        for k in PASS_AT:
            if (share := mean_pass_at_k(counts, k)) is not None:
                self.work.measure(f"pass_at_{k}" if whole else f"part_pass_at_{k}", share, detail)
        self.work.figures |= {"problems": len(right), "passed": solved}
        return self.work.judge(detail)


def _answer(key: Key, made: Completion) -> Answer:
    task, sample = key
    return Answer(
        task=task, sample=sample, completion=made.text, tokens=made.tokens, finish=made.finish, seed=made.seed
    )


def student_digests(files: ModelFiles, tokenizer: Path | None, seed: int, stop: StopRequest) -> dict[str, str]:
    """SHA-256 over the student's weight files and over the tokenizer's file, by name.

    Args:
        files: of the student; without weights they are drawn by `seed`, and the digest is that of config and seed.
        tokenizer: its directory; None where there is none.
        seed: of random weights.
        stop: may end this.

    Raises:
        ModelError: a file cannot be read.
        StopNow: the run is to stop.
    """
    if files.weights:
        digests = {"student": digest_of(files.weights, stop)}
    else:
        drawn = f"random {digest_of(files.config_files, stop)} {seed}"
        digests = {"student": hashlib.sha256(drawn.encode()).hexdigest()}
    if tokenizer is not None:
        digests["tokenizer"] = digest_of([tokenizer / "tokenizer.json"], stop)
    return digests


def digest_of(paths: Sequence[Path], stop: StopRequest) -> str:
    """`files_digest`, which a signal ends: a large file is not read in parts.

    Raises:
        ModelError: a file cannot be read.
        StopNow: the run is to stop.
    """
    try:
        with stop.raising():
            return files_digest(paths)
    except OSError as error:
        raise ModelError(f"{clean(str(error.filename), 300)}: cannot be read: {error.strerror}") from None


def _past(stream: Path) -> tuple[set[Key], Mapping[str, str]]:
    """The answers whose results earlier attempts told, and what the last of them was made from."""
    told: set[Key] = set()
    digests: Mapping[str, str] = {}
    with stream.open("rb") as file:
        for line in file:
            event = decode_line(line)
            if isinstance(event, ProblemEvent):
                told.add((event.task, event.sample))
            elif isinstance(event, Inputs):
                digests = event.digests
    return told, digests
