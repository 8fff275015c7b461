"""What an APR file is as a model: its metadata, and the names of its tensors, as a transformers configuration.

Neither torch nor transformers is imported. The predecessor's keys and their other spellings are those of
https://github.com/paiml/aprender, `crates/apr-format/src/v2/header_impl.rs` (`canonicalize_hf_aliases`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from engine.apr import AprFile, AprTensor
from engine.errors import ModelError
from engine.sniff import is_count, say

CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The architectures whose metadata says all that decides their output, by model type."""
FULL_CONFIG: Final = "hf_config"
"""The key under which our own writer keeps the whole `config.json`; no program of the predecessor knows it."""
SPELLINGS: Final = {
    "hidden_size": ("hidden_size", "hidden_dim", "d_model", "n_embd"),
    "num_hidden_layers": ("num_layers", "num_hidden_layers", "n_layers", "n_layer"),
    "num_attention_heads": ("num_heads", "num_attention_heads", "n_heads", "n_head"),
    "num_key_value_heads": ("num_kv_heads", "num_key_value_heads", "n_kv_heads"),
    "vocab_size": ("vocab_size", "n_vocab"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len", "context_length", "n_ctx"),
    "head_dim": ("head_dim",),
    "rope_theta": ("rope_theta",),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps"),
}
"""A key of transformers to the spellings that files have; the first is the predecessor's."""
_OPTIONAL: Final = frozenset(("num_key_value_heads", "head_dim"))
_NEEDED: Final = frozenset((("qwen3", "head_dim"),))
_REAL: Final = frozenset(("rope_theta", "rms_norm_eps"))
_PASSED_ON: Final = (
    "rope_scaling",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
)
"""Keys of transformers that import-made files may have beside the predecessor's own."""
_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_QUANTISED: Final = ("Q4", "Q8", "Q4_K", "Q6_K")
_LAYER: Final = re.compile(r"model\.layers\.(\d{1,6})\.")


def config_of(apr: AprFile) -> dict[str, Any]:
    """The `config.json` that belongs to an APR file, made of its metadata and its tensors' names and shapes.

    Whether head and embedding are one matrix is told from whether `lm_head.weight` is there, biases from whether
    theirs are. Nothing that decides the output is assumed: what the metadata lacks is refused.

    Raises:
        ModelError: an architecture that is not known, a key that is missing, has another meaning twice or does not fit
            the tensors, or tensors that are no weights of such a model.
    """
    _require_weights(apr)
    full = apr.metadata.get(FULL_CONFIG)
    if full is not None and not isinstance(full, dict):
        raise _wrong(apr, FULL_CONFIG, full, "an object, or no such key")
    config: dict[str, Any] = dict(full or {})
    kind = _model_type(apr, config)
    for key in SPELLINGS:
        if (value := _dimension(apr, key, config, needed=key not in _OPTIONAL or (kind, key) in _NEEDED)) is not None:
            config[key] = value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])  # by the predecessor's own description
    _require_fit(apr, config)
    if full is None:
        _fill(apr, kind, config)
    if not isinstance(config.get("rope_parameters"), dict) and not config.get("rope_scaling"):
        # Where transformers looks for the base of the rotary positions.
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if full is not None and "rope_theta" not in full:
        del config["rope_theta"]
    return config | {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "tie_word_embeddings": HEAD not in apr.tensors,
        "dtype": dominant(apr.tensors),
    }


def dominant(tensors: Mapping[str, AprTensor]) -> str:
    """The dtype that most values of a file come in, by transformers' name; float32 for quantised ones."""
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        values[FLOATS.get(tensor.dtype, "float32")] += math.prod(tensor.shape)
    return values.most_common(1)[0][0]


def _require_weights(apr: AprFile) -> None:
    if "token_embd.weight" in apr.tensors:
        raise ModelError(
            f"{say(apr.path)}: its tensors have the names of a GGUF file (token_embd.weight)",
            expected=f"those of Hugging Face ({EMBEDDING})",
            do="`kdconsole import` the GGUF file that it was made of",
        )
    if EMBEDDING not in apr.tensors:
        first = ", ".join(say(name)[:60] for name in list(apr.tensors)[:3])
        raise ModelError(
            f"{say(apr.path)}: has no tensor {EMBEDDING} (it begins with {first})",
            expected="a whole causal language model, its tensors named as Hugging Face does",
            do="take the model's own file",
        )
    for name, tensor in apr.tensors.items():
        if tensor.dtype not in FLOATS and tensor.dtype not in _QUANTISED:
            raise no_weights(apr, name)


def _model_type(apr: AprFile, config: Mapping[str, Any]) -> str:
    """The one model type that all keys agree on."""
    stated: dict[str, str] = {}
    for where, key in ((apr.metadata, "hf_model_type"), (apr.metadata, "hf_architecture"), (config, "model_type")):
        value = where.get(key)
        if value is None or value == "":
            continue
        shown = key if where is apr.metadata else f"{FULL_CONFIG}.{key}"
        kind = _kind(value)
        if kind is None:
            raise _unknown_architecture(apr, shown, value)
        stated[shown] = kind
    family = apr.metadata.get("architecture")
    kind = _kind(family)
    if kind is None and not stated:
        if family is None:
            raise ModelError(
                f"{say(apr.path)}: the metadata has neither hf_architecture, hf_model_type nor architecture",
                expected=f"one of them, naming {_known()}",
                do="write it again with a program that states it",
            )
        raise _unknown_architecture(apr, "architecture", family)
    if kind is not None:
        stated["architecture"] = kind
    if len(set(stated.values())) > 1:
        told = ", ".join(f"{key} says {value}" for key, value in stated.items())
        raise ModelError(f"{say(apr.path)}: {told}", expected="one architecture", do="take the model's own file")
    return next(iter(stated.values()))


def _kind(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    lowered = value.lower()
    return next((kind for kind, name in CLASSES.items() if lowered in (kind, name.lower())), None)


def _unknown_architecture(apr: AprFile, key: str, value: object) -> ModelError:
    return ModelError(
        f"{say(apr.path)}: {key}: {say(value)[:100]}: an architecture that is not known for APR files",
        expected=_known(),
        do="take the model's Hugging Face directory (safetensors)",
    )


def _known() -> str:
    return " or ".join(CLASSES)


def _dimension(apr: AprFile, key: str, config: Mapping[str, Any], needed: bool) -> int | float | None:
    """The one value that all spellings of a key have; None where there is none and none is needed."""
    inner = _rope_theta(config) if key == "rope_theta" else config.get(key)
    found = {f"{FULL_CONFIG}.{key}": inner} | {name: apr.metadata.get(name) for name in SPELLINGS[key]}
    found = {name: value for name, value in found.items() if value is not None}
    for name, value in found.items():
        if key in _REAL:
            right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
        else:
            right = is_count(value) and 0 < value < 2**31
        if not right:
            raise _wrong(apr, name, value, "a positive number" if key in _REAL else "a positive integer")
    if not found:
        if not needed:
            return None
        raise ModelError(
            f"{say(apr.path)}: the metadata has no {SPELLINGS[key][0]}",
            expected=" or ".join(SPELLINGS[key]),
            do="write it again with a program that states it, or take the model's Hugging Face directory",
        )
    (name, first), *others = found.items()
    for other, value in others:
        # Numbers that went through float32, as the predecessor keeps them.
        if not math.isclose(value, first, rel_tol=1e-6 if key in _REAL else 0.0):
            raise ModelError(
                f"{say(apr.path)}: {name} is {say(first)[:40]} and {other} is {say(value)[:40]}",
                expected="one value under all of its names",
                do="take the model's own file",
            )
    return float(first) if key in _REAL else int(first)


def _rope_theta(config: Mapping[str, Any]) -> object:
    parameters = config.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return config.get("rope_theta", inner)


def _require_fit(apr: AprFile, config: Mapping[str, Any]) -> None:
    shape = apr.tensors[EMBEDDING].shape
    for place, key in enumerate(("vocab_size", "hidden_size")):
        if len(shape) != 2 or shape[place] != config[key]:
            raise ModelError(
                f"{say(apr.path)}: {SPELLINGS[key][0]} is {config[key]:,} and {EMBEDDING} has shape {list(shape)}",
                expected="metadata of these weights",
                do="take the model's own file",
            )
    layers, total = (
        {int(found[1]) for name in apr.tensors if (found := _LAYER.match(name))},
        config["num_hidden_layers"],
    )
    if len(layers) != total or max(layers) != total - 1:
        raise ModelError(
            f"{say(apr.path)}: num_layers is {total:,} and there are tensors of {len(layers):,} layers",
            expected="metadata of these weights, and layers numbered from 0",
            do="take the model's own file",
        )

    # Of these transformers makes its matrices before it holds them against the file's: a wrong one takes any memory.
    heads, kv, wide = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    head = config.get("head_dim") or config["hidden_size"] // heads
    for part, rows, why in (
        ("self_attn.q_proj", heads * head, f"num_heads is {heads:,} and a head {head:,} wide"),
        ("self_attn.k_proj", kv * head, f"num_kv_heads is {kv:,} and a head {head:,} wide"),
        ("mlp.gate_proj", wide, f"intermediate_size is {wide:,}"),
    ):
        name = f"model.layers.0.{part}.weight"
        if name in apr.tensors and apr.tensors[name].shape[:1] != (rows,):
            raise ModelError(
                f"{say(apr.path)}: {why}, and {name} has shape {list(apr.tensors[name].shape)}",
                expected="metadata of these weights",
                do="take the model's own file",
            )


def _fill(apr: AprFile, kind: str, config: dict[str, Any]) -> None:
    """What the metadata of the predecessor's own files has no key for."""
    # llama.cpp's converter turns the rows of q and k round for llama; a file made of a GGUF file keeps them turned.
    if kind == "llama" and str(apr.metadata.get("original_format") or "").lower() == "gguf":
        raise ModelError(
            f"{say(apr.path)}: original_format is gguf: for llama its rows of q and k stand in another order",
            expected="a file made of safetensors weights",
            do="`kdconsole import` the GGUF file that it was made of",
        )
    config |= {key: apr.metadata.get(key) for key in _TOKENS}  # else some architecture's defaults
    config |= {key: apr.metadata[key] for key in _PASSED_ON if apr.metadata.get(key) is not None}
    if kind != "qwen2":
        config.setdefault("attention_bias", _has(apr, "self_attn.q_proj.bias"))
    if kind == "llama":
        config.setdefault("mlp_bias", _has(apr, "mlp.gate_proj.bias"))


def _has(apr: AprFile, ending: str) -> bool:
    return any(name.endswith(ending) for name in apr.tensors)


def _wrong(apr: AprFile, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{say(apr.path)}: {key}: {say(value)[:100]}", expected=expected, do="take the model's own file")


def no_weights(apr: AprFile, name: str) -> ModelError:
    """The error for a tensor of integers."""
    return ModelError(
        f"{say(apr.path)}: tensor {say(name)} is {apr.tensors[name].dtype}: integers, which are no weights",
        expected=f"{', '.join((*FLOATS, *_QUANTISED))}",
        do="write it again as F32, F16 or BF16",
    )
