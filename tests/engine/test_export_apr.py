"""A trained student as an APR file: read back by a fresh process, each tensor compared with the checkpoint's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_fixtures import save_qwen2
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import export_apr as module
from engine import formats
from engine.apr import read_apr
from engine.config import Teacher
from engine.convert import convert
from engine.errors import KdError, ModelError, RunError
from engine.export import APR_LIMITS, Exported, probe_logits, weights_digests
from engine.export_apr import FILE, export_apr
from engine.formats import inspect_model_dir
from engine.models import load_teacher
from engine.stream import Measure
from engine.verify_export import verify

ASSETS = Path(formats.__file__).parent / "assets"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, dict[str, str], Path]:
    """A student after some training, the digests of what it was, and its checkpoint's weights."""
    root = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(
        save_qwen2(root / "model", vocab=2048, layers=2, tie_word_embeddings=True), dtype=torch.float32
    )
    initial = weights_digests(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, root / "model.safetensors")
    return model, initial, root / "model.safetensors"


def measured(exported: Exported) -> dict[str, float]:
    return {measure.name: measure.value for measure in exported.measures}


def test_an_exported_apr_file_has_the_checkpoints_bytes_and_the_models_logits(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path
) -> None:
    model, initial, checkpoint = trained
    exported = export_apr(
        model, tmp_path / "out", checkpoint, run="a-run", initial=initial, tokenizer_dir=ASSETS / "teacher"
    )
    assert exported.problems == []
    assert exported.ok
    assert measured(exported)["export_different_tensors"] == 0
    assert measured(exported)["export_reload_error"] < 1e-5
    assert 0 < measured(exported)["export_logit_error"] < 2e-2
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    there = {path.name for path in exported.path.iterdir()}
    assert there == {FILE, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    apr = read_apr(exported.path / FILE)
    assert {tensor.dtype for tensor in apr.tensors.values()} == {"BF16"}
    assert (apr.metadata["name"], apr.metadata["num_layers"]) == ("a-run", 2)
    back = load_teacher(Teacher(path=str(exported.path / FILE)), "cpu", torch.float32)
    ids = torch.arange(20)
    wanted = probe_logits(model, ids, {n: p.to(torch.bfloat16).float() for n, p in model.named_parameters()})
    assert torch.equal(probe_logits(back.model, ids), wanted)


def test_an_exported_float32_file_is_the_model_bit_for_bit(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, initial, checkpoint = trained
    monkeypatch.setattr(module, "run_verification", here)
    exported = export_apr(model, tmp_path / "out", checkpoint, run="r", initial=initial, dtype="fp32")
    assert exported.ok
    assert measured(exported)["export_logit_error"] < 1e-6
    made = convert(exported.path / FILE, tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def here(model: Path, reference: Path, poll: object = None, checkpoint: Path | None = None) -> list[Measure]:
    """The verification without a process of its own."""
    findings = verify(model, reference, checkpoint)
    assert checkpoint is not None
    return [Measure(name=name, value=findings[name][0], detail=findings[name][1]) for name in APR_LIMITS]


def test_a_file_that_is_not_the_checkpoint_is_rejected_by_the_tensors_name(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, initial, _ = trained
    monkeypatch.setattr(module, "run_verification", here)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    exported = export_apr(model, tmp_path / "out", tmp_path / "other.safetensors", run="r", initial=initial)
    assert not exported.ok
    assert exported.path == tmp_path / "out.rejected"
    assert exported.problems == ["export_different_tensors 1, at most 0: model.norm.weight"]


def test_a_damaged_file_is_rejected(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, initial, checkpoint = trained

    def damage(made: Path, reference: Path, poll: object, checkpoint: Path) -> list[Measure]:
        raw = bytearray(made.read_bytes())
        raw[-200] ^= 1
        made.write_bytes(raw)
        return here(made, reference, poll, checkpoint)

    monkeypatch.setattr(module, "run_verification", damage)
    exported = export_apr(model, tmp_path / "out", checkpoint, run="r", initial=initial)
    assert not exported.ok
    assert "its last four bytes say CRC-32" in " ".join(exported.problems)


def test_unchanged_weights_are_no_export(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, checkpoint = trained
    monkeypatch.setattr(module, "run_verification", here)
    exported = export_apr(model, tmp_path / "out", checkpoint, run="r", initial=weights_digests(model))
    assert [problem.split()[0] for problem in exported.problems] == ["export_unchanged"]


def test_nothing_is_overwritten_and_a_stop_leaves_nothing(
    trained: tuple[PreTrainedModel, dict[str, str], Path], tmp_path: Path
) -> None:
    model, initial, checkpoint = trained
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="is there already"):
        export_apr(model, tmp_path / "there", checkpoint, run="r", initial=initial)

    def stop() -> None:
        raise RunError("stopped")

    with pytest.raises(KdError, match="stopped"):
        export_apr(model, tmp_path / "out", checkpoint, run="r", initial=initial, poll=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert inspect_model_dir(ASSETS / "teacher", "teacher").container is None
