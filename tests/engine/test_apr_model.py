"""APR files as teacher and student: metadata of any spelling, tensors of any dtype, and what does not fit together."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apr_rig import QWEN2, Apr, Entry, qwen2_shapes
from model_fixtures import save_gpt2, save_llama, save_model, save_qwen2

from engine import formats
from engine.apr import read_apr
from engine.apr_model import config_of
from engine.config import Student, Teacher
from engine.convert import convert
from engine.errors import ModelError
from engine.formats import inspect_model_dir, read_tensors, same_files
from engine.models import CausalLM, load_student, load_teacher, weights_distance
from engine.shapes import shape_of

IDS = torch.arange(12).unsqueeze(0) % 48
ASSETS = Path(formats.__file__).parent / "assets"


def weights(seed: int = 0, **shapes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Values that bfloat16 holds exactly, so that every dtype of floats says the same."""
    random = np.random.default_rng(seed)
    return {
        name: (random.integers(-64, 65, shape) / 128 + (1 if "norm" in name else 0)).astype(np.float32)
        for name, shape in qwen2_shapes(**shapes).items()
    }


def stored(values: np.ndarray[Any, Any], number: int) -> bytes:
    if number in (2, 30):
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({0: "<f4", 1: "<f2", 3: "<f8"}[number]).tobytes()


def model(number: int = 0, metadata: dict[str, Any] | None = None, **shapes: Any) -> Apr:
    entries = [
        Entry(name.encode(), number, values.shape, stored(values, number))
        for name, values in sorted(weights(**shapes).items())
    ]
    return Apr(entries, {key: value for key, value in (QWEN2 | (metadata or {})).items() if value != "-"})


def teacher(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_teacher(Teacher(path=str(path)), "cpu", dtype)


@torch.no_grad()
def logits(model: CausalLM) -> torch.Tensor:
    return model.logits(IDS)


def reference(tmp_path: Path, **shapes: Any) -> CausalLM:
    """The same model as transformers has it, out of a directory with its own config."""
    from safetensors.numpy import save_file

    directory = save_qwen2(tmp_path / "reference", vocab=48, layers=2, tie_word_embeddings=True)
    save_file(weights(**shapes), directory / "model.safetensors", metadata={"format": "pt"})
    return teacher(directory)


@pytest.mark.parametrize("number", [0, 1, 2, 30, 3])
def test_a_hand_made_file_of_each_dtype_is_the_model_that_transformers_makes_of_its_values(
    tmp_path: Path, number: int
) -> None:
    path = model(number).write(tmp_path / "x.apr")
    found = teacher(path)
    assert torch.equal(logits(found), logits(reference(tmp_path)))
    assert found.name == str(path)
    assert found.files.tied
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}


def test_a_quantised_teacher_has_the_values_of_its_blocks(tmp_path: Path) -> None:
    apr = model()
    by_name = {entry.name.decode(): entry for entry in apr.entries}
    entry = by_name["model.layers.1.mlp.up_proj.weight"]
    codes = np.random.default_rng(5).integers(-127, 128, entry.shape).astype(np.int8)
    entry.dtype, entry.data = 9, struct.pack("<f", 0.0078125) + codes.tobytes()
    other = by_name["model.layers.0.mlp.down_proj.weight"]
    nibbles = np.random.default_rng(6).integers(0, 16, (*other.shape[:-1], 2, 32)).astype(np.uint8)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    scale = np.full((*packed.shape[:-1], 1), 0.0625, "<f2").view(np.uint8)
    other.dtype, other.data = 8, np.concatenate([scale, packed], -1).tobytes()
    apr.flags = 32
    state = teacher(apr.write(tmp_path / "x.apr")).model.state_dict()
    assert np.array_equal(state[entry.name.decode()].numpy(), codes.astype(np.float32) * np.float32(0.0078125))
    wanted = ((nibbles.astype(np.float32) - 8) * 0.0625).reshape(other.shape)
    assert np.array_equal(state[other.name.decode()].numpy(), wanted)


def test_a_model_that_is_quantised_throughout_loads_with_blocks_of_ggml(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    apr = model()
    for entry in apr.entries:
        if entry.name.endswith(b"mlp.gate_proj.weight"):
            values = np.frombuffer(entry.data, "<f4").reshape(-1, 256)
            # The package makes no Q6_K: blocks of noise with a finite scale are weights as good as any.
            blocks = np.random.default_rng(3).integers(0, 256, (len(values), 210), np.uint8)
            blocks[:, -2:] = np.array([2**-14], "<f2").view(np.uint8)
            entry.dtype, entry.data = 14, blocks.tobytes()
    found = teacher(apr.write(tmp_path / "x.apr"))
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K).reshape(64, 32)
    assert np.array_equal(found.model.state_dict()["model.layers.1.mlp.gate_proj.weight"].numpy(), wanted)


SPELT = {
    "hidden_size": "hidden_dim",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "n_vocab",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
}


def test_metadata_of_either_spelling_is_the_same_configuration(tmp_path: Path) -> None:
    plain = config_of(read_apr(model().write(tmp_path / "a.apr")))
    other = {SPELT.get(key, key): value for key, value in QWEN2.items()} | dict.fromkeys(SPELT, None)
    apr = model()
    apr.metadata = other | {"hidden_size": None}
    assert config_of(read_apr(apr.write(tmp_path / "b.apr"))) == plain
    assert plain["num_hidden_layers"] == 2
    assert plain["model_type"] == "qwen2"
    assert plain["tie_word_embeddings"] is True
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "stated",
    [
        {"hf_architecture": "-", "hf_model_type": "-"},
        {"architecture": "-", "hf_model_type": "-"},
        {"architecture": "-", "hf_architecture": "-"},
        {"architecture": "Qwen2ForCausalLM", "hf_architecture": "-", "hf_model_type": "-"},
        {"architecture": "some-family", "hf_model_type": "-"},
    ],
)
def test_the_architecture_is_told_by_any_of_its_keys(tmp_path: Path, stated: dict[str, Any]) -> None:
    assert config_of(read_apr(model(metadata=stated).write(tmp_path / "x.apr")))["model_type"] == "qwen2"


def test_a_head_of_its_own_makes_an_untied_model(tmp_path: Path) -> None:
    found = teacher(model(tied=False).write(tmp_path / "x.apr"))
    assert not found.files.tied
    assert not torch.equal(found.model.lm_head.weight, found.model.model.embed_tokens.weight)


def without(name: str) -> Apr:
    apr = model()
    apr.entries = [entry for entry in apr.entries if entry.name != name.encode()]
    return apr


def renamed() -> Apr:
    apr = model()
    for entry in apr.entries:
        entry.name = entry.name.replace(b"model.embed_tokens.weight", b"token_embd.weight")
    apr.entries.sort(key=lambda entry: entry.name)
    return apr


def integers() -> Apr:
    apr = model()
    apr.entries[0].dtype, apr.entries[0].data = 4, bytes(4 * 48 * 32)
    return apr


UNFIT = [
    (
        "no architecture",
        lambda: model(metadata=dict.fromkeys(("architecture", "hf_architecture", "hf_model_type"), "-")),
        "neither hf_architecture, hf_model_type nor architecture",
    ),
    (
        "an unknown family",
        lambda: model(metadata={"architecture": "whisper", "hf_architecture": "-", "hf_model_type": "-"}),
        "architecture: whisper: an architecture that is not known",
    ),
    (
        "an unknown class",
        lambda: model(metadata={"hf_architecture": "GPT2LMHeadModel"}),
        "hf_architecture: GPT2LMHeadModel",
    ),
    ("two architectures", lambda: model(metadata={"architecture": "llama"}), "architecture says llama"),
    *(
        (f"no {key}", lambda key=key: model(metadata={key: "-"}), f"the metadata has no {key}")
        for key in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "vocab_size",
            "intermediate_size",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        )
    ),
    ("a text for a number", lambda: model(metadata={"num_heads": "4"}), "num_heads: 4; expected a positive integer"),
    ("a negative number", lambda: model(metadata={"rope_theta": -1.0}), "rope_theta: -1.0; expected a positive number"),
    (
        "two values of one key",
        lambda: model(metadata={"num_hidden_layers": 3}),
        "num_layers is 2 and num_hidden_layers is 3",
    ),
    (
        "another vocabulary",
        lambda: model(metadata={"vocab_size": 64}),
        "vocab_size is 64 and model.embed_tokens.weight",
    ),
    ("another width", lambda: model(metadata={"hidden_size": 64}), "hidden_size is 64 and model.embed_tokens.weight"),
    ("too few layers", lambda: model(metadata={"num_layers": 3}), "num_layers is 3 and there are tensors of 2 layers"),
    ("2 billion layers", lambda: model(metadata={"num_layers": 2**31 - 1}), "num_layers is 2,147,483,647"),
    ("names of GGUF", renamed, "the names of a GGUF file"),
    ("no embedding", lambda: without("model.embed_tokens.weight"), "has no tensor model.embed_tokens.weight"),
    ("integers", integers, "is I32: integers"),
    (
        "a missing tensor",
        lambda: without("model.layers.1.mlp.up_proj.weight"),
        "the weights lack model.layers.1.mlp.up_proj",
    ),
    (
        "other heads",
        lambda: model(metadata={"num_kv_heads": 4}),
        "num_kv_heads is 4 and a head 8 wide, and model.layers.0.self_attn.k_proj.weight has shape [16, 32]",
    ),
    ("heads without number", lambda: model(metadata={"num_heads": 2**31 - 1}), "num_heads is 2,147,483,647 and a head"),
    ("a wide head", lambda: model(metadata={"head_dim": 2**30}), "num_heads is 4 and a head 1,073,741,824 wide"),
    (
        "a wide layer",
        lambda: model(metadata={"intermediate_size": 2**31 - 1}),
        "intermediate_size is 2,147,483,647, and model.layers.0.mlp.gate_proj.weight has shape [64, 32]",
    ),
]


@pytest.mark.parametrize(("made", "said"), [case[1:] for case in UNFIT], ids=[case[0] for case in UNFIT])
def test_what_does_not_belong_together_is_refused_by_its_key(tmp_path: Path, made: Any, said: str) -> None:
    path = made().write(tmp_path / "x.apr")
    with pytest.raises(ModelError) as error:
        teacher(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_nan_in_a_tensor_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    apr = model()
    apr.entries[0].data = struct.pack("<f", float("nan")) + apr.entries[0].data[4:]
    with pytest.raises(ModelError, match=r"NaN in model\.embed_tokens\.weight: 1 of"):
        teacher(apr.write(tmp_path / "x.apr"))


def test_llama_made_of_a_gguf_file_is_refused_for_its_order(tmp_path: Path) -> None:
    llama = dict.fromkeys(("architecture", "hf_model_type"), "llama") | {"hf_architecture": "LlamaForCausalLM"}
    with pytest.raises(ModelError, match="rows of q and k stand in another order"):
        teacher(model(metadata=llama | {"original_format": "gguf"}).write(tmp_path / "x.apr"))


@pytest.mark.parametrize("biases", [False, True])
def test_a_llama_has_the_biases_that_its_tensors_have(tmp_path: Path, biases: bool) -> None:
    source = save_llama(tmp_path / "llama", layers=2, attention_bias=biases, mlp_bias=biases)
    convert(source, tmp_path / "apr" / "x.apr")
    apr = read_apr(tmp_path / "apr" / "x.apr")
    bare = {key: value for key, value in apr.metadata.items() if key != "hf_config"}
    entries = [
        Entry(name.encode(), 0, tensor.shape, apr.path.read_bytes()[tensor.begin : tensor.end])
        for name, tensor in apr.tensors.items()
    ]
    path = Apr(entries, bare).write(tmp_path / "y.apr")
    config = config_of(read_apr(path))
    assert (config["attention_bias"], config["mlp_bias"]) == (biases, biases)
    assert torch.equal(logits(teacher(path)), logits(teacher(source)))


def test_an_apr_file_is_looked_at_like_a_directory(tmp_path: Path) -> None:
    shutil.copy(ASSETS / "teacher" / "tokenizer.json", tmp_path / "tokenizer.json")
    path = model().write(tmp_path / "x.apr")
    files = inspect_model_dir(path, "teacher")
    assert files.parameters == sum(int(np.prod(shape)) for shape in qwen2_shapes().values())
    assert (files.vocab_size, files.hidden_size, files.layers, files.tied) == (48, 32, 2, True)
    assert (files.weights, files.place, files.tokenizer_dir, files.config_files) == ([path], path, tmp_path, [])
    assert files.total_bytes == path.stat().st_size
    shape = shape_of(files)
    assert (shape.parameters, shape.key_value, shape.exact) == (files.parameters, 16, True)
    assert shape_of(files, [0]).parameters < files.parameters
    assert read_tensors(path)["model.norm.weight"].shape == (32,)
    (tmp_path / "tokenizer.json").unlink()
    assert inspect_model_dir(path, "teacher").tokenizer_dir is None


def test_the_same_apr_file_under_another_name_is_the_same_model(tmp_path: Path) -> None:
    one, two = model().write(tmp_path / "a.apr"), model().write(tmp_path / "b.apr")
    other = model(metadata={"name": "b"}).write(tmp_path / "c.apr")
    assert same_files(inspect_model_dir(one, "teacher"), inspect_model_dir(two, "student"))
    assert not same_files(inspect_model_dir(one, "teacher"), inspect_model_dir(other, "student"))
    assert weights_distance(teacher(one), teacher(other)) == 0


def test_a_file_that_is_changed_after_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    path = model().write(tmp_path / "x.apr")
    inspect_model_dir(path, "teacher")
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="its last four bytes say CRC-32"):
        inspect_model_dir(path, "teacher")


def test_a_student_is_an_apr_file_whole_cut_or_random(tmp_path: Path) -> None:
    path = model(2).write(tmp_path / "x.apr")
    whole = load_student(Student(path=str(path)), "cpu", 0)
    assert {parameter.dtype for parameter in whole.model.parameters()} == {torch.float32}
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in whole.model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    cut = load_student(Student(from_=str(path), layers=[1]), "cpu", 0)
    assert cut.model.config.num_hidden_layers == 1
    random = load_student(Student(path=str(path), init="random"), "cpu", 0)
    assert weights_distance(teacher(path), random) > 0.1


def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = model().write(tmp_path / "x.apr")
    loaded = teacher(path)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(path.stat().st_size - 4096))
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_the_configuration_cannot_bring_code_or_another_file_in(tmp_path: Path) -> None:
    full = {"model_type": "qwen2", "auto_map": {"AutoModelForCausalLM": "x.Y"}, "transformers_weights": "/etc/passwd"}
    found = teacher(model(metadata={"hf_config": full}).write(tmp_path / "x.apr"))
    assert not hasattr(found.model.config, "auto_map")
    assert not hasattr(found.model.config, "transformers_weights")
    for wrong, said in (
        ({"hf_config": 3}, "hf_config: 3; expected an object"),
        ({"hf_config": {"model_type": "gpt2"}}, "hf_config.model_type: gpt2"),
        (
            {"hf_config": {"model_type": "qwen2", "hidden_size": 64}},
            "hf_config.hidden_size is 64 and hidden_size is 32",
        ),
        ({"hf_config": full | {"quantization_config": {"quant_method": "gptq"}}}, "quantised weights"),
    ):
        with pytest.raises(ModelError, match=said):
            teacher(model(metadata=wrong).write(tmp_path / "y.apr"))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16", "fp16"])
def test_the_built_in_teacher_written_as_apr_and_read_back_has_its_logits_within_the_dtype(
    tmp_path: Path, dtype: Any
) -> None:
    made = convert(ASSETS / "teacher", tmp_path / "t" / "teacher.apr", dtype)
    original, back = teacher(ASSETS / "teacher"), teacher(made.path)
    difference = (logits(original) - logits(back)).abs().max() / logits(original).abs().max()
    # bfloat16 is how the original is stored; float16 has more bits for all values but the smallest.
    assert float(difference) <= (2e-3 if dtype == "fp16" else 0)
    assert back.files.tokenizer_dir == tmp_path / "t"


def test_a_qwen3_with_its_own_head_width_goes_there_and_back(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    source = save_model(tmp_path / "qwen3", config)
    convert(source, tmp_path / "x.apr")
    convert(tmp_path / "x.apr", tmp_path / "back")
    assert torch.equal(logits(teacher(tmp_path / "x.apr")), logits(teacher(source)))
    assert torch.equal(logits(teacher(tmp_path / "back")), logits(teacher(source)))


def test_an_architecture_that_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_type gpt2: not written as APR"):
        convert(save_gpt2(tmp_path / "gpt2"), tmp_path / "x.apr")
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["model_type"] == "gpt2"
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2"}
