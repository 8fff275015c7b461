"""Two processes train as one does: gradients added up (ddp), models divided (fsdp), the state gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_fixtures import save_gpt2, save_llama, save_qwen2
from rank_rig import Together
from torch import Tensor

from engine import parallel
from engine.checkpoint import OrderState
from engine.config import Student, Teacher, Train
from engine.distill import Pair
from engine.errors import ConfigError
from engine.feed import Fed
from engine.models import CausalLM, load_student, load_teacher
from engine.optimizer import adamw
from engine.parallel import Sharded, Way, gather_into, put, shard, whole
from engine.ranks import ALONE, Ranks
from engine.snapshot import Snapshot, gather
from engine.step import Stepper

STEPS, BATCH, SEQUENCE, PARTS = 20, 4, 16, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": save_qwen2(root / "teacher", hidden=48, seed=1),
        "tied": save_qwen2(root / "tied", hidden=32, seed=2, tie_word_embeddings=True),
        "untied": save_llama(root / "untied", hidden=32, seed=3),
    }


def _load(models: dict[str, Path], student: str) -> tuple[CausalLM, CausalLM]:
    return (
        load_teacher(Teacher(path=str(models["teacher"])), CPU, torch.float32),
        load_student(Student(path=str(models[student])), CPU, 0),
    )


def _train(ranks: Ranks, models: dict[str, Path], student: str, way: Way, steps: int = STEPS) -> dict[str, Any]:
    teacher, trained = _load(models, student)
    parallel.BUCKET_BYTES = 20_000 if ranks.world > 1 else parallel.BUCKET_BYTES  # several of them, in its own process
    if way == "fsdp":
        teacher, trained = shard(teacher, ranks, CPU), shard(trained, ranks, CPU)
    pair = Pair(trained, teacher, temperature=2.0, alpha=0.5, autocast=None, chunk_bytes=4096, compile=False)
    optimizer = adamw(trained.model, Train(steps=steps, learning_rate=1e-2), CPU)
    stepper = Stepper(pair, optimizer, parts=PARTS, clip=1.0, ranks=ranks, way=way)
    figures = []
    for step in range(1, steps + 1):
        windows = np.random.default_rng(step).integers(96, size=(BATCH, SEQUENCE + 1))
        order = OrderState(seed=0, epoch=0, position=step)
        stepper.launch(step, 1e-2, Fed(windows, ranks.mine(BATCH), tuple(range(BATCH)), None, order))
        figures += list(stepper.flush())
    snapshot = Snapshot(trained.model, optimizer) if ranks.main else None
    if snapshot is not None:
        snapshot.fill()
    elif way == "fsdp":
        gather(trained.model, optimizer)
    weights = {name: whole(p.detach()).clone() for name, p in trained.model.named_parameters()}
    held = pair.evaluate(torch.from_numpy(windows), 2, lambda: None)
    return {
        "losses": [step.loss for step in figures],
        "norms": [step.norm for step in figures],
        "weights": weights,
        "files": None if snapshot is None else {name: bytes(image.data) for name, image in snapshot.files.items()},
        "heldout": held.loss,
        "elements": sum(p.to_local().numel() if way == "fsdp" else p.numel() for p in trained.model.parameters()),
    }


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def student(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def one(models: dict[str, Path], student: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(ALONE, models, student, "single")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(
    models: dict[str, Path], student: str, one: dict[str, Any], way: Way, tmp_path: Path
) -> None:
    first, second = Together(2, tmp_path, _train, models, student, way).results()
    for result in (first, second):
        assert result["losses"] == pytest.approx(one["losses"], rel=2e-5)
        assert result["norms"] == pytest.approx(one["norms"], rel=2e-4)
        assert result["heldout"] == pytest.approx(one["heldout"], rel=2e-5)
    assert len(set(one["losses"])) == STEPS
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["weights"].keys() == one["weights"].keys()
    # What a snapshot holds is the whole model, in the files that one process would have made.
    assert {n: len(d) for n, d in first["files"].items()} == {n: len(d) for n, d in one["files"].items()}
    kept = torch.frombuffer(bytearray(first["files"]["model.safetensors"]), dtype=torch.float32)
    alone = torch.frombuffer(bytearray(one["files"]["model.safetensors"]), dtype=torch.float32)
    assert torch.allclose(kept, alone, atol=1e-4)
    share = (first["elements"] + second["elements"]) / one["elements"]
    assert share == pytest.approx(1.0 if way == "fsdp" else 2.0)


def _sent(ranks: Ranks) -> tuple[int, int, int, bool]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    parallel.BUCKET_BYTES = 300
    gradients = parallel.Gradients(model.parameters())
    inputs = torch.arange(16.0).view(2, 8)

    def backward() -> None:
        model(inputs[ranks.mine(2)]).square().sum().backward()

    backward()
    early = gradients._sent
    gradients.expect()
    backward()
    during = gradients._sent
    gradients.finish()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (2 * model(inputs).square().sum()).backward()
    same = all(
        torch.allclose(a, p.grad, rtol=1e-4, atol=1e-4)
        for a, p in zip(mine, model.parameters(), strict=True)
        if p.grad is not None
    )
    return early, during, len(gradients._buckets), same


def test_gradients_travel_while_the_last_backward_pass_runs(tmp_path: Path) -> None:
    for early, during, buckets, same in Together(2, tmp_path, _sent).results():
        assert early == 0  # of a micro-batch that is not the last
        assert during == buckets > 1
        assert same


def _gathered(ranks: Ranks, models: dict[str, Path]) -> bool:
    _, trained = _load(models, "tied")
    divided = shard(_load(models, "tied")[1], ranks, CPU)
    for parameter in divided.model.parameters():
        put(parameter, torch.ones(parameter.shape))
    with torch.no_grad():
        gather_into(divided.model, trained.model if ranks.main else None)
    same = all(bool((p == 1).all()) for p in trained.model.parameters())
    return same if ranks.main else not same


def test_a_divided_model_is_made_whole_in_one_process(models: dict[str, Path], tmp_path: Path) -> None:
    assert Together(2, tmp_path, _gathered, models).results() == [True, True]


def _released(ranks: Ranks, models: dict[str, Path]) -> tuple[int, int]:
    divided = shard(_load(models, "untied")[1], ranks, CPU)
    divided.hidden(torch.zeros((1, 4), dtype=torch.int64))
    assert isinstance(divided, Sharded)
    assert isinstance(divided.head, Tensor)
    during = type(divided.head).__name__
    divided.release()
    return during, type(divided.head).__name__


def test_the_head_is_whole_for_the_loss_alone(models: dict[str, Path], tmp_path: Path) -> None:
    assert Together(2, tmp_path, _released, models).results() == [("Tensor", "DTensor")] * 2


def test_a_head_of_more_than_one_product_is_not_divided(tmp_path: Path) -> None:
    import dataclasses

    lm = load_student(Student(path=str(save_gpt2(tmp_path / "gpt2"))), CPU, 0)
    odd = dataclasses.replace(lm, head=None, head_reason="its head has a bias")
    with pytest.raises(ConfigError, match=r"fsdp: .*its head has a bias"):
        shard(odd, ALONE, CPU)
