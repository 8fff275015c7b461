"""Evaluates a student, on held-out text or on problems: a run like any other, which makes no steps."""

from __future__ import annotations

from engine.errors import ConfigError
from engine.formats import inspect_model_dir, resolve_builtin
from engine.heldout import evaluate_heldout
from engine.loading import load_data, load_the_student, tell_vocabulary
from engine.models import load_teacher
from engine.problem_suite import ProblemSuite, digest_of, student_digests
from engine.stepless import Stepless
from engine.stream import End, Inputs
from engine.text import clean


class Evaluator(Stepless):
    """Brings the measures of one evaluation; `evaluate.suite` says on what."""

    suite: ProblemSuite | None = None

    def phases(self) -> End:
        """Held-out text, or problems."""
        evaluate = self.config.evaluate
        if not evaluate.runs_code:
            return self._on_heldout()
        if not evaluate.run_generated_code:
            raise ConfigError(
                f"evaluate.suite: {clean(evaluate.suite, 300)}: its answers are programs",
                expected="evaluate.run_generated_code: true",
                do="say --run-generated-code",
            )
        self.suite = ProblemSuite(self)
        return self.suite.phases()

    def left(self) -> str:
        """How many answers there are."""
        return "" if self.suite is None else self.suite.left()

    def close(self) -> None:
        """Closes the files of answers."""
        if self.suite is not None:
            self.suite.close()

    def _on_heldout(self) -> End:
        config = self.config
        student = load_the_student(config, self.placement, self.recorder, self.enter)
        files = None if config.teacher is None else inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        corpus, tokenizer = load_data(config, student, files, self.recorder, self.enter, self.poll)
        digests = student_digests(student.files, tokenizer, config.train.seed, self.stop) | {"data": corpus.digest()}
        teacher = None
        if config.teacher is not None and files is not None:
            self.enter("load-teacher", config.teacher.path)
            teacher = load_teacher(config.teacher, self.placement.device, self.placement.dtype)
            tell_vocabulary(teacher.vocab, student, files, self.recorder)
            digests["teacher"] = digest_of(files.weights, self.stop)
        self.recorder.emit(Inputs(digests=digests))

        windows = min(config.data.heldout_windows, corpus.heldout_tokens // config.train.sequence)
        self.enter("evaluate", f"{windows:,} windows of {config.train.sequence:,} tokens")
        self.begin_work()
        found = evaluate_heldout(
            config,
            student,
            teacher,
            corpus,
            self.placement,
            self.poll,
            lambda done, total: self.progress(0, done, total, "windows"),
        )
        detail = f"{found.tokens:,} tokens"
        told = {"heldout_loss": found.loss, "heldout_perplexity": found.perplexity}
        if found.agreement is not None and found.kl is not None:
            told |= {"teacher_agreement": found.agreement, "teacher_kl": found.kl}
        for name, value in told.items():
            self.measure(name, value, detail)
        self.figures |= {"tokens": found.tokens, "tokens_per_second": found.tokens / max(found.seconds, 1e-9)}
        return self.judge(f"held-out loss {found.loss:.4f} over {found.tokens:,} tokens")
