"""Teacher, student and corpus of a run, loaded in turn and each checked as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cautions import needs_two_models, one_model
from engine.config import RunConfig, Teacher
from engine.data import Corpus, load_corpus
from engine.device import Placement
from engine.errors import ModelError
from engine.formats import ModelFiles, inspect_model_dir, resolve_builtin
from engine.models import CausalLM, load_student, load_teacher, weights_distance
from engine.recorder import Recorder
from engine.selfcheck import forward_error
from engine.store_format import Key, layout_digest
from engine.stream import Measure
from engine.teacher_store import StoredTeacher, key_of, open_store
from engine.text import clean
from engine.vocabulary import check_vocabulary

_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Loaded:
    """Everything that training needs; `tokenizer_dir` is where the exported model's tokenizer comes from."""

    teacher: CausalLM | StoredTeacher | None
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

    With a stored teacher the model itself is not loaded onto the device: its files are there to be known by their
    hash, and for its tokenizer.

    Args:
        config: of the run.
        placement: device and precision.
        recorder: told what was found and measured.
        enter: begins a phase, by name and detail.
        poll: called between units of work; raises to stop.

    Raises:
        ModelError: a model cannot be used, or the two do not fit together.
        DataError: the corpus cannot be used.
        StoreError: the teacher is to come from a store, and there is none for this run.
        RunError: a long run whose teacher is its student.
    """
    if config.teacher is not None and config.teacher.source != "online":
        return _load_with_store(config, config.teacher, placement, recorder, enter, poll)
    teacher: CausalLM | None = None
    if config.teacher is not None:
        enter("load-teacher", config.teacher.path)
        teacher = load_teacher(config.teacher, placement.device, placement.dtype)
    student = load_the_student(config, placement, recorder, enter)
    if teacher is not None:
        tell_vocabulary(teacher.vocab, student, teacher.files, recorder)
        _tell_head(teacher, recorder)
        error = teacher_error(teacher, student, placement)
        recorder.emit(Measure(name="teacher_logit_error", value=error))
        _tell_distance(config, recorder, weights_distance(teacher, student))
    _check_student(student, placement, recorder)
    poll()
    corpus, tokenizer_dir = load_data(
        config, student, None if teacher is None else teacher.files, recorder, enter, poll
    )
    return Loaded(teacher, student, corpus, tokenizer_dir)


def _load_with_store(
    config: RunConfig,
    spec: Teacher,
    placement: Placement,
    recorder: Recorder,
    enter: Callable[[str, str], None],
    poll: Callable[[], None],
) -> Loaded:
    """The student and the corpus first: only they tell which store is meant."""
    student = load_the_student(config, placement, recorder, enter)
    if student.head is None and spec.source == "topk":
        recorder.log(f"{student.name}: whole logits are made for each micro-batch", "warning")
    _check_student(student, placement, recorder)
    poll()
    files = inspect_model_dir(resolve_builtin(spec.path), "teacher")
    corpus, tokenizer_dir = load_data(config, student, files, recorder, enter, poll)
    enter("load-teacher", f"{spec.path}, as it was stored")
    key = stored_key(config, placement, files, tokenizer_dir, corpus, student)
    poll()
    teacher = open_store(config, key, corpus, placement.device)
    recorder.log(f"teacher {teacher.name}: {spec.source} of {teacher.manifest.windows:,} windows, {teacher.directory}")
    tell_vocabulary(teacher.vocab, student, files, recorder)
    error = teacher.manifest.measures.get("teacher_logit_error", math.nan)
    recorder.emit(Measure(name="teacher_logit_error", value=error, detail="as measured when it was stored"))
    _tell_distance(config, recorder, _stored_distance(spec, placement, teacher, student))
    return Loaded(teacher, student, corpus, tokenizer_dir)


def load_the_student(
    config: RunConfig, placement: Placement, recorder: Recorder, enter: Callable[[str, str], None]
) -> CausalLM:
    """The student on its device; see `load`."""
    enter("load-student", config.student.source)
    student = load_student(config.student, placement.device, config.train.seed)
    _tell_head(student, recorder)
    return student


def load_data(
    config: RunConfig,
    student: CausalLM,
    teacher: ModelFiles | None,
    recorder: Recorder,
    enter: Callable[[str, str], None],
    poll: Callable[[], None],
) -> tuple[Corpus, Path | None]:
    """The corpus, and the directory of the tokenizer that it is read with: its own, the student's or the teacher's."""
    enter("load-data", ", ".join(config.data.paths))
    tokenizer_dir = student.files.tokenizer_dir
    if teacher is not None:
        tokenizer_dir = tokenizer_dir or teacher.tokenizer_dir
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
    return corpus, tokenizer_dir


def stored_key(
    config: RunConfig,
    placement: Placement,
    teacher: ModelFiles,
    tokenizer_dir: Path | None,
    corpus: Corpus,
    student: CausalLM,
) -> Key:
    """The key under which a run's teacher is stored.

    Raises:
        ModelError: a file of the teacher or the tokenizer cannot be read.
    """
    try:
        return key_of(config, placement.precision, teacher, tokenizer_dir, corpus, student.vocab)
    except OSError as error:
        raise ModelError(f"{clean(str(error.filename), 300)}: cannot be read: {error.strerror}") from None


def tell_vocabulary(rows: int, student: CausalLM, teacher: ModelFiles, recorder: Recorder) -> None:
    """Holds the vocabularies against each other and logs what was found.

    Args:
        rows: of the teacher's head.
        student: as loaded.
        teacher: its files.
        recorder: told.

    Raises:
        ModelError: they do not fit; see `engine.vocabulary.check_vocabulary`.
    """
    check = check_vocabulary(rows, student.vocab, teacher.tokenizer_dir, student.files.tokenizer_dir)
    level = "info" if check.status == "PASS" else "warning"
    recorder.log(f"vocabulary {check.status}: {check.observed}", level)


def layout_of(model: CausalLM) -> str:
    """Digest of the names and shapes of a model's parameters."""
    return layout_digest({name: tensor.shape for name, tensor in model.model.named_parameters()})


def teacher_error(teacher: CausalLM, student: CausalLM, placement: Placement) -> float:
    """The measure `teacher_logit_error`."""
    return forward_error(teacher, _probe(student, placement), placement.autocast)


def _probe(student: CausalLM, placement: Placement) -> torch.Tensor:
    return torch.arange(_PROBE_TOKENS, device=placement.device).remainder(student.vocab).unsqueeze(0)


def _tell_head(model: CausalLM, recorder: Recorder) -> None:
    if model.head is None:
        recorder.log(f"{model.name}: {model.head_reason}; the plain loss on whole logits is used", "warning")


def _check_student(student: CausalLM, placement: Placement, recorder: Recorder) -> None:
    error = forward_error(student, _probe(student, placement), placement.autocast)
    recorder.emit(Measure(name="student_logit_error", value=error))


def _tell_distance(config: RunConfig, recorder: Recorder, distance: float) -> None:
    """That they are two models and not one."""
    recorder.emit(Measure(name="teacher_student_distance", value=distance, detail="relative, over all weights"))
    if distance == 0 and needs_two_models(config):
        raise one_model(config)


def _stored_distance(spec: Teacher, placement: Placement, teacher: StoredTeacher, student: CausalLM) -> float:
    """The distance of the weights, infinite where the layouts differ; the model is not kept, nor on the device."""
    if teacher.manifest.parameters != layout_of(student):
        return math.inf
    return weights_distance(load_teacher(spec, torch.device("cpu"), placement.dtype), student)
