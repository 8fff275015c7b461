"""The arithmetic of a token and the peak of a device: figures that a reader can check with pencil and paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.flops import COUNTED, flops_per_token, peak_flops, product_parameters
from engine.formats import inspect_model_dir
from engine.shapes import Shape, shape_of

QWEN = {  # config.json of Qwen2.5-Coder, as it is published
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
}


def shaped(directory: Path, layers: tuple[int, ...] | None = None, **config: Any) -> Shape:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return shape_of(inspect_model_dir(directory, "student", need_weights=False), layers)


def qwen(directory: Path, size: str, layers: tuple[int, ...] | None = None, **changes: Any) -> Shape:
    common = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
    common |= {"vocab_size": 151_936, "tie_word_embeddings": True, "max_position_embeddings": 32_768}
    return shaped(directory / size, layers, **{**common, **QWEN[size], **changes})


def test_a_token_of_the_coder_pair_costs_6_05_gflop(tmp_path: Path) -> None:
    found = flops_per_token(qwen(tmp_path, "0.5B"), qwen(tmp_path, "1.5B"), "online")
    assert found.formula == "6 x 0.494 B + 2 x 1.544 B"
    student = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864) + 151_936 * 896
    teacher = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960) + 151_936 * 1536
    assert found.total == 6 * student + 2 * teacher
    assert round(found.total / 1e9, 2) == 6.05
    # No H100 in bf16 can pass so many tokens a second.
    peak = peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert peak is not None
    assert 163_000 < peak.flops / found.total < 164_000


def test_a_head_counts_once_whether_it_is_tied_or_not_and_a_look_up_never(tmp_path: Path) -> None:
    tied, own = (qwen(tmp_path / str(t), "0.5B", tie_word_embeddings=t) for t in (True, False))
    assert own.parameters == tied.parameters + 151_936 * 896
    assert product_parameters(tied) == product_parameters(own)
    assert flops_per_token(own, None, "online").formula == "6 x 0.494 B"


def test_what_is_stored_of_a_teacher_is_not_computed(tmp_path: Path) -> None:
    student, teacher = qwen(tmp_path, "0.5B"), qwen(tmp_path, "1.5B")
    alone = flops_per_token(student, None, "online").total
    hidden, topk = (flops_per_token(student, teacher, source) for source in ("hidden", "topk"))
    assert hidden.total == alone + 2 * 151_936 * 1536
    assert hidden.formula == "6 x 0.494 B + 2 x 0.233 B (the teacher's head)"
    assert (topk.total, topk.formula) == (alone, "6 x 0.494 B")
    with pytest.raises(ValueError, match="expected online, hidden or topk"):
        flops_per_token(student, teacher, "cached")


def test_rows_that_the_students_vocabulary_lacks_are_not_multiplied(tmp_path: Path) -> None:
    student, same = qwen(tmp_path, "0.5B"), qwen(tmp_path, "1.5B")
    longer = qwen(tmp_path / "longer", "1.5B", vocab_size=152_064)
    assert flops_per_token(student, longer, "online") == flops_per_token(student, same, "online")


def test_layers_that_are_left_out_cost_nothing(tmp_path: Path) -> None:
    whole, half = (qwen(tmp_path, "0.5B", layers) for layers in (None, tuple(range(12))))
    head = 151_936 * 896
    assert 2 * (product_parameters(half) - head) == product_parameters(whole) - head
    assert flops_per_token(half, None, "online").formula == "6 x 0.315 B"


def test_small_models_are_counted_in_millions(tmp_path: Path) -> None:
    shape = shaped(
        tmp_path, model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=32, vocab_size=1000, n_inner=256
    )
    assert product_parameters(shape) == 2 * (4 * 64 * 64 + 2 * 64 * 256) + 1000 * 64
    assert flops_per_token(shape, None, "online").formula == "6 x 0.162 M"


def test_a_model_that_its_dimensions_do_not_explain_is_about_so_large(tmp_path: Path) -> None:
    experts = shaped(
        tmp_path, model_type="mixtral", num_local_experts=8, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, vocab_size=1000,
    )  # fmt: skip
    assert flops_per_token(experts, None, "online").formula.startswith("6 x about ")


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H100 NVL", 835.0, 60.0),
        ("NVIDIA H200", 989.5, 67.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA B200", 2250.0, None),
        ("NVIDIA GB10", None, 31.0),
    ],
)
def test_the_peak_of_a_known_part_is_the_published_one(name: str, bf16: float | None, fp32: float | None) -> None:
    for precision, tera in (("bf16", bf16), ("fp32", fp32)):
        peak = peak_flops(name, precision)
        if tera is None:
            assert peak is None
        else:
            assert peak is not None
            assert (peak.flops, peak.source.startswith("NVIDIA")) == (tera * 1e12, True)
            assert peak.source.endswith(f", dense {precision}")
    assert peak_flops(name, "fp16") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A100X",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA B200 NVL",
        "NVIDIA GB200",
        "x86_64",
        "",
    ],
)
def test_an_unknown_part_is_not_taken_for_a_known_one(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert peak_flops(name, "fp32") is None


def test_what_the_formula_counts_is_said_in_words() -> None:
    for words in ("no embedding look-up", "the head once", "sequence x sequence", "recomputation"):
        assert words in COUNTED
