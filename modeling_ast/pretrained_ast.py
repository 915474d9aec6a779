"""ASTPreTrainedModel: initialisation, loading into any geometry, and saving.

A checkpoint's position table is made for one grid of patches, which its config describes:

    max_length x num_mel_bins, cut with time_stride x frequency_stride  ->  rows x columns

Asked for another geometry, `from_pretrained` loads the checkpoint as it is and then fits the table
to the new grid by the original code's rule (`resize_position_table`).
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_ast import ASTConfig
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
    # What `auto_map` of a saved config says: where in the copied code each Auto class looks.
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

    def __init__(self, config, *args, **kwargs):
        super().__init__(self._with_our_fields(config), *args, **kwargs)

    @classmethod
    def _with_our_fields(cls, config: Any) -> Any:
        """The config itself, or, of `transformers`' own ASTConfig, one of ours."""
        is_ours = hasattr(config, "trained_grid")
        return config if is_ours else cls.config_class.from_dict(config.to_dict())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # As in ViT and the original: a zero table would leave attention blind to time and pitch
        # until the table has been learnt.
        for name in ("cls_token", "distillation_token", "position_embeddings"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                initialization.trunc_normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> Any:
        """Load a checkpoint of ours or of `transformers`' AST, fitted to another geometry if asked.

        Args:
            pretrained_model_name_or_path, **kwargs: as everywhere in `transformers`.
            max_length: frames (10 ms each) that the position table shall be made for.
            num_mel_bins: mel bins that it shall be made for.
            frequency_stride, time_stride: mel bins and frames between neighbouring patches.

        The four default to the checkpoint's own. They may also come in a `config`, which is how
        `AutoModel.from_pretrained(name, max_length=…)` hands them on. A config's other fields must
        be the checkpoint's. A new number of labels: `num_labels=…, ignore_mismatched_sizes=True`.

        Raises:
            ValueError: when a spectrogram of that geometry is smaller than one patch, or for a
                config that no AST has (see `ASTConfig.from_pretrained`).
        """
        asked = {name: kwargs.pop(name) for name in _GEOMETRY if kwargs.get(name) is not None}
        config = kwargs.get("config")
        if isinstance(config, str | os.PathLike):
            config = cls.config_class.from_pretrained(config)
        if pretrained_model_name_or_path is None or (config is None and not asked):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        stored, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub_arguments)
        # Through the class, so that fields which the file leaves out have their defaults.
        source = cls.config_class(**{name: stored[name] for name in _GEOMETRY if name in stored})
        if config is not None:
            asked = {**{name: getattr(config, name) for name in _GEOMETRY}, **asked}
            kwargs["config"] = config = copy.deepcopy(cls._with_our_fields(config))
            for name in _GEOMETRY:
                setattr(config, name, getattr(source, name))
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model._fit_geometry({name: getattr(source, name) for name in _GEOMETRY} | asked)
        return loaded

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
                embeddings.position_embeddings, old_grid, self.config.trained_grid
            )
            embeddings.position_embeddings = nn.Parameter(table)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save weights, config and a copy of this code, so that the folder runs anywhere."""
        # transformers adds the class that is saved; the other one must be found too.
        self.config.auto_map = dict(self.auto_classes)
        # A pipeline that the config names must lie beside it, too.
        pipeline = Path(__file__).with_name("pipeline_ast.py")
        if getattr(self.config, "custom_pipelines", None) and not pipeline.is_file():
            del self.config.custom_pipelines
        super().save_pretrained(save_directory, *args, **kwargs)
        if getattr(self.config, "custom_pipelines", None):
            for file in (pipeline, *get_relative_import_files(pipeline)):
                shutil.copy(file, save_directory)
