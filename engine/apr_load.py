"""The tensors of an APR file as a transformers model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.apr_values import Values
from engine.formats import ModelFiles
from engine.weight_source import open_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_apr(
    files: ModelFiles, config: PretrainedConfig, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make the model of an APR file; one tensor at a time is held in two dtypes.

    Args:
        files: of the file.
        config: made of `files.config`.
        dtype: of the model; "auto" for the one that most of the file's values have, float32 for quantised ones.

    Returns:
        The model, and what transformers reports of missing, unexpected and mismatched tensors.

    Raises:
        ModelError: a tensor cannot be read.
    """
    wanted = _stored_dtype(files) if isinstance(dtype, str) else dtype
    weights = open_weights(files)
    # A copy of each: a model that pointed into the file would change with it, and its pages are no memory to train in.
    state = {name: tensor_of(weights.values(name)).to(wanted, copy=True) for name in weights.tensors}
    loaded: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=wanted,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
    )
    return loaded[0], loaded[1]


def tensor_of(values: Values) -> Tensor:
    """The values as a tensor that shares their memory."""
    tensor = torch.from_numpy(values.array)
    return tensor.view(torch.bfloat16) if values.dtype == "BF16" else tensor


def _stored_dtype(files: ModelFiles) -> torch.dtype:
    found = getattr(torch, str(files.config["dtype"]))
    assert isinstance(found, torch.dtype)
    return torch.float32 if found.itemsize > 4 else found


def bytes_of(tensor: Tensor) -> bytes:
    """A CPU tensor's bytes, row by row."""
    if not math.prod(tensor.shape):
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
