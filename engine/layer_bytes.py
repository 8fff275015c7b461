"""What a transformer's layers hold of a token while they compute, in bytes; by its shape alone."""

from __future__ import annotations

from engine.shapes import Shape


def saved(s: Shape, mixed: bool) -> int:
    """Bytes a token that one layer keeps for the backward pass, without dropout and without recomputation.

    Counted from the operators of transformers' Llama and Qwen2 blocks, by the method of Korthikanti et al. (2022),
    arXiv:2205.05198, section 4.1. Per token, with hidden h, feed-forward i, query width q and key-value width k:

    - each of two norms keeps its input, the normalised input and its output: 6 h;
    - attention keeps query, key, value, output and one logarithm a head: 2 q + 2 k + heads;
    - a gated feed-forward part keeps gate, activated gate, way up and their product: 4 i (5 i for GPT-2's own gelu).

    In float32 each is 4 bytes. In mixed precision the residual stream and the norms stay in float32 (4 h of them), and
    each of the five products that follow keeps a bf16 copy of its input; the rest is 2 bytes.
    """
    inner = (4 if s.gated else 5) * s.intermediate
    attention = 2 * s.query + 2 * s.key_value
    if mixed:
        return 16 * s.hidden + 10 * s.hidden + 2 * (attention + inner) + 4 * s.heads
    return 4 * (6 * s.hidden + attention + inner + s.heads)


def saved_input(s: Shape) -> int:
    """Bytes a token of a layer's input, which is all that stays of it with activation checkpointing.

    The residual stream is float32 in mixed precision too.
    """
    return 4 * s.hidden


def forward(s: Shape, size: int) -> int:
    """Bytes a token of a forward pass without gradients, at its widest: inside one layer's feed-forward part.

    Args:
        s: the model's shape.
        size: bytes of a number in its products.
    """
    return size * (4 * s.hidden + (3 if s.gated else 2) * s.intermediate) + 4 * s.hidden
