"""Small real models as GGUF files: trained for a moment on the sample texts, and written by the `gguf` package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.language_check import SAMPLES

EOS = "<|end|>"
WIDTH, LAYERS, HEADS, SHARED = 64, 2, 4, 2

need_gguf = pytest.mark.skipif(
    not all(__import__("importlib.util").util.find_spec(name) for name in ("gguf", "accelerate")),
    reason="the packages of kdconsole[import] are not installed",
)


@dataclass(frozen=True)
class Tiny:
    """A model of 2 layers that knows the sample texts by heart, as directory and as GGUF file."""

    directory: Path
    gguf: Path
    state: dict[str, Any]
    """Its weights by name, as NumPy arrays."""


def make_tiny(root: Path, *, model_type: str = "llama", steps: int = 80) -> Tiny:
    """Train and write one; about 2 s."""
    directory = root / model_type
    tokens = save_tokenizer(directory)
    state = _train(directory, model_type, len(tokens), steps)
    gguf = root / f"{model_type}.gguf"
    write_gguf(gguf, directory, state, architecture=model_type)
    return Tiny(directory, gguf, state)


def save_tokenizer(directory: Path) -> list[str]:
    """A byte-level BPE of the sample texts, as transformers would save it; its tokens in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES.values(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return [tokenizer.id_to_token(id_) for id_ in range(tokenizer.get_vocab_size())]


def write_gguf(
    path: Path,
    directory: Path,
    state: dict[str, Any],
    *,
    architecture: str = "llama",
    leave_out: str = "",
    tokenizer: bool = True,
    rows: str = "right",
    extra: dict[str, str] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does: query and key rows reordered for llama, matrices as Q8_0.

    Args:
        path: of the file.
        directory: whose tokenizer is taken.
        state: the weights.
        architecture: llama or qwen2, or any name that shall stand there.
        leave_out: a tensor, by its Hugging Face name.
        tokenizer: whether it is written.
        rows: `right`, or `twice` for query and key rows that were reordered once too often.
        extra: more texts, by key.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny \x1b[31mred")
    writer.add_license("mit")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(WIDTH // HEADS)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    if tokenizer:
        _add_tokenizer(writer, directory)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if architecture == "qwen2" else gguf.MODEL_ARCH.LLAMA, LAYERS
    )
    for name, array in state.items():
        if name == leave_out:
            continue
        for part, heads in (("q_proj", HEADS), ("k_proj", SHARED)):
            for _ in range((architecture == "llama") + (rows == "twice")):
                array = _reorder(array, heads) if part in name else array
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, directory: Path) -> None:
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_eos_token_id(0)


def _reorder(array: Any, heads: int) -> Any:
    # convert_hf_to_gguf's permute: the two halves of a head's rows, interleaved.
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _train(directory: Path, model_type: str, vocabulary: int, steps: int) -> dict[str, Any]:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    windows = [torch.tensor([tokenizer.encode(text).ids]) for text in SAMPLES.values()]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(steps):
            for window in windows:
                logits = model(input_ids=window).logits[0, :-1]
                torch.nn.functional.cross_entropy(logits, window[0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(directory)
    return {name: tensor.numpy().astype(np.float32) for name, tensor in model.state_dict().items()}
