"""ASTConfig: the shape of an Audio Spectrogram Transformer.

The fields and defaults are those of `transformers`' own ASTConfig, so either side reads a
`config.json` the other wrote. The defaults describe the paper's AudioSet model (arXiv 2104.01778,
section 2.1): ViT-base, 16 x 16 patches that overlap by 6, 1024 frames of 10 ms.
The fields after `num_mel_bins` are ours; at their defaults the model is exactly `transformers`'
own. Six of them describe AST's descendants (PaSST, SSAST, AudioMAE, CED, Dasheng). A model whose
output `transformers`' AST would get wrong is saved as another `model_type`, `ast-family`, which
plain `transformers` rejects as unknown.

A `config.json` may come from anyone, so numbers that no AST could have are refused here, before
anything is built from them.
"""

from .versions_ast import OLDEST  # noqa: F401  (first: the rest fails on an older transformers)

# isort: split
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .patch_grid_ast import grid_shape
from .pooling_ast import check_pooling
from .weights_ast import check_json_files, check_weights

_MAX_PARAMETERS = 2**31  # 25 times AST-base: 8 GiB in float32
_MAX_LAYERS = 1000
_MAX_LABELS = 1_000_000
_MAX_FRAMES = 1_000_000  # of 10 ms: almost 3 hours
_MAX_MEL_BINS = 4096
FAMILY_MODEL_TYPE = "ast-family"  # saved for models that transformers' AST cannot compute
# Allowed values, `transformers`' own first.
_CHOICES = {
    "pooling": ("special_tokens", "patches"),
    "final_norm": ("before_pooling", "after_pooling", "none"),
}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Attributes that no honest config.json sets and a hostile one must not replace.
_NEVER_IN_A_FILE = {
    *("__dict__", "__doc__", "__module__", "_auto_class", "attribute_map", "base_config_key"),
    *("base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan"),
    *("extra_config_files", "extra_files", "sub_configs", "sub_configs_defaults"),
}


@strict
class ASTConfig(PreTrainedConfig):
    """Shape of an AST encoder and of its position table.

    The defaults are those of the published checkpoint
    [MIT/ast-finetuned-audioset-10-10-0.4593](https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593).

    Raises:
        ValueError: at construction, if these numbers do not describe a possible model.
    """

    model_type = "audio-spectrogram-transformer"

    hidden_size: int = 768  # width D of the encoder
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # width of the MLP inside a layer
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    patch_size: int = 16  # mel bins per patch, and frames unless `time_patch_size` says otherwise
    frequency_stride: int = 10  # mel bins between neighbouring patches
    time_stride: int = 10  # frames between neighbouring patches
    max_length: int = 1024  # frames (10 ms each) the position table covers
    num_mel_bins: int = 128  # mel bins the position table covers
    time_patchout: int = 0  # training: grid columns dropped per clip (PaSST, arXiv 2110.05069)
    frequency_patchout: int = 0  # training: grid rows dropped per clip
    unstructured_patchout: int = 0  # training: single patches dropped per clip, from those left
    # Inference: tokens merged away in every layer, or in each one (ToMe, arXiv 2210.09461).
    merged_tokens_per_layer: int | list[int] = 0
    label_smoothing: float | int = 0.0  # training: share of the target spread over all labels
    window_pooling: str | None = None  # over a long clip's windows; None: mean weighted by length
    num_special_tokens: int = 2  # 2: class and distillation token, 1: class token, 0: patches only
    pooling: str = "special_tokens"  # mean of these tokens, or of the "patches": rows, then time
    final_norm: str = "before_pooling"  # or "after_pooling" (the head then has no norm), or "none"
    time_patch_size: int | None = None  # frames per patch, if it is not square
    head_norm_eps: float | None = None  # epsilon of the head's norm, if it differs
    native_features: bool = True  # False: spectrograms `transformers`' extractor cannot make

    def __post_init__(self, **kwargs: Any) -> None:
        named = getattr(self, "id2label", None)
        if isinstance(named, dict):  # some datasets use numbers as class names
            self.id2label = {
                index: str(name) if type(name) in (int, float) else name
                for index, name in named.items()
            }
        self._check_labels(kwargs.get("num_labels"))  # the base class makes a name for each
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in `transformers`, but refuses a folder whose weights belong to a smaller model.

        Raises:
            ValueError: also for a file with numbers or types that no AST could have.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_json_files(folder)
        if (folder / "config.json").is_file():
            stored, _ = cls.get_config_dict(folder)
            cls.from_dict(stored, name_or_path=folder)  # checks
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        content, kwargs = super().get_config_dict(*args, **kwargs)
        return cls._of_one_type(content), kwargs

    @classmethod
    def _of_one_type(cls, content: dict[str, Any]) -> dict[str, Any]:
        """A file's content under one of our two types; `to_dict` picks the type again."""
        is_family = content.get("model_type") == FAMILY_MODEL_TYPE
        return {**content, "model_type": cls.model_type} if is_family else content

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Dropped: a file must not choose these, as they can name code to download from the Hub.
        chosen_by_caller = ("attn_implementation", "experts_implementation")
        content = {k: v for k, v in config_dict.items() if k not in chosen_by_caller}
        content = cls._of_one_type(content)
        if "per_layer_config" in content:
            raise ValueError("Not an AST config: per_layer_config, but AST's layers are all alike.")
        for name in content:
            if name in _NEVER_IN_A_FILE or callable(getattr(cls, name, None)):
                raise ValueError(f"Not an AST config: AST has no setting {name[:60]!r}.")
        try:
            folder = Path(kwargs.get("name_or_path", ""))  # AutoConfig passes it
            if (folder / "config.json").is_file():
                check_json_files(folder)
                check_weights(folder, cls(**content).num_encoder_parameters)
            return super().from_dict(content, **kwargs)
        except (StrictDataclassError, AttributeError, TypeError) as error:
            reason = _CONTROL_CHARACTERS.sub("?", " ".join(str(error).split()))
            raise ValueError(f"This is no config of an AST: {reason[:300]}") from error

    def check(self) -> None:
        """Raise ValueError when the numbers, together, cannot make a model."""
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "patch_size",
            "frequency_stride",
            "time_stride",
            "time_patch_size",
        ):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        for field in (
            "time_patchout",
            "frequency_patchout",
            "unstructured_patchout",
        ):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be 0 (off) or more, got {getattr(self, field)}.")
        for field, most in (
            ("num_hidden_layers", _MAX_LAYERS),
            ("max_length", _MAX_FRAMES),
            ("num_mel_bins", _MAX_MEL_BINS),
            ("frequency_stride", _MAX_MEL_BINS),
            ("time_stride", _MAX_FRAMES),
        ):
            if getattr(self, field) > most:
                raise ValueError(
                    f"{field} must be at most {most}, got {getattr(self, field)}. No AST has such "
                    "a number: do not trust this config."
                )
        merged = self.merged_tokens
        if len(merged) != self.num_hidden_layers or min(merged) < 0:
            raise ValueError(
                "merged_tokens_per_layer must be 0 (off) or more, or a list of such numbers for "
                f"{self.num_hidden_layers} layers, got {str(self.merged_tokens_per_layer)[:60]}."
            )
        for field in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "initializer_range",
            "layer_norm_eps",
        ):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be from 0 to 1, got {getattr(self, field)}.")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}."
                )
        if self.num_special_tokens not in (0, 1, 2):
            raise ValueError(
                f"num_special_tokens must be 0, 1 or 2, got {self.num_special_tokens}."
            )
        if self.num_special_tokens == 0 and self.pooling == "special_tokens":
            raise ValueError(
                "A model without special tokens cannot pool them: set pooling='patches'."
            )
        if self.head_norm_eps is not None and not 0 < self.head_norm_eps < 1:
            raise ValueError(f"head_norm_eps must be between 0 and 1, got {self.head_norm_eps}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                "hidden_act must be an activation that transformers knows, got "
                f"{self.hidden_act[:60]!r}."
            )
        if self.window_pooling is not None:
            check_pooling(self.window_pooling)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads})."
            )
        patch_bins, patch_frames = self.patch_shape
        if self.max_length < patch_frames or self.num_mel_bins < patch_bins:
            raise ValueError(
                f"A spectrogram of max_length={self.max_length} frames and "
                f"num_mel_bins={self.num_mel_bins} is smaller than one patch of "
                f"{patch_frames} x {patch_bins}."
            )
        if self.num_encoder_parameters > _MAX_PARAMETERS:
            raise ValueError(
                f"These numbers describe an encoder of {self.num_encoder_parameters:,} parameters, "
                f"more than {_MAX_PARAMETERS:,}. No AST is that large: do not trust this config."
            )
        rows, columns = self.trained_grid
        left = (rows - self.frequency_patchout) * (columns - self.time_patchout)
        if (
            self.frequency_patchout >= rows
            or self.time_patchout >= columns
            or self.unstructured_patchout >= left
        ):
            raise ValueError(
                f"frequency_patchout={self.frequency_patchout}, time_patchout={self.time_patchout}"
                f" and unstructured_patchout={self.unstructured_patchout} drop every patch of a "
                f"grid of {rows} rows x {columns} columns. Drop fewer."
            )

    def _check_labels(self, num_labels: Any) -> None:
        named = None if self.id2label is None else len(self.id2label)
        for count in (num_labels, named):
            if count is not None and not (isinstance(count, int) and 0 <= count <= _MAX_LABELS):
                raise ValueError(
                    f"num_labels must be a number up to {_MAX_LABELS}, got {repr(count)[:60]}. No "
                    "AST has more: do not trust this config."
                )
        for index, name in (self.id2label or {}).items():
            # Names get printed: none may steer a terminal or break a line.
            if _CONTROL_CHARACTERS.search(name):
                raise ValueError(f"The name of label {index} has control characters: {name!r}.")

    @property
    def num_encoder_parameters(self) -> int:
        """Learned parameters of the encoder, with its position table, without the head."""
        width, inner = self.hidden_size, self.intermediate_size
        rows, columns = self.trained_grid
        attention = 4 * width * width + (3 * width if self.qkv_bias else 0) + width
        mlp = 2 * width * inner + inner + width
        layer = attention + mlp + 4 * width  # two LayerNorms
        tokens = 2 * self.num_special_tokens + rows * columns
        patches = math.prod(self.patch_shape) + 1
        final_norm = 0 if self.final_norm == "none" else 2
        return self.num_hidden_layers * layer + (tokens + patches + final_norm) * width

    @property
    def is_native(self) -> bool:
        """Whether `transformers`' own AST computes exactly this model."""
        return (
            (self.num_special_tokens, self.pooling) == (2, "special_tokens")
            and self.final_norm == "before_pooling"
            and self.time_patch_size in (None, self.patch_size)
            and self.head_norm_eps in (None, self.layer_norm_eps)
            and self.native_features
        )

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        if not self.is_native:
            content["model_type"] = FAMILY_MODEL_TYPE
        return content

    @property
    def merged_tokens(self) -> list[int]:
        """Tokens merged away in each layer at inference."""
        merged = self.merged_tokens_per_layer
        return [merged] * self.num_hidden_layers if isinstance(merged, int) else list(merged)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Mel bins and frames per patch."""
        return self.patch_size, self.time_patch_size or self.patch_size

    @property
    def trained_grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid that the position table covers."""
        return self.grid_shape(self.max_length, self.num_mel_bins)

    def grid_shape(self, frames: int, mel_bins: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of a spectrogram."""
        return grid_shape(
            frames, mel_bins, self.patch_shape, self.frequency_stride, self.time_stride
        )


ASTConfig.register_for_auto_class()
