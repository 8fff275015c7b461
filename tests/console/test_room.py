from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console, RenderableType

from console import room as room_module
from console.room import (
    POOLS,
    Free,
    Gpu,
    advice,
    document,
    find_gpu,
    free_disk,
    free_memory,
    look,
    pool_of,
    pools,
    require_room,
    shortage,
    table,
)
from engine.config import RunConfig, load_config, template
from engine.errors import ConfigError
from engine.estimate import Pool, Row, Shortage

ROOT = Path(__file__).parents[2]
# As `cli.py` will have it; the subprocess shows what an operator sees, exit code included.
COMMAND = (
    "from console import cli, room\n"
    "cli.cli.add_command(room.room_command)\n"
    "import sys\n"
    "try:\n"
    "    cli.main()\n"
    "finally:\n"
    "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
)


def qwen(path: Path, *, hidden: int, intermediate: int, layers: int, heads: int, rows: int) -> Path:
    """A Qwen2 directory with right headers whose weights are a hole in the file: nothing could be loaded from it."""
    kv = 2 * hidden // heads
    shapes = {"model.embed_tokens.weight": [rows, hidden], "model.norm.weight": [hidden]}
    for n in range(layers):
        for name, shape in {
            "self_attn.q_proj.weight": [hidden, hidden],
            "self_attn.q_proj.bias": [hidden],
            "self_attn.k_proj.weight": [kv, hidden],
            "self_attn.k_proj.bias": [kv],
            "self_attn.v_proj.weight": [kv, hidden],
            "self_attn.v_proj.bias": [kv],
            "self_attn.o_proj.weight": [hidden, hidden],
            "mlp.gate_proj.weight": [intermediate, hidden],
            "mlp.up_proj.weight": [intermediate, hidden],
            "mlp.down_proj.weight": [hidden, intermediate],
            "input_layernorm.weight": [hidden],
            "post_attention_layernorm.weight": [hidden],
        }.items():
            shapes[f"model.layers.{n}.{name}"] = shape
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    path.mkdir()
    file = path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(file, 8 + len(raw) + position)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def production(tmp_path: Path) -> Path:
    """A configuration of 1.5B to 0.5B, at a batch that no machine holds."""
    qwen(tmp_path / "1.5b", hidden=1536, intermediate=8960, layers=28, heads=12, rows=151_936)
    qwen(tmp_path / "0.5b", hidden=896, intermediate=4864, layers=24, heads=14, rows=151_936)
    file = tmp_path / "config.yaml"
    file.write_text("teacher: 1.5b\nstudent: 0.5b\ndata:\n  path: corpus\ntrain:\n  device: cpu\n")
    return file


def resolved(file: Path, *sets: str) -> RunConfig:
    return load_config(file, sets=sets)


def shown(renderable: RenderableType, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_a_production_run_that_fits_nowhere_is_refused_with_its_table_in_under_five_seconds(
    production: Path, tmp_path: Path
) -> None:
    arguments = ["room", str(production), "--set", "train.batch=65536", "--evidence", str(tmp_path / "evidence")]
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    assert done.returncode == 2, done.stderr
    # Of a core: it waits for nothing, and the clock on the wall goes on while others have the cores.
    assert sum(after[2:4]) - sum(before[2:4]) < 5
    for row in (
        "student weights",
        "gradients",
        "AdamW moments",
        "teacher weights",
        "student activations",
        "loss chunks",
    ):
        assert row in done.stdout
    assert "494.0 M" in done.stdout
    assert "1.54 G" in done.stdout
    assert "error: not enough room: memory:" in done.stderr
    assert not (tmp_path / "evidence").exists()


def test_the_production_template_is_refused_on_a_small_machine_without_a_weight_being_read(
    production: Path, tmp_path: Path
) -> None:
    models = [
        option for role, name in (("teacher", "1.5b"), ("student", "0.5b")) for option in ("--set", f"{role}={name}")
    ]
    config = tmp_path / "gx10.yaml"
    config.write_text(template("gx10"))
    device = ("--set", "train.device=cpu", "--set", "train.batch=65536", "--set", "train.accumulation=1")
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, "room", str(config), *models, *device],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "1.54 G" in done.stdout
    assert "50,000 steps" in done.stdout
    assert "error: not enough room: memory:" in done.stderr


def test_figures_of_the_production_run_are_in_the_range_that_is_known(production: Path, tmp_path: Path) -> None:
    needed = look(resolved(production, "train.precision=bf16", "train.device=cpu"), tmp_path).estimate
    by_name = {row.name: row.bytes for row in needed.memory}
    assert by_name["student weights"] == pytest.approx(494e6 * 4, rel=0.001)
    assert by_name["teacher weights"] == pytest.approx(1.544e9 * 2, rel=0.001)
    assert 9e9 < by_name["student activations"] < 15e9
    assert 20e9 < needed.host_bytes < 45e9


def test_the_json_document_has_what_the_table_has(production: Path) -> None:
    arguments = ["room", str(production), "--set", "train.batch=65536", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    document = json.loads(done.stdout)
    assert document["schema"] == "kdconsole.room/1"
    assert document["ok"] is False
    assert document["shortages"][0]["where"] == "host"
    total = sum(row["bytes"] for row in document["memory"])
    assert document["needed_bytes"]["host"] == total
    assert done.returncode == 2


def test_too_little_room_is_refused_and_force_is_an_override(production: Path, tmp_path: Path) -> None:
    config, tables = resolved(production, "train.batch=65536"), list[RenderableType]()
    with pytest.raises(ConfigError, match=r"not enough room: memory: .* GiB needed, .*--force"):
        require_room(config, tmp_path, show=tables.append)
    assert "✘ too little" in shown(tables[0])
    assert require_room(config, tmp_path, force=True, show=tables.append) == ["room"]
    assert len(tables) == 2


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ([], []),
        (["device"], ["train.batch"]),
        (["host"], ["train.batch"]),
        (["disk"], ["--evidence"]),
        (["disk", "host", "device"], ["train.batch", "--evidence"]),
    ],
)
def test_the_advice_is_for_the_pools_that_are_short_and_for_no_other(where: list[Pool], told: list[str]) -> None:
    said = advice(Shortage(where=each, needed=2, free=1) for each in where)
    assert [word for word in ("train.batch", "--evidence") if word in said] == told
    assert said.count("train.accumulation") <= 1


@pytest.mark.parametrize("where", POOLS)
def test_a_shortage_names_its_pool_and_both_figures(where: Pool) -> None:
    told = shortage(Shortage(where=where, needed=5 << 30, free=3 << 29))
    assert told == f"{POOLS[where]}: 5.00 GiB needed, 1.50 GiB free"


def test_a_device_without_memory_of_its_own_is_counted_as_the_hosts(production: Path, tmp_path: Path) -> None:
    room = look(resolved(production), tmp_path)
    row = Row(name="gradients", bytes=1, where="device", how="")
    assert [pool for pool, _, _ in pools(room)] == ["host", "disk"]
    assert pool_of(room.estimate, row) == "memory"
    apart = msgspec.structs.replace(room.estimate, shared=False)
    assert [pool for pool, _, _ in pools(replace(room, estimate=apart))] == ["device", "host", "disk"]
    assert pool_of(apart, row) == "GPU memory"


def test_the_evidence_directorys_name_cannot_steer_the_terminal(production: Path, tmp_path: Path) -> None:
    assert "\\x1b[2J\\u202e" in shown(table(look(resolved(production), tmp_path / "\x1b[2J\u202e")))


def test_a_run_that_fits_shows_nothing_and_overrides_nothing(tmp_path: Path) -> None:
    config, tables = load_config(template="builtin", sets=["train.device=cpu"]), list[RenderableType]()
    assert require_room(config, tmp_path, force=True, show=tables.append) == []
    assert tables == []


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_disk", lambda directory: 1000)
    with pytest.raises(ConfigError, match=r"disk: .* needed.*--evidence"):
        require_room(load_config(template="builtin", sets=["train.device=cpu"]), tmp_path)


def _smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program of ours in nvidia-smi's place."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_free_memory_of_the_gpu_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(tmp_path, monkeypatch, "echo 'NVIDIA GeForce RTX 4090, 23000'")
    assert find_gpu() == Gpu("NVIDIA GeForce RTX 4090", 23_000 << 20)


def test_a_gpu_that_tells_no_memory_shares_the_hosts(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _smi(tmp_path, monkeypatch, "echo 'NVIDIA GB10, [N/A]'")
    room = look(resolved(production, "train.device=cuda"), tmp_path)
    assert room.estimate.shared
    assert room.estimate.device_bytes == 0
    assert room.free.device is None
    assert "GPU memory" not in shown(table(room))


def test_a_small_gpu_is_refused(production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(tmp_path, monkeypatch, "echo 'Small, 4000'")
    with pytest.raises(ConfigError, match=r"GPU memory: .* GiB needed, 3\.91 GiB free"):
        require_room(resolved(production, "train.device=auto"), tmp_path)


@pytest.mark.parametrize("script", ["exit 9", "exec sleep 30", "echo", "printf '\\377\\376'"])
def test_an_nvidia_smi_that_does_not_answer_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(room_module, "_SMI_SECONDS", 0.2)
    _smi(tmp_path, monkeypatch, script)
    assert find_gpu() is None


def test_hidden_gpus_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(tmp_path, monkeypatch, "echo 'GPU, 1000'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpu() is None


def test_cuda_by_name_where_there_is_no_gpu_is_too_little(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "find_gpu", lambda: None)
    monkeypatch.setattr(room_module, "_GPU_NODES", (str(tmp_path / "none"),))
    with pytest.raises(ConfigError, match=r"GPU memory: .* GiB needed, 0\.0000 GiB free"):
        require_room(resolved(production, "train.device=cuda"), tmp_path)
    monkeypatch.setattr(room_module, "_GPU_NODES", (str(tmp_path),))
    assert look(resolved(production, "train.device=cuda"), tmp_path).free.device is None


def test_free_figures_are_real_ones(tmp_path: Path) -> None:
    host, disk = free_memory(), free_disk(tmp_path / "not" / "there")
    assert host is None or host > 1 << 20
    assert disk is not None
    assert disk > 0
    assert Free(None, host, disk).disk == disk


def test_what_auto_comes_to_for_the_memory_that_is_free_is_told(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = resolved(production, "train.accumulation=auto")
    eight = resolved(production, "train.accumulation=8")
    needed = look(eight, tmp_path).estimate.host_bytes
    free = needed + needed // 8
    monkeypatch.setattr(room_module, "free_host_bytes", lambda *, shared: free)
    monkeypatch.setattr(room_module, "free_memory", lambda: free)
    room = look(automatic, tmp_path)
    assert room.estimate.settled == ("train.accumulation: auto: 8 parts of 2 windows",)
    assert room.estimate.host_bytes == needed
    assert room.shortages == []
    assert "train.accumulation: auto: 8 parts of 2 windows" in shown(table(room))
    assert document(room)["settled"] == ["train.accumulation: auto: 8 parts of 2 windows"]
    assert look(eight, tmp_path).estimate.settled == ()


def test_auto_is_refused_only_where_single_windows_do_not_fit(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = resolved(production, "train.accumulation=auto")
    single = look(resolved(production, "train.accumulation=16"), tmp_path).estimate.host_bytes
    for free in (single, single - 1):  # the margin is for choosing, not for refusing
        monkeypatch.setattr(room_module, "free_host_bytes", lambda *, shared, free=free: free)
        monkeypatch.setattr(room_module, "free_memory", lambda free=free: free)
        assert look(automatic, tmp_path).estimate.settled == ("train.accumulation: auto: 16 parts of 1 window",)
        assert bool(look(automatic, tmp_path).shortages) == (free < single)
    with pytest.raises(ConfigError, match=r"set train\.activation_checkpointing: true, or lower train\.sequence"):
        require_room(automatic, tmp_path)


def test_a_preparation_is_held_against_the_disk_that_it_is_stored_on(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("x" * 3 * 512 * 20)
    asked = list[Path]()
    monkeypatch.setattr(room_module, "free_disk", lambda directory: asked.append(directory) or 1 << 50)
    sets = ("mode=prepare", "teacher.source=hidden", f"teacher.cache={tmp_path / 'cache'}")
    room = look(resolved(production, *sets), tmp_path)
    assert asked == [tmp_path / "cache"]
    [stored] = [row for row in room.estimate.disk if row.name == "stored teacher"]
    assert stored.bytes == 20 * (512 * 1536 * 2 + 8)
    look(resolved(production), tmp_path)
    assert asked[1:] == [tmp_path]
