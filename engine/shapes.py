"""The dimensions of a model, from `config.json` and safetensors headers alone: what an estimate needs of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.formats import ModelFiles, read_tensors
from engine.sniff import TensorEntry, is_count

_LLAMA_LIKE = frozenset(("llama", "mistral", "qwen2", "qwen3"))
_LAYER = re.compile(r"\.(\d+)\.")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Where one of these is set, logits are more than one matrix product and the loss keeps them whole. The trainer finds
# that out by running the model; here the names have to do.
_AFTER_HEAD = (
    "final_logit_softcapping",
    "output_logit_soft_cap",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory. Where `exact` is False the parameters are an upper estimate."""

    parameters: int
    """A tied head counted once."""
    hidden: int
    layers: int
    vocab: int
    intermediate: int
    query: int
    """Heads times their width."""
    key_value: int
    """Key-value heads times their width."""
    heads: int
    gated: bool
    """Whether the feed-forward part has a gate beside its way up."""
    tied: bool
    plain_head: bool
    """Whether logits are one matrix product, as far as names tell."""
    exact: bool
    source: str
    """Where the parameter count comes from, in words."""

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * self.hidden


def shape_of(files: ModelFiles, layers: Sequence[int] | None = None) -> Shape:
    """The shape of a model.

    Args:
        files: as `inspect_model_dir` gives them; without weights the parameters are counted from the config.
        layers: keep these layers only; None keeps all.

    Raises:
        ModelError: a weight file's header cannot be read (again).
    """
    config = _language_part(files.config)
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or max(1, files.hidden_size // 64)
    width = _first(config, "head_dim") or max(1, files.hidden_size // heads)
    kv_heads = _first(config, "num_key_value_heads", "multi_query_kv_heads", "num_kv_heads") or heads
    gated = not (files.model_type.startswith("gpt") or files.model_type in ("opt", "bloom", "phi", "pythia"))
    intermediate = _first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
    kept = files.layers if layers is None else len(layers)
    shape = Shape(
        parameters=0,
        hidden=files.hidden_size,
        layers=kept,
        vocab=files.vocab_size,
        intermediate=intermediate or 4 * files.hidden_size,
        query=heads * width,
        key_value=kv_heads * width,
        heads=heads,
        gated=gated,
        tied=_tied(files),
        plain_head=not any(_is_set(config.get(key)) or _is_set(files.config.get(key)) for key in _AFTER_HEAD),
        exact=True,
        source="",
    )
    if not files.weights:
        parameters, exact = count_parameters(files, shape)
        kind = "counted from config.json" if exact else f"an upper estimate from config.json of {files.model_type}"
        return replace(shape, parameters=parameters, exact=exact, source=kind)
    tensors: dict[str, TensorEntry] = {}
    for file in files.weights:
        tensors |= read_tensors(file)
    if any(name.endswith(("lm_head.bias", "embed_out.bias")) for name in tensors):
        shape = replace(shape, plain_head=False)
    if layers is None:
        return replace(shape, parameters=files.parameters, source="the headers of its weights")
    kept_layers = set(layers)
    parameters = sum(math.prod(t.shape) for name, t in tensors.items() if _kept(name, kept_layers))
    source = f"the headers of its weights, {kept} of {files.layers} layers"
    return replace(shape, parameters=parameters, source=source)


def count_parameters(files: ModelFiles, shape: Shape) -> tuple[int, bool]:
    """Parameters of a model that starts from random weights, and whether the count is exact.

    Exact for Llama, Mistral, Qwen2, Qwen3 and GPT-2. Any other architecture is counted as the largest of its kind:
    biases everywhere, a head of its own, every expert of every layer.
    """
    config = _language_part(files.config)
    h, q, kv, i = shape.hidden, shape.query, shape.key_value, shape.intermediate
    head = 0 if shape.tied else shape.embedding
    if files.model_type in _LLAMA_LIKE:
        attention = 2 * h * q + 2 * h * kv
        if files.model_type == "qwen2":
            attention += q + 2 * kv
        elif config.get("attention_bias") is True:
            attention += q + 2 * kv + h
        if files.model_type == "qwen3":
            attention += 2 * (q // shape.heads)
        feed_forward = 3 * h * i + (2 * i + h if config.get("mlp_bias") is True else 0)
        return shape.embedding + head + shape.layers * (attention + feed_forward + 2 * h) + h, True
    if files.model_type == "gpt2":
        positions = (_first(config, "n_positions", "max_position_embeddings") or 1024) * h
        layer = 4 * h * h + 4 * h + 2 * h * i + i + h + 4 * h
        return shape.embedding + head + positions + shape.layers * layer + 2 * h, True
    experts = max((_first(config, key) or 1 for key in _EXPERTS), default=1)
    attention = 2 * h * max(q, h) + 2 * h * kv + 2 * q + 2 * kv + h
    feed_forward = experts * (3 * h * i + 2 * i + 2 * h)
    positions = (_first(config, "n_positions", "max_position_embeddings") or 0) * h
    positions = 0 if "rope_theta" in config or "rope_parameters" in config else positions
    return 2 * shape.embedding + positions + shape.layers * (attention + feed_forward + 8 * h) + 4 * h, False


def _kept(name: str, layers: set[int]) -> bool:
    found = _LAYER.search(name)
    return found is None or int(found[1]) in layers


def _language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in ("text_config", "decoder"):
        if isinstance(inner := config.get(part), dict):
            return inner
    return config


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and is_count(value) and 0 < value < 2**31:
            return value
    return None


def _tied(files: ModelFiles) -> bool:
    # A key that is left out has the architecture's default: tied for GPT-2, not for those that came after Llama.
    if "tie_word_embeddings" not in files.config and not files.weights:
        return files.model_type == "gpt2"
    return files.tied


def _is_set(value: object) -> bool:
    return value is not None and value is not False and value not in (0, 1, 0.0, 1.0)
