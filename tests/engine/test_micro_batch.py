"""How a run decides in how many parts it takes a batch, by the memory that is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import RunConfig, fingerprint, load_config
from engine.estimate import estimate
from engine.formats import ModelFiles, inspect_model_dir
from engine.micro_batch import (
    MARGIN,
    UNIFIED_RESERVE,
    equal_parts,
    foresee,
    free_host_bytes,
    kept_parts,
    relief,
    resolve,
    told,
)
from engine.stream import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A student of random weights, large enough that its activations decide: config.json is all there is of it."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 1_000,
        "hidden_size": 512,
        "intermediate_size": 2_048,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def files(model: Path) -> ModelFiles:
    return inspect_model_dir(model, "student", need_weights=False)


def configured(model: Path, *sets: str) -> RunConfig:
    given = ("data.path=builtin:stdlib", "train.batch=24", "train.accumulation=auto", "train.precision=fp32")
    student = (f"student.path={model}", "student.init=random", "teacher=null", "distill.alpha=1")
    return load_config(sets=[*student, "mode=train", *given, *sets])


def needed(config: RunConfig, files: ModelFiles, parts: int, device: Any = "cpu", **train: Any) -> Any:
    train = {"accumulation": parts, **train}
    asked = msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, **train))
    return estimate(asked, None, files, device=device)


def enough(size: int) -> int:
    """The least memory of which so many bytes may be planned with."""
    free = size
    while free - free // MARGIN < size:
        free += 1 + (size - (free - free // MARGIN))
    return free


def started(accumulation: int, world_size: int = 1) -> Run:
    texts = dict.fromkeys(("config", "gate", "contract", "student", "host", "device", "device_name", "precision"), "")
    figures = {"temperature": 1.0, "alpha": 0.5, "tokens_per_step": 1, "target_steps": 1}
    given = {"attempt": 1, "mode": "train", "teacher": None, "world_size": world_size, "accumulation": accumulation}
    return msgspec.convert({"event": "run", "v": 1, **texts, **figures, **given}, Run)


def on_cpu(config: RunConfig, files: ModelFiles, free: int | None, **more: Any) -> RunConfig:
    return resolve(config, None, files, device="cpu", shared=False, free_device=None, free_host=free, **more)


@given(st.integers(1, 5_000))
def test_equal_parts_are_the_divisors_in_order(windows: int) -> None:
    assert equal_parts(windows) == [n for n in range(1, windows + 1) if windows % n == 0]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8, 12, 24])
def test_the_fewest_parts_that_fit_with_the_margin_are_taken(model: Path, files: ModelFiles, parts: int) -> None:
    config = configured(model)
    free = enough(needed(config, files, parts).host_bytes)
    assert on_cpu(config, files, free).train.parts == parts
    if parts < 24:
        assert on_cpu(config, files, free - 1 - MARGIN).train.parts > parts


def test_where_nothing_fits_parts_are_single_windows_and_where_nothing_is_known_there_is_one(
    model: Path, files: ModelFiles
) -> None:
    config = configured(model)
    assert on_cpu(config, files, 1).train.parts == 24
    assert on_cpu(config, files, None).train.parts == 1


def test_a_number_in_the_configuration_stays(model: Path, files: ModelFiles) -> None:
    config = configured(model, "train.accumulation=5")
    assert on_cpu(config, files, 1) == config


@pytest.mark.parametrize("pool", ["free_device", "free_host"])
def test_each_memory_can_be_the_one_that_is_short(model: Path, files: ModelFiles, pool: str) -> None:
    config = configured(model)
    free: dict[str, Any] = {"free_device": None, "free_host": None, pool: 1}
    assert resolve(config, None, files, device="cuda", shared=False, **free).train.parts == 24


def test_a_smoke_takes_the_parts_of_the_run_that_it_stands_for(model: Path, files: ModelFiles) -> None:
    run, smoke = configured(model), configured(model, "mode=smoke")
    free = enough(needed(smoke, files, 3).host_bytes)
    taken = on_cpu(run, files, free).train.parts
    assert taken > 3
    assert on_cpu(smoke, files, free).train.parts == taken
    assert on_cpu(smoke, files, free).mode == "smoke"


def test_several_devices_divide_their_models_only_where_whole_ones_do_not_fit(model: Path, files: ModelFiles) -> None:
    config = configured(model, "train.devices=4", "train.sequence=16")

    def settled(free: int) -> tuple[str, int]:
        train = resolve(config, None, files, device="cuda", shared=False, free_device=free, free_host=None).train
        return train.parallel, train.parts

    whole, parts = (
        [needed(config, files, n, "cuda", parallel=way).device_bytes for n in (1, 6)] for way in ("ddp", "fsdp")
    )
    assert parts[0] < whole[1]
    assert settled(enough(whole[0])) == ("ddp", 1)
    assert settled(enough(whole[1])) == ("ddp", 6)
    assert settled(enough(parts[0])) == ("fsdp", 1)
    assert settled(1) == ("fsdp", 6)


@pytest.mark.parametrize(
    ("accumulation", "world_size", "devices", "parts"),
    [(4, 1, 1, 4), (3, 2, 2, 3), (2, 2, 1, 4), (4, 1, 2, 2), (1, 1, 2, 1), (1, 4, 1, 4), (24, 1, 4, 6), (9, 9, 1, 24)],
)
def test_a_later_attempt_keeps_the_parts_and_with_other_devices_their_windows(
    model: Path, files: ModelFiles, accumulation: int, world_size: int, devices: int, parts: int
) -> None:
    config, before = configured(model, f"train.devices={devices}"), started(accumulation, world_size)
    assert kept_parts(config, before) == parts
    for free in (1, None):
        assert on_cpu(config, files, free, before=before).train.parts == parts


def test_what_is_settled_changes_no_digest_that_a_run_is_known_by(model: Path, files: ModelFiles) -> None:
    config = configured(model)
    before = fingerprint(config)
    assert fingerprint(on_cpu(config, files, 1)) != before  # which is why a run keeps the one it was given
    assert fingerprint(config) == before


def test_what_is_foreseen_is_the_estimate_of_what_would_be_settled(model: Path, files: ModelFiles) -> None:
    config = configured(model)
    wanted = needed(config, files, 4)
    free: dict[str, Any] = {"device": "cpu", "shared": False, "free_device": None}
    found = foresee(config, None, files, free_host=enough(wanted.host_bytes), **free)
    assert found.memory == wanted.memory
    assert found.settled == ("train.accumulation: auto: 4 parts of 6 windows",)
    number = configured(model, "train.accumulation=4")
    assert foresee(number, None, files, free_host=1, **free) == wanted
    several = configured(model, "train.devices=2")
    assert foresee(several, None, files, free_host=1, **free).settled == (
        "train.accumulation: auto: 12 parts of 1 window",
        "train.parallel: auto: fsdp",
    )


@pytest.mark.parametrize(("parts", "text"), [(1, "1 part of 24 windows"), (24, "24 parts of 1 window")])
def test_what_is_settled_is_told_in_words(model: Path, files: ModelFiles, parts: int, text: str) -> None:
    assert told(configured(model, f"train.accumulation={parts}")) == text


@pytest.mark.parametrize(
    ("sets", "parts", "first"),
    [
        (["train.accumulation=4"], None, "set train.accumulation: auto (it is 4)"),
        (["train.accumulation=24"], None, "set train.activation_checkpointing: true"),
        ([], 4, "set train.accumulation: 6"),
        ([], 24, "set train.activation_checkpointing: true"),
        ([], None, "set train.activation_checkpointing: true"),
        (["train.activation_checkpointing=true"], None, "lower train.sequence"),
        (["train.activation_checkpointing=true", "train.accumulation=1"], None, "set train.accumulation: auto (it is"),
    ],
)
def test_advice_for_too_little_memory_names_only_what_would_still_help(
    model: Path, files: ModelFiles, sets: list[str], parts: int | None, first: str
) -> None:
    advice = relief(configured(model, *sets), parts)
    assert advice.startswith(first)
    assert advice.endswith(
        "lower train.sequence" if "accumulation: " not in advice else "train.batch or train.sequence"
    )


def test_the_hosts_memory_counts_what_this_process_holds_and_leaves_a_gpus_reserve() -> None:
    alone, shared = free_host_bytes(shared=False), free_host_bytes(shared=True)
    if alone is None or shared is None:
        pytest.skip("Linux alone tells how much memory is free")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < alone <= total
    assert alone - shared == pytest.approx(min(alone, total // UNIFIED_RESERVE), abs=total // 50)


def test_it_imports_no_torch() -> None:
    code = "import sys, engine.micro_batch; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=False).returncode == 0
