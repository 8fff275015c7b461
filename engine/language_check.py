"""Whether a model is the language model that its files are meant to be: what it makes of plain text.

A tensor that was read in the wrong order has the right name, shape and values, and every check of bytes passes. Only
what the model says shows it. Two known-bad models stand beside it as controls: the same weights with the rows of the
query and key projections in llama.cpp's order for rotary positions, and in the inverse of that order. Where one of them
predicts better than the model, the model is the one that was read wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENGLISH: Final = """\
Rain had fallen all night, and in the morning the river stood high against the old stone bridge. The children walked \
slowly to school, because the road was covered with mud and fallen leaves. Their teacher waited at the door and asked \
each of them what they had seen on the way. One boy said that the water had carried a whole tree past the mill. Nobody \
believed him at first, but when the class went outside after lunch, the tree was still there, caught between two \
rocks, with a small grey cat sitting in its branches.
"""
PYTHON: Final = '''\
def mean(values):
    """Return the arithmetic mean of a list of numbers."""
    if not values:
        raise ValueError("mean of an empty list")
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


class Counter:
    def __init__(self):
        self.counts = {}

    def add(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1
        return self.counts[name]


if __name__ == "__main__":
    print(mean([1, 2, 3, 4]))
'''
SAMPLES: Final = {"english": ENGLISH, "python": PYTHON}

LARGEST_SHARE: Final = 0.6
"""Of the chance level ln(vocabulary): a model whose better sample lies above it does not predict text."""
_MOST_TOKENS = 512


class Language(msgspec.Struct, frozen=True, kw_only=True):
    """Cross-entropies in nats a token over the sample texts."""

    chance: float
    """ln(vocabulary): what a model that knows nothing has."""
    texts: dict[str, float]
    """Of the model, by sample."""
    controls: dict[str, float] = {}
    """Of each known-bad model, the mean over the samples; empty where the architecture has no such rows."""

    @property
    def mean(self) -> float:
        """Over the samples."""
        return sum(self.texts.values()) / len(self.texts)

    @property
    def problem(self) -> str:
        """What is wrong, in words; empty for a language model that was read rightly."""
        best = min(self.texts.values())
        if not best <= LARGEST_SHARE * self.chance:
            return (
                f"it does not predict text: {best:.2f} nats a token on its better sample, where chance is "
                f"{self.chance:.2f} and a language model has less than {LARGEST_SHARE * self.chance:.2f}"
            )
        name, value = min(self.controls.items(), key=lambda item: item[1], default=("", math.inf))
        if not self.mean < value:
            return (
                f"its query and key rows stand in the wrong order: {self.mean:.2f} nats a token as read, "
                f"{value:.2f} with {name}"
            )
        return ""


@torch.no_grad()
def check_language(model: PreTrainedModel, encode: Callable[[str], Sequence[int]], vocab: int) -> Language:
    """Measure a model on the sample texts, and its controls where the architecture has rotary rows by head.

    Args:
        model: float32, in evaluation mode; its weights are changed for the controls and put back bit by bit.
        encode: text to ids as the model was trained on them, a token at the beginning included.
        vocab: rows of its head.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MOST_TOKENS
    ids = {name: torch.tensor(list(encode(text)))[: min(longest, _MOST_TOKENS)] for name, text in SAMPLES.items()}
    texts = {name: _cross_entropy(model, window) for name, window in ids.items()}
    controls: dict[str, float] = {}
    if rows := _rotary_rows(model):
        for name, order in (("rows in llama.cpp's order", _interleaved), ("rows out of llama.cpp's order", _halved)):
            with _reordered(rows, order):
                controls[name] = sum(_cross_entropy(model, window) for window in ids.values()) / len(ids)
    return Language(chance=math.log(vocab), texts=texts, controls=controls)


def _cross_entropy(model: PreTrainedModel, ids: Tensor) -> float:
    if len(ids) < 2:
        return math.inf
    logits: Tensor = model(input_ids=ids[None], use_cache=False, return_dict=True).logits[0, :-1].float()
    value = float(torch.nn.functional.cross_entropy(logits, ids[1:]))
    return math.inf if math.isnan(value) else value


def _rotary_rows(model: PreTrainedModel) -> list[tuple[Tensor, int]]:
    """Weights and biases of all query and key projections, each with its number of heads."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    found = []
    for name, parameter in model.named_parameters():
        for part, count in ((".q_proj.", heads), (".k_proj.", shared)):
            if part in name and isinstance(count, int) and parameter.shape[0] % (2 * count) == 0:
                found.append((parameter, count))
    return found


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _halved(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@contextmanager
def _reordered(rows: list[tuple[Tensor, int]], order: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    back = _halved if order is _interleaved else _interleaved
    for parameter, heads in rows:
        parameter.copy_(order(parameter, heads).clone())
    try:
        yield
    finally:
        for parameter, heads in rows:
            parameter.copy_(back(parameter, heads).clone())
