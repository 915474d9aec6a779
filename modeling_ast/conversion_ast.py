"""Converts other code bases' weights to AST: the original's, image models', and the descendants'.

`FAMILIES` is the table: what a file looks like -> how it becomes an AST. Names and shapes of its
tensors decide. `convert_checkpoint` reads all of them; for an unknown file, the error lists what
was looked for. Most code bases use the names of timm's vision transformer:

    cls_token, dist_token          embeddings.cls_token, embeddings.distillation_token
    pos_embed                      embeddings.position_embeddings
    patch_embed.proj               embeddings.patch_embeddings.projection
    blocks.N.norm1, norm2          encoder.layer.N.layernorm_before, layernorm_after
    blocks.N.attn.qkv              encoder.layer.N.attention.attention.query, key, value (stacked)
    blocks.N.attn.proj             encoder.layer.N.attention.output.dense
    blocks.N.mlp.fc1, fc2          encoder.layer.N.intermediate.dense, output.dense
    norm                           layernorm

`transformers`' DeiT and ViT folders already use the right-hand names, after `deit.` or `vit.`.
The original AST code (github.com/YuanGongND/ast) has timm's names prefixed by `module.v.`, its head
as `module.mlp_head.0` and `.1` (classifier.layernorm and classifier.dense), and two unused image
heads, `module.v.head` and `module.v.head_dist`, which are dropped in both directions.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from feature_extraction import ASTFeatureExtractor, LogMel

from .checkpoint_files_ast import read_weights
from .configuration_ast import ASTConfig
from .modeling_ast import ASTForAudioClassification, ASTModel
from .patch_grid_ast import grid_shape, resize_position_table

State = dict[str, Tensor]

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
# Attention heads by width: in the original code, and in the descendants' published models.
_ORIGINAL_HEADS = {192: 3, 384: 6, 768: 12}
_HEADS = {**_ORIGINAL_HEADS, 256: 4, 1024: 16, 1280: 16, 1536: 24}
_ENCODER = "audio_spectrogram_transformer."
_AST_SPECIAL_TOKENS = 2
_PASST_LENGTH = 1024  # frames; longer ones are of 20 or 30 s, or of shorter hops
_LAYER_NORM_EPS = 1e-6  # timm's
_HEAD_NORM_EPS = 1e-5  # torch's, in heads written as nn.LayerNorm(width)
_BATCH_NORM_EPS = 1e-5

# Front ends, as settings of ASTFeatureExtractor. SSAST and AudioMAE have exactly AST's.
KALDI_FEATURES: dict[str, Any] = {"mel_scale": "torchaudio", "remove_mean": True}
PASST_FEATURES: dict[str, Any] = {
    "sampling_rate": 32000,
    "win_length": 800,
    "hop_length": 320,
    "n_fft": 1024,
    "frequency_min": 0.0,
    "frequency_max": 15000.0,
    "mel_scale": "torchaudio",
    "center": True,
    "compression": "log_offset",
    "mel_floor": 1e-5,
    "mean": -4.5,
    "std": 2.5,
    "padding_value": math.log(1e-5),  # of silence, as a waveform padded with zeros
    "return_attention_mask": True,
}
CED_FEATURES: dict[str, Any] = {
    "win_length": 512,
    "hop_length": 160,
    "n_fft": 512,
    "frequency_min": 0.0,
    "frequency_max": 8000.0,
    "mel_scale": "htk",
    "preemphasis": 0.0,
    "center": True,
    "periodic_window": True,
    "compression": "decibels",
    "mel_floor": 1e-10,
    "dynamic_range": 120.0,
    "do_normalize": False,
    "padding_value": -100.0,  # decibels of silence
    "return_attention_mask": True,
}


class ConvertedCheckpoint(NamedTuple):
    """What `convert_checkpoint` returns."""

    family: str
    model: Any  # ASTForAudioClassification, or ASTModel if the file has no head
    feature_extractor: ASTFeatureExtractor
    notes: list[str]  # what was assumed because the weights do not tell


@dataclass
class Numbers:
    """What weights do not tell; None: as in the family's published models, as far as they fit."""

    frequency_stride: int | None = None
    time_stride: int | None = None
    max_length: int | None = None
    num_mel_bins: int | None = None
    num_attention_heads: int | None = None


@dataclass
class Parts:
    """The parts of an AST: config fields, tensors of encoder and head, front end."""

    fields: dict[str, Any]
    encoder: State
    head: State = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """An entry of the table."""

    name: str
    looks_for: str  # in words, for the error about an unknown file
    matches: Callable[[State], bool]
    read: Callable[[State, dict[str, Any], Numbers], Parts]


def convert_checkpoint(
    path: str | os.PathLike,
    *,
    family: str | None = None,
    frequency_stride: int | None = None,
    time_stride: int | None = None,
    max_length: int | None = None,
    num_mel_bins: int | None = None,
    num_attention_heads: int | None = None,
    **config_fields: Any,
) -> ConvertedCheckpoint:
    """Read a checkpoint of any code base in `FAMILIES`.

    Width, depth, patch shape, number of labels and usually the patch grid are read from the
    weights. The rest takes the family's defaults unless given here; the notes say what was assumed.

    Args:
        path: a `.pth`, `.pt` or `.safetensors` file, or a folder that holds one. Wrappers' prefixes
            (`module.` …) and training state next to the weights do not matter.
        family: a name in `FAMILIES`, if names and shapes fit more than one: a fine-tuned SSAST with
            16 x 16 patches looks like an AST.
        frequency_stride, time_stride: mel bins and frames between neighbouring patches.
        max_length: frames the position table covers.
        num_mel_bins: mel bins it covers.
        num_attention_heads: needed for widths other than 192, 256, 384, 768, 1024, 1280 and 1536.
        **config_fields: other fields of `ASTConfig`: `id2label`, `problem_type`, `pooling`, ….

    Returns:
        The family's name, the model (without a head if the file has none: a starting point for
        fine-tuning), its feature extractor, notes.

    Raises:
        ValueError: if the file fits no entry, if the numbers do not fit its position table, if
            tensors are missing or unexpected, or if it is a pickle that would run code.
    """
    state, settings = read_weights(path)
    numbers = Numbers(frequency_stride, time_stride, max_length, num_mel_bins, num_attention_heads)
    entry = find_family(state, path, family)
    try:
        parts = entry.read(state, settings, numbers)
        if parts.head:
            parts.fields["num_labels"] = len(parts.head["dense.weight"])
            _check_label_names(parts.fields["num_labels"], config_fields)
        config = ASTConfig(**{**parts.fields, **config_fields})
    except KeyError as error:
        raise ValueError(f"{path} looks like {entry.name}, but lacks {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} looks like {entry.name}. {error}") from error
    tensors = parts.encoder
    if parts.head:
        tensors = {_ENCODER + name: tensor for name, tensor in tensors.items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in parts.head.items()}
    model: Any = (ASTForAudioClassification if parts.head else ASTModel)(config)
    _load_exactly(model, tensors, path, entry.name)
    features = ASTFeatureExtractor(
        **{
            "num_mel_bins": config.num_mel_bins,
            "max_length": config.max_length,
            **parts.features,
        }
    )
    return ConvertedCheckpoint(entry.name, model.eval(), features, parts.notes)


def find_family(state: State, path: str | os.PathLike, name: str | None = None) -> Family:
    """The table entry that these tensors fit.

    Args:
        name: the entry to use, if it is known.

    Raises:
        ValueError: if they fit none; the message says what each looks for.
    """
    known = {entry.name.lower(): entry for entry in FAMILIES}
    if name is not None:
        if name.lower() not in known:
            names = ", ".join(entry.name for entry in FAMILIES)
            raise ValueError(f"Unknown family {name!r}; expected one of {names}.")
        return known[name.lower()]
    for entry in FAMILIES:
        if entry.matches(state):
            return entry
    looked_for = "; ".join(f"{entry.name}: {entry.looks_for}" for entry in FAMILIES)
    raise ValueError(
        f"Unknown kind of weights in {path}. Looked for {looked_for}. Found "
        f"{', '.join(sorted(state)[:5]) or 'no tensors'} …"
    )


def _check_label_names(labels: int, config_fields: dict[str, Any]) -> None:
    names = config_fields.get("id2label") or range(labels)
    if len(names) != labels:
        raise ValueError(f"It has {labels} labels, but {len(names)} names were given.")


def _load_exactly(model: Any, tensors: State, path: str | os.PathLike, family: str) -> None:
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    wrong = [n for n in expected if n in tensors and expected[n].shape != tensors[n].shape]
    if missing or unknown or wrong:
        said = [
            f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for what, names in (
                ("it lacks", missing),
                ("it has unexpected", unknown),
                ("shapes do not fit its config:", wrong),
            )
            if names
        ]
        raise ValueError(f"{path} is not a complete {family} checkpoint: {'; '.join(said)}.")
    model.load_state_dict(tensors)


def timm_to_ast(state: State) -> State:
    """Rename a timm vision transformer's tensors, dropping those outside the encoder.

    Raises:
        ValueError: if a block holds something that AST's layers do not have.
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
                f"The checkpoint has a tensor {name!r}, which AST's layers lack: it is not a plain "
                "ViT or DeiT."
            )
        new_name = f"encoder.layer.{number}.{_IN_BLOCK[part]}.{kind}"
        if part == "attn.qkv":
            for projection, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[new_name.replace("qkv", projection)] = chunk
        else:
            renamed[new_name] = tensor
    return renamed


def encoder_shape(encoder: State) -> dict[str, Any]:
    """The config fields that an encoder's tensors determine."""
    projection = encoder["embeddings.patch_embeddings.projection.weight"]
    width, _, patch_bins, patch_frames = projection.shape
    layers = {name.split(".")[2] for name in encoder if name.startswith("encoder.layer.")}
    if not layers:
        raise ValueError("It has no transformer layers.")
    fields = {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "intermediate_size": len(encoder["encoder.layer.0.intermediate.dense.bias"]),
        "patch_size": patch_bins,
    }
    return fields if patch_frames == patch_bins else {**fields, "time_patch_size": patch_frames}


# --- The descendants -----------------------------------------------------------------------------


def _read_passt(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    special = state["new_pos_embed"]
    tables = state["time_new_pos_embed"], state["freq_new_pos_embed"]
    numbers = replace(numbers, num_mel_bins=numbers.num_mel_bins or 128)
    encoder, fields, notes = _with_summed_positions(
        state, *tables, special, numbers, strides=(10, 16, 12, 14), lengths=(1000,)
    )
    if fields["max_length"] > _PASST_LENGTH:
        notes.append(
            f"Taken for {fields['max_length'] / 100:g} s, a spectrum every 10 ms; for a file with "
            "stfthop in its name set hop_length in preprocessor_config.json: 100 or 160."
        )
    fields["num_special_tokens"] = special.shape[1]
    head = _head(state, "head.0", "head.1")
    return _parts(fields, encoder, head, PASST_FEATURES, notes, settings, numbers)


def _read_ced(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    # The authors' Hub repositories prefix everything but the head with `encoder.`.
    prefix = "encoder." if "encoder.time_pos_embed" in state else ""
    inner = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    settings = {**settings, **(settings.get("encoder_kwargs") or {})}
    if settings.get("pooling") == "dm":
        raise ValueError(
            "Its pooling is 'dm', a mean of probabilities over time: AST's head has no such thing."
        )
    time, frequency = inner["time_pos_embed"], inner["freq_pos_embed"]
    patch = _patch_shape(inner["patch_embed.proj.weight"])
    stride = settings.get("patch_stride") or (None, None)
    stride = (stride, stride) if isinstance(stride, int) else stride
    numbers = replace(
        numbers,
        num_mel_bins=numbers.num_mel_bins or _ced_mel_bins(inner, frequency.shape[2] * patch[0]),
        frequency_stride=numbers.frequency_stride or stride[0],
        time_stride=numbers.time_stride or stride[1],
    )
    special = inner["token_pos_embed"][None] if "cls_token" in inner else None  # (1, 1, D)
    encoder, fields, notes = _with_summed_positions(
        inner, time, frequency, special, numbers,
        strides=(patch[0],), lengths=(settings.get("target_length"), 1012, 1008),
    )  # fmt: skip
    fields |= {
        "num_special_tokens": 0 if special is None else 1,
        "pooling": "patches" if special is None else "special_tokens",
        "problem_type": "multi_label_classification",  # the authors' code ends in a sigmoid
    }
    head = _head(state, "outputlayer.0", "outputlayer.1")
    features = {**CED_FEATURES, **_ced_features(inner, settings, fields["num_mel_bins"])}
    return _parts(fields, encoder, head, features, notes, settings, numbers)


def _ced_mel_bins(state: State, default: int) -> int:
    norm = state.get("init_bn.1.weight", state.get("init_bn.weight"))
    return default if norm is None else len(norm)


def _ced_features(state: State, settings: dict[str, Any], num_mel_bins: int) -> dict[str, Any]:
    """The spectrogram's batch normalisation as numbers per bin, and settings from the file."""
    features: dict[str, Any] = {}
    for ours, theirs in (
        ("win_length", "win_size"),
        ("hop_length", "hop_size"),
        ("n_fft", "n_fft"),
        ("frequency_min", "f_min"),
        ("frequency_max", "f_max"),
    ):
        if settings.get(theirs) is not None:
            features[ours] = settings[theirs]
    window, filters = state.get("front_end.0.spectrogram.window"), _ced_filters(state)
    if window is not None:
        features["win_length"] = len(window)
    if filters is not None:
        features["n_fft"] = 2 * (len(filters) - 1)
        numbers = {
            name: value
            for name, value in {**CED_FEATURES, **features}.items()
            if name in LogMel.__dataclass_fields__
        }
        _, own = LogMel(num_mel_bins=num_mel_bins, **numbers).matrices()
        if own.shape != filters.shape or (own - filters).abs().max() > 1e-4:
            raise ValueError(
                f"Its mel filters differ from those of {numbers['frequency_min']:g} to "
                f"{numbers['frequency_max']:g} Hz. Name it model.safetensors or pytorch_model.bin "
                'and put a config.json beside it that says what they are: {"f_min": …, "f_max": …}.'
            )
    norm = "init_bn.1" if "init_bn.1.weight" in state else "init_bn"
    if f"{norm}.weight" in state:
        weight, bias, mean, variance = (
            state[f"{norm}.{name}"].double()
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + _BATCH_NORM_EPS).sqrt()
        features["bin_scale"] = scale.float().tolist()
        features["bin_offset"] = (bias - mean * scale).float().tolist()
    return features


def _ced_filters(state: State) -> Tensor | None:
    return state.get("front_end.0.mel_scale.fb")


def _read_ssast(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    inner = {n.removeprefix("v."): t for n, t in state.items() if n.startswith("v.")}
    patch = _patch_shape(inner["patch_embed.proj.weight"])
    special = 2 if "dist_token" in inner else 1
    is_square = patch[0] == patch[1]
    strides: Sequence[tuple[int, int]] = ((10, 10), (16, 16), (12, 12), (14, 14))
    if not is_square:
        strides = ((patch[0], 1), (patch[0], patch[1]))
    if "p_input_tdim" in state:  # pretrained: its patches do not overlap
        numbers = Numbers(
            numbers.frequency_stride or patch[0],
            numbers.time_stride or patch[1],
            numbers.max_length or int(state["p_input_tdim"]),
            numbers.num_mel_bins or int(state["p_input_fdim"]),
            numbers.num_attention_heads,
        )
    encoder = timm_to_ast(inner)
    table = encoder["embeddings.position_embeddings"]
    geometry, notes = _joint_geometry(table.shape[1] - special, patch, numbers, strides)
    fields = {
        **encoder_shape(encoder),
        "num_special_tokens": special,
        "pooling": "patches",
        **geometry,
    }
    head = _head(state, "mlp_head.0", "mlp_head.1")
    return _parts(fields, encoder, head, KALDI_FEATURES, notes, settings, numbers)


def _read_audiomae(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    encoder = timm_to_ast(state)
    # Its images have time as height: patches are numbered column by column.
    projection = encoder["embeddings.patch_embeddings.projection.weight"].transpose(2, 3)
    encoder["embeddings.patch_embeddings.projection.weight"] = projection.contiguous()
    patch = _patch_shape(projection)
    table = encoder["embeddings.position_embeddings"]
    geometry, notes = _joint_geometry(
        table.shape[1] - 1, patch, numbers, ((16, 16), (10, 10), (12, 12), (14, 14))
    )
    rows, columns = grid_shape(
        geometry["max_length"],
        geometry["num_mel_bins"],
        patch,
        geometry["frequency_stride"],
        geometry["time_stride"],
    )
    by_time = table[:, 1:].unflatten(1, (columns, rows))
    by_row = by_time.transpose(1, 2).flatten(1, 2)
    encoder["embeddings.position_embeddings"] = torch.cat([table[:, :1], by_row], dim=1)
    fields = {
        **encoder_shape(encoder),
        "num_special_tokens": 1,
        "pooling": "patches",
        **geometry,
    }
    head: State = {}
    if "fc_norm.weight" in state:  # fine-tuned
        fields["final_norm"] = "after_pooling"
        for kind in ("weight", "bias"):
            encoder[f"layernorm.{kind}"] = state[f"fc_norm.{kind}"]
            if f"head.{kind}" in state:
                head[f"dense.{kind}"] = state[f"head.{kind}"]
    return _parts(fields, encoder, head, KALDI_FEATURES, notes, settings, numbers)


def _read_original(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    encoder, head = _original_parts(state)
    fields = encoder_shape(encoder)
    strides = (numbers.frequency_stride or 10, numbers.time_stride or 10)
    spectrogram = (numbers.max_length or 1024, numbers.num_mel_bins or 128)
    patches = state["v.pos_embed"].shape[1] - _AST_SPECIAL_TOKENS
    _check_table_size(patches, strides, spectrogram, fields["patch_size"])
    asked = numbers.num_attention_heads
    fields |= {
        "num_attention_heads": _original_head_count(fields["hidden_size"], asked),
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in encoder,
        "frequency_stride": strides[0],
        "time_stride": strides[1],
        "max_length": spectrogram[0],
        "num_mel_bins": spectrogram[1],
        "layer_norm_eps": _LAYER_NORM_EPS,
    }
    notes = []
    if fields["patch_size"] == 16:
        notes.append(
            "A fine-tuned SSAST has the same names but pools patches: if this is one, pass family "
            "SSAST."
        )
    return Parts(fields, encoder, head, {}, notes)


def _read_image(state: State, settings: dict[str, Any], numbers: Numbers) -> Parts:
    config = _vision_config(state, **{k: v for k, v in vars(numbers).items() if v is not None})
    names = ("frequency_stride", "time_stride", "max_length", "num_mel_bins")
    fields = {
        **encoder_shape(_image_encoder(state)),
        **{name: getattr(config, name) for name in (*names, "num_attention_heads")},
        "layer_norm_eps": config.layer_norm_eps,
    }
    notes = ["Trained on images: use it as a starting point for fine-tuning."]
    return Parts(fields, _image_to_ast(state, config), {}, {}, notes)


def _parts(
    fields: dict[str, Any],
    encoder: State,
    head: State,
    features: dict[str, Any],
    notes: list[str],
    settings: dict[str, Any],
    numbers: Numbers,
) -> Parts:
    """Parts, completed by what all descendants share."""
    asked = numbers.num_attention_heads or settings.get("num_heads")
    fields |= {
        "num_attention_heads": _head_count(fields["hidden_size"], asked),
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in encoder,
        "layer_norm_eps": _LAYER_NORM_EPS,
        "native_features": False,
    }
    if fields.get("final_norm") != "after_pooling":
        fields["head_norm_eps"] = _HEAD_NORM_EPS
    if head and len(head["dense.weight"]) == 527:
        fields.setdefault("problem_type", "multi_label_classification")  # AudioSet's labels
    encoder = {name: tensor.float() for name, tensor in encoder.items()}
    head = {name: tensor.float() for name, tensor in head.items()}
    return Parts(fields, encoder, head, dict(features), notes)


def _patch_shape(projection: Tensor) -> tuple[int, int]:
    """Mel bins and frames of a patch."""
    _, _, bins, frames = projection.shape
    return bins, frames


def _head(state: State, norm: str, dense: str) -> State:
    """LayerNorm and linear layer; nothing where there is no head."""
    if f"{dense}.weight" not in state:
        return {}
    names = {"layernorm": norm, "dense": dense}
    return {f"{o}.{k}": state[f"{t}.{k}"] for o, t in names.items() for k in ("weight", "bias")}


def _head_count(width: int, asked: int | None) -> int:
    if asked is None and width not in _HEADS:
        raise ValueError(
            f"Its width is {width}; the published models' are "
            + ", ".join(f"{w} ({h} heads)" for w, h in sorted(_HEADS.items()))
            + ". The number of heads cannot be read from the weights: pass num_attention_heads."
        )
    return _HEADS[width] if asked is None else asked


def _with_summed_positions(
    state: State,
    time: Tensor,
    frequency: Tensor,
    special: Tensor | None,
    numbers: Numbers,
    *,
    strides: Sequence[int],
    lengths: Sequence[int | None],
) -> tuple[State, dict[str, Any], list[str]]:
    """An encoder whose position table is the sum of two, under AST's names and with one table.

    The authors' code has `length // stride` rows and columns; those that no patch reaches are
    unused and dropped here.

    Args:
        state: the encoder's tensors under timm's names.
        time: (1, D, 1, columns).
        frequency: (1, D, rows, 1).
        special: (1, special tokens, D); None: there are none.
        numbers: with the number of mel bins.
        strides: the published ones, in order of preference, if several fit the rows.
        lengths: likewise for lengths.

    Returns:
        its tensors, config fields, notes.
    """
    patch = _patch_shape(state["patch_embed.proj.weight"])
    num_mel_bins, rows, columns = numbers.num_mel_bins or 0, frequency.shape[2], time.shape[3]
    notes = []
    frequency_stride = numbers.frequency_stride
    if frequency_stride is None:
        fitting = [
            stride
            for stride in (*strides, *range(1, patch[0] + 1))
            if (num_mel_bins - patch[0]) // stride + 1 == rows
        ]
        if not fitting:
            raise ValueError(
                f"Its position table has {rows} rows, but no stride cuts num_mel_bins="
                f"{num_mel_bins} into that many. Pass the num_mel_bins it was trained with."
            )
        frequency_stride = fitting[0]
        if frequency_stride not in strides:
            notes.append(f"frequency_stride={frequency_stride}, the smallest that fits.")
    elif (num_mel_bins - patch[0]) // frequency_stride + 1 != rows:
        raise ValueError(
            f"Its position table has {rows} rows, but frequency_stride={frequency_stride} cuts "
            f"num_mel_bins={num_mel_bins} into {(num_mel_bins - patch[0]) // frequency_stride + 1}."
        )
    time_stride = numbers.time_stride
    if time_stride is None:
        time_stride = frequency_stride if patch[0] == patch[1] else patch[1]
        notes.append(f"time_stride={time_stride}, as in the published models.")
    shortest = (columns - 1) * time_stride + patch[1]
    longest = shortest + time_stride - 1

    def fits(length: int | None) -> bool:
        return length is not None and (
            shortest <= length <= longest or length // time_stride == columns
        )

    max_length = numbers.max_length
    if max_length is None:
        max_length = next(filter(fits, (*lengths, longest - longest % 100)), longest) or longest
    elif not fits(max_length):
        raise ValueError(
            f"Its position table has {columns} columns: with time_stride={time_stride}, "
            f"max_length={shortest} to {longest} would fit; got {max_length}."
        )
    columns = min(columns, (max_length - patch[1]) // time_stride + 1)
    encoder = timm_to_ast(state)
    table = (time[..., :columns] + frequency).flatten(2).transpose(1, 2)
    if special is not None:
        table = torch.cat([special, table], dim=1)
    encoder["embeddings.position_embeddings"] = table
    fields = {
        **encoder_shape(encoder),
        "num_mel_bins": num_mel_bins,
        "max_length": max_length,
        "frequency_stride": frequency_stride,
        "time_stride": time_stride,
    }
    return encoder, fields, notes


_LENGTHS = (1024, 512, 128, 1000, 100)  # frames: AudioSet, ESC-50, Speech Commands; round ones


def _joint_geometry(
    patches: int,
    patch: tuple[int, int],
    numbers: Numbers,
    strides: Sequence[tuple[int, int]],
) -> tuple[dict[str, int], list[str]]:
    """Strides, length and mel bins of a model whose table has one entry per patch.

    Args:
        patches: positions in the table.
        patch: mel bins and frames.
        strides: (frequency, time) of the published models, in order of preference.
    """
    num_mel_bins = numbers.num_mel_bins or 128
    tried = [
        pair
        for pair in dict.fromkeys((*strides, patch))
        if (pair[0] <= patch[0] and pair[1] <= patch[1])
        and numbers.frequency_stride in (None, pair[0])
        and numbers.time_stride in (None, pair[1])
    ]
    if not tried:
        tried = [
            (
                numbers.frequency_stride or numbers.time_stride or patch[0],
                numbers.time_stride or numbers.frequency_stride or patch[1],
            )
        ]
    fitting = []
    for frequency, time in tried:
        rows = (num_mel_bins - patch[0]) // frequency + 1
        if rows < 1 or patches % rows:
            continue
        shortest = (patches // rows - 1) * time + patch[1]
        longest = shortest + time - 1
        if numbers.max_length is not None:
            if shortest <= numbers.max_length <= longest:
                fitting.append((-1, frequency, time, numbers.max_length))
            continue
        known = [n for n in _LENGTHS if shortest <= n <= longest]
        rank = _LENGTHS.index(known[0]) if known else len(_LENGTHS)
        fitting.append((rank, frequency, time, known[0] if known else longest))
    if not fitting:
        asked = ", ".join(
            f"{name}={value}"
            for name, value in vars(numbers).items()
            if value is not None and name != "num_attention_heads"
        )
        raise ValueError(
            f"It has positions for {patches} patches of {patch[0]} mel bins x {patch[1]} frames, "
            "which do not fit "
            + (f"{asked}" if asked else f"{num_mel_bins} mel bins")
            + ". Pass the frequency_stride, time_stride, max_length and num_mel_bins it was "
            "trained with."
        )
    _, frequency, time, max_length = min(fitting, key=lambda fit: fit[0])
    fields = {
        "frequency_stride": frequency,
        "time_stride": time,
        "max_length": max_length,
        "num_mel_bins": num_mel_bins,
    }
    notes = []
    given = (numbers.frequency_stride, numbers.time_stride, numbers.max_length)
    if None in given:
        notes.append(
            f"{patches} patches: assumed {max_length} frames x {num_mel_bins} mel bins, one patch "
            f"every {time} frames and {frequency} bins."
        )
    return fields, notes


# --- The original code ---------------------------------------------------------------------------


def read_original_checkpoint(
    path: str | os.PathLike,
    *,
    frequency_stride: int,
    time_stride: int,
    max_length: int,
    num_mel_bins: int,
    num_attention_heads: int | None,
    **config_fields: Any,
) -> tuple[ASTConfig, State]:
    """Config and state dict for an `ASTForAudioClassification` from an original `.pth`.

    See `ASTForAudioClassification.from_original_checkpoint`.
    """
    state, settings = read_weights(path)
    needed = {"mlp_head.1.weight", "v.pos_embed", "v.patch_embed.proj.weight", "v.dist_token"}
    if not needed <= set(state):
        raise ValueError(
            f"{path} is not a checkpoint of the original AST code: expected "
            f"{', '.join(sorted(needed))}, with or without 'module.'; found "
            f"{', '.join(sorted(state)[:3]) or 'no tensors'} …"
        )
    numbers = Numbers(frequency_stride, time_stride, max_length, num_mel_bins, num_attention_heads)
    try:
        parts = _read_original(state, settings, numbers)
        _check_label_names(len(state["mlp_head.1.weight"]), config_fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    labels = len(state["mlp_head.1.weight"])
    config = ASTConfig(**{**parts.fields, "num_labels": labels, **config_fields})
    tensors = {_ENCODER + name: tensor for name, tensor in parts.encoder.items()}
    return config, tensors | {f"classifier.{n}": tensor for n, tensor in parts.head.items()}


def _original_parts(state: State) -> tuple[State, State]:
    inner = {n.removeprefix("v."): tensor for n, tensor in state.items() if n.startswith("v.")}
    return timm_to_ast(inner), _head(state, "mlp_head.0", "mlp_head.1")


def ast_to_original(state: State) -> State:
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


def _original_head_count(width: int, asked: int | None) -> int:
    known = _ORIGINAL_HEADS.get(width)
    if asked is None:
        if known is None:
            raise ValueError(
                f"Its width is {width}; the original code's are "
                + ", ".join(f"{w} ({h} heads)" for w, h in _ORIGINAL_HEADS.items())
                + ". The number of heads cannot be read from the weights: pass num_attention_heads."
            )
        return known
    if known is not None and asked != known:
        raise ValueError(
            f"Got num_attention_heads={asked}, but the original code's models of this width, "
            f"{width}, have {known} heads. Omit num_attention_heads."
        )
    return asked


def _check_table_size(
    patches: int,
    strides: tuple[int, int],
    spectrogram: tuple[int, int],
    patch_size: int,
) -> None:
    patch = (patch_size, patch_size)
    max_length, num_mel_bins = spectrogram
    rows, columns = grid_shape(max_length, num_mel_bins, patch, *strides)
    if rows * columns == patches:
        return
    fitting = [
        f"frequency_stride={frequency}, time_stride={time}"
        for frequency in range(1, patch_size + 1)
        for time in range(1, patch_size + 1)
        if math.prod(grid_shape(max_length, num_mel_bins, patch, frequency, time)) == patches
    ]
    fitting.sort(key=lambda text: len(set(re.findall(r"\d+", text))))  # equal strides first
    hints = [f"of these, {'; or '.join(fitting[:8])} would fit"] if fitting else []
    if patches % rows == 0:
        shortest = (patches // rows - 1) * strides[1] + patch_size
        hints.append(
            f"with these strides, max_length={shortest} to {shortest + strides[1] - 1} would fit"
        )
    raise ValueError(
        f"It has positions for {patches} patches, but frequency_stride={strides[0]}, "
        f"time_stride={strides[1]} cut max_length={max_length} frames x "
        f"num_mel_bins={num_mel_bins} into {rows} rows x {columns} columns = {rows * columns}. "
        + (
            "Pass the numbers the model was trained with: " + "; ".join(hints) + "."
            if hints
            else "No strides fit: max_length or num_mel_bins must be wrong."
        )
    )


# --- Image models --------------------------------------------------------------------------------


def read_vision_checkpoint(path: str | os.PathLike, config: ASTConfig) -> State:
    """DeiT or ViT weights as the state dict of an `ASTModel` of this config.

    See `ASTForAudioClassification.from_vision_checkpoint`.
    """
    state = _image_state(path)
    found = encoder_shape(_image_encoder(state))
    wrong = {name: size for name, size in found.items() if getattr(config, name) != size}
    if wrong:
        raise ValueError(
            f"{path} does not fit the config: "
            + ", ".join(
                f"its {n} is {s}, the config's {getattr(config, n)}" for n, s in wrong.items()
            )
            + ". Build the ASTConfig from the checkpoint's numbers."
        )
    return _image_to_ast(state, config)


def vision_config(path: str | os.PathLike, **fields: Any) -> ASTConfig:
    """The config of an AST that starts from these DeiT or ViT weights.

    Args:
        path: see `ASTForAudioClassification.from_vision_checkpoint`.
        **fields: other config fields. By default, `num_attention_heads` is hidden_size / 64, as in
            every published DeiT and ViT, and `layer_norm_eps` is timm's 1e-6.
    """
    return _vision_config(_image_state(path), **fields)


def _image_state(path: str | os.PathLike) -> State:
    state, _ = read_weights(path)
    if not _is_image_model(state):
        raise ValueError(
            f"{path} holds no DeiT or ViT weights: expected timm's names ('patch_embed.proj.weight'"
            " …) or those of a transformers DeiT/ViT folder; found "
            f"{', '.join(sorted(state)[:3]) or 'no tensors'} …"
        )
    return state


def _vision_config(state: State, **fields: Any) -> ASTConfig:
    shape = encoder_shape(_image_encoder(state))
    defaults = {
        "num_attention_heads": max(1, shape["hidden_size"] // 64),
        "layer_norm_eps": _LAYER_NORM_EPS,
    }
    return ASTConfig(**{**shape, **defaults, **fields})


def _image_to_ast(state: State, config: ASTConfig) -> State:
    encoder = _image_encoder(state)
    projection = "embeddings.patch_embeddings.projection.weight"
    encoder[projection] = encoder[projection].sum(dim=1, keepdim=True)
    table = encoder["embeddings.position_embeddings"]
    if "embeddings.distillation_token" not in encoder:
        encoder["embeddings.distillation_token"] = encoder["embeddings.cls_token"].clone()
        table = torch.cat([table[:, :1], table], dim=1)
    side = math.isqrt(table.shape[1] - _AST_SPECIAL_TOKENS)
    encoder["embeddings.position_embeddings"] = resize_position_table(
        table, (side, side), config.trained_grid, _AST_SPECIAL_TOKENS
    )
    return encoder


def _image_encoder(state: State) -> State:
    """The tensors of a DeiT's or ViT's encoder under the names of AST checkpoints."""
    if "patch_embed.proj.weight" in state:
        return timm_to_ast(state)
    return {
        name: tensor
        for name, tensor in _without_model_name(state).items()
        if name.startswith(("embeddings.", "encoder.", "layernorm."))
        and name != "embeddings.mask_token"
    }


def _without_model_name(state: State) -> State:
    return {re.sub(r"^(deit|vit)\.", "", name): tensor for name, tensor in state.items()}


# --- What a file looks like ----------------------------------------------------------------------


def _has(*names: str) -> Callable[[State], bool]:
    return lambda state: set(names) <= set(state)


def _is_ced(state: State) -> bool:
    is_summed = any(
        _has(f"{p}time_pos_embed", f"{p}freq_pos_embed")(state) for p in ("", "encoder.")
    )
    return is_summed and "outputlayer.1.weight" in state


def _is_dasheng(state: State) -> bool:
    is_summed = any(
        _has(f"{p}time_pos_embed", f"{p}freq_pos_embed")(state) for p in ("", "encoder.")
    )
    return is_summed and "outputlayer.1.weight" not in state


def _is_ssast(state: State) -> bool:
    if not _has("v.patch_embed.proj.weight", "v.pos_embed", "v.cls_token")(state):
        return False
    height, width = state["v.patch_embed.proj.weight"].shape[2:]
    return "p_input_tdim" in state or height != width or "v.dist_token" not in state


def _is_audiomae(state: State) -> bool:
    if not _has("patch_embed.proj.weight", "pos_embed", "cls_token")(state):
        return False
    is_mono = state["patch_embed.proj.weight"].shape[1] == 1
    return is_mono and ("fc_norm.weight" in state or "decoder_embed.weight" in state)


def _is_image_model(state: State) -> bool:
    projection = "embeddings.patch_embeddings.projection.weight"
    return "patch_embed.proj.weight" in state or projection in _without_model_name(state)


FAMILIES: tuple[Family, ...] = (
    Family(
        "PaSST",
        "time_new_pos_embed, freq_new_pos_embed",
        _has("time_new_pos_embed", "freq_new_pos_embed", "patch_embed.proj.weight"),
        _read_passt,
    ),
    Family(
        "CED",
        "time_pos_embed, freq_pos_embed and outputlayer",
        _is_ced,
        _read_ced,
    ),
    Family(
        "Dasheng",
        "time_pos_embed, freq_pos_embed without outputlayer",
        _is_dasheng,
        _read_ced,
    ),
    Family(
        "SSAST",
        "v.patch_embed.proj.weight with p_input_tdim, with patches that are not square or without "
        "v.dist_token",
        _is_ssast,
        _read_ssast,
    ),
    Family(
        "AST",
        "v.patch_embed.proj.weight, v.dist_token and mlp_head",
        _has("v.patch_embed.proj.weight", "v.pos_embed", "v.dist_token", "mlp_head.1.weight"),
        _read_original,
    ),
    Family(
        "AudioMAE",
        "patch_embed.proj.weight of one channel with fc_norm or decoder_embed",
        _is_audiomae,
        _read_audiomae,
    ),
    Family(
        "image transformer",
        "patch_embed.proj.weight, or a transformers DeiT/ViT's embeddings.patch_embeddings",
        _is_image_model,
        _read_image,
    ),
)
