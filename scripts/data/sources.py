"""Sounds as a stream, from a folder, CSV, Parquet or tar files, or the Hub.

    open_stream     -> one split as a streaming `datasets.IterableDataset`; audio stays encoded

`datasets` decodes and encodes its Audio feature with torchcodec, which needs FFmpeg's libraries.
Audio columns are therefore read as stored, bytes or a path; `load_audio` decodes them in workers.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants

from ..common.checkpoints import can_reach
from ..common.options import did_you_mean
from .suffixes import AUDIO_SUFFIXES

logger = logging.getLogger(__name__)

# After each shuffled pass through Parquet files `datasets` sleeps for 5 s, so that the threads that
# read them end before Python does. Commands have more to do after their last pass.
datasets_config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1

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
        audio_column: the column of a CSV with the file names.
        columns: only these, with rows in order; from Parquet, no others are read.

    Raises:
        ValueError: if there is no such dataset or split.
    """
    path = Path(dataset)
    if path.is_dir():
        kind, files = _files_by_kind(path)
        if kind:
            return _load(kind, split, columns, data_files=files)
        if tables := _tables(path):
            if split not in tables:
                raise ValueError(f"{path} has no split {split!r}; it has {sorted(tables)}.")
            return _named_files([Path(table) for table in tables[split]], audio_column, columns)
        return _class_folders(path, split, columns)
    if path.suffix in (".parquet", ".tar", *_TABLE_SUFFIXES):
        if "*" not in dataset and not path.is_file():
            raise ValueError(f"No such file: {dataset}")
        if path.suffix in _TABLE_SUFFIXES:
            if split != "train":
                raise ValueError(f"{dataset} is one table, split 'train': it has no {split!r}.")
            return _named_files([path], audio_column, columns)
        kind = "parquet" if path.suffix == ".parquet" else "webdataset"
        return _load(kind, split, columns, data_files=dataset)
    if path.is_file():
        raise ValueError(
            f"{dataset} is a file; expected a folder, CSV (.csv), Parquet (.parquet) or tar (.tar)."
        )
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise ValueError(f"No such folder or file: {dataset}")
    with _offline_if_silent():
        return _load(dataset, split, columns, name=config)


@contextmanager
def _offline_if_silent() -> Iterator[None]:
    """Without a network, what `datasets` has in its cache opens at once, and nothing else.

    By itself it asks a Hub that does not answer for most of a minute.
    """
    modules: tuple[Any, ...] = (constants, datasets_config)
    settings = [(module, module.HF_HUB_OFFLINE) for module in modules]
    silent = not can_reach(constants.ENDPOINT)
    try:
        for module, value in settings:
            module.HF_HUB_OFFLINE = value or silent
        yield
    finally:
        for module, value in settings:
            module.HF_HUB_OFFLINE = value


def open_sounds(
    folder: str, audio_column: str, columns: list[str] | None = None
) -> IterableDataset | None:
    """All sounds of a folder and its sub-folders, by path; None of any other dataset."""
    path = Path(folder)
    if not path.is_dir() or _files_by_kind(path)[1] or _tables(path):
        return None
    files = [
        str(file)
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file() and _is_text(str(file))
    ]
    if not files:
        return None
    table = pyarrow.table({audio_column: pyarrow.array(files, pyarrow.string())})
    return _table_stream(table, None, columns)


def _file_split(file: Path) -> str:
    return file.stem.split("-")[0].lower()


def _by_split(data_files: Iterable[Path]) -> dict[str, list[str]]:
    """Data files by split, according to the start of their name or their folder's."""
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
            # These loaders encode an Audio column themselves unless told that it is not one.
            plain = {
                column: Value(stored) if isinstance(feature, Audio) else feature
                for column, feature in features.items()
            }
            stream = load_dataset(
                kind, split=split, streaming=True, features=Features(plain), **kwargs
            )
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        where = kwargs.get("data_files", kind)
        nor = (
            ". There is no such folder or file, either."
            if isinstance(error, ConnectionError)
            else ""
        )
        raise ValueError(f"Cannot open the dataset {where}: {error}{nor}") from error
    return stream if columns is None else stream.select_columns(columns)


def class_folder_splits(dataset: str) -> list[str] | None:
    """The splits of a folder of class folders, empty if it has none; None for other data."""
    path = Path(dataset)
    if not path.is_dir() or _files_by_kind(path)[1] or _tables(path):
        return None
    names = {child.name for child in path.iterdir() if child.is_dir()}
    return sorted(names) if names and names <= set(_SPLIT_FOLDERS) else []


def data_files(dataset: str, splits: Iterable[str]) -> dict[str, int]:
    """The local Parquet or tar files of some splits: their sizes in bytes, by name."""
    path = Path(dataset)
    if path.is_dir():
        by_split = _files_by_kind(path)[1]
        files = [Path(file) for split in splits for file in by_split.get(split, [])]
        return {str(file.relative_to(path)): file.stat().st_size for file in files}
    if path.suffix in (".parquet", ".tar"):
        return {file.name: file.stat().st_size for file in sorted(path.parent.glob(path.name))}
    return {}


def hub_revision(dataset: str) -> str | None:
    """The commit of a dataset on the Hub; None for local data."""
    if Path(dataset).exists() or Path(dataset).suffix in (".parquet", ".tar", *_TABLE_SUFFIXES):
        return None
    try:
        with _offline_if_silent():
            return HfApi().dataset_info(dataset).sha
    except Exception:  # no answer from the Hub, for whatever reason: the data may be cached
        return None


def _files_by_kind(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The loader of a folder's Parquet or tar files, and the files by split; "", {} if none."""
    for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
        if files := _by_split(folder.rglob(pattern)):
            return kind, files
    return "", {}


def _tables(folder: Path) -> dict[str, list[str]]:
    """A folder's train.csv, test.tsv …, by split."""
    return _by_split(
        table
        for table in folder.iterdir()
        if table.suffix in _TABLE_SUFFIXES and _file_split(table) in _SPLIT_FOLDERS
    )


def _class_folders(folder: Path, split: str, columns: list[str] | None) -> IterableDataset:
    """A folder of class folders (one split, if it has splits): a path and a label per sound."""
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
    for name in classes:
        if not _is_text(name):
            raise ValueError(
                f"The class folder {name!r} in {folder} has a name that is not UTF-8. Rename it."
            )
    files: list[str] = []
    labels: list[str] = []
    unnamed: list[str] = []
    for root in roots:
        for name in classes:
            found = sorted(
                str(file)
                for file in (root / name).rglob("*")
                if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
            )
            unnamed += [file for file in found if not _is_text(file)]
            found = [file for file in found if _is_text(file)]
            files += found
            labels += [name] * len(found)
    if unnamed:
        logger.warning(
            "Skipped %d sounds with names that are not UTF-8, such as %r. Rename them.",
            len(unnamed),
            unnamed[0],
        )
    if not files:
        raise ValueError(
            f"{folder} holds no data: expected one sub-folder of sounds per class, a train.csv, "
            "Parquet files or tar files."
        )
    features = Features({"audio": Value("string"), "label": ClassLabel(names=classes)})
    table = Dataset.from_dict({"audio": files, "label": labels}, features=features)
    return _table_stream(table.data.table, features, columns)


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8; Python represents other bytes by surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _named_files(
    tables: list[Path], audio_column: str, columns: list[str] | None
) -> IterableDataset:
    """CSV files that name sound files, relative to their own folder."""
    parts = []
    for path in tables:
        try:
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
                ),
                # Class names stay text.
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
                f"{path} names {files[0]}, but there is no such file: the column {audio_column!r} "
                "must hold addresses, or paths relative to the table's folder."
            )
        place = table.column_names.index(audio_column)
        parts.append(table.set_column(place, audio_column, pyarrow.array(files, pyarrow.string())))
    try:
        table = pyarrow.concat_tables(parts, promote_options="permissive")
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"The columns of {tables[0].parent} do not agree: {error}") from error
    if not len(table):
        raise ValueError(f"No rows in {' and '.join(map(str, tables))}.")
    return _table_stream(table, None, columns)


def _table_stream(
    table: pyarrow.Table, features: Features | None, columns: list[str] | None
) -> IterableDataset:
    """File names as a stream of rows in a random order, so that no shard is all one class."""
    if columns is not None:
        table = table.select(columns)
    else:
        table = table.take(np.random.default_rng(0).permutation(len(table)))
    if features is not None:
        features = Features({name: features[name] for name in table.column_names})
    rows = Dataset(table, info=DatasetInfo(features=features))
    return rows.to_iterable_dataset(num_shards=min(_MAX_SHARDS, len(rows)))
