"""Other code bases' weights to checkpoint folders, and AST's back to the original's file."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification, convert_checkpoint

from ..common.bundled import hub_configs_folder, read_label_names
from ..common.files import usual_modes, write_whole
from ..common.options import did_you_mean

_IMAGE_CLASSES = 1000
_AUDIOSET_LABELS = 527
_GEOMETRY = ("frequency_stride", "time_stride", "max_length", "num_mel_bins", "num_attention_heads")
_MODEL_TYPES = ("audio-spectrogram-transformer", "ast-family")


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder is already an AST checkpoint, ours or `transformers`'."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in _MODEL_TYPES


def weights_to_folder(
    source: Path, folder: Path, labels: str | None = None, **settings: Any
) -> list[str]:
    """Write a checkpoint folder with model, feature extractor and code from others' weights.

    Args:
        source: a file or folder that `convert_checkpoint` can read.
        labels: names of the labels in order: a JSON file, or one of `hub_configs/labels`; default:
            AudioSet's if there are 527, else numbers.
        **settings: for `convert_checkpoint`.

    Returns:
        Sentences: what the weights are, and what was assumed.

    Raises:
        ValueError: as for `convert_checkpoint`, and for label names that do not fit.
    """
    folder_to_write(folder)
    if labels is not None:
        settings |= _named(read_label_names(labels))
    converted = convert_checkpoint(source, **settings)
    model, config = converted.model, converted.model.config
    notes = [f"{source.name} is {converted.family}: {_shape(config)}.", *converted.notes]
    if not isinstance(model, ASTForAudioClassification):
        notes.append("It has no classification head: use it as a starting point for fine-tuning.")
    elif labels is None and config.num_labels == _AUDIOSET_LABELS:
        names = _named(read_label_names("audioset"))
        config.id2label, config.label2id = names["id2label"], names["label2id"]
        if config.problem_type is None:
            config.problem_type = "multi_label_classification"
        notes.append("527 labels: assumed to be AudioSet's, in its order.")
    model.save_pretrained(folder)
    converted.feature_extractor.save_pretrained(folder)
    usual_modes(folder)
    return notes


def weights_to_repository(source: Path, folder: Path, variant: str) -> None:
    """Write a complete Hub repository, with card, from the authors' file of a published model.

    Args:
        variant: name of a folder in `hub_configs`, with geometry, labels, statistics and card.

    Raises:
        ValueError: for an unknown variant, or a file that is not this variant's.
    """
    folder_to_write(folder)
    cards = hub_configs_folder().glob("*/config.json")
    known = {card.parent.name: card.parent for card in cards}
    if variant not in known:
        raise ValueError(f"Unknown variant {variant!r}{did_you_mean(variant, sorted(known))}")
    config = ASTConfig.from_pretrained(known[variant])
    settings = {field: getattr(config, field) for field in _GEOMETRY}
    has_head = config.architectures == ["ASTForAudioClassification"]
    if has_head:
        labels = ("id2label", "label2id", "problem_type")
        settings |= {field: getattr(config, field) for field in labels}
    converted = convert_checkpoint(source, **settings)
    model: Any = converted.model
    stated = json.loads((known[variant] / "config.json").read_text(encoding="utf-8"))
    for field in ASTConfig.__annotations__:
        if field in stated and getattr(model.config, field) != getattr(config, field):
            raise ValueError(
                f"{source} is not {variant}: its {field} is {getattr(model.config, field)}, "
                f"expected {getattr(config, field)}."
            )
    if isinstance(model, ASTForAudioClassification) != has_head:
        raise ValueError(f"{source} is not {variant}: it has {'no' if has_head else 'a'} head.")
    extractor = ASTFeatureExtractor.from_pretrained(known[variant])
    # CED's batch normalisation of the spectrogram comes with its weights.
    extractor.bin_scale = converted.feature_extractor.bin_scale
    extractor.bin_offset = converted.feature_extractor.bin_offset
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    shutil.copy(known[variant] / "README.md", folder)
    usual_modes(folder)


def folder_to_original(source: Path, file: Path) -> None:
    """Write a checkpoint folder's weights as a `.pth` that the original code loads.

    Its strict load also needs the two image heads that its model never uses; they are zeros.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: it is not a checkpoint folder.")
    model = ASTForAudioClassification.from_pretrained(source)
    state = model.to_original_state_dict()
    for head in ("head", "head_dist"):
        state[f"module.v.{head}.weight"] = torch.zeros(_IMAGE_CLASSES, model.config.hidden_size)
        state[f"module.v.{head}.bias"] = torch.zeros(_IMAGE_CLASSES)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_whole(file, lambda unfinished: torch.save(tensors, unfinished))


def folder_to_write(folder: Path) -> None:
    """Raise ValueError if a file is in the way."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; the second argument must be a folder to write.")


def _named(names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _shape(config: ASTConfig) -> str:
    rows, columns = config.trained_grid
    bins, frames = config.patch_shape
    return (
        f"width {config.hidden_size}, {config.num_hidden_layers} layers, {rows} x {columns} patches"
        f" of {bins} mel bins x {frames} frames, of {config.max_length} frames x "
        f"{config.num_mel_bins} mel bins"
    )
