"""What a loaded teacher says of windows, in the form in which it is stored, and how that is held against it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import Placement
from engine.models import CausalLM
from engine.store_format import Key, id_bytes, kept_logits
from engine.topk_loss import TopK, top_k_of
from engine.windows import Batch

_COMPARED = 256
"""Logits a token that are compared where hidden states are stored."""
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Differences of logits, as a fraction of the largest one, that the order of summation can make."""


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher with a head that is one matrix product, on its device.

    Args:
        teacher: the model.
        placement: where and how it computes.
        key: of what is stored.
        temperature: of the run.
        vocabulary: the student's rows.
        chunk_bytes: size of one chunk of logits in float32.
    """

    teacher: CausalLM
    placement: Placement
    key: Key
    temperature: float
    vocabulary: int
    chunk_bytes: int

    @property
    def head(self) -> Tensor:
        """Weight of the head, in the dtype of the products."""
        assert self.teacher.head is not None
        return self.teacher.head.detach().to(self.placement.dtype)

    @torch.no_grad()
    def hidden(self, windows: Batch) -> Tensor:
        """Last hidden states as the loss takes them, shape [windows, sequence, width], on the device.

        Args:
            windows: shape [windows, sequence + 1].
        """
        device, autocast = self.placement.device, self.placement.autocast
        inputs = torch.from_numpy(windows[:, :-1].copy()).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return self.teacher.hidden(inputs).to(self.placement.dtype)

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits over the student's vocabulary, a chunk of tokens at a time.

        Args:
            hidden: shape [tokens, width].

        Yields:
            Which tokens, and their logits, shape [chunk, vocabulary].
        """
        head = self.head[: self.vocabulary]
        rows = max(1, self.chunk_bytes // (4 * self.vocabulary))
        for begin in range(0, len(hidden), rows):
            part = slice(begin, min(len(hidden), begin + rows))
            yield part, (hidden[part].to(head.device, head.dtype) @ head.T).float()

    @torch.no_grad()
    def heldout(self, windows: Batch) -> dict[str, Tensor]:
        """What is stored of held-out windows: hidden states as they are, so that evaluation is exact."""
        return {"hidden": self.hidden(windows).cpu()}

    @torch.no_grad()
    def train(self, windows: Batch) -> dict[str, Tensor]:
        """What is stored of training windows; see `StoredTeacher.read`."""
        hidden = self.hidden(windows)
        if self.key.kind == "hidden":
            return {"hidden": hidden.to(torch.bfloat16).cpu()}
        shape = hidden.shape[:2]
        parts = [self._top(logits, self.key.top_k or 1) for _, logits in self.logits(hidden.flatten(0, 1))]
        ids, logits, tail = (torch.cat(each).view(*shape, *each[0].shape[1:]) for each in zip(*parts, strict=True))
        narrow = torch.uint16 if id_bytes(self.vocabulary) == 2 else torch.int32
        return {"ids": ids.to(narrow), "logits": logits, "tail": tail}

    @torch.no_grad()
    def compare(self, stored: Mapping[str, Tensor], windows: Batch) -> tuple[float, int]:
        """Computes windows again and holds what was read of them against that.

        Args:
            stored: of `StoredTeacher.read`.
            windows: the same ones, shape [windows, sequence + 1].

        Returns:
            The smallest cosine of a token, over the largest logits and the log-sum-exp of the rest, as stored and as
            computed; and how many stored ids are none of the largest, ties within rounding left out.
        """
        smallest, differ = 1.0, 0
        flat = {name: tensor.flatten(0, 1) for name, tensor in stored.items()}
        short = self.key.kind == "hidden" or self.placement.autocast is not None
        rounding = _ROUNDING[torch.bfloat16 if short else torch.float32]
        for part, online in self.logits(self.hidden(windows).flatten(0, 1)):
            if self.key.kind == "topk":
                there = TopK(*(flat[name][part].to(online.device) for name in TopK._fields))
            else:
                [(_, logits)] = self.logits(flat["hidden"][part])
                there = top_k_of(logits, kept_logits(_COMPARED, self.vocabulary), self.temperature)
            ids = there.ids.to(torch.int64)
            there = there._replace(ids=ids, logits=there.logits.float(), tail=there.tail.float())
            here = online.gather(1, ids)
            top = online.amax(1, keepdim=True)
            rest = online.scatter(1, ids, -torch.inf).sub_(top).div_(self.temperature).logsumexp(1)
            cosine = torch.nn.functional.cosine_similarity(
                self._scores(there), self._scores(TopK(ids, here - top, rest)), dim=1
            )
            smallest = min(smallest, float(cosine.min()))
            last = online.topk(ids.shape[1], dim=1).values[:, -1:]
            slack = rounding * online.abs().amax(1, keepdim=True)
            differ += int((here < last - slack).sum())
        return smallest, differ

    def _top(self, logits: Tensor, k: int) -> TopK:
        ids, values, tail = top_k_of(logits, k, self.temperature)
        return TopK(ids.cpu(), values.clamp_(min=-65_504).half().cpu(), tail.cpu())

    def _scores(self, top: TopK) -> Tensor:
        return torch.cat([top.logits / self.temperature, top.tail.unsqueeze(1)], dim=1)
