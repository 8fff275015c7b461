"""What a model does between its last hidden state and its logits, found out by running it on eight tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.text import clean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names that transformers' configs have for what happens after the head. They make a message clearer and decide
# nothing: the probe sees the effect itself, whatever its name.
_LOGIT_KEYS = (
    "final_logit_softcapping",
    "output_logit_soft_cap",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
    "unpadded_vocab_size",
)


class HeadProbe(NamedTuple):
    """What was found."""

    vocab: int
    """Columns of the logits."""
    head: Tensor | None
    """The head's live weight, [vocab, hidden], when the logits are one matrix product of the last hidden state."""
    reason: str
    """Why `head` is None, in words that follow the model's name; empty when it is not."""
    causal: bool
    """Whether the hidden states of earlier positions are free of later tokens."""


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> HeadProbe:
    """Find out whether `logits == base_model(ids).last_hidden_state @ head.T` holds, bias, scale and cap included.

    The head's output is replaced by a ramp of known, large values: whatever comes after the head (scale, soft cap,
    cut, mask) then shows in the logits exactly, where small random weights would hide it. The mode of the model
    (training or evaluation) is left as it was.
    """
    device = next(model.parameters()).device
    embeddings: Any = model.get_input_embeddings()
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % int(embeddings.weight.shape[0])
    head: Any = model.get_output_embeddings()
    # Modules can have modes of their own (a frozen part in evaluation), so each one's is kept.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plain = model(input_ids=ids, use_cache=False, return_dict=True).logits
        vocab = int(plain.shape[-1])
        # Another last token in the second row: all before it must stay, but for rounding.
        first, second = plain[0, :-1].float(), plain[1, :-1].float()
        tolerance = 2e-2 if plain.dtype in (torch.bfloat16, torch.float16) else 1e-4
        causal = bool((first - second).abs().max() <= tolerance * (first - first.mean(-1, keepdim=True)).abs().max())
        reason = _reason(model, head, ids, vocab)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return HeadProbe(vocab, None if reason else head.weight, reason, causal)


def _reason(model: PreTrainedModel, head: Any, ids: Tensor, vocab: int) -> str:
    if type(head) is not nn.Linear:
        return f"its head is no plain linear layer ({type(head).__name__})"
    if getattr(head, "bias", None) is not None:
        return "its head has a bias"
    base: Any = model.base_model
    if base is model:
        return "it has no base model apart from its head"
    inputs: list[Tensor] = []
    ramps: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs.append(args[0])
        ramps.append(torch.linspace(-1000, 1000, output.numel(), device=output.device).to(output.dtype).view_as(output))
        return ramps[-1]

    handle = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if len(ramps) != 1:
        return f"its head runs {len(ramps)} times in a forward pass"
    if ramps[0].shape != logits.shape or not torch.equal(ramps[0].float(), logits.float()):
        config = model.config.get_text_config()
        named = [f"{key}: {value}" for key in _LOGIT_KEYS if (value := getattr(config, key, None)) is not None]
        return f"its logits are changed after the head ({clean(', '.join(named), 200) or 'scale, cap or cut'})"
    state = getattr(base(input_ids=ids, use_cache=False, return_dict=True), "last_hidden_state", None)
    if state is None or state.shape != inputs[0].shape:
        return "its head does not take the base model's last hidden state"
    gap, scale = (state.float() - inputs[0].float()).abs().max(), state.float().abs().max()
    if not gap <= (2e-2 if state.dtype in (torch.bfloat16, torch.float16) else 1e-5) * scale:
        return "its head takes the base model's last hidden state only after a change (a scale or projection)"
    return ""
