"""Checkpoint files of other code as folders and repositories of ours, and back."""

import shutil
from pathlib import Path
from typing import Any

import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification

from ..common.bundled import hub_configs_folder, read_label_names
from ..common.files import write_whole
from ..common.options import did_you_mean

_IMAGE_CLASSES = 1000


def original_to_folder(
    source: Path, folder: Path, labels: str | None = None, **settings: Any
) -> None:
    """Write a checkpoint folder with model, feature extractor and code from an original `.pth`.

    Args:
        labels: names of the labels in order: a JSON file, or one of `hub_configs/labels`.
        **settings: of `ASTForAudioClassification.from_original_checkpoint`.

    Raises:
        ValueError: as `from_original_checkpoint`, and for label names that do not fit.
    """
    if labels is not None:
        names = read_label_names(labels)
        settings["id2label"] = dict(enumerate(names))
        settings["label2id"] = {name: index for index, name in enumerate(names)}
    _folder_to_write(folder)
    model = ASTForAudioClassification.from_original_checkpoint(source, **settings)
    model.save_pretrained(folder)
    ASTFeatureExtractor(
        num_mel_bins=model.config.num_mel_bins, max_length=model.config.max_length
    ).save_pretrained(folder)


def original_to_repository(source: Path, folder: Path, variant: str) -> None:
    """Write a Hub repository, complete with its card, from the author's file of a published model.

    Args:
        variant: name of a folder of `hub_configs`, which gives geometry, labels, statistics, card.

    Raises:
        ValueError: for an unknown variant, and for a file that is not this variant's.
    """
    _folder_to_write(folder)
    cards = hub_configs_folder().glob("*/config.json")
    known = {card.parent.name: card.parent for card in cards}
    if variant not in known:
        raise ValueError(f"Unknown variant {variant!r}{did_you_mean(variant, sorted(known))}")
    config = ASTConfig.from_pretrained(known[variant])
    fields = ("frequency_stride", "time_stride", "max_length", "num_mel_bins")
    settings = {field: getattr(config, field) for field in (*fields, "num_attention_heads")}
    labels = {field: getattr(config, field) for field in ("id2label", "label2id", "problem_type")}
    model = ASTForAudioClassification.from_original_checkpoint(source, **settings, **labels)
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size"):
        if getattr(model.config, field) != getattr(config, field):
            raise ValueError(
                f"{source} is not {variant}: its {field} is {getattr(model.config, field)}, "
                f"expected {getattr(config, field)}."
            )
    model.save_pretrained(folder)
    ASTFeatureExtractor.from_pretrained(known[variant]).save_pretrained(folder)
    shutil.copy(known[variant] / "README.md", folder)


def _folder_to_write(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file; the second argument must be a folder to write.")


def folder_to_original(source: Path, file: Path) -> None:
    """Write a checkpoint folder's weights as a `.pth` that the original code loads.

    Its strict load also wants the two image heads that its model never uses; they are zeros.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: it is no checkpoint folder.")
    model = ASTForAudioClassification.from_pretrained(source)
    state = model.to_original_state_dict()
    for head in ("head", "head_dist"):
        state[f"module.v.{head}.weight"] = torch.zeros(_IMAGE_CLASSES, model.config.hidden_size)
        state[f"module.v.{head}.bias"] = torch.zeros(_IMAGE_CLASSES)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_whole(file, lambda unfinished: torch.save(state, unfinished))
