"""Labelled sound as a stream: from a folder, Parquet or tar files, or the Hub, decoded by us.

    open_stream     -> one split as a streaming `datasets.IterableDataset`; audio stays encoded
    LabelledAudio   -> train and evaluation streams with labels as class indices

`datasets` decodes and encodes its Audio feature with torchcodec, which needs FFmpeg's libraries. So
audio columns are read as what is stored, bytes or a path, and `load_audio` decodes them in workers.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError

from .arguments import did_you_mean

AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"),
    *(".w64", ".rf64", ".m4a", ".mp4", ".aac", ".webm", ".wma"),
}
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_MAX_SHARDS = 64  # of a folder: enough for any number of workers


def open_stream(dataset: str, split: str, config: str | None = None) -> IterableDataset:
    """One split of a dataset, streaming, with audio as bytes or paths.

    Args:
        dataset: a folder with one sub-folder of sounds per class (or train/, validation/, test/
            with such sub-folders); a Parquet or WebDataset tar file, a folder or a glob of them;
            or the name of a dataset on the Hub.
        split: which one; a file, or a folder without splits, is all "train".
        config: the Hub dataset's configuration.

    Raises:
        ValueError: when there is no such dataset or split.
    """
    path = Path(dataset)
    if path.is_dir():
        for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
            if any(path.rglob(pattern)):
                return _load(kind, split, data_dir=None, data_files=_by_split(path, pattern))
        return _class_folders(path, split)
    if path.suffix in (".parquet", ".tar"):
        if "*" not in dataset and not path.is_file():
            raise ValueError(f"No such file: {dataset}")
        kind = "parquet" if path.suffix == ".parquet" else "webdataset"
        return _load(kind, split, data_files=dataset)
    if path.is_file():
        raise ValueError(
            f"{dataset} is a file, expected a folder, Parquet (.parquet) or tar (.tar)."
        )
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise ValueError(f"No such folder or file: {dataset}")
    return _load(dataset, split, name=config)


def _by_split(folder: Path, pattern: str) -> dict[str, list[str]]:
    """The folder's data files by split, told from the start of their name or their folder's."""
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob(pattern)):
        names = (file.stem.split("-")[0].lower(), file.parent.name.lower())
        split = next((_SPLIT_FOLDERS[name] for name in names if name in _SPLIT_FOLDERS), "train")
        files.setdefault(split, []).append(str(file))
    return files


def _load(kind: str, split: str, **kwargs: Any) -> IterableDataset:
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        stream = load_dataset(kind, split=split, streaming=True, **kwargs)
        stored = {"webdataset": "binary", "audiofolder": "string"}.get(stream.info.builder_name)
        features = stream.features or {}
        if stored is None:
            for column, feature in features.items():
                if isinstance(feature, Audio):
                    stream = stream.cast_column(column, Audio(decode=False))
        elif any(isinstance(feature, Audio) for feature in features.values()):
            # These loaders encode an Audio column themselves unless told that it is none.
            plain = {
                column: Value(stored) if isinstance(feature, Audio) else feature
                for column, feature in features.items()
            }
            stream = load_dataset(
                kind, split=split, streaming=True, features=Features(plain), **kwargs
            )
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        where = kwargs.get("data_files", kind)
        raise ValueError(f"Cannot open the dataset {where}: {error}") from error
    return stream


def _class_folders(folder: Path, split: str) -> IterableDataset:
    """A folder of class folders (of a split, where it has splits), a path and a label per sound."""
    names = {child.name for child in folder.iterdir() if child.is_dir()}
    if names and names <= set(_SPLIT_FOLDERS):
        chosen = [name for name in sorted(names) if _SPLIT_FOLDERS[name] == split]
        if not chosen:
            raise ValueError(f"{folder} has no split {split!r}; it has {sorted(names)}.")
        roots = [folder / name for name in chosen]
        classes = sorted({c.name for n in names for c in (folder / n).iterdir() if c.is_dir()})
    elif split != "train":
        raise ValueError(
            f"{folder} has no split {split!r}; its sub-folders are the classes {sorted(names)[:5]}."
        )
    else:
        roots, classes = [folder], sorted(names)
    files: list[str] = []
    labels: list[str] = []
    for root in roots:
        for name in classes:
            found = sorted(
                file
                for file in (root / name).rglob("*")
                if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
            )
            files += map(str, found)
            labels += [name] * len(found)
    if not files:
        raise ValueError(
            f"{folder} holds no data: expected one sub-folder of sounds per class, "
            "Parquet files or tar files."
        )
    features = Features({"audio": Value("string"), "label": ClassLabel(names=classes)})
    table = Dataset.from_dict({"audio": files, "label": labels}, features=features)
    return table.to_iterable_dataset(num_shards=min(_MAX_SHARDS, len(table)))


@dataclass
class LabelledAudio:
    """Train and evaluation streams of {"audio": undecoded, "label": class index}."""

    train: IterableDataset
    evaluation: IterableDataset
    label_names: list[str]
    train_counts: list[int]  # clips per class
    evaluation_counts: list[int]


def open_labelled_audio(
    dataset: str,
    config: str | None = None,
    audio_column: str = "audio",
    label_column: str = "label",
    train_split: str = "train",
    evaluation_split: str | None = None,
    fold_column: str | None = None,
    evaluation_fold: str | None = None,
    evaluation_fraction: float = 0.2,
) -> LabelledAudio:
    """Open a dataset for training, with its evaluation part, and count its labels once.

    The evaluation part is `evaluation_split` if given, else the rows whose `fold_column` equals
    `evaluation_fold`, else a fixed `evaluation_fraction` of the train split, chosen by a checksum
    of each sound: the same clips every time, however the stream is sharded.

    Raises:
        ValueError: for a wrong path, an unknown column, a missing label or an empty part.
    """
    stream = open_stream(dataset, train_split, config)
    columns = stream.column_names or list(next(iter(stream), {}))
    if not columns:
        raise ValueError(f"The split {train_split!r} of {dataset} is empty.")
    wanted = {"audio_column": audio_column, "label_column": label_column}
    if fold_column is not None:
        wanted["fold_column"] = fold_column
    for option, column in wanted.items():
        if column not in columns:
            raise ValueError(
                f"{dataset} has no column {column!r} (--{option}){did_you_mean(column, columns)}"
            )

    if evaluation_split is not None:
        train, evaluation = stream, open_stream(dataset, evaluation_split, config)
    else:
        if fold_column is not None:
            if evaluation_fold is None:
                raise ValueError("--fold_column needs --evaluation_fold: the fold to hold out.")
            held_out: Callable[[dict[str, Any]], bool] = partial(
                _in_fold, column=fold_column, fold=str(evaluation_fold)
            )
        elif 0 < evaluation_fraction < 1:
            held_out = partial(_in_fraction, column=audio_column, fraction=evaluation_fraction)
        else:
            raise ValueError(
                f"--evaluation_fraction must be between 0 and 1, got {evaluation_fraction}."
            )
        train = stream.filter(partial(_negate, held_out))
        evaluation = stream.filter(held_out)

    counts = {
        part: _count_labels(part_stream, label_column, f"the {part} part of {dataset}")
        for part, part_stream in (("train", train), ("evaluation", evaluation))
    }
    label_feature = (stream.features or {}).get(label_column)
    values = sorted(set().union(*counts.values()))
    if isinstance(label_feature, ClassLabel):
        values = list(range(label_feature.num_classes))
        label_names = label_feature.names
    else:
        label_names = [str(value) for value in values]
    if len(values) < 2:
        raise ValueError(
            f"{dataset} has one label only ({label_names[0]!r}); a classifier needs at least two."
        )
    index = {value: position for position, value in enumerate(values)}
    keep = partial(_keep, audio_column=audio_column, label_column=label_column, index=index)
    return LabelledAudio(
        train=train.map(keep, remove_columns=columns),
        evaluation=evaluation.map(keep, remove_columns=columns),
        label_names=label_names,
        train_counts=[counts["train"][value] for value in values],
        evaluation_counts=[counts["evaluation"][value] for value in values],
    )


def _in_fold(example: dict[str, Any], column: str, fold: str) -> bool:
    return str(example[column]) == fold


def _in_fraction(example: dict[str, Any], column: str, fraction: float) -> bool:
    audio = example[column]
    if isinstance(audio, dict):
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, str):  # the file's name in its class: the same on any machine
        audio = "/".join(Path(audio).parts[-2:]).encode()
    return zlib.crc32(audio) / 2**32 < fraction


def _negate(predicate: Callable[[dict[str, Any]], bool], example: dict[str, Any]) -> bool:
    return not predicate(example)


def _keep(
    example: dict[str, Any], audio_column: str, label_column: str, index: dict[Any, int]
) -> dict[str, Any]:
    return {"audio": example[audio_column], "label": index[example[label_column]]}


def _count_labels(stream: IterableDataset, column: str, name: str) -> Counter:
    counts: Counter = Counter()
    for position, example in enumerate(stream.select_columns([column])):
        label = example[column]
        if label is None or label == "" or label == -1:
            raise ValueError(
                f"Row {position} of {name} has no label in the column {column!r}. Remove the row "
                "or name another --label_column."
            )
        if not isinstance(label, (str, int)):
            raise ValueError(
                f"Row {position} of {name} has the label {label!r} in the column {column!r}; "
                "expected one class name or index."
            )
        counts[label] += 1
    if not counts:
        raise ValueError(f"There are no clips in {name}. Check the split, fold or fraction.")
    return counts
