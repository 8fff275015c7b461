"""Teachers and students with random weights, for benchmarks that need sizes and no knowledge."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging

import engine
from engine.formats import ModelFiles, inspect_model_dir
from engine.head_probe import probe_head
from engine.models import CausalLM

VOCABULARY = 151_936
ROLES = ("teacher", "student")


@dataclass(frozen=True)
class Size:
    """One Qwen2 configuration, its head tied to its embedding."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int

    def config(self, vocabulary: int) -> Qwen2Config:
        """As transformers has it."""
        return Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            # Livelier than the usual 0.02, with which a random teacher says next to nothing.
            initializer_range=0.08,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )


QWEN_1_5B = Size(1536, 28, 12, 2, 8960)
QWEN_0_5B = Size(896, 24, 14, 2, 4864)
STUDENT_15M = Size(96, 4, 3, 1, 256)
PAIRS: dict[str, tuple[Size, Size, str]] = {
    "small": (Size(384, 2, 6, 2, 1024), STUDENT_15M, "60 M to 15 M; nearly all of both are embeddings"),
    "body": (QWEN_0_5B, STUDENT_15M, "0.5 B (true Qwen2.5-Coder sizes) to 15 M: the teacher's body dominates"),
    "qwen": (QWEN_1_5B, QWEN_0_5B, "1.5 B to 0.5 B, true Qwen2.5-Coder sizes"),
    "tiny": (Size(64, 2, 2, 1, 128), Size(32, 2, 2, 1, 64), "as small as can be, to see that it runs"),
}


def vocabulary_of(pair: str) -> int:
    """Of both models of a pair."""
    return 2_048 if pair == "tiny" else VOCABULARY


def make(pair: str, device: str, precision: str) -> tuple[CausalLM, CausalLM]:
    """Teacher and student on the device: the same weights whoever asks; the teacher as the engine holds one.

    Args:
        pair: one of PAIRS.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", of the teacher's weights; the student's are float32 always.
    """
    logging.set_verbosity_error()
    teacher_size, student_size, _ = PAIRS[pair]
    vocabulary = vocabulary_of(pair)
    teacher = _model(teacher_size, vocabulary, 1, device, "teacher")
    if precision == "bf16":
        teacher.model.to(torch.bfloat16)
    teacher.model.requires_grad_(False)
    teacher.model.eval()
    student = _model(student_size, vocabulary, 2, device, "student")
    student.model.train()
    return _with_head(teacher), _with_head(student)


def parameters(model: CausalLM) -> tuple[int, int]:
    """All parameters of a model, and those of its embedding."""
    own: Any = model.model.get_input_embeddings()
    return sum(p.numel() for p in model.model.parameters()), own.weight.numel()


def model_files(pair: str, held: Path) -> list[ModelFiles]:
    """Teacher's and student's config.json below a directory, as `engine.formats` sees them."""
    found = []
    for role, size in zip(ROLES, PAIRS[pair][:2], strict=True):
        config = size.config(vocabulary_of(pair))
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(held / role)
        found.append(inspect_model_dir(held / role, "student", need_weights=False))
    return found


def save(pair: str, role: str, directory: Path, device: str) -> None:
    """A model of a pair as a Hugging Face directory: weights for the teacher, the built-in tokenizer for both.

    Args:
        pair: one of PAIRS.
        role: "teacher" or "student".
        directory: made.
        device: where the weights are drawn.
    """
    teacher, student, _ = PAIRS[pair]
    size = teacher if role == "teacher" else student
    directory.mkdir(parents=True)
    if role == "teacher":
        model = _model(size, vocabulary_of(pair), 1, device, role)
        model.model.to(torch.bfloat16 if device == "cuda" else torch.float32)
        model.model.save_pretrained(directory)
    else:
        config = size.config(vocabulary_of(pair))
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(directory)
    builtin = Path(engine.__file__).parent / "assets" / "teacher"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin / name, directory / name)


def _model(size: Size, vocabulary: int, seed: int, device: str, role: str) -> CausalLM:
    config = size.config(vocabulary)
    config.architectures = ["Qwen2ForCausalLM"]
    with tempfile.TemporaryDirectory() as held, torch.random.fork_rng(devices=[]):
        config.save_pretrained(held)
        files = inspect_model_dir(Path(held), "student", need_weights=False)
        torch.default_generator.manual_seed(seed)
        with torch.device(device):  # by a GPU's own generator: 1.5 B numbers take a while on the CPU
            if device != "cpu":
                torch.cuda.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return CausalLM(model, role, vocabulary, None, "", files)


def _with_head(model: CausalLM) -> CausalLM:
    probe = probe_head(model.model)
    return CausalLM(model.model, model.name, probe.vocab, probe.head, probe.reason, model.files)
