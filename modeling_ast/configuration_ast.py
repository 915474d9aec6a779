"""ASTConfig: the shape of an Audio Spectrogram Transformer.

The fields and their defaults are those of `transformers`' own ASTConfig, so a `config.json` written
by either side is read by the other. The defaults describe the AudioSet model of the paper
(arXiv 2104.01778, section 2.1): ViT-base, 16 x 16 patches that overlap by 6, 1024 frames of 10 ms.
The last six fields are ours; with their defaults the model is exactly `transformers`' own.

A `config.json` may come from anybody, so numbers that no AST has are refused here, before anything
is built from them.
"""

from .versions_ast import OLDEST  # noqa: F401  (first: in an older transformers the rest fails)

# isort: split
import re
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .patch_grid_ast import NUM_SPECIAL_TOKENS, grid_shape
from .pooling_ast import check_pooling
from .weights_ast import check_json_files, check_weights

_MAX_PARAMETERS = 2**31  # 25 times AST-base: 8 GiB in float32
_MAX_LAYERS = 1000
_MAX_LABELS = 1_000_000
_MAX_FRAMES = 1_000_000  # of 10 ms: almost 3 hours
_MAX_MEL_BINS = 4096
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Properties of the class that no config.json has, and that a hostile one must not replace.
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
        ValueError: at construction, when the numbers cannot make a model.
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
    patch_size: int = 16  # frames and mel bins per patch: patches are square
    frequency_stride: int = 10  # mel bins between neighbouring patches
    time_stride: int = 10  # frames between neighbouring patches
    max_length: int = 1024  # frames (10 ms each) that the position table was made for
    num_mel_bins: int = 128  # mel bins that the position table was made for
    time_patchout: int = 0  # training: grid columns dropped per clip (PaSST, arXiv 2110.05069)
    frequency_patchout: int = 0  # training: grid rows dropped per clip
    unstructured_patchout: int = 0  # training: single patches dropped per clip, of those left
    merged_tokens_per_layer: int = 0  # inference: tokens merged away per layer (arXiv 2210.09461)
    label_smoothing: float | int = 0.0  # training: part of the target spread over all labels
    window_pooling: str | None = None  # of a long clip's windows; None: mean, weighted by length

    def __post_init__(self, **kwargs):
        if isinstance(self.id2label, dict):  # data sets name classes by numbers, too
            self.id2label = {
                index: str(name) if type(name) in (int, float) else name
                for index, name in self.id2label.items()
            }
        self._check_labels(kwargs.get("num_labels"))  # the base class makes a name for each
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in `transformers`, but a folder whose weights are of a smaller model is refused.

        Raises:
            ValueError: also for a file with numbers or types that no AST has.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_json_files(folder)
        if (folder / "config.json").is_file():
            stored, _ = cls.get_config_dict(folder)
            cls.from_dict(stored, name_or_path=folder)  # checks
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Left out: what a file must not choose, as it can name code to download from the Hub.
        chosen_by_caller = ("attn_implementation", "experts_implementation")
        content = {k: v for k, v in config_dict.items() if k not in chosen_by_caller}
        if "per_layer_config" in content:
            raise ValueError("This is no config of an AST: its layers are all alike.")
        for name in content:
            if name in _NEVER_IN_A_FILE or callable(getattr(cls, name, None)):
                raise ValueError(f"This is no config of an AST: it has no setting {name[:60]!r}.")
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
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        for field in (
            "time_patchout",
            "frequency_patchout",
            "unstructured_patchout",
            "merged_tokens_per_layer",
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
                    f"{field} must be at most {most}, got {getattr(self, field)}. No AST is like "
                    "that: do not trust this config."
                )
        for field in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "initializer_range",
            "layer_norm_eps",
        ):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be from 0 to 1, got {getattr(self, field)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act must be one of transformers', got {self.hidden_act[:60]!r}."
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
        if self.max_length < self.patch_size or self.num_mel_bins < self.patch_size:
            raise ValueError(
                f"A spectrogram of max_length={self.max_length} frames and "
                f"num_mel_bins={self.num_mel_bins} is smaller than one patch of "
                f"{self.patch_size} x {self.patch_size}."
            )
        if self.num_encoder_parameters > _MAX_PARAMETERS:
            raise ValueError(
                f"These numbers make an encoder of {self.num_encoder_parameters:,} parameters, "
                f"more than {_MAX_PARAMETERS:,}. No AST is like that: do not trust this config."
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
            # Names are printed; one must not steer a terminal or end a line.
            if _CONTROL_CHARACTERS.search(name):
                raise ValueError(f"The name of label {index} has control characters: {name!r}.")

    @property
    def num_encoder_parameters(self) -> int:
        """Numbers that the encoder learns, its position table included, the head excluded."""
        width, inner = self.hidden_size, self.intermediate_size
        rows, columns = self.trained_grid
        attention = 4 * width * width + (3 * width if self.qkv_bias else 0) + width
        mlp = 2 * width * inner + inner + width
        layer = attention + mlp + 4 * width  # two LayerNorms
        tokens = NUM_SPECIAL_TOKENS + (NUM_SPECIAL_TOKENS + rows * columns)
        patches = self.patch_size**2 + 1
        return self.num_hidden_layers * layer + (tokens + patches + 2) * width

    @property
    def trained_grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid that the position table was made for."""
        return self.grid_shape(self.max_length, self.num_mel_bins)

    def grid_shape(self, frames: int, mel_bins: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of a spectrogram."""
        return grid_shape(
            frames, mel_bins, self.patch_size, self.frequency_stride, self.time_stride
        )


ASTConfig.register_for_auto_class()
