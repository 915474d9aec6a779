"""Labelled sound for training and evaluation: opens, splits, counts and checks it.

With the label column "" there are no labels (for a student that has only a teacher), and a folder
of sounds needs no sub-folders.

    open_stream     -> one split as stored (in `sources`)
    LabelledAudio   -> train and evaluation streams with labels as class indices, and their counts

Problems with a dataset surface here, in the one pass that counts its labels, before any model is
built.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from datasets import ClassLabel, IterableDataset, Value

from ..common.options import did_you_mean
from .fingerprint import ClassFingerprint, Fingerprint, checksum, file_size, short_name
from .holdout import NO_LABEL, hold_out
from .options import LabelledOptions
from .sources import class_folder_splits, data_files, hub_revision, open_sounds, open_stream

__all__ = ["LabelledAudio", "for_class_folders", "open_labelled_audio", "open_stream"]

logger = logging.getLogger(__name__)
O = TypeVar("O", bound=LabelledOptions)  # noqa: E741


@dataclass
class LabelledAudio:
    """Train and evaluation streams of {"audio": undecoded, "label": …, "name": origin}.

    A label is a class index, or a list of them in a multi-label dataset.
    """

    train: IterableDataset
    evaluation: IterableDataset
    label_names: list[str]
    train_counts: list[int]  # clips per class
    evaluation_counts: list[int]
    problem_type: str  # as in a model's config
    train_clips: int
    evaluation_clips: int
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def balanced_draws(self) -> list[float]:
        """How often to draw a training clip per epoch for each of its labels.

        The original's scheme (`gen_weight_file.py` of github.com/YuanGongND/ast): a clip's weight
        is the sum of 1000 / (count + 0.01) over its labels, and an epoch draws as many clips as
        there are, in proportion to their weights. A clip without labels is never drawn.
        """
        weights = [1000 / (count + 0.01) for count in self.train_counts]
        total = sum(c * w for c, w in zip(self.train_counts, weights, strict=True))
        return [self.train_clips * weight / total for weight in weights]


def open_labelled_audio(
    dataset: str, options: LabelledOptions, kept: Mapping[str, str] | None = None
) -> LabelledAudio:
    """Open a dataset for training, with its evaluation part, and count its labels once.

    The evaluation part is `evaluation_split` if given, else the rows whose `fold_column` equals
    `evaluation_fold`, else `evaluation_fraction` of each class of the train split: the same clips
    every time, however the stream is sharded (see `holdout`).

    Args:
        dataset: see `open_stream`.
        options: columns and parts. A label is a class name or index per clip, or a list of them
            (multi-label). If there are groups, the fraction holds out whole groups; given parts
            must not share any. With the label column "" there are no labels.
        kept: further columns, by the name they get in the streams.

    Raises:
        ValueError: for a wrong path, an unknown column, a missing or unknown label, an empty part
            or a group in both.
    """
    stream = _open(dataset, options.train_split, options)
    columns = _checked_columns(dataset, options, stream)
    for column in (kept or {}).values():
        if column not in columns:
            raise ValueError(f"{dataset} has no column {column!r}{did_you_mean(column, columns)}")
    train, evaluation, held_out = _divide(dataset, options, stream)
    for name, part in (("train", train), ("evaluation", evaluation)):
        if not part.clips:
            raise ValueError(
                f"There are no clips in the {name} part of {dataset}. Check the split, fold, group "
                "or fraction."
            )
    if common := sorted(map(str, train.groups & evaluation.groups)):
        raise ValueError(
            f"{len(common)} values of the column {options.group_column!r}, such as "
            f"{', '.join(common[:3])}, are in both the train and the evaluation part of "
            f"{dataset}. Choose other parts, or omit --group_column to accept this."
        )
    values: list[Any] = []
    label_names: list[str] = []
    if options.label_column:
        values, label_names = _classes(
            dataset,
            options.label_column,
            train,
            evaluation,
            (stream.features or {}).get(options.label_column),
            options.evaluation_split is not None,
        )
    if isinstance(held_out, _HeldOutKeys):
        _warn_of_small_classes(values, label_names, train, evaluation, options.group_column)

    if held_out is None:
        assert options.evaluation_split is not None
        train_rows = stream
        evaluation_rows = _open(dataset, options.evaluation_split, options)
    else:
        train_rows = stream.filter(partial(_negate, held_out))
        evaluation_rows = stream.filter(held_out)
    keep = partial(
        _keep,
        audio_column=options.audio_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
        is_multi_label=train.is_multi_label,
        index={value: position for position, value in enumerate(values)},
        kept=dict(kept or {}),
    )
    splits = [options.train_split]
    if options.evaluation_split is not None:
        splits.append(options.evaluation_split)
    return LabelledAudio(
        train=train_rows.map(keep, remove_columns=columns),
        evaluation=evaluation_rows.map(keep, remove_columns=columns),
        label_names=label_names,
        train_counts=[train.labels[value] for value in values],
        evaluation_counts=[evaluation.labels[value] for value in values],
        problem_type=f"{'multi' if train.is_multi_label else 'single'}_label_classification",
        train_clips=train.clips,
        evaluation_clips=evaluation.clips,
        fingerprint=_fingerprint(dataset, splits, values, label_names, train, evaluation),
    )


def _open(
    dataset: str, split: str, options: LabelledOptions, columns: list[str] | None = None
) -> IterableDataset:
    """A split; of a folder without splits, where no labels are wanted, all sounds in it."""
    if not options.label_column and not class_folder_splits(dataset):
        stream = open_sounds(dataset, options.audio_column, columns)
        if stream is not None and split != options.train_split:
            raise ValueError(f"{dataset} is a folder of sounds: it has no split {split!r}.")
        if stream is not None:
            return stream
    return open_stream(dataset, split, options.dataset_config, options.audio_column, columns)


def _checked_columns(dataset: str, options: LabelledOptions, stream: IterableDataset) -> list[str]:
    """The data's columns, if they include those named by the options."""
    columns = stream.column_names or list(next(iter(stream), {}))
    if not columns:
        raise ValueError(f"The split {options.train_split!r} of {dataset} is empty.")
    for option in ("audio_column", "label_column", "fold_column", "group_column"):
        column = getattr(options, option)
        if column and column not in columns:
            raise ValueError(
                f"{dataset} has no column {column!r} (--{option}){did_you_mean(column, columns)}"
            )
    if options.evaluation_split is not None and (options.fold_column or options.evaluation_fold):
        raise ValueError("Give either --evaluation_split or --fold_column with --evaluation_fold.")
    if (options.fold_column is None) != (options.evaluation_fold is None):
        given, missing = "fold_column", "evaluation_fold: the fold to hold out"
        if options.fold_column is None:
            given, missing = "evaluation_fold", "fold_column: where folds are named"
        raise ValueError(f"--{given} needs --{missing}.")
    return columns


def _divide(
    dataset: str, options: LabelledOptions, stream: IterableDataset
) -> "tuple[_Part, _Part, _HeldOutFold | _HeldOutKeys | None]":
    """Both parts, counted, and what tells their rows apart within a split."""
    by_share = options.evaluation_split is None and options.fold_column is None
    # Sounds are read only if necessary: to tell them apart, or if they are just names.
    feature = (stream.features or {}).get(options.audio_column)
    reads_audio = (by_share and options.group_column is None) or feature == Value("string")
    columns = {options.label_column, options.group_column, options.fold_column}
    columns |= {options.audio_column} if reads_audio else set()
    read = sorted(filter(None, columns))

    def clips_of(split: str) -> Iterator[_Clip]:
        rows = _open(dataset, split, options, read)
        for position, row in enumerate(rows):
            yield _read_clip(row, position, f"of the split {split!r} of {dataset}", options)

    train, evaluation = _Part(), _Part()
    if options.evaluation_split is not None:
        for part, split in ((train, options.train_split), (evaluation, options.evaluation_split)):
            for clip in clips_of(split):
                part.add(clip)
        return train, evaluation, None
    if options.fold_column is not None:
        for clip in clips_of(options.train_split):
            (evaluation if clip.fold == options.evaluation_fold else train).add(clip)
        return train, evaluation, _HeldOutFold(options.fold_column, str(options.evaluation_fold))
    clips = list(clips_of(options.train_split))
    groups: dict[int, Counter] = {}
    for clip in clips:
        groups.setdefault(clip.key, Counter()).update(clip.labels or [NO_LABEL])
    held_out = _HeldOutKeys(
        frozenset(hold_out(groups, options.evaluation_fraction)),
        options.group_column or options.audio_column,
        options.group_column is not None,
    )
    for clip in clips:
        (evaluation if clip.key in held_out.keys else train).add(clip)
    return train, evaluation, held_out


def for_class_folders(dataset: str, options: O) -> O:
    """Options without those that do not apply to class folders: columns, and often splits.

    This lets a recipe made for a table work on them; a warning says what is ignored.
    """
    splits = class_folder_splits(dataset)
    if splits is None or not options.label_column:
        return options
    plain: dict[str, Any] = {
        "audio_column": "audio",
        "label_column": "label",
        "label_separator": None,
        "fold_column": None,
        "evaluation_fold": None,
        "group_column": None,
    }
    if not splits:
        plain |= {"train_split": "train"}
        if options.evaluation_split != "train":
            plain |= {"evaluation_split": None}
    changes = {name: value for name, value in plain.items() if getattr(options, name) != value}
    if not changes:
        return options
    changed = replace(options, **changes)
    held_out = changed.evaluation_split is None
    logger.warning(
        "%s has class folders%s: ignored %s.%s",
        dataset,
        "" if splits else " and no splits",
        ", ".join(f"--{name} {getattr(options, name)}" for name in changes),
        f" {100 * options.evaluation_fraction:g} % of each class is held out." if held_out else "",
    )
    return changed


class _Clip(NamedTuple):
    """What the counting pass learns of a row."""

    labels: list[Any]
    key: int  # of the sound, or of its group
    group: Any
    fold: str | None
    checksum: int
    is_multi_label: bool


def _read_clip(row: dict[str, Any], position: int, where: str, options: LabelledOptions) -> _Clip:
    where = f"Row {position} {where}"
    value = row[options.label_column] if options.label_column else []
    separator = options.label_separator
    is_multi_label = isinstance(value, list) or separator is not None
    if value is None or (not is_multi_label and value in ("", -1)):
        raise ValueError(
            f"{where} has no label in the column {options.label_column!r}. Remove the row or name "
            "another --label_column."
        )
    labels = _labels(value, separator)
    if not all(isinstance(label, (str, int)) for label in labels):
        raise ValueError(
            f"{where} has the label {value!r} in the column {options.label_column!r}; expected a "
            "class name or index, or a list of them."
        )
    group = None if options.group_column is None else row[options.group_column]
    if options.group_column is not None and group in (None, ""):
        raise ValueError(f"{where} has nothing in the column {options.group_column!r}.")
    audio = row.get(options.audio_column)
    sound = None if audio is None else _sound_key(audio)
    name: Any = position if sound is None else sound
    size = file_size(audio) if isinstance(audio, str) else 0
    return _Clip(
        labels,
        key=checksum(group) if group is not None else sound or 0,
        group=group,
        fold=None if options.fold_column is None else str(row[options.fold_column]),
        checksum=checksum(name, size),
        is_multi_label=is_multi_label,
    )


def _sound_key(audio: Any) -> int:
    """A checksum of a sound's bytes, or of its name in its class if it is a file."""
    if isinstance(audio, dict):
        audio = audio.get("bytes") or audio.get("path") or ""
    return checksum(short_name(audio) if isinstance(audio, str) else audio)


@dataclass(frozen=True)
class _HeldOutFold:
    """Whether a row is for evaluation: by its fold."""

    column: str
    fold: str

    def __call__(self, row: dict[str, Any]) -> bool:
        return str(row[self.column]) == self.fold


@dataclass(frozen=True)
class _HeldOutKeys:
    """Whether a row is for evaluation: by the checksum of its sound or group."""

    keys: frozenset[int]
    column: str
    is_group: bool

    def __call__(self, row: dict[str, Any]) -> bool:
        value = row[self.column]
        return (checksum(value) if self.is_group else _sound_key(value)) in self.keys


def _negate(predicate: Callable[[dict[str, Any]], bool], row: dict[str, Any]) -> bool:
    return not predicate(row)


@dataclass
class _Part:
    """What the counting pass finds in the train or the evaluation part."""

    clips: int = 0
    labels: Counter = field(default_factory=Counter)
    groups: set = field(default_factory=set)
    checksums: Counter = field(default_factory=Counter)  # by label
    is_multi_label: bool = False

    def add(self, clip: _Clip) -> None:
        self.clips += 1
        self.is_multi_label = clip.is_multi_label
        self.labels.update(clip.labels)
        for label in clip.labels or [NO_LABEL]:
            self.checksums[label] += clip.checksum
        if clip.group is not None:
            self.groups.add(clip.group)


def _fingerprint(
    dataset: str,
    splits: list[str],
    values: list[Any],
    label_names: list[str],
    train: _Part,
    evaluation: _Part,
) -> Fingerprint:
    # A sound that moves from one part to the other changes the sum, too.
    sums = {
        value: (train.checksums[value] + 3 * evaluation.checksums[value]) % 2**64
        for value in values or [NO_LABEL]
    }
    classes = {
        name: ClassFingerprint(train.labels[value], evaluation.labels[value], sums[value])
        for value, name in zip(values, label_names, strict=True)
    }
    if not values:
        classes = {"": ClassFingerprint(train.clips, evaluation.clips, sums[NO_LABEL])}
    return Fingerprint(
        classes,
        data_files(dataset, splits),
        hub_revision(dataset),
    )


def _warn_of_small_classes(
    values: list[Any],
    names: list[str],
    train: _Part,
    evaluation: _Part,
    group_column: str | None,
) -> None:
    small = [
        name
        for value, name in zip(values, names, strict=True)
        if train.labels[value] and not evaluation.labels[value]
    ]
    if small:
        logger.warning(
            "Too few %s to hold any out; trained on but not evaluated: %s.",
            "clips" if group_column is None else f"values of {group_column!r}",
            _listed(small),
        )


def _labels(value: Any, separator: str | None) -> list[Any]:
    """All labels of a clip, without duplicates."""
    if isinstance(value, list):
        return list(dict.fromkeys(value))
    if separator is None or not isinstance(value, str):
        return [value]
    return list(dict.fromkeys(part.strip() for part in value.split(separator) if part.strip()))


def _classes(
    dataset: str, label_column: str, train: _Part, evaluation: _Part, feature: Any, apart: bool
) -> tuple[list[Any], list[str]]:
    """The labels as stored, in the order of the classes, and the classes' names.

    Args:
        dataset, label_column: for messages.
        train, evaluation: what was counted.
        feature: of the label column.
        apart: whether the evaluation part is a separate split, which could have other labels.
    """
    feature = getattr(feature, "feature", feature)  # of a list
    values = sorted(train.labels if apart else train.labels | evaluation.labels)
    names = [str(value) for value in values]
    if isinstance(feature, ClassLabel):
        values, names = list(range(feature.num_classes)), list(feature.names)
    for name, part in (("train", train), ("evaluation", evaluation)):
        if unknown := sorted(map(str, set(part.labels) - set(values))):
            raise ValueError(
                f"The {name} part of {dataset} has labels that are not classes of the train "
                f"part: {_listed(unknown)}. The classes are {_listed(names)}."
            )
    if not train.labels:
        raise ValueError(f"No clip of {dataset} has a label in {label_column!r}.")
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
    kept: dict[str, str],
) -> dict[str, Any]:
    stored = example[label_column] if label_column else []
    labels = [index[label] for label in _labels(stored, label_separator)]
    return {
        "audio": example[audio_column],
        "label": labels if is_multi_label else labels[0],
        "name": sound_name(example, audio_column),
        **{name: example[column] for name, column in kept.items()},
    }


def sound_name(example: dict[str, Any], audio_column: str) -> str:
    """A sound's origin: its path, its key in a tar file, or a checksum of its bytes."""
    audio = example[audio_column]
    path = audio.get("path") if isinstance(audio, dict) else audio
    if isinstance(path, str):
        return path
    if "__key__" in example:
        return str(example["__key__"])
    encoded = audio["bytes"] if isinstance(audio, dict) else audio
    return f"sound with MD5 {hashlib.md5(encoded).hexdigest()}"
