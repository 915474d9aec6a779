"""Weights of other code bases under the names of AST checkpoints, and back.

timm's vision transformer, which DeiT and the original AST code use, and the names here:

    cls_token, dist_token          embeddings.cls_token, embeddings.distillation_token
    pos_embed                      embeddings.position_embeddings
    patch_embed.proj               embeddings.patch_embeddings.projection
    blocks.N.norm1, norm2          encoder.layer.N.layernorm_before, layernorm_after
    blocks.N.attn.qkv              encoder.layer.N.attention.attention.query, key, value (stacked)
    blocks.N.attn.proj             encoder.layer.N.attention.output.dense
    blocks.N.mlp.fc1, fc2          encoder.layer.N.intermediate.dense, output.dense
    norm                           layernorm

`transformers`' DeiT and ViT folders use the right-hand names already, behind a `deit.` or `vit.`.
The original AST code (github.com/YuanGongND/ast) has timm's names behind `module.v.`, its head as
`module.mlp_head.0` and `.1` (classifier.layernorm and classifier.dense), and two image heads,
`module.v.head` and `module.v.head_dist`, that nothing uses: they are left out both ways.
"""

import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .configuration_ast import ASTConfig
from .patch_grid_ast import NUM_SPECIAL_TOKENS, grid_shape, resize_position_table

_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ORIGINAL_HEAD = {"mlp_head.0": "classifier.layernorm", "mlp_head.1": "classifier.dense"}
# Heads by width in the original code: DeiT tiny, small and base, 64 wide each.
_ORIGINAL_HEADS = {192: 3, 384: 6, 768: 12}
_ENCODER = "audio_spectrogram_transformer."


class ConvertibleMixin:
    """What `ASTForAudioClassification` can start from, and be turned into."""

    @classmethod
    def from_vision_checkpoint(cls, path: str | os.PathLike, config: ASTConfig) -> Any:
        """Start from a vision transformer trained on images (paper, section 2.2).

        The patch weights of the three colour channels are summed (as the original code does; the
        paper says averaged), the position table is fitted to the spectrogram's grid, and a
        checkpoint with a class token only gives it to both special tokens. The head stays random.

        Args:
            path: DeiT or ViT weights: a timm-layout `.pth` or `.safetensors` file, or a
                `transformers` DeiT/ViT folder.
            config: the AST to build; its width, depth and patch size must be the checkpoint's.

        Raises:
            ValueError: when the checkpoint is of another kind or does not fit `config`.
        """
        model: Any = cls(config)  # type: ignore[call-arg]
        model.audio_spectrogram_transformer.load_state_dict(read_vision_checkpoint(path, config))
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

        Width, depth, patch size and number of labels are read from the weights; what cannot be is
        asked for. LayerNorm's epsilon is 1e-6 throughout (the original's head has 1e-5: a
        difference of about 1e-5 in the logits).

        Args:
            path: the file, with or without the `module.` that `DataParallel` writes before names.
            frequency_stride, time_stride: `fstride` and `tstride` of the original code.
            max_length: `input_tdim`, in frames of 10 ms.
            num_mel_bins: `input_fdim`.
            num_attention_heads: needed only for widths other than the original's 192, 384 and 768.
            **config_fields: of `ASTConfig`: `id2label`, `problem_type`, ….

        Raises:
            ValueError: when the file is no AST checkpoint, or its position table has another size
                than these numbers give; the message names strides and lengths that would fit. Also
                when the file is a pickle that would run code.
        """
        config, state = read_original_checkpoint(
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
        """The weights under the original code's names, bit for bit; see the module's docstring.

        The original code reads them with `strict=False`, as the two unused image heads are absent;
        `ast-convert` adds these as zeros. It rebuilds the model from `fstride`, `tstride`,
        `input_tdim`, `input_fdim` and a size, tiny224, small224 or base384.
        """
        model: Any = self
        return ast_to_original(model.state_dict())


def timm_to_ast(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm vision transformer's tensors; what is outside the encoder is left out.

    Raises:
        ValueError: when a block holds something that AST's layers do not have.
    """
    renamed = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.(.+)\.(\w+)$", name)
        if block is None:
            if name in _OUTSIDE_BLOCKS:
                renamed[_OUTSIDE_BLOCKS[name]] = tensor
            continue
        number, part, kind = block.groups()
        if part not in _IN_BLOCK:
            raise ValueError(
                f"The checkpoint has a tensor {name!r}, for which AST's layers have no place: it "
                "is not a plain ViT or DeiT."
            )
        new_name = f"encoder.layer.{number}.{_IN_BLOCK[part]}.{kind}"
        if part == "attn.qkv":
            for projection, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[new_name.replace("qkv", projection)] = chunk
        else:
            renamed[new_name] = tensor
    return renamed


def ast_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An `ASTForAudioClassification`'s state dict under the original code's names."""
    outside = {ours: timm for timm, ours in _OUTSIDE_BLOCKS.items()}
    in_block = {ours: timm for timm, ours in _IN_BLOCK.items()}
    head = {ours: original for original, ours in _ORIGINAL_HEAD.items()}
    renamed = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix(_ENCODER)
        path, _, kind = name.rpartition(".")
        layer = re.match(r"encoder\.layer\.(\d+)\.(.+)", path)
        if path in head:
            renamed[f"module.{head[path]}.{kind}"] = tensor
        elif layer is None:
            renamed[f"module.v.{outside[name]}"] = tensor
        elif path.endswith(".query"):
            stacked = [
                state[full_name.replace(".query.", f".{projection}.")]
                for projection in ("query", "key", "value")
            ]
            renamed[f"module.v.blocks.{layer[1]}.attn.qkv.{kind}"] = torch.cat(stacked)
        elif not path.endswith((".key", ".value")):
            renamed[f"module.v.blocks.{layer[1]}.{in_block[layer[2]]}.{kind}"] = tensor
    return renamed


def read_original_checkpoint(
    path: str | os.PathLike,
    *,
    frequency_stride: int,
    time_stride: int,
    max_length: int,
    num_mel_bins: int,
    num_attention_heads: int | None,
    **config_fields: Any,
) -> tuple[ASTConfig, dict[str, Tensor]]:
    """Config and state dict of an `ASTForAudioClassification` from an original `.pth`.

    See `ASTForAudioClassification.from_original_checkpoint`.
    """
    original = {
        name.removeprefix("module."): tensor for name, tensor in _read_tensors(Path(path)).items()
    }
    encoder = timm_to_ast(
        {name[2:]: tensor for name, tensor in original.items() if name.startswith("v.")}
    )
    needed = {"mlp_head.1.weight", "v.pos_embed", "v.patch_embed.proj.weight", "v.dist_token"}
    if not needed <= set(original):
        raise ValueError(
            f"{path} is no checkpoint of the original AST code: expected "
            f"{', '.join(sorted(needed))}, with or without 'module.', found "
            f"{', '.join(sorted(original)[:3]) or 'no tensors'} …"
        )
    shape = vision_shape(encoder)
    _check_table_size(
        path,
        original["v.pos_embed"].shape[1] - NUM_SPECIAL_TOKENS,
        (frequency_stride, time_stride),
        (max_length, num_mel_bins),
        shape["patch_size"],
    )
    labels = len(original["mlp_head.1.weight"])
    if len(config_fields.get("id2label") or range(labels)) != labels:
        raise ValueError(
            f"{path} has {labels} labels, but {len(config_fields['id2label'])} names were given."
        )
    config = ASTConfig(
        **{
            **shape,
            "num_attention_heads": _head_count(path, shape["hidden_size"], num_attention_heads),
            "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in encoder,
            "frequency_stride": frequency_stride,
            "time_stride": time_stride,
            "max_length": max_length,
            "num_mel_bins": num_mel_bins,
            "layer_norm_eps": 1e-6,
            "num_labels": labels,
            **config_fields,
        }
    )
    state = {_ENCODER + name: tensor for name, tensor in encoder.items()}
    for name, ours in _ORIGINAL_HEAD.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = original[f"{name}.{kind}"]
    return config, state


def _head_count(path: str | os.PathLike, width: int, asked: int | None) -> int:
    known = _ORIGINAL_HEADS.get(width)
    if asked is None:
        if known is None:
            raise ValueError(
                f"{path} has width {width}; the original code's have "
                + ", ".join(f"{w} ({h} heads)" for w, h in _ORIGINAL_HEADS.items())
                + ". The number of heads cannot be read from the weights: pass num_attention_heads."
            )
        return known
    if known is not None and asked != known:
        raise ValueError(
            f"num_attention_heads={asked} was asked for, but the original code's models of width "
            f"{width}, as {path} is, have {known} heads. Leave num_attention_heads out."
        )
    return asked


def _check_table_size(
    path: str | os.PathLike,
    patches: int,
    strides: tuple[int, int],
    spectrogram: tuple[int, int],
    patch_size: int,
) -> None:
    max_length, num_mel_bins = spectrogram
    rows, columns = grid_shape(max_length, num_mel_bins, patch_size, *strides)
    if rows * columns == patches:
        return
    fitting = [
        f"frequency_stride={frequency}, time_stride={time}"
        for frequency in range(1, patch_size + 1)
        for time in range(1, patch_size + 1)
        if math.prod(grid_shape(max_length, num_mel_bins, patch_size, frequency, time)) == patches
    ]
    fitting.sort(key=lambda text: len(set(re.findall(r"\d+", text))))  # equal strides first
    hints = [f"of these, {'; or '.join(fitting[:8])} would fit"] if fitting else []
    if patches % rows == 0:
        shortest = (patches // rows - 1) * strides[1] + patch_size
        hints.append(
            f"with these strides, max_length={shortest} to {shortest + strides[1] - 1} would fit"
        )
    raise ValueError(
        f"{path} has positions for {patches} patches, but frequency_stride={strides[0]}, "
        f"time_stride={strides[1]} cut max_length={max_length} frames x "
        f"num_mel_bins={num_mel_bins} into {rows} rows x {columns} columns = {rows * columns}. "
        + (
            "Pass the numbers that the model was trained with: " + "; ".join(hints) + "."
            if hints
            else "No strides fit: max_length or num_mel_bins is another."
        )
    )


def read_vision_checkpoint(path: str | os.PathLike, config: ASTConfig) -> dict[str, Tensor]:
    """DeiT or ViT weights as the state dict of an `ASTModel` of this config.

    See `ASTForAudioClassification.from_vision_checkpoint`.
    """
    encoder = _read_encoder(path)
    found = vision_shape(encoder)
    wrong = {name: size for name, size in found.items() if getattr(config, name) != size}
    if wrong:
        raise ValueError(
            f"{path} does not fit the config: "
            + ", ".join(
                f"its {n} is {s}, the config's {getattr(config, n)}" for n, s in wrong.items()
            )
            + ". Build the ASTConfig with the checkpoint's numbers."
        )

    projection = "embeddings.patch_embeddings.projection.weight"
    encoder[projection] = encoder[projection].sum(dim=1, keepdim=True)
    table = encoder["embeddings.position_embeddings"]
    if "embeddings.distillation_token" not in encoder:
        encoder["embeddings.distillation_token"] = encoder["embeddings.cls_token"].clone()
        table = torch.cat([table[:, :1], table], dim=1)
    side = math.isqrt(table.shape[1] - NUM_SPECIAL_TOKENS)
    encoder["embeddings.position_embeddings"] = resize_position_table(
        table, (side, side), config.trained_grid
    )
    return encoder


def _read_encoder(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a DeiT's or ViT's encoder under the names of AST checkpoints."""
    state = _read_tensors(Path(path))
    if "patch_embed.proj.weight" in state:
        return timm_to_ast(state)
    stripped = {re.sub(r"^(deit|vit)\.", "", name): tensor for name, tensor in state.items()}
    if "embeddings.patch_embeddings.projection.weight" not in stripped:
        raise ValueError(
            f"{path} holds no DeiT or ViT weights: expected timm's names ('patch_embed.proj.weight'"
            " …) or those of a transformers DeiT/ViT folder, found "
            f"{', '.join(sorted(state)[:3]) or 'no tensors'} …"
        )
    return {
        name: tensor
        for name, tensor in stripped.items()
        if name.startswith(("embeddings.", "encoder.", "layernorm."))
        and name != "embeddings.mask_token"
    }


def vision_shape(encoder: dict[str, Tensor]) -> dict[str, int]:
    """The config fields that a DeiT or ViT checkpoint fixes, read off its tensors."""
    width, _, patch_size, _ = encoder["embeddings.patch_embeddings.projection.weight"].shape
    layers = {name.split(".")[2] for name in encoder if name.startswith("encoder.layer.")}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "intermediate_size": len(encoder["encoder.layer.0.intermediate.dense.bias"]),
        "patch_size": patch_size,
    }


def vision_config(path: str | os.PathLike, **fields) -> ASTConfig:
    """The config of an AST that starts from these DeiT or ViT weights.

    Args:
        path: see `ASTForAudioClassification.from_vision_checkpoint`.
        **fields: further config fields. `num_attention_heads` is hidden_size / 64 unless given, as
            in every published DeiT and ViT; `layer_norm_eps` is timm's 1e-6.
    """
    shape = vision_shape(_read_encoder(path))
    defaults = {"num_attention_heads": max(1, shape["hidden_size"] // 64), "layer_norm_eps": 1e-6}
    return ASTConfig(**{**shape, **defaults, **fields})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path} holds no weights: expected {' or '.join(names)} in it.")
        path = found
    if not path.is_file():
        raise ValueError(f"No such checkpoint: {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not read: it is a pickle that holds more than tensors, or none at all, "
            "and unpickling it could run any code that its author put there. Only plain tensors "
            "are read; where you trust the file, save its state_dict alone. "
            f"({_reason(error)})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of torch.save, or it is cut off. ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors.")
    return state.get("model", state)  # DeiT's own files keep the weights under "model"


def _reason(error: Exception) -> str:
    """torch's own sentence on what it refused, without its advice to switch the check off."""
    found = re.search(r"WeightsUnpickler error: (.+?)(\.\s|\n|$)", str(error))
    return found[1] if found else "not a file of torch.save"
