"""ASTConfig: the shape of an Audio Spectrogram Transformer. Fields only, no I/O.

The fields and their defaults are those of `transformers`' own ASTConfig, so a `config.json` written
by either side is read by the other. The defaults describe the AudioSet model of the paper
(arXiv 2104.01778, section 2.1): ViT-base, 16 x 16 patches that overlap by 6, 1024 frames of 10 ms.
The last five fields are ours; with their defaults the model is exactly `transformers`' own.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .patch_grid_ast import grid_shape


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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError when the numbers, together, cannot make a model."""
        for field in (
            "hidden_size",
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
