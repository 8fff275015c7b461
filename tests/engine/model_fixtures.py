"""Small random models, saved by transformers' own `save_pretrained`, for every test that needs a real directory.

Use as plain functions (`save_qwen2(path, vocab=64)`), or import the fixture `model_zoo`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class ModelZoo:
    """Directories of small random models with 96 tokens and 4 layers (GPT-2: 3), made once a session. Read only."""

    qwen2: Path
    qwen2_sharded: Path
    llama: Path
    gpt2: Path


def save_qwen2(
    path: Path, *, vocab: int = 96, hidden: int = 32, layers: int = 4, seed: int = 0, **options: Any
) -> Path:
    """Save a random Qwen2; `shard="20KB"` splits it, other options go to its config (`tie_word_embeddings=True`)."""
    from transformers import Qwen2Config

    shard = options.pop("shard", None)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **options,
    )
    return save_model(path, config, seed=seed, shard=shard)


def save_llama(
    path: Path, *, vocab: int = 96, hidden: int = 32, layers: int = 4, seed: int = 0, **options: Any
) -> Path:
    """Save a random Llama."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        **options,
    )
    return save_model(path, config, seed=seed)


def save_gpt2(path: Path, *, vocab: int = 96, hidden: int = 32, layers: int = 3, seed: int = 0, **options: Any) -> Path:
    """Save a random GPT-2 (tied head)."""
    from transformers import GPT2Config

    options = {"bos_token_id": 0, "eos_token_id": 0, **options}
    config = GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=256, **options)
    return save_model(path, config, seed=seed)


def save_model(path: Path, config: Any, *, seed: int = 0, shard: str | None = None) -> Path:
    """Save a random causal language model of any config of transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # The usual 0.02 leaves logits so flat that a mistake would hide in rounding.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return path


def save_tokenizer(path: Path, tokens: list[str], added: dict[int, str] | None = None) -> Path:
    """Write a minimal `tokenizer.json` (whole words) with these tokens as ids 0, 1, 2, … and these control tokens."""
    path.mkdir(parents=True, exist_ok=True)
    document = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": id_,
                "content": content,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for id_, content in (added or {}).items()
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "unk_token": tokens[0] if tokens else "",
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """Qwen2 (whole and sharded, the same weights), Llama and GPT-2."""
    root = tmp_path_factory.mktemp("models")
    return ModelZoo(
        qwen2=save_qwen2(root / "qwen2"),
        qwen2_sharded=save_qwen2(root / "qwen2-sharded", shard="40KB"),
        llama=save_llama(root / "llama"),
        gpt2=save_gpt2(root / "gpt2"),
    )
