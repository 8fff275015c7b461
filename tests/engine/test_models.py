"""Teacher and student from real directories, the head apart from the body, and the vocabulary rule."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from engine.config import Student, Teacher
from engine.errors import ModelError
from engine.formats import inspect_model_dir
from engine.models import CausalLM, align_vocabulary, load_student, load_teacher, weights_distance
from engine.vocabulary import check_vocabulary, read_vocabulary
from tests.engine.model_fixtures import (
    ModelZoo,
    model_zoo,
    save_gpt2,
    save_model,
    save_qwen2,
    save_tokenizer,
)

__all__ = ["model_zoo"]

IDS = torch.tensor([[5, 17, 3, 90, 41, 8, 2, 60], [9, 9, 1, 0, 95, 30, 7, 4]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on matrices this small, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def teacher(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_teacher(Teacher(path=str(path)), "cpu", dtype)


def student(path: Path, seed: int = 0, **options: Any) -> CausalLM:
    return load_student(Student(path=str(path), **options), "cpu", seed)


def subset(path: Path, layers: list[int]) -> CausalLM:
    return load_student(Student(from_=str(path), layers=layers), "cpu", 0)


def plain_logits(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits  # type: ignore[no-any-return]


def copied(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    edit_config(target, **config)
    return target


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen2", "qwen2_sharded", "llama", "gpt2"])
def test_head_times_hidden_state_is_the_plain_forward_pass(model_zoo: ModelZoo, name: str) -> None:
    path = getattr(model_zoo, name)
    lm = teacher(path)
    assert lm.head is not None, lm.head_reason
    assert lm.head.shape == (96, 32)
    assert lm.vocab == 96
    with torch.no_grad():
        product = lm.hidden(IDS) @ lm.head.T
    reference = plain_logits(path)
    limit = 1e-5 * float(reference.abs().max())
    assert float((product - reference).abs().max()) <= limit
    assert float((lm.logits(IDS) - reference).abs().max()) <= limit


def test_a_sharded_directory_is_the_same_model_as_the_whole_one(model_zoo: ModelZoo) -> None:
    assert inspect_model_dir(model_zoo.qwen2_sharded, "teacher").index is not None
    assert len(inspect_model_dir(model_zoo.qwen2_sharded, "teacher").weights) > 1
    assert weights_distance(teacher(model_zoo.qwen2), teacher(model_zoo.qwen2_sharded)) == 0


def test_the_directory_says_as_many_parameters_as_the_model_has(model_zoo: ModelZoo) -> None:
    for path in (model_zoo.qwen2, model_zoo.qwen2_sharded, model_zoo.llama, model_zoo.gpt2):
        lm = teacher(path)
        assert lm.files.parameters == sum(parameter.numel() for parameter in lm.model.parameters())
        assert lm.files.vocab_size == lm.vocab
        assert lm.files.tied == (path == model_zoo.gpt2)


def test_the_teacher_takes_no_gradient_and_the_student_trains_in_float32(model_zoo: ModelZoo) -> None:
    fixed, trained = teacher(model_zoo.gpt2, torch.bfloat16), student(model_zoo.gpt2)
    assert not fixed.model.training
    assert trained.model.training
    assert all(p.dtype is torch.bfloat16 and not p.requires_grad for p in fixed.model.parameters())
    assert all(p.dtype is torch.float32 and p.requires_grad for p in trained.model.parameters())
    assert trained.model.config._attn_implementation == "sdpa"
    assert trained.head is trained.model.get_input_embeddings().weight, "the tied head must be the live weight"


def test_a_tied_head_may_be_absent_from_the_file_and_an_untied_one_may_not(tmp_path: Path) -> None:
    tied = save_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    lm = student(tied)
    assert lm.head is not None
    assert lm.head is lm.model.get_input_embeddings().weight
    edit_config(tied, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lack lm_head\.weight; expected every tensor"):
        student(tied)


def test_nothing_is_printed_and_no_network_is_touched(
    model_zoo: ModelZoo, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    teacher(model_zoo.qwen2)
    student(model_zoo.gpt2, init="random")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR


def test_random_weights_are_a_pure_function_of_the_seed(model_zoo: ModelZoo) -> None:
    torch.manual_seed(1)
    first = student(model_zoo.llama, seed=7, init="random")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = student(model_zoo.llama, seed=7, init="random"), student(model_zoo.llama, seed=8, init="random")
    assert torch.equal(before, torch.get_rng_state())
    assert weights_distance(first, again) == 0
    assert weights_distance(first, other) > 0.1
    assert weights_distance(first, student(model_zoo.llama)) > 0.1


def test_a_random_student_needs_no_weights(model_zoo: ModelZoo, tmp_path: Path) -> None:
    shutil.copy(model_zoo.qwen2 / "config.json", tmp_path)
    assert student(tmp_path, init="random").vocab == 96
    with pytest.raises(ModelError, match=r"no weights.*init: random"):
        student(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_chosen_layers_keep_their_weights_and_all_layers_are_the_same_model(model_zoo: ModelZoo, name: str) -> None:
    path = getattr(model_zoo, name)
    source = student(path)
    stack = "transformer.h" if name == "gpt2" else "model.layers"
    total = source.files.layers
    kept = subset(path, [0, total - 1])
    ours, theirs = dict(kept.model.named_parameters()), dict(source.model.named_parameters())
    assert kept.model.config.num_hidden_layers == 2
    for key, value in ours.items():
        original = key.replace(f"{stack}.1.", f"{stack}.{total - 1}.")
        assert torch.equal(value, theirs[original]), key
    assert len(ours) < len(theirs)
    assert weights_distance(source, subset(path, list(range(total)))) == 0
    assert weights_distance(source, load_student(Student(from_=str(path)), "cpu", 0)) == 0
    assert bool(kept.logits(IDS).detach().isfinite().all())


def test_settings_of_single_layers_go_with_their_layers(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    path = save_qwen2(
        tmp_path / "mixed",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=types,
        eos_token_id=[1, 2, 3, 4],
    )
    kept = subset(path, [1, 2])
    assert kept.model.config.layer_types == ["sliding_attention", "full_attention"]
    assert kept.model.config.eos_token_id == [1, 2, 3, 4]
    windows = [layer.self_attn.sliding_window for layer in kept.model.model.layers]
    assert windows == [4, None]


def test_layers_that_depend_on_their_place_are_refused(tmp_path: Path) -> None:
    path = save_gpt2(tmp_path / "scaled", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match=r"layer 2 would not stay what it is.*scaling"):
        subset(path, [0, 2])


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 4], "4; expected numbers from 0 to 3: it has 4 layers"),
        ([-1], "-1; expected numbers from 0 to 3"),
        ([1, 2, 1], "1 is repeated"),
        ([], "at least one layer"),
    ],
)
def test_impossible_layers_are_refused(model_zoo: ModelZoo, layers: list[int], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        subset(model_zoo.qwen2, layers)
    assert says in str(caught.value)


def head_cases() -> list[tuple[str, str, dict[str, Any], str]]:
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**small, "num_key_value_heads": 2, "intermediate_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    opt = {**small, **tokens, "ffn_dim": 64, "max_position_embeddings": 64}
    gemma = {**wide, **tokens, "head_dim": 8}
    gptj = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    return [
        ("granite scale", "GraniteConfig", {**wide, "logits_scaling": 8.0}, "logits_scaling: 8.0"),
        ("granite scale of one", "GraniteConfig", {**wide, "logits_scaling": 1.0}, ""),
        ("cohere scale", "CohereConfig", {**wide, **tokens, "logit_scale": 0.5}, "logit_scale: 0.5"),
        (
            "gemma2 soft cap",
            "Gemma2Config",
            {**gemma, "final_logit_softcapping": 30.0},
            "final_logit_softcapping: 30.0",
        ),
        ("gemma2 without cap", "Gemma2Config", {**gemma, "final_logit_softcapping": None}, ""),
        ("gpt-j bias", "GPTJConfig", {**gptj, **tokens}, "its head has a bias"),
        ("opt", "OPTConfig", {**opt, "word_embed_proj_dim": 32}, ""),
        ("opt projected", "OPTConfig", {**opt, "word_embed_proj_dim": 16}, ""),
        ("mistral", "MistralConfig", wide, ""),
    ]


@pytest.mark.parametrize(
    ("config", "options", "reason"), [c[1:] for c in head_cases()], ids=[c[0] for c in head_cases()]
)
def test_a_head_that_is_more_than_one_product_is_none_with_its_reason(
    tmp_path: Path, config: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    lm = teacher(save_model(tmp_path / "m", getattr(transformers, config)(**options)))
    assert (lm.head is None) == bool(reason)
    assert reason in lm.head_reason
    assert lm.logits(IDS).shape == (2, 8, 96)
    if lm.head is None:
        with pytest.raises(ModelError, match="expected a head that is one matrix product"):
            lm.hidden(IDS)
    else:
        logits = lm.logits(IDS)
        assert float((lm.hidden(IDS) @ lm.head.T - logits).abs().max()) <= 1e-5 * float(logits.abs().max())


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ModelError, match="not causal"):
        teacher(save_model(tmp_path / "bert", config))


@pytest.mark.parametrize(
    ("value", "says"),
    [(math.nan, "NaN in model.layers.2.mlp.up_proj.weight: 3 of 2,048 values"), (math.inf, "infinity")],
)
def test_weights_that_are_not_finite_are_named(model_zoo: ModelZoo, tmp_path: Path, value: float, says: str) -> None:
    path = copied(model_zoo.qwen2, tmp_path / "bad")
    edit_weights(path, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][5, :3].fill_(value))
    with pytest.raises(ModelError) as caught:
        student(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def drop(*names: str) -> Any:
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("model.layers.0.mlp.up_proj.weight"), "lack model.layers.0.mlp.up_proj.weight; expected"),
        (
            drop(*[f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(2) for part in ("up", "down")]),
            "model.layers.1.mlp.down_proj.weight and 1 more",
        ),
        (
            lambda t: t.update({"extra.\x1bweight": torch.zeros(2)}),
            r"have extra.\x1bweight, unknown to Qwen2ForCausalLM",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(2)}),
            "model.norm.weight is (2,), not (32,); expected the shapes of config.json",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    model_zoo: ModelZoo, tmp_path: Path, change: Any, says: str
) -> None:
    path = copied(model_zoo.qwen2, tmp_path / "odd")
    edit_weights(path, change)
    with pytest.raises(ModelError) as caught:
        student(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "qwen17"}, "model_type qwen17 is unknown to transformers"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}, "needs the code that came with it"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "ViTModel is no causal language model"),
        ({"model_type": "t5", "architectures": ["T5"]}, "T5 is no causal language model"),
        ({"num_attention_heads": 0}, "does not load"),
        ({"num_attention_heads": "\x1b[2Jfour"}, "does not load"),
        ({"hidden_act": "no_such_activation"}, "does not load"),
    ],
)
def test_a_config_that_transformers_cannot_use_is_one_clear_line(
    model_zoo: ModelZoo, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    path = copied(model_zoo.qwen2, tmp_path / "odd", **config)
    (path / "code.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ModelError) as caught:
        teacher(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_config_cannot_name_other_weights_or_code(model_zoo: ModelZoo, tmp_path: Path) -> None:
    path = copied(
        model_zoo.qwen2,
        tmp_path / "sly",
        transformers_weights="other.safetensors",
        _attn_implementation="somebody/kernel",
        attn_implementation="somebody/kernel",
        auto_map={"AutoModelForCausalLM": "code.Mine"},
    )
    (path / "code.py").write_text("raise SystemExit('remote code was run')")
    lm = teacher(path)
    assert lm.model.config._attn_implementation == "sdpa"
    assert weights_distance(teacher(model_zoo.qwen2), lm) == 0


def test_distance_is_zero_for_the_same_file_in_two_precisions_and_infinite_for_other_shapes(
    model_zoo: ModelZoo, tmp_path: Path
) -> None:
    fixed = teacher(model_zoo.qwen2, torch.bfloat16)
    assert weights_distance(fixed, student(model_zoo.qwen2)) == 0
    assert weights_distance(fixed, student(model_zoo.llama)) == math.inf
    nudged = copied(model_zoo.qwen2, tmp_path / "nudged")
    edit_weights(nudged, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    assert weights_distance(teacher(model_zoo.qwen2), student(nudged)) == pytest.approx(0.5, rel=1e-5)


WORDS = [f"w{n}" for n in range(60)]


def test_a_larger_teacher_passes_when_the_tokenizers_agree_on_the_shared_ids(tmp_path: Path) -> None:
    small = save_tokenizer(tmp_path / "s", WORDS, {60: "<pad>", 61: "<mine>"})
    large = save_tokenizer(tmp_path / "t", [*WORDS, "<pad>"], {62: "<tool>", 90: "<far>"})
    check = check_vocabulary(96, 64, large, small)
    assert (check.status, check.rows) == ("PASS", 64)
    assert "teacher has 96 rows, student 64; 61 ids agree; 2 more on one side only" in check.observed
    assert "cut to 64 and renormalised" in check.observed
    equal = check_vocabulary(64, 64, small, small)
    assert equal.status == "PASS"
    assert "cut" not in equal.observed


def test_a_smaller_teacher_is_refused_with_both_numbers(tmp_path: Path) -> None:
    same = save_tokenizer(tmp_path, WORDS)
    for tokenizer in (same, None):
        with pytest.raises(ModelError, match=r"teacher has 151,936 rows, student 152,064; expected"):
            check_vocabulary(151_936, 152_064, tokenizer, tokenizer)


def test_ids_that_mean_different_tokens_are_refused_with_their_number_and_the_first(tmp_path: Path) -> None:
    changed = [*WORDS]
    changed[7], changed[9] = "\x1b[2Jseven", "nine"
    ours, theirs = save_tokenizer(tmp_path / "s", WORDS), save_tokenizer(tmp_path / "t", changed)
    with pytest.raises(ModelError) as caught:
        check_vocabulary(96, 96, theirs, ours)
    text = str(caught.value)
    assert "2 of 60 ids mean different tokens, the first is 7: teacher " in text
    assert "student 'w7'" in text
    assert "\x1b" not in text
    # Beyond the student's rows, the teacher may say what it likes.
    assert check_vocabulary(96, 7, theirs, ours).status == "PASS"


def test_a_student_token_that_the_teacher_never_learned_is_refused(tmp_path: Path) -> None:
    ours, theirs = save_tokenizer(tmp_path / "s", WORDS), save_tokenizer(tmp_path / "t", WORDS[:50])
    with pytest.raises(ModelError, match=r"10 of 60 ids .* the first is 50: teacher has none, student 'w50'"):
        check_vocabulary(96, 96, theirs, ours)


def test_tokenizers_without_a_common_id_are_refused(tmp_path: Path) -> None:
    ours, theirs = save_tokenizer(tmp_path / "s", []), save_tokenizer(tmp_path / "t", WORDS)
    with pytest.raises(ModelError, match="share no id below 96"):
        check_vocabulary(96, 96, theirs, ours)


def test_without_a_tokenizer_equal_rows_are_unknown_and_others_refused(tmp_path: Path) -> None:
    one = save_tokenizer(tmp_path, WORDS)
    for ours, theirs, who in ((None, one, "teacher"), (one, None, "student"), (None, None, "teacher and student")):
        check = check_vocabulary(96, 96, ours, theirs)
        assert (check.status, check.rows) == ("UNKNOWN", 96)
        assert f"no tokenizer for {who}: the ids were not compared" in check.observed
        with pytest.raises(ModelError, match=r"teacher has 97 rows, student 96, and .*put tokenizer\.json into"):
            check_vocabulary(97, 96, ours, theirs)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("{}", "no model.vocab"),
        ('{"model": {"vocab": {"a": "b"}}}', "model.vocab has the entry 'a': b"),
        ('{"model": {"vocab": [["a", 0.5], 3]}}', "model.vocab has the entry"),
        ('{"model": {"vocab": {}}, "added_tokens": [3]}', "added_tokens is not a list of objects"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": -1, "content": ""}]}', "no id or content"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        read_vocabulary(tmp_path)
    assert says in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_a_unigram_vocabulary_counts_its_ids_by_position(tmp_path: Path) -> None:
    document = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert read_vocabulary(tmp_path).tokens == {0: "<unk>", 1: "a"}


def test_a_teacher_of_152064_rows_stands_over_a_student_of_151936(tmp_path: Path) -> None:
    big = save_tokenizer(save_qwen2(tmp_path / "t", vocab=152_064, hidden=8, layers=1), WORDS)
    small = save_tokenizer(save_qwen2(tmp_path / "s", vocab=151_936, hidden=8, layers=1), WORDS)
    fixed, trained = teacher(big), student(small)
    assert fixed.head is not None
    assert (fixed.vocab, trained.vocab, fixed.head.shape[0]) == (152_064, 151_936, 152_064)
    check = align_vocabulary(fixed, trained, fixed.files.tokenizer_dir, trained.files.tokenizer_dir)
    assert (check.status, check.rows) == ("PASS", 151_936)
    with pytest.raises(ModelError, match="teacher has 151,936 rows, student 152,064"):
        align_vocabulary(trained, fixed, small, big)
