"""How much a stored teacher takes, before any of it is there: by the configuration and the models' shapes alone."""

from __future__ import annotations

from engine.config import RunConfig
from engine.shapes import Shape
from engine.store_format import Sizes, id_bytes, kept_logits, sizes


def sizes_of(config: RunConfig, student: Shape, teacher: Shape, wide: int, corpus_tokens: int | None = None) -> Sizes:
    """What is stored, or was: the training windows that the steps visit, no more of them than there are.

    Args:
        config: of the run; its source is hidden or topk.
        student: its shape.
        teacher: that of the teacher.
        wide: bytes of one number of the head and the held-out part.
        corpus_tokens: about so many are in the corpus; None where nobody counted them.
    """
    train, wanted = config.train, config.teacher
    assert wanted is not None
    assert wanted.source != "online"
    windows, heldout = config.steps_asked * train.batch, config.data.heldout_windows
    if corpus_tokens is not None:
        windows, heldout = min(windows, corpus_tokens // train.sequence), min(heldout, corpus_tokens // train.sequence)
    return sizes(
        wanted.source,
        sequence=train.sequence,
        windows=windows,
        heldout=heldout,
        width=teacher.hidden,
        rows=teacher.vocab,
        wide=wide,
        top_k=kept_logits(wanted.top_k, student.vocab),
        vocabulary=student.vocab,
    )


def read_bytes(config: RunConfig, student: Shape, teacher: Shape) -> int:
    """Bytes of one token of the training part in memory: ids are widened when they are read."""
    assert config.teacher is not None
    if config.teacher.source == "hidden":
        return 2 * teacher.hidden
    return (2 + 4) * kept_logits(config.teacher.top_k, student.vocab) + 4


def how_a_token(config: RunConfig, student: Shape, teacher: Shape) -> str:
    """What is stored of a token, in words."""
    if config.teacher is not None and config.teacher.source == "topk":
        kept = kept_logits(config.teacher.top_k, student.vocab)
        return f"{kept:,} x (2 + {id_bytes(student.vocab)}) + 4 bytes"
    return f"{teacher.hidden:,} x 2 bytes"
