"""Labelled sound for training and evaluation, opened, divided, counted and checked.

    open_stream     -> one split as it is stored (of `sources`)
    LabelledAudio   -> train and evaluation streams with labels as class indices, and their counts

What is wrong with a data set shows here, in the one pass that counts its labels, before any model
is built.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel, IterableDataset

from ..common.options import did_you_mean
from .options import LabelledOptions
from .sources import open_stream

__all__ = ["LabelledAudio", "open_labelled_audio", "open_stream"]

logger = logging.getLogger(__name__)


@dataclass
class LabelledAudio:
    """Train and evaluation streams of {"audio": undecoded, "label": …, "name": where it is from}.

    A label is a class index, or a list of them in a multi-label data set.
    """

    train: IterableDataset
    evaluation: IterableDataset
    label_names: list[str]
    train_counts: list[int]  # clips per class
    evaluation_counts: list[int]
    problem_type: str  # as a model's config has it
    train_clips: int
    evaluation_clips: int

    def balanced_draws(self) -> list[float]:
        """How often a training clip is to be drawn per epoch for each of its labels.

        The original's scheme (`gen_weight_file.py` of github.com/YuanGongND/ast): the weight of a
        clip is the sum of 1000 / (count + 0.01) over its labels, and as many clips as there are
        are drawn in proportion to it. A clip without labels is never drawn.
        """
        weights = [1000 / (count + 0.01) for count in self.train_counts]
        total = sum(c * w for c, w in zip(self.train_counts, weights, strict=True))
        return [self.train_clips * weight / total for weight in weights]


def open_labelled_audio(dataset: str, options: LabelledOptions) -> LabelledAudio:
    """Open a dataset for training, with its evaluation part, and count its labels once.

    The evaluation part is `evaluation_split` if given, else the rows whose `fold_column` equals
    `evaluation_fold`, else a fixed `evaluation_fraction` of the train split, chosen by a checksum
    of each sound, or of its `group_column`: the same clips every time, however the stream is
    sharded.

    Args:
        dataset: see `open_stream`.
        options: columns and parts. A label is a class name or index per clip, or a list of them
            (multi-label). The fraction is of the groups where there are some; given parts are
            checked for common ones.

    Raises:
        ValueError: for a wrong path, an unknown column, a missing or unknown label, an empty part
            or a group in both.
    """
    config, audio_column = options.dataset_config, options.audio_column
    label_column, group_column = options.label_column, options.group_column
    train_split, evaluation_split = options.train_split, options.evaluation_split
    stream = open_stream(dataset, train_split, config, audio_column)
    columns = stream.column_names or list(next(iter(stream), {}))
    if not columns:
        raise ValueError(f"The split {train_split!r} of {dataset} is empty.")
    for option in ("audio_column", "label_column", "fold_column", "group_column"):
        column = getattr(options, option)
        if column is not None and column not in columns:
            raise ValueError(
                f"{dataset} has no column {column!r} (--{option}){did_you_mean(column, columns)}"
            )
    held_out = None
    if evaluation_split is None:
        held_out = _held_out(options)
    elif options.fold_column is not None or options.evaluation_fold is not None:
        raise ValueError("Give either --evaluation_split or --fold_column with --evaluation_fold.")

    train, evaluation = (
        _Part(dataset, label_column, options.label_separator, group_column) for _ in range(2)
    )
    read = {label_column}
    read |= {group_column} if group_column is not None else set()
    read |= {held_out.column} if held_out is not None else set()
    open_split = partial(open_stream, dataset, config=config, audio_column=audio_column)
    for position, row in enumerate(open_split(train_split, columns=sorted(read))):
        part = evaluation if held_out is not None and held_out(row) else train
        part.count(row, position, train_split)
    if evaluation_split is not None:
        for position, row in enumerate(open_split(evaluation_split, columns=sorted(read))):
            evaluation.count(row, position, evaluation_split)
    for name, part in (("train", train), ("evaluation", evaluation)):
        if not part.clips:
            raise ValueError(
                f"There are no clips in the {name} part of {dataset}. Check the split, fold, group "
                "or fraction."
            )
    _check_groups(train, evaluation)
    feature = (stream.features or {}).get(label_column)
    values, label_names = _classes(train, evaluation, feature, evaluation_split is not None)

    if evaluation_split is not None:
        train_rows, evaluation_rows = stream, open_split(evaluation_split)
    else:
        assert held_out is not None
        train_rows = stream.filter(partial(_negate, held_out))
        evaluation_rows = stream.filter(held_out)
    keep = partial(
        _keep,
        audio_column=audio_column,
        label_column=label_column,
        label_separator=options.label_separator,
        is_multi_label=train.is_multi_label,
        index={value: position for position, value in enumerate(values)},
    )
    return LabelledAudio(
        train=train_rows.map(keep, remove_columns=columns),
        evaluation=evaluation_rows.map(keep, remove_columns=columns),
        label_names=label_names,
        train_counts=[train.labels[value] for value in values],
        evaluation_counts=[evaluation.labels[value] for value in values],
        problem_type=f"{'multi' if train.is_multi_label else 'single'}_label_classification",
        train_clips=train.clips,
        evaluation_clips=evaluation.clips,
    )


@dataclass(frozen=True)
class _HeldOut:
    """Whether a row is for evaluation: by its fold, or by the checksum of its sound or group."""

    column: str
    fold: str | None
    fraction: float

    def __call__(self, row: dict[str, Any]) -> bool:
        value = row[self.column]
        if self.fold is not None:
            return str(value) == self.fold
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        elif isinstance(value, str) and os.path.isabs(value):
            value = "/".join(Path(value).parts[-2:])  # the name in its class: on any machine
        encoded = value if isinstance(value, bytes) else str(value).encode()
        checksum = hashlib.blake2b(encoded, digest_size=8).digest()
        return int.from_bytes(checksum, "big") / 2**64 < self.fraction


def _held_out(options: LabelledOptions) -> _HeldOut:
    if (options.fold_column is None) != (options.evaluation_fold is None):
        given, missing = "fold_column", "evaluation_fold: the fold to hold out"
        if options.fold_column is None:
            given, missing = "evaluation_fold", "fold_column: where folds are named"
        raise ValueError(f"--{given} needs --{missing}.")
    if options.fold_column is not None:
        return _HeldOut(options.fold_column, options.evaluation_fold, 0.0)
    column = options.group_column or options.audio_column
    return _HeldOut(column, None, options.evaluation_fraction)


def _negate(predicate: Callable[[dict[str, Any]], bool], row: dict[str, Any]) -> bool:
    return not predicate(row)


@dataclass
class _Part:
    """What the counting pass finds in the train or the evaluation part."""

    dataset: str
    label_column: str
    label_separator: str | None
    group_column: str | None
    clips: int = 0
    labels: Counter = field(default_factory=Counter)
    groups: set = field(default_factory=set)
    is_multi_label: bool = False

    def count(self, row: dict[str, Any], position: int, split: str | None) -> None:
        where = f"Row {position} of the split {split!r} of {self.dataset}"
        value = row[self.label_column]
        self.is_multi_label = isinstance(value, list) or self.label_separator is not None
        labels = _labels(value, self.label_separator)
        if value is None or (not self.is_multi_label and value in ("", -1)):
            raise ValueError(
                f"{where} has no label in the column {self.label_column!r}. Remove the row or name "
                "another --label_column."
            )
        if not all(isinstance(label, (str, int)) for label in labels):
            raise ValueError(
                f"{where} has the label {value!r} in the column {self.label_column!r}; expected a "
                "class name or index, or a list of them."
            )
        if self.group_column is not None:
            group = row[self.group_column]
            if group is None or group == "":
                raise ValueError(f"{where} has nothing in the column {self.group_column!r}.")
            self.groups.add(group)
        self.labels.update(labels)
        self.clips += 1


def _check_groups(train: _Part, evaluation: _Part) -> None:
    if common := sorted(map(str, train.groups & evaluation.groups)):
        raise ValueError(
            f"{len(common)} values of the column {train.group_column!r}, such as "
            f"{', '.join(common[:3])}, are in both the train and the evaluation part of "
            f"{train.dataset}. Choose other parts, or leave out --group_column to accept it."
        )


def _labels(value: Any, separator: str | None) -> list[Any]:
    """All labels of a clip, once each."""
    if isinstance(value, list):
        return list(dict.fromkeys(value))
    if separator is None or not isinstance(value, str):
        return [value]
    return list(dict.fromkeys(part.strip() for part in value.split(separator) if part.strip()))


def _classes(
    train: _Part, evaluation: _Part, feature: Any, apart: bool
) -> tuple[list[Any], list[str]]:
    """The labels as they are stored, in the order of the classes, and the classes' names.

    Args:
        train, evaluation: what was counted.
        feature: of the label column.
        apart: whether the evaluation part is a split of its own, which may have other labels.
    """
    feature = getattr(feature, "feature", feature)  # of a list
    values = sorted(train.labels if apart else train.labels | evaluation.labels)
    names = [str(value) for value in values]
    if isinstance(feature, ClassLabel):
        values, names = list(range(feature.num_classes)), list(feature.names)
    for name, part in (("train", train), ("evaluation", evaluation)):
        if unknown := sorted(map(str, set(part.labels) - set(values))):
            raise ValueError(
                f"The {name} part of {part.dataset} has labels that are no class of the train "
                f"part: {_listed(unknown)}. The classes are {_listed(names)}."
            )
    if not train.labels:
        raise ValueError(f"No clip of {train.dataset} has a label in {train.label_column!r}.")
    counts = [
        (name, train.labels[v], evaluation.labels[v]) for name, v in zip(names, values, strict=True)
    ]
    if untrained := [name for name, trained, evaluated in counts if evaluated and not trained]:
        logger.warning("Classes without a clip to train on: %s.", _listed(untrained))
    return values, names


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _keep(
    example: dict[str, Any],
    audio_column: str,
    label_column: str,
    label_separator: str | None,
    is_multi_label: bool,
    index: dict[Any, int],
) -> dict[str, Any]:
    labels = [index[label] for label in _labels(example[label_column], label_separator)]
    return {
        "audio": example[audio_column],
        "label": labels if is_multi_label else labels[0],
        "name": _name(example, audio_column),
    }


def _name(example: dict[str, Any], audio_column: str) -> str:
    """Where a sound is from: its path, its key in a tar file, else a checksum of its bytes."""
    audio = example[audio_column]
    path = audio.get("path") if isinstance(audio, dict) else audio
    if isinstance(path, str):
        return path
    if "__key__" in example:
        return str(example["__key__"])
    encoded = audio["bytes"] if isinstance(audio, dict) else audio
    return f"sound with MD5 {hashlib.md5(encoded).hexdigest()}"
