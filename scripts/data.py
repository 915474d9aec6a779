"""Labelled sound as a stream: from a folder, CSV, Parquet or tar files, or the Hub.

    open_stream     -> one split as a streaming `datasets.IterableDataset`; audio stays encoded
    LabelledAudio   -> train and evaluation streams with labels as class indices, and their counts

`datasets` decodes and encodes its Audio feature with torchcodec, which needs FFmpeg's libraries. So
audio columns are read as what is stored, bytes or a path, and `load_audio` decodes them in workers.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError

from .arguments import did_you_mean

logger = logging.getLogger(__name__)

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
_TABLE_SUFFIXES = (".csv", ".tsv")
_MAX_SHARDS = 64  # of a table: enough for any number of workers


def open_stream(
    dataset: str,
    split: str,
    config: str | None = None,
    audio_column: str = "audio",
    columns: list[str] | None = None,
) -> IterableDataset:
    """One split of a dataset, streaming, with audio as bytes or paths.

    Args:
        dataset: a folder with one sub-folder of sounds per class (or train/, validation/, test/
            with such sub-folders); a Parquet or WebDataset tar file, a folder or a glob of them; a
            CSV (or tab-separated .tsv) file that names sound files, relative to its own folder, or
            a folder with train.csv, validation.csv or test.csv; or the name of a dataset on the
            Hub.
        split: which one; a file, or a folder without splits, is all "train".
        config: the Hub dataset's configuration.
        audio_column: with the file names of a CSV.
        columns: the only ones wanted; of Parquet no others are read.

    Raises:
        ValueError: when there is no such dataset or split.
    """
    path = Path(dataset)
    if path.is_dir():
        for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
            if any(path.rglob(pattern)):
                files = _by_split(path.rglob(pattern))
                return _load(kind, split, columns, data_files=files)
        tables = _by_split(
            table
            for table in path.iterdir()
            if table.suffix in _TABLE_SUFFIXES and _file_split(table) in _SPLIT_FOLDERS
        )
        if tables:
            if split not in tables:
                raise ValueError(f"{path} has no split {split!r}; it has {sorted(tables)}.")
            return _named_files([Path(table) for table in tables[split]], audio_column, columns)
        return _class_folders(path, split, columns)
    if path.suffix in (".parquet", ".tar", *_TABLE_SUFFIXES):
        if "*" not in dataset and not path.is_file():
            raise ValueError(f"No such file: {dataset}")
        if path.suffix in _TABLE_SUFFIXES:
            if split != "train":
                raise ValueError(f"{dataset} is one table, all 'train': it has no split {split!r}.")
            return _named_files([path], audio_column, columns)
        kind = "parquet" if path.suffix == ".parquet" else "webdataset"
        return _load(kind, split, columns, data_files=dataset)
    if path.is_file():
        raise ValueError(
            f"{dataset} is a file, expected a folder, CSV (.csv), Parquet (.parquet) or tar (.tar)."
        )
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise ValueError(f"No such folder or file: {dataset}")
    return _load(dataset, split, columns, name=config)


def _file_split(file: Path) -> str:
    return file.stem.split("-")[0].lower()


def _by_split(data_files: Iterable[Path]) -> dict[str, list[str]]:
    """Data files by split, told from the start of their name or their folder's."""
    files: dict[str, list[str]] = {}
    for file in sorted(data_files):
        names = (_file_split(file), file.parent.name.lower())
        split = next((_SPLIT_FOLDERS[name] for name in names if name in _SPLIT_FOLDERS), "train")
        files.setdefault(split, []).append(str(file))
    return files


def _load(kind: str, split: str, columns: list[str] | None, **kwargs: Any) -> IterableDataset:
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        stream = load_dataset(kind, split=split, streaming=True, **kwargs)
        if columns is not None and stream.info.builder_name == "parquet":
            kwargs["columns"] = columns
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
    return stream if columns is None else stream.select_columns(columns)


def _class_folders(folder: Path, split: str, columns: list[str] | None) -> IterableDataset:
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
            f"{folder} holds no data: expected one sub-folder of sounds per class, a train.csv, "
            "Parquet files or tar files."
        )
    features = Features({"audio": Value("string"), "label": ClassLabel(names=classes)})
    table = Dataset.from_dict({"audio": files, "label": labels}, features=features)
    return _table_stream(table.data.table, features, columns)


def _named_files(
    tables: list[Path], audio_column: str, columns: list[str] | None
) -> IterableDataset:
    """CSV files that name sound files, relative to where they are themselves."""
    parts = []
    for path in tables:
        try:
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
                ),
                # Class names stay what they are.
                convert_options=pyarrow.csv.ConvertOptions(
                    true_values=[], false_values=[], timestamp_parsers=[]
                ),
            )
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"Cannot read {path}: {error}") from error
        if audio_column not in table.column_names:
            raise ValueError(
                f"{path} has no column {audio_column!r} (--audio_column)"
                f"{did_you_mean(audio_column, table.column_names)}"
            )
        files = [
            name if "://" in name else os.path.join(path.parent, name)
            for name in map(str, table[audio_column].to_pylist())
        ]
        if files and not any("://" in name or os.path.exists(name) for name in files[:10]):
            raise ValueError(
                f"{path} names {files[0]}, and there is no such file: the column {audio_column!r} "
                "must hold addresses or paths, relative to the folder of the table."
            )
        place = table.column_names.index(audio_column)
        parts.append(table.set_column(place, audio_column, pyarrow.array(files, pyarrow.string())))
    try:
        table = pyarrow.concat_tables(parts, promote_options="permissive")
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"The columns of {tables[0].parent} do not agree: {error}") from error
    return _table_stream(table, None, columns)


def _table_stream(
    table: pyarrow.Table, features: Features | None, columns: list[str] | None
) -> IterableDataset:
    """File names as a stream, in an order that does not go class by class."""
    order = np.random.default_rng(0).permutation(len(table))
    info = None if features is None else DatasetInfo(features=features)
    stream = Dataset(table.take(order), info=info).to_iterable_dataset(
        num_shards=max(1, min(_MAX_SHARDS, len(table)))
    )
    return stream if columns is None else stream.select_columns(columns)


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
    group_column: str | None = None,
    label_separator: str | None = None,
) -> LabelledAudio:
    """Open a dataset for training, with its evaluation part, and count its labels once.

    The evaluation part is `evaluation_split` if given, else the rows whose `fold_column` equals
    `evaluation_fold`, else a fixed `evaluation_fraction` of the train split, chosen by a checksum
    of each sound, or of its `group_column`: the same clips every time, however the stream is
    sharded.

    Args:
        dataset, config: see `open_stream`.
        audio_column: the sounds: bytes, paths, or both.
        label_column: a class name or index per clip, or a list of them (multi-label).
        train_split, evaluation_split, fold_column, evaluation_fold, evaluation_fraction: see above.
        group_column: what clips have in common that must not be in both parts: a speaker, a
            recording. The fraction is of the groups then; given parts are checked.
        label_separator: between the names in one string of a multi-label dataset.

    Raises:
        ValueError: for a wrong path, an unknown column, a missing or unknown label, an empty part
            or a group in both.
    """
    stream = open_stream(dataset, train_split, config, audio_column)
    columns = stream.column_names or list(next(iter(stream), {}))
    if not columns:
        raise ValueError(f"The split {train_split!r} of {dataset} is empty.")
    wanted = {"audio_column": audio_column, "label_column": label_column}
    if fold_column is not None:
        wanted["fold_column"] = fold_column
    if group_column is not None:
        wanted["group_column"] = group_column
    for option, column in wanted.items():
        if column not in columns:
            raise ValueError(
                f"{dataset} has no column {column!r} (--{option}){did_you_mean(column, columns)}"
            )

    part = partial(_Part, dataset, label_column, label_separator, group_column)
    train, evaluation = part("train"), part("evaluation")
    read = {label_column, *([group_column] if group_column is not None else [])}
    held_out: Callable[[dict[str, Any]], bool] | None = None
    folds: set[str] = set()
    if evaluation_split is not None:
        evaluation_stream = open_stream(dataset, evaluation_split, config, audio_column)
        for row in open_stream(dataset, evaluation_split, config, audio_column, sorted(read)):
            evaluation.count(row)
    elif fold_column is not None:
        if evaluation_fold is None:
            raise ValueError("--fold_column needs --evaluation_fold: the fold to hold out.")
        held_out = partial(_in_fold, column=fold_column, fold=str(evaluation_fold))
        read.add(fold_column)
    elif 0 < evaluation_fraction < 1:
        by = audio_column if group_column is None else group_column
        held_out = partial(_in_fraction, column=by, fraction=evaluation_fraction)
        read.add(by)
    else:
        raise ValueError(
            f"--evaluation_fraction must be between 0 and 1, got {evaluation_fraction}."
        )
    for row in open_stream(dataset, train_split, config, audio_column, sorted(read)):
        if fold_column is not None:
            folds.add(str(row.get(fold_column)))
        (evaluation if held_out is not None and held_out(row) else train).count(row)
    if held_out is not None:
        evaluation_stream = stream.filter(held_out)
        stream = stream.filter(partial(_negate, held_out))

    for each in (train, evaluation):
        if not each.clips:
            known = f" Folds: {', '.join(sorted(folds))}." if folds else ""
            raise ValueError(
                f"There are no clips in {each.name}. Check the split, fold, group or fraction."
                + known
            )
    if common := sorted(map(str, train.groups & evaluation.groups)):
        raise ValueError(
            f"{len(common)} values of the column {group_column!r} are in both the train and the "
            f"evaluation part of {dataset}, such as {', '.join(common[:3])}. Choose other parts, or "
            "leave out --group_column to accept it."
        )
    values, label_names = _classes(train, evaluation, (stream.features or {}).get(label_column))
    is_multi_label = train.is_multi_label
    if len(values) < (1 if is_multi_label else 2):
        raise ValueError(
            f"{dataset} has one label only ({label_names[0]!r}); a classifier needs at least two."
            if label_names
            else f"No clip of {dataset} has a label in the column {label_column!r}."
        )
    keep = partial(
        _keep,
        audio_column=audio_column,
        label_column=label_column,
        label_separator=label_separator,
        is_multi_label=is_multi_label,
        index={value: position for position, value in enumerate(values)},
    )
    return LabelledAudio(
        train=stream.map(keep, remove_columns=columns),
        evaluation=evaluation_stream.map(keep, remove_columns=columns),
        label_names=label_names,
        train_counts=[train.labels[value] for value in values],
        evaluation_counts=[evaluation.labels[value] for value in values],
        problem_type=f"{'multi' if is_multi_label else 'single'}_label_classification",
        train_clips=train.clips,
        evaluation_clips=evaluation.clips,
    )


@dataclass
class _Part:
    """What the counting pass finds in the train or the evaluation part."""

    dataset: str
    label_column: str
    label_separator: str | None
    group_column: str | None
    kind: str
    clips: int = 0
    labels: Counter = field(default_factory=Counter)
    groups: set = field(default_factory=set)
    is_multi_label: bool = False

    @property
    def name(self) -> str:
        return f"the {self.kind} part of {self.dataset}"

    def count(self, row: dict[str, Any]) -> None:
        value = row[self.label_column]
        is_list = isinstance(value, list)
        self.is_multi_label = is_list or self.label_separator is not None
        labels = _labels(value, self.label_separator)
        if value is None or (not self.is_multi_label and value in ("", -1)):
            raise ValueError(
                f"Row {self.clips} of {self.name} has no label in the column "
                f"{self.label_column!r}. Remove the row or name another --label_column."
            )
        if not all(isinstance(label, (str, int)) for label in labels):
            raise ValueError(
                f"Row {self.clips} of {self.name} has the label {value!r} in the column "
                f"{self.label_column!r}; expected a class name or index, or a list of them."
            )
        if self.group_column is not None:
            group = row[self.group_column]
            if group is None or group == "":
                raise ValueError(
                    f"Row {self.clips} of {self.name} has nothing in the column "
                    f"{self.group_column!r} (--group_column)."
                )
            self.groups.add(group)
        self.labels.update(labels)
        self.clips += 1


def _labels(value: Any, separator: str | None) -> list[Any]:
    """All labels of a clip, once each."""
    if isinstance(value, list):
        return list(dict.fromkeys(value))
    if separator is None or not isinstance(value, str):
        return [value]
    return list(dict.fromkeys(part.strip() for part in value.split(separator) if part.strip()))


def _classes(train: _Part, evaluation: _Part, feature: Any) -> tuple[list[Any], list[str]]:
    """The labels as they are stored, in the order of the classes, and the classes' names."""
    feature = getattr(feature, "feature", feature)  # of a list
    if isinstance(feature, ClassLabel):
        values = list(range(feature.num_classes))
        names = list(feature.names)
    else:
        values = sorted(train.labels)
        names = [str(value) for value in values]
    for part in (train, evaluation):
        if unknown := [str(label) for label in part.labels if label not in set(values)]:
            known = names[:10] + ["…"] * (len(names) > 10)
            raise ValueError(
                f"{part.name[0].upper()}{part.name[1:]} has labels that are no class of the train "
                f"part: {', '.join(sorted(unknown)[:10])}. Classes: {', '.join(known)}."
            )
    if unheard := [
        name
        for name, value in zip(names, values, strict=True)
        if not train.labels[value] and evaluation.labels[value]
    ]:
        logger.warning("Classes that are only evaluated, never trained: %s", ", ".join(unheard))
    return values, names


def _in_fold(example: dict[str, Any], column: str, fold: str) -> bool:
    return str(example[column]) == fold


def _in_fraction(example: dict[str, Any], column: str, fraction: float) -> bool:
    """Whether the checksum of a sound, or of what names its group, is that low."""
    value = example[column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    elif isinstance(value, str) and ("/" in value or os.sep in value):
        value = "/".join(Path(value).parts[-2:])  # the file's name in its class, on any machine
    encoded = value if isinstance(value, bytes) else str(value).encode()
    checksum = hashlib.blake2b(encoded, digest_size=8).digest()
    return int.from_bytes(checksum, "big") / 2**64 < fraction


def _negate(predicate: Callable[[dict[str, Any]], bool], example: dict[str, Any]) -> bool:
    return not predicate(example)


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
