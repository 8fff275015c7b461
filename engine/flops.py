"""The arithmetic of a training step: FLOP a token by model FLOP counting, and what a device can do at best.

Counted is what the method asks for and nothing else: 2 FLOP for each parameter of a matrix product in a forward pass,
4 more in a backward one. An embedding is looked up and counts nothing; a head is a product and counts once, tied or
not. Products of sequence x sequence inside attention are left out, and so is whatever an implementation computes
twice, such as recomputed activations: a device is not the better used for doing work again.

Source: Kaplan et al. (2020), arXiv:2001.08361, section 2.1; Chowdhery et al. (2022), arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.shapes import Shape

TERA = 1e12
COUNTED = (
    "student: 6 FLOP a parameter and token (2 forward, 4 backward); teacher: 2 (forward alone); parameters of matrix "
    "products only, the head once, no embedding look-up; attention's products of sequence x sequence and recomputation "
    "not counted"
)
"""What the formula counts, in words, for wherever the figure is explained."""
_UNEXPLAINED = 0.1
"""Part of a model's own parameters that its dimensions may leave unexplained: biases, norms, small extra layers."""


@dataclass(frozen=True)
class Flops:
    """FLOP of one training token, and how they were counted: `6 x 0.494 B + 2 x 1.544 B`."""

    total: float
    formula: str


@dataclass(frozen=True)
class Peak:
    """FLOP a second of one device at best, dense, and who says so."""

    flops: float
    source: str


def flops_per_token(student: Shape, teacher: Shape | None, source: str) -> Flops:
    """FLOP that one token costs in a training step.

    Args:
        student: of the model that learns, all of it.
        teacher: of the model learnt from; None where there is none.
        source: where its targets come from: `online`, `hidden` (stored hidden states, so that its head alone is
            computed) or `topk` (stored logits: nothing is computed).

    Raises:
        ValueError: an unknown source.
    """
    if source not in ("online", "hidden", "topk"):
        raise ValueError(f"teacher source {source!r}: expected online, hidden or topk")
    total, terms = 6.0 * product_parameters(student), [f"6 x {_count(student)}"]
    if teacher is not None and source != "topk":
        # Rows that the student's vocabulary lacks are cut off before the product.
        head = teacher.hidden * min(teacher.vocab, student.vocab)
        body = 0 if source == "hidden" else _body(teacher)
        total += 2.0 * (body + head)
        said = f"{_scaled(head)} (the teacher's head)" if source == "hidden" else _count(teacher, body + head)
        terms.append(f"2 x {said}")
    return Flops(total, " + ".join(terms))


def product_parameters(shape: Shape) -> int:
    """Parameters of a model that stand in matrix products, its head included."""
    return _body(shape) + shape.embedding


def _body(shape: Shape) -> int:
    attention = 2 * shape.hidden * shape.query + 2 * shape.hidden * shape.key_value
    return shape.layers * (attention + (3 if shape.gated else 2) * shape.hidden * shape.intermediate)


def _count(shape: Shape, parameters: int | None = None) -> str:
    """The parameters of its products; `about` where its dimensions do not explain the model, as with experts."""
    found = product_parameters(shape) if parameters is None else parameters
    own = shape.parameters - shape.embedding * (1 if shape.tied else 2)
    explained = abs(own - _body(shape)) <= _UNEXPLAINED * max(own, _body(shape))
    return ("" if explained else "about ") + _scaled(found)


def _scaled(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 0.1e9 else f"{parameters / 1e6:.3f} M"


@dataclass(frozen=True)
class _Part:
    """A device by the whole of its name, and its published TFLOP/s; None where nothing is published for a precision."""

    name: str
    bf16: float | None
    fp32: float | None
    source: str


# Tensor-core figures without sparsity, with sums kept in float32. A name has to match from end to end: an H100 NVL, a
# slice of an H100 (MIG) and a laptop's RTX 4090 are slower parts, and a wrong peak is worse than none. Where NVIDIA
# publishes no dense bf16 figure, as for the GB10 (its data sheet has 1 PFLOP of sparse FP4 alone, and how much of that
# is left in bf16 differs between Blackwell parts), there is none here either.
_PARTS = (
    _Part(r"H100 80GB HBM3", 989.5, 67.0, "NVIDIA H100 data sheet, SXM"),
    _Part(r"H100 PCIe", 756.0, 51.0, "NVIDIA H100 data sheet, PCIe"),
    _Part(r"H100 NVL", 835.0, 60.0, "NVIDIA H100 data sheet, NVL"),
    _Part(r"H200", 989.5, 67.0, "NVIDIA H200 data sheet, SXM"),
    _Part(r"H200 NVL", 835.5, 60.0, "NVIDIA H200 data sheet, NVL"),
    _Part(r"A100[- ](SXM4|SXM|PCIe?|PCIE)[- ](40|80)GB|A100 80GB PCIe", 312.0, 19.5, "NVIDIA A100 data sheet"),
    _Part(r"L40S", 362.0, 91.6, "NVIDIA L40S data sheet"),
    _Part(r"GeForce RTX 4090", 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, sums in FP32"),
    _Part(r"B200", 2250.0, None, "NVIDIA HGX B200 data sheet, an eighth of 18 PFLOP/s dense"),
    _Part(r"GB10", None, 31.0, "NVIDIA's GB10 talk at Hot Chips 2025"),
)


def peak_flops(device_name: str, precision: str) -> Peak | None:
    """The published dense peak of a device, None for one that is not in the table.

    Args:
        device_name: as torch gives it, such as `NVIDIA H100 80GB HBM3`.
        precision: of the run's matrix products, `bf16` or `fp32`; the engine leaves TF32 off.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    for part in _PARTS:
        if re.fullmatch(part.name, name):
            tera = {"bf16": part.bf16, "fp32": part.fp32}.get(precision)
            return None if tera is None else Peak(tera * TERA, f"{part.source}, dense {precision}")
    return None
