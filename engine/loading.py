"""Teacher, student and corpus of a run, loaded in turn and each checked as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cautions import needs_two_models, one_model
from engine.config import RunConfig
from engine.data import Corpus, load_corpus
from engine.device import Placement
from engine.formats import resolve_builtin
from engine.models import CausalLM, align_vocabulary, load_student, load_teacher, weights_distance
from engine.recorder import Recorder
from engine.selfcheck import forward_error
from engine.stream import Measure

_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Loaded:
    """Everything that training needs; `tokenizer_dir` is where the exported model's tokenizer comes from."""

    teacher: CausalLM | None
    student: CausalLM
    corpus: Corpus
    tokenizer_dir: Path | None


def load(
    config: RunConfig,
    placement: Placement,
    recorder: Recorder,
    enter: Callable[[str, str], None],
    poll: Callable[[], None],
) -> Loaded:
    """Loads the models onto the device and the corpus into memory.

    Args:
        config: of the run.
        placement: device and precision.
        recorder: told what was found and measured.
        enter: begins a phase, by name and detail.
        poll: called between units of work; raises to stop.

    Raises:
        ModelError: a model cannot be used, or the two do not fit together.
        DataError: the corpus cannot be used.
        RunError: a long run whose teacher is its student.
    """
    teacher: CausalLM | None = None
    if config.teacher is not None:
        enter("load-teacher", config.teacher.path)
        teacher = load_teacher(config.teacher, placement.device, placement.dtype)
    enter("load-student", config.student.source)
    student = load_student(config.student, placement.device, config.train.seed)
    tokenizer_dir = student.files.tokenizer_dir
    if teacher is not None:
        check = align_vocabulary(teacher, student, teacher.files.tokenizer_dir, tokenizer_dir)
        level = "info" if check.status == "PASS" else "warning"
        recorder.log(f"vocabulary {check.status}: {check.observed}", level)
        tokenizer_dir = tokenizer_dir or teacher.files.tokenizer_dir
    for model in (student, teacher):
        if model is not None and model.head is None:
            reason = f"{model.name}: {model.head_reason}"
            recorder.log(f"{reason}; the plain loss on whole logits is used", "warning")
    _compare(config, placement, recorder, teacher, student)
    poll()

    enter("load-data", ", ".join(config.data.paths))
    if config.data.tokenizer is not None:
        builtin = config.data.tokenizer == "builtin"
        tokenizer_dir = resolve_builtin("builtin:teacher") if builtin else Path(config.data.tokenizer)
    corpus = load_corpus(
        config.data,
        tokenizer_dir,
        sequence=config.train.sequence,
        rows=student.vocab,
        progress=lambda fraction: poll(),
    )
    recorder.log(
        f"{corpus.description}: {corpus.documents:,} files, {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.heldout_tokens:,} held out"
    )
    if corpus.undecodable:
        recorder.log(f"{corpus.description}: {corpus.undecodable:,} places are not UTF-8", "warning")
    return Loaded(teacher, student, corpus, tokenizer_dir)


def _compare(
    config: RunConfig, placement: Placement, recorder: Recorder, teacher: CausalLM | None, student: CausalLM
) -> None:
    """The checks that need the real models: forward passes, and that they are two models and not one."""
    probe = torch.arange(_PROBE_TOKENS, device=placement.device).remainder(student.vocab).unsqueeze(0)
    if teacher is not None:
        error = forward_error(teacher, probe, placement.autocast)
        recorder.emit(Measure(name="teacher_logit_error", value=error))
        distance = weights_distance(teacher, student)
        recorder.emit(Measure(name="teacher_student_distance", value=distance, detail="relative, over all weights"))
        if distance == 0 and needs_two_models(config):
            raise one_model(config)
    error = forward_error(student, probe, placement.autocast)
    recorder.emit(Measure(name="student_logit_error", value=error))
