from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import save_gpt2, save_qwen2
from safetensors.torch import load_file, save_file

from engine import export as export_module
from engine.config import Student
from engine.contract import AllAtMost, builtin_contract, parse_contract
from engine.errors import ConfigError, RunError
from engine.export import LIMITS, Exported, export, run_verification, unique_state, weights_digests
from engine.falsifiers import JUDGE_PHASE, Judge
from engine.formats import resolve_builtin
from engine.model_card import Provenance, model_card
from engine.models import load_student
from engine.stream import Measure, Phase, Run
from engine.verify_export import verify
from tests.nursery import Nursery

TOKENIZER = resolve_builtin("builtin:student")
PROVENANCE = Provenance(
    run="20250101-000000-train-abcdef",
    teacher="/models/teacher",
    student="/models/student",
    data=["builtin:stdlib"],
    config="ab" * 32,
    steps=12,
    tokens=12_288,
    temperature=2.0,
    alpha=0.3,
    losses={"held-out, last": 3.21},
    verdicts=[("F-FINITE-001", "PASS", "all finite to step 12")],
    versions={"torch": "2"},
)


def trained(path: Path, **options: Any) -> tuple[Any, dict[str, str]]:
    """A small student after something like a step, and the digests of what it was before."""
    if not path.exists():
        save_qwen2(path, vocab=2048, tie_word_embeddings=True, **options)
    model = load_student(Student(path=str(path)), "cpu", 0).model
    initial = weights_digests(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, initial


def _verify_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds to import torch; where it is not the point, the same check runs in this one."""

    def run(model_dir: Path, reference: Path, *_: Any) -> list[Measure]:
        return [Measure(name=n, value=v, detail=d) for n, (v, d) in verify(model_dir, reference).items()]

    monkeypatch.setattr(export_module, "run_verification", run)


def verdict(exported: Exported) -> Any:
    contract = parse_contract(builtin_contract("train"), "train")
    judge = Judge(contract)
    judge.observe(
        Run(
            attempt=1,
            mode="train",
            config="",
            gate="",
            contract="",
            teacher=None,
            student="s",
            host="",
            device="cpu",
            device_name="",
            precision="fp32",
            target_steps=1,
            temperature=1.0,
            alpha=1.0,
            tokens_per_step=1,
        )
    )
    for measure in exported.measures:
        judge.observe(measure)
    judge.observe(Phase(name=JUDGE_PHASE))
    return next(v for v in judge.verdicts if v.id == "F-EXPORT-001")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> tuple[Path, Exported, Path]:
    """A run directory with a verified model in it, what was found, and the reference that it was held against."""
    run_dir = tmp_path_factory.mktemp("run")
    model, initial = trained(run_dir / "student")
    kept = run_dir / "reference.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = export_module.run_verification

    def keep(model_dir: Path, reference: Path, *rest: Any) -> list[Measure]:
        shutil.copyfile(reference, kept)
        return original(model_dir, reference, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "run_verification", keep)
        patch.setenv("PYTHONPATH", nursery.python_path)
        exported = export(model, run_dir, provenance=PROVENANCE, initial=initial, tokenizer_dir=TOKENIZER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.config.dtype == torch.float32
    return run_dir, exported, kept


def test_a_good_export_passes_and_leaves_nothing_but_the_model(good: tuple[Path, Exported, Path]) -> None:
    run_dir, exported, _ = good
    assert exported.problems == []
    assert exported.ok
    assert verdict(exported).verdict == "PASS"
    assert exported.path == run_dir / "model"
    assert sorted(p.name for p in run_dir.iterdir()) == ["model", "reference.safetensors", "student"]
    files = {path.name for path in exported.path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files
    values = {measure.name: measure.value for measure in exported.measures}
    assert values["export_reload_error"] < 1e-5
    assert 0 < values["export_logit_error"] < 2e-2


def test_weights_are_bf16_the_config_says_so_and_a_tied_head_is_written_once(
    good: tuple[Path, Exported, Path],
) -> None:
    tensors = load_file(good[1].path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert json.loads((good[1].path / "config.json").read_text())["dtype"] == "bfloat16"


def test_plain_transformers_loads_the_export_and_its_tokenizer(good: tuple[Path, Exported, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(good[1].path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(good[1].path, local_files_only=True)
    ids = tokenizer("import ", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


def _nothing(directory: Path) -> None:
    save_file({}, directory / "model.safetensors")


def _shortened(directory: Path) -> None:
    file = directory / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 100)


def _one_tensor_less(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _one_value_not_finite(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _another_layers_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    one, two = (f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _another_config(directory: Path) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    file.write_text(json.dumps(config))


def _broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("doctor", "broken"),
    [
        (_nothing, "export_missing_tensors"),
        (_shortened, "export_missing_bytes"),
        (_one_tensor_less, "export_missing_tensors"),
        (_one_value_not_finite, "export_non_finite"),
        (_another_layers_weights, "export_reload_error"),
        (_another_config, "export_reload_error"),
        (_broken_tokenizer, "export_load_failures"),
    ],
)
def test_a_doctored_export_is_found(
    good: tuple[Path, Exported, Path], tmp_path: Path, doctor: Callable[[Path], None], broken: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(good[1].path, directory)
    doctor(directory)
    findings = verify(directory, good[2])
    exported = Exported(directory, [Measure(name=n, value=v, detail=d) for n, (v, d) in findings.items()])
    assert set(findings) == set(LIMITS)
    assert findings[broken][0] > LIMITS[broken]
    judged = verdict(exported)
    assert judged.verdict == "FAIL"
    assert broken in judged.observed


def test_an_export_of_nothing_fails_in_a_fresh_process(good: tuple[Path, Exported, Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(good[1].path, directory)
    _nothing(directory)
    exported = Exported(directory, run_verification(directory, good[2]))
    assert verdict(exported).verdict == "FAIL"
    assert "no weights" in " ".join(exported.problems)


def test_an_export_whose_written_map_is_empty_fails_and_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _verify_here(monkeypatch)
    model, initial = trained(tmp_path / "student")
    original = type(model).save_pretrained

    def save_nothing(self: Any, directory: Path, **_: Any) -> None:
        original(self, directory, state_dict={})

    monkeypatch.setattr(type(model), "save_pretrained", save_nothing)
    exported = export(model, tmp_path, provenance=PROVENANCE, initial=initial)
    assert verdict(exported).verdict == "FAIL"
    assert exported.path == tmp_path / "model.rejected"
    assert not (tmp_path / "model").exists()


def test_an_export_of_unchanged_weights_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _verify_here(monkeypatch)
    model, _ = trained(tmp_path / "student")
    exported = export(model, tmp_path, provenance=PROVENANCE, initial=weights_digests(model))
    judged = verdict(exported)
    assert judged.verdict == "FAIL"
    assert judged.observed == "export_unchanged 1"


def test_a_rejected_export_leaves_the_earlier_model(
    good: tuple[Path, Exported, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _verify_here(monkeypatch)
    shutil.copytree(good[1].path, tmp_path / "model")
    model, _ = trained(tmp_path / "student")
    exported = export(model, tmp_path, provenance=PROVENANCE, initial=weights_digests(model))
    assert not exported.ok
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == unique_state(model).keys()


def test_fp32_weights_reload_without_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _verify_here(monkeypatch)
    path = save_gpt2(tmp_path / "student")
    model, initial = trained(path)
    exported = export(model, tmp_path, provenance=PROVENANCE, initial=initial, dtype="fp32")
    assert exported.problems == []
    assert {tensor.dtype for tensor in load_file(exported.path / "model.safetensors").values()} == {torch.float32}
    assert {measure.name: measure.value for measure in exported.measures}["export_logit_error"] < 1e-5


def test_a_verification_that_dies_counts_as_failed(
    good: tuple[Path, Exported, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    measures = run_verification(good[1].path, good[2])
    assert all(measure.value == math.inf for measure in measures)
    assert verdict(Exported(good[1].path, measures)).verdict == "FAIL"


def test_stopping_while_a_model_is_verified_ends_the_process_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    children: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            children.append(self)

    def poll() -> None:
        if children:
            raise Stopped

    monkeypatch.setattr(subprocess, "Popen", Watched)
    model, initial = trained(tmp_path / "student")
    with pytest.raises(Stopped):
        export(model, tmp_path, provenance=PROVENANCE, initial=initial, poll=poll)
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_directory_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    model, initial = trained(tmp_path / "student")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        export(model, tmp_path / "file", provenance=PROVENANCE, initial=initial)


def test_the_train_contract_has_the_limits_of_the_code() -> None:
    contract = parse_contract(builtin_contract("train"), "train")
    falsifier = next(f for f in contract.falsifiers if f.id == "F-EXPORT-001")
    assert isinstance(falsifier, AllAtMost)
    assert falsifier.limits == {f"measure.{name}": limit for name, limit in LIMITS.items()}


def test_an_export_that_was_never_looked_at_is_undecided(good: tuple[Path, Exported, Path]) -> None:
    judged = verdict(Exported(good[1].path, good[1].measures[:-1]))
    assert judged.verdict == "UNKNOWN"
    assert judged.observed == "missing: measure.export_logit_error"


def test_a_limit_that_nothing_can_break_is_refused() -> None:
    text = (
        "version: 1\nname: mine\nfalsifiers:\n  - id: F-MINE-001\n    claim: c\n    kind: all_at_most\n"
        "    limits: {measure.export_logit_error: .inf}\n"
    )
    with pytest.raises(ConfigError, match=r"limits: a limit that is not finite; expected finite numbers"):
        parse_contract(text, "mine.yaml")


def test_a_card_names_what_the_model_comes_from_and_keeps_text_as_text() -> None:
    from msgspec.structs import replace

    odd = replace(
        PROVENANCE,
        teacher="a`b|c",
        losses={"x | <script>": 1.0},
        verdicts=[("F-X-001", "FAIL", "[a](http://b)\x1b[0m")],
    )
    card = model_card(odd, architecture="Qwen2ForCausalLM", parameters=1_234, dtype="bf16")
    assert "1,234 parameters" in card
    assert r"x \| \<script\>" in card
    assert r"\[a\](http" in card
    assert r"\`b" in card
    assert "\x1b" not in card
    assert PROVENANCE.config in card
    plain = model_card(PROVENANCE, architecture="A", parameters=1, dtype="bf16")
    assert "| F-FINITE-001 | PASS | all finite to step 12 |" in plain
    assert "`/models/teacher`" in plain
