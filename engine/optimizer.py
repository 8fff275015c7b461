"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch

from engine.config import Train


def learning_rate(step: int, train: Train, warmup_steps: int) -> float:
    """Learning rate of a step, a pure function of its number.

    Linear warm-up to `train.learning_rate`, then the schedule down to `train.min_learning_rate` at `train.steps`,
    whatever number of steps a smoke really makes: a smoke trains as the real run's beginning does.

    Args:
        step: from 1 on.
        train: the configuration's section.
        warmup_steps: of this run; a smoke has its own.
    """
    if step <= warmup_steps:
        return train.learning_rate * step / warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = min(1.0, (step - warmup_steps) / max(1, train.steps - warmup_steps))
    factor = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * factor


def adamw(model: torch.nn.Module, train: Train, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases (one dimension) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=1e-8,
        fused=device.type in ("cpu", "cuda"),
    )
