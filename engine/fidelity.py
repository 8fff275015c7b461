"""What a coarse teacher keeps of the full one: the mass of its largest logits, and the direction of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models import CausalLM
from engine.teacher_output import TeacherOutput
from engine.windows import Batch

FIDELITY_TOKENS = 2_048
"""Held-out tokens that the table is made of, at most."""


@dataclass(frozen=True)
class Fidelity:
    """Of one temperature and one number of logits, over all tokens looked at."""

    temperature: float
    k: int
    mass: float
    """Mean share of the teacher's probability that its K largest logits hold."""
    cosine: float
    """Between the gradient of the coarse loss by the student's logits and that of the full one, as one vector each."""


class FidelityTable:
    """Sums up chunks of tokens.

    With p the teacher's and q the student's probabilities, the full gradient is q - p; the coarse one is the same
    where a logit is stored and q (1 - r) elsewhere, r = p_rest / q_rest. What their products need are sums over the
    rest, which the teacher's ranking gives for every K at once.

    Args:
        pairs: temperature and number of logits; each number below the vocabulary.
    """

    def __init__(self, pairs: Iterable[tuple[float, int]]) -> None:
        self._counts: dict[float, list[int]] = {}
        for temperature, k in sorted(set(pairs)):
            self._counts.setdefault(temperature, []).append(k)
        self._sums = {(t, k): torch.zeros(4, dtype=torch.float64) for t, ks in self._counts.items() for k in ks}
        self.tokens = 0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Takes the logits of some tokens.

        Args:
            student: shape [tokens, vocabulary].
            teacher: the same, cut to the student's vocabulary.
        """
        self.tokens += len(teacher)
        most = max(k for counts in self._counts.values() for k in counts)
        ids = teacher.topk(most, dim=1).indices
        wide = torch.float32 if teacher.device.type == "mps" else torch.float64
        for temperature, counts in self._counts.items():
            p, q = ((logits.float() / temperature).softmax(1) for logits in (teacher, student))
            stored_p, stored_q = (x.gather(1, ids).to(wide) for x in (p, q))
            stored_gap = stored_q - stored_p
            squares = stored_gap**2
            p, q = (x.scatter(1, ids, 0.0) for x in (p, q))
            gap = q - p
            beyond = [p.sum(1), q.sum(1), *(torch.einsum("tv,tv->t", a, b) for a, b in ((gap, q), (q, q), (gap, gap)))]
            ranked = [stored_p, stored_q, stored_gap * stored_q, stored_q**2]
            for k in counts:
                # What lies beyond K is summed, not taken from a whole that it may be a rounding error of.
                rest = [far.to(wide) + near[:, k:].sum(1) for far, near in zip(beyond, ranked, strict=False)]
                pull = 1 - rest[0] / rest[1].clamp_min(1e-30)
                near = squares[:, :k].sum(1)
                self._sums[temperature, k] += (
                    torch.stack(
                        [
                            stored_p[:, :k].sum(),
                            (near + pull * rest[2]).sum(),
                            (near + pull**2 * rest[3]).sum(),
                            (squares.sum(1) + beyond[4].to(wide)).sum(),
                        ]
                    )
                    .cpu()
                    .double()
                )

    def rows(self) -> list[Fidelity]:
        """What was found, by temperature and number."""
        found = []
        for (temperature, k), (mass, product, coarse, full) in (
            (pair, sums.tolist()) for pair, sums in self._sums.items()
        ):
            size = (coarse * full) ** 0.5
            # A student that is its teacher has no gradient to compare.
            found.append(Fidelity(temperature, k, mass / max(1, self.tokens), product / size if size else 1.0))
        return found


@torch.no_grad()
def measure(
    output: TeacherOutput,
    student: CausalLM,
    windows: Batch,
    pairs: Iterable[tuple[float, int]],
    poll: Callable[[], None],
) -> list[Fidelity]:
    """What the largest logits of a teacher keep, and the gradient of a student as it is now.

    Args:
        output: the teacher.
        student: on the same device; its mode is left as it was.
        windows: shape [windows, sequence + 1]; `FIDELITY_TOKENS` of them are looked at.
        pairs: temperature and number of logits; each number below the vocabulary.
        poll: called between windows; may raise to stop.
    """
    table = FidelityTable(pairs)
    device, autocast = output.placement.device, output.placement.autocast
    mode = student.model.training
    student.model.eval()
    try:
        for begin in range(len(windows)):
            poll()
            left = FIDELITY_TOKENS - table.tokens
            window = windows[begin : begin + 1]
            inputs = torch.from_numpy(window[:, :-1].copy()).to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                said = student.logits(inputs).flatten(0, 1)
            for part, logits in output.logits(output.hidden(window).flatten(0, 1)[:left]):
                table.add(said[part].float(), logits)
    finally:
        student.model.train(mode)
    return table.rows()


def lines(rows: Sequence[Fidelity], chosen: tuple[float, int]) -> list[str]:
    """The table as an operator reads it; the row of the run's own temperature and number is marked."""
    told = ["     T      K    mass  cosine of the gradient"]
    for row in rows:
        mark = "  <- this run" if (row.temperature, row.k) == chosen else ""
        told.append(f"{row.temperature:6g} {row.k:6,} {row.mass:7.4f} {row.cosine:7.4f}{mark}")
    return told
