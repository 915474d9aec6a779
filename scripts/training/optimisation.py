"""Optimizer, learning rates and weight averaging."""

import math
import re
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .options import FinetuneOptions

_ENCODER = "audio_spectrogram_transformer."  # in its weights' names


def make_optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Adam or AdamW over the trained weights."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return kind(
        parameter_groups(
            model,
            options.learning_rate,
            options.weight_decay,
            options.layer_decay,
            options.head_learning_rate,
        ),
        betas=(options.adam_beta1, options.adam_beta2),
    )


def parameter_groups(
    model: Any,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """The trained weights by learning rate and weight decay.

    Weight decay on matrices; none on biases, norms, tokens and positions. The last layer learns at
    `layer_decay` times `learning_rate`, the one below at `layer_decay` times that, and so on down
    to the embeddings (BEiT, arXiv 2106.08254); what is above the encoder learns at
    `head_learning_rate`, by default `learning_rate`.
    """
    layers = model.config.num_hidden_layers
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        above = layers - int(layer[1]) if layer else layers + 1 if ".embeddings." in name else 0
        is_matrix = parameter.dim() > 1 and "embeddings.position" not in name
        decay = weight_decay if is_matrix and "token" not in name else 0.0
        rate = learning_rate * layer_decay**above
        if head_learning_rate is not None and _ENCODER not in name:
            rate = head_learning_rate
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_factor(step: int, options: FinetuneOptions, steps_per_epoch: int) -> float:
    """The learning rate at an optimizer step, counted from 0, relative to its peak."""
    steps = options.num_epochs * steps_per_epoch
    warmup = options.warmup_steps or round(options.warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if options.lr_scheduler_type == "step":
        late = step // steps_per_epoch - options.lr_step_start
        return options.lr_step_factor ** (late // options.lr_step_epochs + 1) if late >= 0 else 1.0
    if options.lr_scheduler_type == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 1 - done if options.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2


def make_average(model: nn.Module, options: FinetuneOptions) -> AveragedModel | None:
    """The averaged copy of the weights that becomes the result; None without averaging."""
    if options.ema_decay:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay))
    return AveragedModel(model) if options.averaged_epochs > 1 else None
