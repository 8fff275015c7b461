from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_fixtures import ModelZoo, model_zoo, save_model

from engine.config import RunConfig, load_config, to_yaml
from engine.estimate import Estimate, Row, estimate
from engine.falsifiers import builtin_contract
from engine.formats import inspect_model_dir
from engine.shapes import shape_of

__all__ = ["model_zoo"]

ROOT = Path(__file__).parents[2]


def configured(teacher: Path | None, student: Path, *sets: str, mode: str = "train") -> RunConfig:
    """A resolved configuration; the data are never looked at by an estimate."""
    models = [f"student.path={student}", *([f"teacher={teacher}"] if teacher else ["teacher=null", "distill.alpha=1"])]
    return load_config(sets=[*models, "data.path=builtin:stdlib", f"mode={mode}", *sets])


def estimated(model: Path, *sets: str, device: Any = "cpu", **options: Any) -> Estimate:
    files = inspect_model_dir(model, "student")
    return estimate(configured(model, model, *sets), files, files, device=device, **options)


def rows(found: Estimate) -> dict[str, Row]:
    return {row.name: row for row in (*found.memory, *found.disk)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gpt2"])
def test_parameters_of_a_random_student_are_counted_as_transformers_makes_them(
    tmp_path: Path, family: str, seed: int
) -> None:
    import transformers

    draw = np.random.default_rng([seed, len(family)])
    heads, kv, width, layers, vocab = 4, int(draw.choice([1, 2, 4])), 8, int(draw.integers(1, 4)), 97
    tied = bool(draw.integers(2))
    common = {"vocab_size": vocab, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=heads, n_positions=64, **common)
    else:
        kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[family]
        extra = (
            {"attention_bias": bool(draw.integers(2)), "mlp_bias": bool(draw.integers(2))} if kind == "Llama" else {}
        )
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=32,
            intermediate_size=int(draw.integers(40, 80)),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=width,
            **extra,
            **common,
        )
    config.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_of(inspect_model_dir(tmp_path, "student", need_weights=False))
    assert shape.exact
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_architecture_is_counted_high_and_said_so(tmp_path: Path) -> None:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    files = inspect_model_dir(tmp_path, "student", need_weights=False)
    shape = shape_of(files)
    assert not shape.exact
    assert shape.parameters >= sum(p.numel() for p in model.parameters())
    found = estimate(configured(None, tmp_path, "student.init=random"), None, files, device="cpu")
    assert "upper estimate" in found.notes[0]


def test_layers_that_are_left_out_are_not_counted(model_zoo: ModelZoo) -> None:
    files = inspect_model_dir(model_zoo.qwen2_sharded, "student")
    whole, half = shape_of(files), shape_of(files, [0, 2])
    layer = (whole.parameters - half.parameters) // 2
    assert half.layers == 2
    assert half.parameters == whole.parameters - 2 * layer
    assert layer == 32 * 32 * 2 + 32 * 16 * 2 + 32 + 16 * 2 + 3 * 32 * 64 + 2 * 32


def test_training_state_is_sixteen_bytes_a_parameter(model_zoo: ModelZoo) -> None:
    found = rows(estimated(model_zoo.llama))
    parameters = shape_of(inspect_model_dir(model_zoo.llama, "student")).parameters
    state = sum(found[name].bytes for name in ("student weights", "gradients", "AdamW moments"))
    assert state == 16 * parameters
    assert found["teacher weights"].bytes == 4 * parameters
    assert found["checkpoint snapshot"].bytes == 12 * parameters


def test_mixed_precision_halves_the_teacher_and_adds_copies(model_zoo: ModelZoo) -> None:
    full, mixed = rows(estimated(model_zoo.llama)), rows(estimated(model_zoo.llama, "train.precision=bf16"))
    assert mixed["teacher weights"].bytes * 2 == full["teacher weights"].bytes
    assert mixed["student activations"].bytes < full["student activations"].bytes
    assert "bf16 copies of weights" in mixed
    assert "bf16 copies of weights" not in full


def test_accumulation_lowers_activations_and_nothing_of_the_state(model_zoo: ModelZoo) -> None:
    one, four = rows(estimated(model_zoo.qwen2)), rows(estimated(model_zoo.qwen2, "train.accumulation=4"))
    assert four["student activations"].bytes * 4 == one["student activations"].bytes
    assert four["gradients"] == one["gradients"]


def test_activations_are_what_autograd_saves(model_zoo: ModelZoo) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_zoo.qwen2, dtype=torch.float32).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for precision in ("fp32", "bf16"):
        saved: dict[int, int] = {}
        alive = []

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved, alive: list[Any] = alive) -> torch.Tensor:
            storage = tensor.untyped_storage()
            alive.append(tensor)  # so that no address is used twice
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            model.base_model(input_ids=torch.arange(2 * 128).view(2, 128) % 96, use_cache=False)
        found = rows(estimated(model_zoo.qwen2, "train.batch=2", "train.sequence=128", f"train.precision={precision}"))
        copies = found["bf16 copies of weights"].bytes if precision == "bf16" else 0
        assert sum(saved.values()) == pytest.approx(found["student activations"].bytes + copies, rel=0.1)


def test_a_gpu_keeps_its_rows_apart_and_one_that_shares_memory_adds_them(model_zoo: ModelZoo) -> None:
    apart = estimated(model_zoo.qwen2, device="cuda")
    together = estimated(model_zoo.qwen2, device="cuda", shared=True)
    assert apart.precision == "bf16"
    assert apart.device_bytes > 0
    assert together.device_bytes == 0
    assert together.host_bytes == apart.device_bytes + apart.host_bytes
    assert estimated(model_zoo.qwen2).device_bytes == 0


def test_a_head_with_a_cap_needs_whole_logits(tmp_path: Path, model_zoo: ModelZoo) -> None:
    for file in model_zoo.qwen2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "whole logits" in rows(estimated(tmp_path))
    assert "loss chunks" in rows(estimated(model_zoo.qwen2))


def test_every_pool_that_is_too_small_is_named_and_an_unknown_one_is_not(model_zoo: ModelZoo) -> None:
    found = estimated(model_zoo.qwen2, device="cuda")
    assert found.fits(None, None, None) == []
    assert found.fits(found.device_bytes, found.host_bytes, found.disk_bytes) == []
    short = found.fits(found.device_bytes - 1, found.host_bytes - 1, found.disk_bytes - 1)
    assert [each.where for each in short] == ["device", "host", "disk"]
    assert short[0].needed == found.device_bytes


def test_disk_grows_with_the_checkpoints_that_are_kept(model_zoo: ModelZoo) -> None:
    two, five = rows(estimated(model_zoo.qwen2)), rows(estimated(model_zoo.qwen2, "checkpoint.keep_last=5"))
    none = rows(estimated(model_zoo.qwen2, "checkpoint.every_steps=0"))
    short = rows(
        estimated(model_zoo.qwen2, "train.steps=6000", "checkpoint.every_steps=5000", "checkpoint.keep_last=5")
    )
    assert none["checkpoints"].bytes < short["checkpoints"].bytes < two["checkpoints"].bytes < five["checkpoints"].bytes


def test_the_estimate_is_what_a_real_training_takes(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    def config(vocab: int, hidden: int, layers: int) -> Any:
        return Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 192,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )

    config(32_000, 576, 8).save_pretrained(tmp_path / "student")
    save_model(tmp_path / "teacher", config(32_000, 192, 4))
    np.random.default_rng(0).integers(0, 32_000, 40_000, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
    resolved = configured(
        tmp_path / "teacher",
        tmp_path / "student",
        *("student.init=random", f"data.path={tmp_path / 'tokens.bin'}", "data.heldout_windows=4"),
        *("train.batch=4", "train.sequence=64", "train.device=cpu", "train.precision=fp32", "train.warmup_steps=1"),
        *("train.threads=1", "smoke.max_steps=2", "smoke.budget_seconds=170"),
        mode="smoke",
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(resolved))
    (run_dir / "contract.yaml").write_text(builtin_contract("smoke"))
    (run_dir / "dispatch.json").write_text('{"run": "measured"}')
    subprocess.run(
        [sys.executable, "-P", "-m", "engine", str(run_dir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    end = json.loads((run_dir / "events.jsonl").read_text().splitlines()[-1])
    assert end["steps"] == 2, end
    peak = end["summary"]["peak_rss_bytes"]
    teacher = inspect_model_dir(tmp_path / "teacher", "teacher")
    student = inspect_model_dir(tmp_path / "student", "student", need_weights=False)
    found = estimate(resolved, teacher, student, device="cpu")
    framework = rows(found)["framework"].bytes
    assert found.host_bytes == pytest.approx(peak, rel=0.35)
    assert found.host_bytes - framework == pytest.approx(peak - framework, rel=0.35)
    assert shape_of(student).parameters > 40_000_000


def test_an_estimate_imports_no_torch() -> None:
    code = "import sys, engine.estimate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=False).returncode == 0
