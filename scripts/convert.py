"""Convert AST checkpoints: the original code's `.pth` to a Hugging Face folder, and back.

    ast-convert audioset_10_10_0.4593.pth --variant ast-audioset-10-10-0.4593 --output ast-audioset
    ast-convert my_ast.pth my-ast --labels audioset
    ast-convert ast-audioset audioset.pth

The direction follows from the first argument: a file or a folder. `--variant` names one of the
author's published checkpoints: geometry, labels, statistics and card are those of its folder in
`hub_configs`, and the result is a complete Hub repository. Of any other `.pth`, strides, length and
mel bins are those that it was trained with; a wrong one is noticed, and what would fit is named.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification

from .common.arguments import run_command
from .common.bundled import hub_configs_folder, read_label_names
from .common.options import did_you_mean

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
    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file first: an interrupted run leaves no half of one behind.
    unfinished = file.with_name(file.name + ".part")
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, unfinished)
    os.replace(unfinished, file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ast-convert",
        description="Convert AST checkpoints: the original code's .pth to a folder, and back.",
    )
    parser.add_argument("source", type=Path, help="an original .pth, or a checkpoint folder")
    parser.add_argument("target", type=Path, nargs="?", help="the folder, or the .pth, to write")
    parser.add_argument("--output", type=Path, help="the same as the second argument")
    parser.add_argument("--variant", help="name of a published checkpoint, a folder of hub_configs")
    geometry = parser.add_argument_group("what the .pth was trained with")
    geometry.add_argument("--frequency-stride", type=int, default=10, help="fstride (default 10)")
    geometry.add_argument("--time-stride", type=int, default=10, help="tstride (default 10)")
    geometry.add_argument("--max-length", type=int, default=1024, help="input_tdim (default 1024)")
    geometry.add_argument("--num-mel-bins", type=int, default=128, help="input_fdim (default 128)")
    geometry.add_argument("--num-attention-heads", type=int, help="only for widths of your own")
    parser.add_argument("--labels", help="JSON list of label names, or the name of a bundled one")
    parser.add_argument(
        "--problem-type",
        choices=["single_label_classification", "multi_label_classification", "regression"],
        help="what the scores mean; AudioSet models are multi-label",
    )
    options = parser.parse_args(argv)

    settings = vars(options).copy()
    source, target = settings.pop("source"), settings.pop("target")
    output, variant = settings.pop("output"), settings.pop("variant")

    def convert() -> None:
        if (target is None) == (output is None):
            raise ValueError("Say once what to write: ast-convert SOURCE TARGET, or --output.")
        result = target or output
        if source.is_dir():
            if options.labels or options.problem_type or variant:
                raise ValueError(
                    "--labels, --problem-type and --variant are for a .pth, which names none."
                )
            folder_to_original(source, result)
        elif not source.is_file():
            raise ValueError(f"No such file or folder: {source}")
        elif variant is None:
            original_to_folder(source, result, **settings)
        else:
            changed = [name for name in settings if settings[name] != parser.get_default(name)]
            if changed:
                option = changed[0].replace("_", "-")
                raise ValueError(f"--variant fixes the geometry and labels: leave out --{option}.")
            original_to_repository(source, result, variant)
        print(f"Wrote {result}")

    run_command("ast-convert", convert)


if __name__ == "__main__":
    main()
