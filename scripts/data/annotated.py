"""Recordings and annotations as labelled sound: what is heard in them, and when.

    recordings      a folder of sounds, in sub-folders or not; CSV, Parquet or tar; a Hub dataset
    annotations     see `annotations`

    rows            {"audio": undecoded, "label": [class index, …], "name": where from,
                    "events": [[start, end, class index], …] in seconds, or None: only the labels
                    of the whole recording are known}

A recording that nobody annotated is read for the labels in its label column, if there is one, and
is left out otherwise: that nothing is marked in it says nothing.
"""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import ClassLabel, IterableDataset

from feature_extraction import AudioDecodingError, audio_duration

from ..common.options import did_you_mean
from .annotations import Annotation, read_annotations
from .labelled import LabelledAudio, _held_out, _labels, _name, _negate
from .options import LabelledOptions
from .sources import AUDIO_SUFFIXES, _table_stream, open_stream

logger = logging.getLogger(__name__)

_TABLES = (".parquet", ".tar", ".csv", ".tsv")

Row = dict[str, Any]


def open_annotated_audio(
    dataset: str, annotations: str, options: LabelledOptions, label_column: str | None = None
) -> LabelledAudio:
    """Open recordings with their annotations for training, with their evaluation part.

    Args:
        dataset: see above.
        annotations: file or folder, see `read_annotations`.
        options: columns and parts, as for `open_labelled_audio`.
        label_column: of the annotations, where it has an unusual name.

    Raises:
        ValueError: as `read_annotations` and `open_labelled_audio`. Rows that are left out are
            logged.
    """
    splits = [options.train_split]
    if options.evaluation_split is not None:
        splits.append(options.evaluation_split)
    streams = [_open_recordings(dataset, split, options) for split in splits]
    held_out = None if len(splits) == 2 else _held_out(options)
    columns = streams[0].column_names or list(next(iter(streams[0]), {}))
    _check_columns(dataset, columns, options)

    durations: dict[str, float | None] = {}
    weak_labels: dict[str, list[str]] = {}
    is_for_evaluation: dict[str, bool] = {}
    has_labels = options.label_column in columns
    feature = (streams[0].features or {}).get(options.label_column)
    for number, stream in enumerate(streams):
        for row in stream:
            name = _name(row, options.audio_column)
            if name in durations:
                raise ValueError(f"{dataset} holds {name} twice; names tell recordings apart here.")
            try:
                durations[name] = audio_duration(row[options.audio_column])
            except AudioDecodingError:
                durations[name] = None  # is reported where it is decoded
            is_for_evaluation[name] = number == 1 if held_out is None else held_out(row)
            if has_labels:
                values = _labels(row[options.label_column], options.label_separator)
                weak_labels[name] = [_label_name(value, feature) for value in values]
    found = read_annotations(annotations, durations, durations.get, label_column)
    if problems := found.describe_problems():
        logger.warning("%s", problems)
    for name in found.of_recording:
        weak_labels.pop(name, None)
    label_names = sorted({*found.label_names, *(n for of in weak_labels.values() for n in of)})
    if left_out := len(durations) - len(found.of_recording) - len(weak_labels):
        logger.warning(
            "Recordings left out, as nothing says what is heard in them: %d of %d. An empty file "
            "of annotations says that nothing is.",
            left_out,
            len(durations),
        )
    index = {name: position for position, name in enumerate(label_names)}
    keep = partial(
        _keep,
        audio_column=options.audio_column,
        events=found.of_recording,
        weak_labels=weak_labels,
        index=index,
    )
    is_known = partial(
        _is_known, audio_column=options.audio_column, known={*found.of_recording, *weak_labels}
    )
    known = [stream.filter(is_known) for stream in streams]
    if held_out is None:
        train, evaluation = known
    else:
        train, evaluation = known[0].filter(partial(_negate, held_out)), known[0].filter(held_out)
    counts = {False: Counter[str](), True: Counter[str]()}
    clips: Counter[bool] = Counter()
    for name in {*found.of_recording, *weak_labels}:
        part = is_for_evaluation[name]
        clips[part] += 1
        counts[part].update(_labels_of(name, found.of_recording, weak_labels))
    for part, title in ((False, "train"), (True, "evaluation")):
        if not clips[part]:
            raise ValueError(
                f"There are no annotated recordings in the {title} part of {dataset}. Check the "
                "split, fold, group or fraction."
            )
    return LabelledAudio(
        train=train.map(keep, remove_columns=columns),
        evaluation=evaluation.map(keep, remove_columns=columns),
        label_names=label_names,
        train_counts=[counts[False][name] for name in label_names],
        evaluation_counts=[counts[True][name] for name in label_names],
        problem_type="multi_label_classification",
        train_clips=clips[False],
        evaluation_clips=clips[True],
    )


def _open_recordings(dataset: str, split: str, options: LabelledOptions) -> IterableDataset:
    """Also a folder that holds nothing but sounds."""
    folder = Path(dataset)
    if folder.is_dir() and not any(file.suffix in _TABLES[:2] for file in folder.rglob("*")):
        files = sorted(
            str(file)
            for file in folder.rglob("*")
            if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
        )
        tables = any(file.stem.startswith(("train", split)) for file in folder.glob("*.[ct]sv"))
        if files and not tables:
            if options.evaluation_split is not None:
                raise ValueError(f"{dataset} is a folder of sounds: it has no splits.")
            table = pyarrow.table({options.audio_column: pyarrow.array(files, pyarrow.string())})
            return _table_stream(table, None, None)
    return open_stream(dataset, split, options.dataset_config, options.audio_column)


def _check_columns(dataset: str, columns: list[str], options: LabelledOptions) -> None:
    for option in ("audio_column", "fold_column", "group_column"):
        column = getattr(options, option)
        if column is not None and column not in columns:
            raise ValueError(
                f"{dataset} has no column {column!r} (--{option}){did_you_mean(column, columns)}"
            )


def _label_name(value: Any, feature: Any) -> str:
    """A label column's value as the name of its class."""
    feature = getattr(feature, "feature", feature)  # of a list
    return feature.int2str(value) if isinstance(feature, ClassLabel) else str(value)


def _labels_of(
    name: str, events: dict[str, list[Annotation]], weak_labels: dict[str, list[str]]
) -> list[str]:
    if name in events:
        return sorted({annotation.label for annotation in events[name]})
    return weak_labels[name]


def _is_known(row: Row, audio_column: str, known: set[str]) -> bool:
    return _name(row, audio_column) in known


def _keep(
    row: Row,
    audio_column: str,
    events: dict[str, list[Annotation]],
    weak_labels: dict[str, list[str]],
    index: dict[str, int],
) -> Row:
    name = _name(row, audio_column)
    of_recording = events.get(name)
    return {
        "audio": row[audio_column],
        "label": [index[label] for label in _labels_of(name, events, weak_labels)],
        "name": name,
        "events": None
        if of_recording is None
        else [[start, end, index[label]] for start, end, label in of_recording],
    }
