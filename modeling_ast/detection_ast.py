"""Detection: which labels are present in each tenth of a second, not just in the whole clip.

    log-mel spectrogram     (B, T, F)
    encoder                 (B, 2 + N, D)           as in `modeling_ast`; N = rows * columns
    mean over the rows      (B, columns, D)         one vector per patch column
    logits                  (B, columns, labels)    LayerNorm and one linear layer

Columns are 16 frames wide and start every `time_stride` frames (0.1 s at stride 10); `frames_ast`
says which stretch of time each one represents. The encoder and its parameter names are those of any
AST checkpoint, so `from_pretrained` can start from one; the head is new. `transformers`' own AST
has no such head, so checkpoints carry their own `model_type`.
"""

import math
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import initialization
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ast import ASTConfig
from .modeling_ast import ASTForAudioClassification, ASTModel
from .patch_grid_ast import count_valid_columns
from .pooling_ast import check_pooling, pool_logits, pool_scores
from .pretrained_ast import ASTPreTrainedModel

_RARE = 0.05  # a new head's score of every label: most columns hold none (arXiv 1708.02002)
_DROPPING_TOKENS = ("time_patchout", "unstructured_patchout", "merged_tokens_per_layer")
_OF_CLASSIFIERS = ("model_type", "auto_map", "architectures", *_DROPPING_TOKENS)


@strict
class ASTFrameConfig(ASTConfig):
    """Shape of an AST that labels every patch column; see `ASTConfig`."""

    model_type = "ast-frame-classification"

    # How a clip's scores follow from its columns': in training when only the clip's labels are
    # known, and whenever one answer for the whole clip is wanted.
    window_pooling: str | None = "linear_softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.problem_type = "multi_label_classification"  # sounds overlap

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also accepts a classifier's config, minus what a frame model cannot have."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {k: v for k, v in config_dict.items() if k not in _OF_CLASSIFIERS}
            if config_dict.get("window_pooling", "") is None:
                del config_dict["window_pooling"]
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        super().check()
        if self.window_pooling is None:
            raise ValueError("A frame model needs window_pooling, e.g. linear_softmax.")
        check_pooling(self.window_pooling)
        for field in _DROPPING_TOKENS:
            if getattr(self, field):
                raise ValueError(
                    f"{field}={getattr(self, field)} leaves columns without a token, but a frame "
                    "model needs one for each: set it to 0. frequency_patchout is fine."
                )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_type": self.model_type}


class ASTFrameHead(nn.Module):
    """LayerNorm and one linear layer, applied to each column."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, columns: Tensor) -> Tensor:
        return self.dense(self.layernorm(columns))


class ASTForAudioFrameClassification(ASTPreTrainedModel):
    """The encoder with a classification head on every patch column.

    `from_pretrained` also takes AST classifiers; the head is then new, and `transformers` says so.
    Labels do not exclude each other: a score is the sigmoid of its logit.
    """

    config: ASTFrameConfig
    config_class = ASTFrameConfig
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "detection_ast.ASTFrameConfig",
        "AutoModelForAudioClassification": "detection_ast.ASTForAudioFrameClassification",
        "AutoModelForAudioFrameClassification": "detection_ast.ASTForAudioFrameClassification",
    }

    def __init__(self, config: ASTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.audio_spectrogram_transformer = ASTModel(self.config)
        self.frame_classifier = ASTFrameHead(self.config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.frame_classifier.dense:  # `transformers` skips modules without weights
            initialization.constant_(module.bias, math.log(_RARE / (1 - _RARE)))

    @classmethod
    def _with_our_fields(cls, config: Any) -> Any:
        """The config itself, or that of another AST turned into one with this head."""
        if config.model_type == cls.config_class.model_type:
            return config
        return cls.config_class.from_dict(config.to_dict())

    @classmethod
    def from_classifier(cls, model: ASTForAudioClassification) -> Any:
        """A frame model for a classifier's labels, on top of its encoder, which the two share.

        This lets a detector start from anything a classifier can start from: checkpoints, the
        original code's files, vision weights.
        """
        frame_model = cls(model.config)
        frame_model.audio_spectrogram_transformer = model.audio_spectrogram_transformer
        frame_model.audio_spectrogram_transformer.config = frame_model.config
        for module in frame_model.audio_spectrogram_transformer.modules():
            if hasattr(module, "config"):
                module.config = frame_model.config
        return frame_model

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        clip_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_values, attention_mask, **kwargs: see `ASTModel.forward`.
            labels: (B, columns, labels) in 0..1, strong labels; negative means unknown.
            clip_labels: (B, labels) in 0..1, weak labels: what occurs somewhere in the clip. Used
                for clips whose columns are all unknown; negative means unknown.
            num_items_in_batch: as for the classifier: elements of `labels` (or of `clip_labels`,
                without `labels`) in the whole batch, if this is one of several parts of it.

        Returns:
            loss (if labels are given), logits (B, columns, labels), hidden_states, attentions.
            Logits of columns that the mask marks as padding are meaningless.

        Raises:
            ValueError: as `ASTModel.forward`, and for labels of another shape.
        """
        config = self.config
        encoded = self.audio_spectrogram_transformer(input_values, attention_mask, **kwargs)
        _, columns = config.grid_shape(*input_values.shape[1:])
        # Row by row; in training, whole rows may be missing.
        patches = encoded.last_hidden_state[:, config.num_special_tokens :].unflatten(
            1, (-1, columns)
        )
        logits = self.frame_classifier(patches.mean(dim=1))  # (B, columns, labels)
        loss = None
        if labels is not None or clip_labels is not None:
            is_sound = self.column_mask(input_values, attention_mask)
            loss = detection_loss(
                logits, labels, clip_labels, is_sound, config.window_pooling, num_items_in_batch
            )
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def column_mask(self, input_values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, columns), True where a column contains no padding."""
        _, columns = self.config.grid_shape(*input_values.shape[1:])
        if attention_mask is None:
            return input_values.new_ones(len(input_values), columns, dtype=torch.bool)
        valid = count_valid_columns(
            attention_mask, self.config.patch_shape[1], self.config.time_stride
        )
        return torch.arange(columns, device=valid.device) < valid[:, None]

    def pool(self, logits: Tensor, is_sound: Tensor | None = None) -> Tensor:
        """Logits (..., columns, labels), mask (..., columns) -> the clip's scores (..., labels)."""
        assert self.config.window_pooling is not None
        return pool_scores(logits.float().sigmoid(), self.config.window_pooling, is_sound)


def detection_loss(
    logits: Tensor,
    labels: Tensor | None,
    clip_labels: Tensor | None,
    is_sound: Tensor,
    pooling: str | None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Binary cross-entropy over columns whose labels are known, else over the pooled clip.

    A mean over clips. A clip with strong labels contributes the mean over its known columns and
    labels, one with weak labels the mean over its known labels, one without labels 0.

    Args:
        logits: (B, columns, labels).
        labels: (B, columns, labels) or None; negative: unknown.
        clip_labels: (B, labels) or None; negative: unknown.
        is_sound: (B, columns): columns of padding do not count.
        pooling: one of `WINDOW_POOLINGS`, for weak labels.
        num_items_in_batch: see `ASTForAudioFrameClassification.forward`.

    Raises:
        ValueError: for labels of another shape.
    """
    for name, given, shape in (
        ("labels", labels, logits.shape),
        ("clip_labels", clip_labels, (len(logits), logits.shape[-1])),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"{name} must have the shape {tuple(shape)} for logits of {tuple(logits.shape)}, "
                f"got {tuple(given.shape)}."
            )
    logits = logits.float()
    per_clip = logits.new_zeros(len(logits))
    has_columns = torch.zeros_like(per_clip, dtype=torch.bool)
    if labels is not None:
        is_known = (labels >= 0) & is_sound[:, :, None]
        has_columns = is_known.flatten(1).any(dim=1)
        loss = binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        per_clip = _known_mean(loss.flatten(1), is_known.flatten(1))
    if clip_labels is not None:
        assert pooling is not None
        pooled = pool_logits(logits, "multi_label_classification", pooling, is_sound)
        loss = binary_cross_entropy_with_logits(pooled, clip_labels.to(pooled), reduction="none")
        per_clip = per_clip.where(has_columns, _known_mean(loss, clip_labels >= 0))
    if num_items_in_batch is None:
        return per_clip.mean()
    counted = labels if labels is not None else clip_labels
    assert counted is not None
    return per_clip.sum() * (counted.numel() // len(counted)) / num_items_in_batch


def _known_mean(values: Tensor, is_known: Tensor) -> Tensor:
    """(B, n) -> (B,), 0 where nothing is known."""
    return values.where(is_known, 0.0).sum(dim=1) / is_known.sum(dim=1).clamp(min=1)


ASTForAudioFrameClassification.register_for_auto_class("AutoModelForAudioFrameClassification")
ASTFrameConfig.register_for_auto_class()
