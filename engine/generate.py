"""Text that a model continues prompts with: batches through transformers' `generate`, with its key and value cache.

What is ours is how a row begins and ends. It ends at a text that no function body holds, at an end token, or at the
limit of its tokens. It begins before the white space that ends its prompt: a model has seen a line break and the
indentation after it as one token, so that a prompt that ends in the line break alone is one that it never saw, and what
it says then is not what it knows. What it repeats of that white space is taken away from its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from engine.data import load_tokenizer
from engine.data_files import name_of
from engine.errors import DataError, ModelError
from engine.models import CausalLM
from engine.text import clean

Finish = Literal["stop", "end", "length"]

STOPS: Final = (
    "\nclass ",
    "\ndef ",
    "\nasync def ",
    "\n@",
    "\n#",
    "\nif ",
    "\nfor ",
    "\nwhile ",
    "\nprint(",
    "\nassert ",
    "\nimport ",
    "\nfrom ",
    "\n```",
    '\n"""',
    "\n'''",
)
"""Line beginnings that end a function's body; they stand in column 0, where no line of a body can."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float
    """0 takes the likeliest one (greedy)."""
    top_p: float
    """Of the likeliest tokens, those that hold this share of the probability; 1 takes all."""
    max_new_tokens: int
    seed: int
    """Of a whole evaluation; each batch has its own (`batch_seed`)."""


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    text: str
    """What stands after the prompt, cut before the stop text; without end tokens and half characters at the limit."""
    tokens: int
    """Generated, with those of the stop text and the end token."""
    finish: Finish
    """stop: at a stop text; end: at an end token; length: at `max_new_tokens` or the end of the model's context."""
    seed: int
    """Of its batch."""


def batch_seed(seed: int, batch: int) -> int:
    """The seed of one batch of an evaluation, below 2**48, so that every JSON reader keeps it whole.

    Args:
        seed: of the evaluation.
        batch: its number, the first being 0.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:6], "big")


class Generator:
    """Continues prompts with one model.

    Args:
        student: on its device; its mode and settings are left as they were.
        tokenizer: the directory that holds `tokenizer.json`.
        sampling: how tokens are chosen, and how many.
        autocast: dtype of mixed precision, None for none.

    Raises:
        DataError: there is no tokenizer, or it has ids that the model has no row for.
    """

    def __init__(
        self, student: CausalLM, tokenizer: Path, sampling: Sampling, autocast: torch.dtype | None = None
    ) -> None:
        self.student, self.sampling, self.autocast = student, sampling, autocast
        self._tokenizer, end_of_text = load_tokenizer(tokenizer)
        top = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if top >= student.vocab:
            raise DataError(
                f"tokenizer: {name_of(tokenizer)} has ids up to {top:,}",
                expected=f"ids below the {student.vocab:,} rows of {student.name}",
                do="give the tokenizer that the model was trained with",
            )
        self.ends = _end_tokens(student, self._tokenizer, end_of_text)
        """Tokens that end a row."""
        limit = getattr(student.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = limit if isinstance(limit, int) and limit > 0 else None
        """Tokens that prompt and answer may have together; None where the model names no limit."""
        self.ended = 0
        """Rows of the batch in hand that have ended, for who tells how far it is; `poll` is called after each token."""

    def room(self, prompt: str) -> int:
        """Tokens that may follow a prompt: `max_new_tokens`, or less where the context ends before; 0: none fits.

        Raises:
            DataError: the prompt has no token.
        """
        return self._room(self._encode(prompt))

    def complete(
        self,
        prompts: Sequence[str],
        seed: int,
        stops: Sequence[str] = STOPS,
        poll: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Continues all prompts as one batch.

        The same prompts in the same order with the same seed give the same texts on the same machine. A prompt that
        leaves less room in the model's context than `max_new_tokens` gets what is left; see `room`.

        Args:
            prompts: without their white end, and with the token that the tokenizer begins a text with, if any.
            seed: of this batch; without meaning for greedy generation.
            stops: texts that end a row.
            poll: called at every token; may raise to stop.

        Raises:
            DataError: a prompt has no token.
            ModelError: the model's logits are not numbers.
        """
        ids = [self._encode(prompt) for prompt in prompts]
        rooms = [self._room(row) for row in ids]
        found: dict[int, Completion] = {}
        self.ended = 0

        def after_token(ended: int) -> None:
            self.ended = len(found) + ended
            poll()

        with self._as_evaluated(seed):
            # Rows of one call end at one limit: a model with learned positions has none beyond its context to go on
            # with while others of its batch are not done.
            for room in sorted(set(rooms), reverse=True):
                chosen = [index for index, there in enumerate(rooms) if there == room]
                rows = _Rows(self._tokenizer, [ids[index] for index in chosen], self.ends, stops, after_token)
                if room:
                    self._generate(rows, room)
                for index, (text, tokens, finish) in zip(chosen, rows.results(), strict=True):
                    found[index] = Completion(text.removeprefix(_white_end(prompts[index])), tokens, finish, seed)
        return [found[index] for index in range(len(prompts))]

    def _encode(self, prompt: str) -> list[int]:
        try:
            encoding = self._tokenizer.encode(prompt.removesuffix(_white_end(prompt)), add_special_tokens=True)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise DataError(f"tokenizer: cannot encode a prompt: {clean(str(error), 200)}") from None
        ids, added = list(encoding.ids), list(encoding.special_tokens_mask)
        while added and added[-1]:  # what it puts after a text would say that the text is over
            ids.pop()
            added.pop()
        if not ids:
            raise DataError(
                f"prompt {clean(repr(prompt), 80)}: no token", expected="text that the model can go on with"
            )
        return ids

    def _room(self, ids: Sequence[int]) -> int:
        wanted = self.sampling.max_new_tokens
        return wanted if self.context is None else max(0, min(wanted, self.context - len(ids)))

    def _generate(self, rows: _Rows, room: int) -> None:
        device = next(self.student.model.parameters()).device
        ids, mask = rows.padded()
        settings: dict[str, Any] = {"do_sample": False}
        if self.sampling.temperature > 0:
            # transformers takes the 50 likeliest unless told otherwise.
            settings = {
                "do_sample": True,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": 0,
            }
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            self.student.model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(max_new_tokens=room, use_cache=True, pad_token_id=0, **settings),
                logits_processor=[_Numbers(self.student.name)],
                stopping_criteria=[rows],
            )

    @contextmanager
    def _as_evaluated(self, seed: int) -> Iterator[None]:
        """Evaluation mode, a seed, and none of the model's own generation settings; all put back afterwards."""
        model: Any = self.student.model
        device = next(model.parameters()).device
        training, own = model.training, model.generation_config
        model.eval()
        # A generation_config.json can hold penalties, minimal lengths and end tokens: what is measured is the model.
        model.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield
        finally:
            model.generation_config = own
            model.train(training)


class _Numbers(LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that are not numbers: the likeliest of them would look like an answer."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ModelError(f"{self._name}: its logits are not numbers", do="evaluate it with train.precision: fp32")
        return scores


class _Rows(StoppingCriteria):  # type: ignore[misc]
    """The rows of one batch: what was generated of each, and where and why it ended."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        ends: frozenset[int],
        stops: Sequence[str],
        after_token: Callable[[int], object],
    ) -> None:
        self._tokenizer, self._prompts, self._ends, self._stops = tokenizer, prompts, ends, stops
        self._after_token = after_token
        self._new: list[list[int]] = [[] for _ in prompts]
        self._finish: list[Finish | None] = [None for _ in prompts]
        # A token holds a byte at least, so that a stop text has no more tokens than bytes.
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of the prompts, each of shape [rows, longest prompt], padded on the left."""
        longest = max(len(ids) for ids in self._prompts)
        ids = torch.zeros(len(self._prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self._prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids, mask

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: Any) -> Tensor:
        """After each token: which rows are done."""
        open_rows = [row for row, finish in enumerate(self._finish) if finish is None]
        newest = input_ids[:, -1].tolist()
        for row in open_rows:
            self._new[row].append(newest[row])
            if newest[row] in self._ends:
                self._finish[row] = "end"
        if self._stops:
            # The tail alone is looked at, so that a token costs the same however long the text has become.
            tails = self._tokenizer.decode_batch([self._new[row][-self._tail :] for row in open_rows])
            for row, tail in zip(open_rows, tails, strict=True):
                if self._first_stop(tail) is not None and self._first_stop(self._text(row)) is not None:
                    self._finish[row] = "stop"
        done = [finish is not None for finish in self._finish]
        self._after_token(sum(done))
        return torch.tensor(done, device=input_ids.device)

    def results(self) -> Iterator[tuple[str, int, Finish]]:
        """Text, generated tokens and end of each row."""
        for row, finish in enumerate(self._finish):
            text = self._text(row)
            if (cut := self._first_stop(text)) is not None:
                text, finish = text[:cut], "stop"
            elif finish is None:
                text, finish = text.rstrip("\ufffd"), "length"
            yield text, len(self._new[row]), finish

    def _first_stop(self, text: str) -> int | None:
        return min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)

    def _text(self, row: int) -> str:
        # With the prompt before it: alone, its first token would lose the space that it begins with in some tokenizers.
        prompt, new = self._prompts[row], self._new[row]
        if self._finish[row] == "end":
            new = new[:-1]
        return self._tokenizer.decode(prompt + new)[len(self._tokenizer.decode(prompt)) :]


def _white_end(prompt: str) -> str:
    """The white space that a prompt ends with; none where it has nothing else."""
    return prompt[len(prompt.rstrip()) :] if prompt.strip() else ""


def _end_tokens(student: CausalLM, tokenizer: Tokenizer, end_of_text: int | None) -> frozenset[int]:
    """What the model's settings and the tokenizer name as the end, and all control tokens: none is part of a text."""
    found = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    for settings in (student.model.generation_config, student.model.config.get_text_config()):
        named: Any = getattr(settings, "eos_token_id", None)
        found.update(token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int))
    return frozenset(found if end_of_text is None else found | {end_of_text})
