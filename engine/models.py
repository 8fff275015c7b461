"""Teacher and student: causal language models out of their files, and what the loss needs of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from engine.apr_load import load_apr
from engine.errors import ModelError
from engine.formats import ModelFiles, Role, inspect_model_dir, resolve_builtin
from engine.head_probe import probe_head
from engine.text import clean
from engine.vocabulary import VocabularyCheck, check_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.config import Student, Teacher

_CHUNK = 2**24
"""Elements of a weight that are looked at together, so that checks need no second copy of it."""
_NAMED = 3
"""How many tensors a message names."""
# What transformers raises for a config or weights that it cannot use is not one class. A traceback would hide the file.
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# Keys by which a config.json can make transformers fetch or run something else than the model beside it.
_UNTRUSTED_KEYS = ("auto_map", "transformers_weights", "fusion_config", "distributed_config", "custom_pipelines")


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A loaded model with its head apart, so that the loss can take the last matrix product in chunks."""

    model: PreTrainedModel
    name: str
    """The path it came from, for messages."""
    vocab: int
    """Columns of its logits."""
    head: Tensor | None
    """The live head weight, [vocab, hidden], when `logits` is `hidden @ head.T` and nothing else; otherwise None."""
    head_reason: str
    """Why `head` is None, in words; empty when it is not."""
    files: ModelFiles

    def hidden(self, input_ids: Tensor) -> Tensor:
        """The last hidden state, [batch, sequence, hidden], in the head's dtype.

        Raises:
            ModelError: the model has no head that is one matrix product (`head` is None).
        """
        if self.head is None:
            raise ModelError(f"{self.name}: {self.head_reason}", expected="a head that is one matrix product")
        output = self.model.base_model(input_ids=input_ids, use_cache=False, return_dict=True)
        state: Tensor = output.last_hidden_state
        # Autocast decides the product's dtype by itself and would only lose here.
        return state if torch.is_autocast_enabled(state.device.type) else state.to(self.head.dtype)

    def logits(self, input_ids: Tensor) -> Tensor:
        """The logits of a plain forward pass, [batch, sequence, vocab]."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits


def load_teacher(spec: Teacher, device: torch.device | str, dtype: torch.dtype) -> CausalLM:
    """Load the teacher: evaluation mode, no gradients.

    Args:
        spec: the `teacher` section.
        device: where it shall compute.
        dtype: of its weights.

    Raises:
        ModelError: there is no usable causal language model, or its weights do not fit, or are not finite.
    """
    files = inspect_model_dir(resolve_builtin(spec.path), "teacher")
    model = _pretrained(files, "teacher", dtype)
    model.requires_grad_(False)
    model.eval()
    return _finish(model, files, "teacher", spec.path, device)


def load_student(spec: Student, device: torch.device | str, seed: int) -> CausalLM:
    """Load or make the student: float32 weights, training mode.

    Random weights are drawn on the CPU and are a pure function of `seed` and the config, whatever the device;
    the global random state is left as it was.

    Args:
        spec: the `student` section: pretrained, random by a directory's config, or some layers of another model.
        device: where it shall train.
        seed: for random weights.

    Raises:
        ModelError: as `load_teacher`; or `layers` names layers that the model does not have or cannot be cut to.
    """
    source, random = spec.source, spec.starts_random
    if not source:
        raise ModelError("student: neither path nor from", expected="one of them", do="set student.path")
    if random and spec.layers is not None:
        raise ModelError(
            "student: init: random with layers", expected="layers of a pretrained model, or random weights"
        )
    files = inspect_model_dir(resolve_builtin(source), "student", need_weights=not random)
    if random:
        with _explained(files, "student"), _seeded(seed):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                _config(files, "student"), dtype=torch.float32, trust_remote_code=False
            )
    elif spec.layers is not None:
        model = _keep_layers(_pretrained(files, "student", "auto"), spec.layers, files)
    else:
        model = _pretrained(files, "student", torch.float32)
    model.train()
    return _finish(model, files, "student", source, device)


def align_vocabulary(
    teacher: CausalLM, student: CausalLM, teacher_tokenizer: Path | None, student_tokenizer: Path | None
) -> VocabularyCheck:
    """Hold the loaded models' vocabularies against each other; see `engine.vocabulary.check_vocabulary`."""
    return check_vocabulary(teacher.vocab, student.vocab, teacher_tokenizer, student_tokenizer)


def layer_lists(model: nn.Module, total: int) -> list[str]:
    """Names of the module lists of so many layers, without those that stand inside of another."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


@torch.no_grad()
def weights_distance(teacher: CausalLM, student: CausalLM) -> float:
    """Relative L2 distance of all weights, |student - teacher| / |teacher|.

    The student is rounded to the teacher's dtype first: the same file loaded in bfloat16 and float32 has distance 0.

    Returns:
        0 for the same weights; infinity when tensor names or shapes differ.
    """
    ours, theirs = dict(student.model.named_parameters()), dict(teacher.model.named_parameters())
    if {name: tensor.shape for name, tensor in ours.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
        return math.inf
    difference = norm = 0.0
    for name, reference in theirs.items():
        for a, b in zip(_chunks(ours[name]), _chunks(reference), strict=True):
            wide = b.float()
            difference += float((a.to(b).float() - wide).square().sum(dtype=torch.float64))
            norm += float(wide.square().sum(dtype=torch.float64))
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / norm)


def _finish(model: PreTrainedModel, files: ModelFiles, role: Role, name: str, device: torch.device | str) -> CausalLM:
    with _explained(files, role):
        model.to(device)
        _require_finite(model, files, role)
        probe = probe_head(model)
    if not probe.causal:
        raise ModelError(
            f"{role} {clean(name)}: not causal: a later token changes what it says of an earlier one",
            expected="a decoder that was trained to predict the next token",
            do="take another model",
        )
    return CausalLM(model, clean(name), probe.vocab, probe.head, probe.reason, files)


def _config(files: ModelFiles, role: Role) -> PretrainedConfig:
    where = f"{role} {clean(str(files.container or files.directory / 'config.json'))}"
    if files.model_type not in CONFIG_MAPPING:
        if files.config.get("auto_map"):
            raise ModelError(
                f"{where}: model_type {files.model_type} needs the code that came with it (auto_map)",
                expected="an architecture that transformers has itself; code of a model is never run",
                do="take a model of another architecture",
            )
        raise ModelError(
            f"{where}: model_type {files.model_type} is unknown to transformers",
            expected="a causal language model that it knows",
            do="check the spelling, or update transformers",
        )
    _silence()
    config: PretrainedConfig = (
        AutoConfig.from_pretrained(str(files.directory), local_files_only=True, trust_remote_code=False)
        if files.container is None
        else CONFIG_MAPPING[files.model_type].from_dict(copy.deepcopy(files.config))
    )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ModelError(
            f"{where}: {files.architecture or files.model_type} is no causal language model",
            expected="a decoder that predicts the next token, such as Qwen2ForCausalLM",
            do="take another model",
        )
    for key in _UNTRUSTED_KEYS:
        if key in vars(config):
            delattr(config, key)
    # A name here can mean a kernel to be downloaded; None lets transformers choose SDPA, or eager where there is none.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def read_pretrained(files: ModelFiles, role: Role, dtype: torch.dtype | str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model as transformers makes it, and its report of missing, unexpected and mismatched tensors.

    Raises:
        ModelError: transformers cannot make it.
    """
    with _explained(files, role), torch.random.fork_rng(devices=[]):
        config = _config(files, role)
        if files.container is not None:
            return load_apr(files, config, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(files.directory),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    return loaded[0], loaded[1]


def _pretrained(files: ModelFiles, role: Role, dtype: torch.dtype | str) -> PreTrainedModel:
    model, report = read_pretrained(files, role, dtype)
    where = f"{role} {clean(str(files.place))}"
    advice = "take the config.json that belongs to these weights"
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} is {tuple(stored)}, not {tuple(wanted)}" for name, stored, wanted in mismatched[:_NAMED]]
        raise ModelError(f"{where}: {_some(shapes, len(mismatched))}", expected="the shapes of config.json", do=advice)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{where}: the weights lack {_some(missing, len(missing))}", expected="every tensor of the model", do=advice
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise ModelError(
            f"{where}: the weights have {_some(unexpected, len(unexpected))}, unknown to {type(model).__name__}",
            expected="no tensor that the model does not use",
            do=advice,
        )
    if errors := [str(error) for error in report["error_msgs"]]:
        raise ModelError(f"{where}: {_some(errors, len(errors))}", expected="weights that load", do=advice)
    return model


def _keep_layers(source: PreTrainedModel, layers: Sequence[int], files: ModelFiles) -> PreTrainedModel:
    """Make the model of `source`'s config with these layers only, in this order, in float32, their weights kept."""
    where = f"student.layers of {clean(str(files.place))}"
    stack, total = _layer_stack(source, where)
    if not layers:
        raise ModelError(f"{where}: empty", expected="at least one layer")
    if outside := [index for index in layers if not 0 <= index < total]:
        raise ModelError(f"{where}: {outside[0]}", expected=f"numbers from 0 to {total - 1}: it has {total} layers")
    if len(set(layers)) != len(layers):
        twice = next(index for index in layers if list(layers).count(index) > 1)
        raise ModelError(f"{where}: {twice} is repeated", expected="each layer once")
    with _explained(files, "student"), torch.random.fork_rng(devices=[]):
        student: PreTrainedModel = AutoModelForCausalLM.from_config(
            _cut_config(source.config, layers, total), dtype=torch.float32, trust_remote_code=False
        )
        new_place = {f"{stack}.{old}.": f"{stack}.{new}." for new, old in enumerate(layers)}
        kept = {}
        for name, tensor in source.state_dict().items():
            if not name.startswith(f"{stack}."):
                kept[name] = tensor
            elif (place := ".".join(name.split(".")[: stack.count(".") + 2]) + ".") in new_place:
                kept[new_place[place] + name.removeprefix(place)] = tensor
        student.load_state_dict(kept, strict=True)
    for new, old in enumerate(layers):
        before, after = source.get_submodule(f"{stack}.{old}"), student.get_submodule(f"{stack}.{new}")
        if changed := _changed_setting(before, after):
            raise ModelError(
                f"{where}: layer {old} would not stay what it is: {changed}",
                expected=f"an architecture whose layers do not depend on their place ({files.model_type} does)",
                do="keep all layers, or take another model",
            )
    return student


def _layer_stack(model: PreTrainedModel, where: str) -> tuple[str, int]:
    """Name of the one module list that holds the layers, and their number."""
    total = int(model.config.get_text_config().num_hidden_layers)
    outer = layer_lists(model, total)
    if len(outer) != 1:
        raise ModelError(
            f"{where}: {type(model).__name__} keeps its {total} layers in {len(outer)} lists",
            expected="one list of layers",
            do="use the whole model, or init: random with a smaller config.json",
        )
    return outer[0], total


def _cut_config(config: PretrainedConfig, layers: Sequence[int], total: int) -> PretrainedConfig:
    values: dict[str, Any] = copy.deepcopy(config.to_dict())
    for key, value in values.items():
        # One entry a layer (layer_types and its like); lists of token ids can have that length by chance.
        if isinstance(value, list) and len(value) == total and "token" not in key and key != "architectures":
            values[key] = [value[index] for index in layers]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(values)


def _changed_setting(before: nn.Module, after: nn.Module) -> str:
    """Name a plain attribute (a window, a scale, a flag) by which two layers differ, their own number apart."""
    for (name, old), new in zip(before.named_modules(), after.modules(), strict=False):
        for key, value in vars(old).items():
            if (
                key.startswith("_")
                or key == "training"
                or key in ("layer_idx", "layer_id", "layer_index", "layer_number")
            ):
                continue
            other = getattr(new, key, None)
            if isinstance(value, bool | int | float | str) and (type(value), value) != (type(other), other):
                return clean(f"{f'{name}.' if name else ''}{key} {value!r} becomes {other!r}", 200)
    return ""


def _require_finite(model: nn.Module, files: ModelFiles, role: Role) -> None:
    for name, tensor in model.named_parameters():
        if all(bool(chunk.isfinite().all()) for chunk in _chunks(tensor)):
            continue
        nans = sum(int(chunk.isnan().sum()) for chunk in _chunks(tensor))
        count = nans or sum(int(chunk.isinf().sum()) for chunk in _chunks(tensor))
        raise ModelError(
            f"{role} {clean(str(files.place))}: {'NaN' if nans else 'infinity'} in {clean(name)}: "
            f"{count:,} of {tensor.numel():,} values",
            expected="finite weights",
            do="export the model again from its last good checkpoint",
        )


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.detach().reshape(-1).split(_CHUNK))


def _some(names: Sequence[str], count: int) -> str:
    rest = f" and {count - _NAMED:,} more" if count > _NAMED else ""
    return ", ".join(clean(name, 200) for name in names[:_NAMED]) + rest


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The CPU's generator alone: torch.manual_seed would set the accelerators' too, which the fork does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _explained(files: ModelFiles, role: Role) -> Iterator[None]:
    """Turn what transformers and torch raise into one line that names the directory."""
    try:
        yield
    except _LOAD_ERRORS as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ModelError(
            f"{role} {clean(str(files.place))}: {files.architecture or files.model_type} does not load: "
            f"{clean(said, 300)}",
            expected="config.json and weights of one model that transformers can load",
            do="--debug shows the whole error",
        ) from error


def _silence() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
