"""ASTPreTrainedModel: initialisation, loading into any geometry, and saving.

A checkpoint's position table fits one grid of patches, which its config describes:

    max_length x num_mel_bins, cut with time_stride x frequency_stride  ->  rows x columns

For another geometry, `from_pretrained` loads the checkpoint unchanged and then fits the table to
the new grid by the original code's rule (`resize_position_table`).
"""

import copy
import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_ast import ASTConfig
from .loss_ast import classification_loss
from .naming_ast import (
    NATIVE_TO_OURS,
    fit_adapter_config,
    read_adapter_config,
    rename_state_dict,
)
from .patch_grid_ast import resize_position_table

_GEOMETRY = ("max_length", "num_mel_bins", "frequency_stride", "time_stride")
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class ASTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config: ASTConfig
    config_class = ASTConfig
    # For `auto_map` in a saved config: where in the copied code each Auto class looks.
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_ast.ASTConfig",
        "AutoModel": "modeling_ast.ASTModel",
        "AutoModelForAudioClassification": "modeling_ast.ASTForAudioClassification",
    }
    base_model_prefix = "audio_spectrogram_transformer"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ASTEmbeddings", "ASTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(self._with_our_fields(config), *args, **kwargs)
        self.register_load_state_dict_pre_hook(rename_state_dict)

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """Called by `forward` with labels, logits, config and, if given, `num_items_in_batch`.

        As in `transformers`, you can set another function or a module here.
        """
        own = self._modules.get("loss_function") or self.__dict__.get("_loss_function")
        return own or self._classification_loss

    @loss_function.setter
    def loss_function(self, function: Callable[..., Tensor]) -> None:
        self._loss_function = function

    def _classification_loss(
        self,
        labels: Tensor,
        logits: Tensor,
        config: ASTConfig,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        smoothing = config.label_smoothing if self.training else 0.0
        return classification_loss(
            logits, labels, config.problem_type, num_items_in_batch, smoothing
        )

    @classmethod
    def _with_our_fields(cls, config: Any) -> Any:
        """The config itself, or one of ours made from `transformers`' own ASTConfig."""
        is_ours = hasattr(config, "trained_grid")
        return config if is_ours else cls.config_class.from_dict(config.to_dict())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # As in ViT and the original code: with a zero table, attention would be blind to time and
        # pitch until the table is learned.
        for name in ("cls_token", "distillation_token", "position_embeddings"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                initialization.trunc_normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, ours or `transformers`' AST, optionally fitted to another geometry.

        Args:
            pretrained_model_name_or_path, **kwargs: as everywhere in `transformers`.
            max_length: frames (10 ms each) the position table should cover.
            num_mel_bins: mel bins it should cover.
            frequency_stride, time_stride: mel bins and frames between neighbouring patches.

        The four default to the checkpoint's own. They can also come in a `config`, which is how
        `AutoModel.from_pretrained(name, max_length=…)` passes them. A config's other fields must
        match the checkpoint. A new number of labels: `num_labels=…, ignore_mismatched_sizes=True`.
        Layers can have the checkpoints' names or those of `transformers` 5, see `naming_ast`.

        Raises:
            ValueError: if a spectrogram of that geometry is smaller than one patch, if weights of
                the encoder are missing, or for a config that no AST could have (see
                `ASTConfig.from_pretrained`).
        """
        asked = {name: kwargs.pop(name) for name in _GEOMETRY if kwargs.get(name) is not None}
        config = kwargs.get("config")
        if isinstance(config, str | os.PathLike):
            config = cls.config_class.from_pretrained(config)
        if pretrained_model_name_or_path is None or (config is None and not asked):
            return cls._load(pretrained_model_name_or_path, *model_args, **kwargs)

        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        stored, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub_arguments)
        # Through the class, so that fields missing from the file get their defaults.
        fields = (*_GEOMETRY, "patch_size", "time_patch_size")
        source = cls.config_class(**{name: stored[name] for name in fields if name in stored})
        if config is not None:
            asked = {**{name: getattr(config, name) for name in _GEOMETRY}, **asked}
            kwargs["config"] = config = copy.deepcopy(cls._with_our_fields(config))
            for name in _GEOMETRY:
                setattr(config, name, getattr(source, name))
        loaded: Any = cls._load(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model._fit_geometry({name: getattr(source, name) for name in _GEOMETRY} | asked)
        return loaded

    @classmethod
    def _load(cls, name: Any, *model_args: Any, **kwargs: Any) -> Any:
        """`transformers`' own loading, with either naming scheme; all weights or an error."""
        wants_info = kwargs.pop("output_loading_info", False)
        takes_all_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["key_mapping"] = NATIVE_TO_OURS | (kwargs.get("key_mapping") or {})
        model, info = super().from_pretrained(
            name, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if info["mismatched_keys"] and not takes_all_sizes:
            weight, stored, wanted = sorted(info["mismatched_keys"])[0]
            raise ValueError(
                f"{name}: {weight} has shape {tuple(stored)} in the weights and {tuple(wanted)} by "
                "the config. For another number of labels pass ignore_mismatched_sizes=True."
            )
        # Otherwise it would save under the names it read.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if conversion.source_patterns[0] not in NATIVE_TO_OURS
        ]
        encoder = "" if model.base_model is model else f"{cls.base_model_prefix}."
        missing = sorted(key for key in info["missing_keys"] if key.startswith(encoder))
        if missing and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{name} is not a complete AST checkpoint: it lacks {len(missing)} weights of the "
                f"encoder, {missing[0]} …. (If only the head's are missing, a new head is made.)"
            )
        return (model, info) if wants_info else model

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`, for PEFT adapters with either our layer names or its own."""
        config = kwargs.get("peft_config")
        if config is None and peft_model_id is not None:
            hub_arguments = {
                **(getattr(kwargs.get("load_config"), "download_kwargs", None) or {}),
                **(kwargs.get("adapter_kwargs") or {}),
            }
            config = read_adapter_config(peft_model_id, **hub_arguments)
            kwargs["peft_config"] = config
        if config is not None:
            fit_adapter_config(config, [name for name, _ in self.named_modules()])
        if kwargs.get("load_config") is None:
            kwargs["weight_mapping"] = get_model_conversion_mapping(self, NATIVE_TO_OURS)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    @torch.no_grad()
    def _fit_geometry(self, geometry: dict[str, int]) -> None:
        old_grid = self.config.trained_grid
        for name, value in geometry.items():
            setattr(self.config, name, value)
        self.config.check()
        embeddings: Any = self.base_model.embeddings
        embeddings.patch_embeddings.projection.stride = (
            self.config.frequency_stride,
            self.config.time_stride,
        )
        if self.config.trained_grid != old_grid:
            table = resize_position_table(
                embeddings.position_embeddings,
                old_grid,
                self.config.trained_grid,
                self.config.num_special_tokens,
            )
            embeddings.position_embeddings = nn.Parameter(table)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save weights, config and a copy of this code, so that the folder runs anywhere."""
        # transformers adds the class being saved; the other one must be found, too.
        self.config.auto_map = dict(self.auto_classes)
        # A pipeline named in the config must be saved with it.
        pipeline = Path(__file__).with_name("pipeline_ast.py")
        if getattr(self.config, "custom_pipelines", None) and not pipeline.is_file():
            del self.config.custom_pipelines
        super().save_pretrained(save_directory, *args, **kwargs)
        # safetensors makes files private to the owner; give the weights the config's permissions.
        config = Path(save_directory) / "config.json"
        if config.is_file():  # with several processes, only one writes
            for weights in Path(save_directory).glob("*.safetensors"):
                weights.chmod(config.stat().st_mode)
        if getattr(self.config, "custom_pipelines", None):
            for file in (pipeline, *get_relative_import_files(pipeline)):
                shutil.copy(file, save_directory)


class ConvertibleMixin:
    """Conversions of `ASTForAudioClassification` from and to other code bases.

    The code that reads other code bases' files, `conversion_ast.py`, is part of the installed
    package and does not travel with checkpoints.
    """

    @classmethod
    def from_vision_checkpoint(cls, path: str | os.PathLike, config: ASTConfig) -> Any:
        """Start from a vision transformer trained on images (paper, section 2.2).

        The patch weights of the three colour channels are summed (as in the original code; the
        paper says averaged), the position table is fitted to the spectrogram's grid, and if the
        checkpoint has only a class token, both special tokens get it. The head stays random.

        Args:
            path: DeiT or ViT weights: a timm-layout `.pth` or `.safetensors` file, or a
                `transformers` DeiT/ViT folder.
            config: the AST to build; its width, depth and patch size must match the checkpoint.

        Raises:
            ValueError: if the checkpoint is of another kind or does not fit `config`.
        """
        model: Any = cls(config)  # type: ignore[call-arg]
        state = _conversion().read_vision_checkpoint(path, config)
        model.audio_spectrogram_transformer.load_state_dict(state)
        return model

    @classmethod
    def from_original_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        frequency_stride: int = 10,
        time_stride: int = 10,
        max_length: int = 1024,
        num_mel_bins: int = 128,
        num_attention_heads: int | None = None,
        **config_fields: Any,
    ) -> Any:
        """Read a `.pth` of the original AST code (github.com/YuanGongND/ast), of any size.

        Width, depth, patch size and number of labels are read from the weights; pass the rest.
        LayerNorm's epsilon is 1e-6 throughout (the original's head has 1e-5: a difference of about
        1e-5 in the logits).

        Args:
            path: the file, with or without `DataParallel`'s prefix `module.`.
            frequency_stride, time_stride: `fstride` and `tstride` of the original code.
            max_length: `input_tdim`, in frames of 10 ms.
            num_mel_bins: `input_fdim`.
            num_attention_heads: needed only for widths other than the original's 192, 384 and 768.
            **config_fields: other fields of `ASTConfig`: `id2label`, `problem_type`, ….

        Raises:
            ValueError: if the file is not an AST checkpoint, or if its position table does not have
                the size that these numbers give; the message names strides and lengths that would
                fit. Also if the file is a pickle that would run code.
        """
        config, state = _conversion().read_original_checkpoint(
            path,
            frequency_stride=frequency_stride,
            time_stride=time_stride,
            max_length=max_length,
            num_mel_bins=num_mel_bins,
            num_attention_heads=num_attention_heads,
            **config_fields,
        )
        model: Any = cls(config)  # type: ignore[call-arg]
        model.load_state_dict(state)
        return model.eval()

    def to_original_state_dict(self) -> dict[str, Tensor]:
        """The weights under the original code's names, bit for bit; see `conversion_ast.py`.

        The two unused image heads are absent, so the original code needs `strict=False` to load
        them; `ast-convert` adds them as zeros. The original code rebuilds the model from `fstride`,
        `tstride`, `input_tdim`, `input_fdim` and a size: tiny224, small224 or base384.

        Raises:
            ValueError: for a model that the original code cannot compute.
        """
        model: Any = self
        if not model.config.is_native:
            raise ValueError(
                "The original AST code cannot compute this model: its special tokens, pooling, "
                "patches or spectrograms differ from the original's."
            )
        return _conversion().ast_to_original(model.state_dict())


def _conversion() -> Any:
    try:
        # By name: `transformers` would copy, or require, any module in an import statement.
        return importlib.import_module("modeling_ast.conversion_ast")
    except ImportError as error:
        raise ValueError(
            "Only the installed package reads files of other code bases, not the code that comes "
            "with a checkpoint. Install it: pip install audio-spectrogram-transformer"
        ) from error
