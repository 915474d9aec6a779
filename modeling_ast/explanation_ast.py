"""Where in the spectrogram an AST looks: attention rollout and gradient-weighted attention.

attentions      layers x (B, heads, S, S)   S = special tokens + rows * columns
relevance       (B, S, S)                   how much each input token contributes to each output
of the clip     (B, rows * columns)         output tokens pooled as the model pools them
map             (B, F, T)                   spread over the patches' frames and bins, sum 1
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold

from feature_extraction.fbank_ast import LogMel

from .patch_grid_ast import count_valid_columns, patch_mask

_TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000, 16000)


@torch.no_grad()
def attention_rollout(
    model: Any, input_values: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """What the clip's embedding is made of (Abnar and Zuidema, arXiv 2005.00928).

    Attention, averaged over heads, is mixed half and half with the residual connection and
    multiplied through the layers. The same for every class.

    Args:
        model: an `ASTModel` or `ASTForAudioClassification`.
        input_values: (B, T, F) as for the model.
        attention_mask: (B, T), 1 = sound, 0 = padding, which gets no relevance.

    Returns:
        (B, F, T), not negative; each clip's map sums to 1.

    Raises:
        ValueError: with token merging on, which moves patches from their places.
    """
    with _showing_attention(model):
        output = model(input_values, attention_mask, output_attentions=True)
    attentions = output.attentions
    identity = torch.eye(attentions[0].shape[-1], device=input_values.device)
    relevance = identity
    for attention in attentions:
        relevance = (attention.float().mean(dim=1) + identity) / 2 @ relevance
    return _to_spectrogram(relevance, model.base_model, input_values, attention_mask)


def class_relevance(
    model: Any,
    input_values: Tensor,
    label: int | Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The evidence for a class: gradient-weighted attention (Chefer et al., arXiv 2103.15679).

    In each layer, attention is multiplied by the gradient of the class's logit; the positive part,
    averaged over heads, is added to the relevance so far (the paper's equations 5 and 6).

    Args:
        model: an `ASTForAudioClassification`.
        input_values: (B, T, F) as for the model.
        label: class index, one for all clips or one each, (B,); None: each clip's best class.
        attention_mask: (B, T), 1 = sound, 0 = padding, which gets no relevance.

    Returns:
        (B, F, T), not negative; each clip's map sums to 1, or is 0 if nothing supports the class.

    Raises:
        ValueError: with token merging on, or for a label the model does not have.
    """
    labels = model.config.num_labels
    if label is not None:
        label = torch.as_tensor(label, device=input_values.device)
        if label.min() < 0 or label.max() >= labels:
            raise ValueError(f"label must be from 0 to {labels - 1}, got {label.tolist()}.")
    with _showing_attention(model), torch.enable_grad():
        # So that attentions carry gradients even if the model's weights are frozen.
        output = model(
            input_values.detach().clone().requires_grad_(), attention_mask, output_attentions=True
        )
        chosen = output.logits.argmax(dim=1) if label is None else label.expand(len(input_values))
        logits = output.logits.gather(1, chosen[:, None])
        gradients = torch.autograd.grad(logits.sum(), output.attentions)
    relevance = torch.eye(gradients[0].shape[-1], device=input_values.device)
    for attention, gradient in zip(output.attentions, gradients, strict=True):
        weighted = (attention.detach() * gradient).float().clamp(min=0).mean(dim=1)
        relevance = relevance + weighted @ relevance
    return _to_spectrogram(relevance, model.base_model, input_values, attention_mask)


def plot_relevance(
    input_values: Tensor,
    relevance: Tensor,
    path: str | Path,
    title: str = "",
    filterbank: LogMel | None = None,
) -> None:
    """Draw one clip's log-mel spectrogram (T, F) above its relevance map (F, T), into a file.

    Args:
        filterbank: what made the spectrogram, for both axes: `feature_extractor.filterbank`;
            default: AST's, at 16 kHz.
    """
    from matplotlib.figure import Figure

    mel_bins = len(relevance)
    bank = filterbank or LogMel(num_mel_bins=mel_bins)
    seconds = len(input_values) * bank.frame_shift / bank.sampling_rate
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for axis, image, name, colours in (
        (axes[0], input_values.T, "log-mel spectrogram", "magma"),
        (axes[1], relevance, "relevance", "viridis"),
    ):
        axis.imshow(
            image.detach().float().cpu().numpy(),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, -0.5, mel_bins - 0.5),
            cmap=colours,
        )
        ticks = [hz for hz in _TICKS_HZ if hz <= bank.highest_frequency]
        places = [bank.mel_bin(hz) for hz in ticks]
        axis.set_yticks(places, [f"{hz:g}" for hz in ticks])
        axis.set(ylabel="frequency (Hz)", title=name, ylim=(-0.5, mel_bins - 0.5))
    axes[1].set_xlabel("time (s)")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=100)


@contextmanager
def _showing_attention(model: Any) -> Iterator[None]:
    """Evaluation mode with eager attention, which returns its weights; restored afterwards."""
    config = model.config
    if any(config.merged_tokens):
        raise ValueError(
            f"merged_tokens_per_layer={config.merged_tokens_per_layer} moves patches from their "
            "places; set model.config.merged_tokens_per_layer = 0 to explain the model."
        )
    implementation, training = config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


def _to_spectrogram(
    relevance: Tensor, encoder: Any, input_values: Tensor, attention_mask: Tensor | None
) -> Tensor:
    config = encoder.config
    special, patch = config.num_special_tokens, config.patch_shape
    _, frames, mel_bins = input_values.shape
    is_valid = torch.ones_like(relevance[:, 0])  # (B, S)
    if attention_mask is not None:
        columns = count_valid_columns(attention_mask, patch[1], config.time_stride)
        is_valid[:, special:] *= patch_mask(columns, *config.grid_shape(frames, mel_bins))
    clip = encoder.pool(relevance, is_valid)[:, special:]  # (B, N)
    is_valid = is_valid[:, special:]
    # Patches overlap: each bin gets the mean of the non-padding patches that cover it.
    stride = (config.frequency_stride, config.time_stride)

    def spread(values: Tensor) -> Tensor:
        blocks = values[:, None, :].expand(-1, math.prod(patch), -1)
        return fold(blocks, (mel_bins, frames), patch, stride=stride)[:, 0]  # (B, F, T)

    image = spread(clip * is_valid) / spread(is_valid).clamp(min=1)
    total = image.sum(dim=(1, 2), keepdim=True)
    return image / total.where(total > 0, 1.0)
