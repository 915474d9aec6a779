"""Recordings with annotations as labelled sound: what can be heard in them, and when.

    recordings      a folder of sounds, with or without sub-folders; CSV, Parquet or tar; a Hub
                    dataset
    annotations     see `annotations`

    rows            {"audio": undecoded, "label": [class index, …], "name": origin,
                    "events": [[start, end, class index], …] in seconds, or None: only the labels
                    of the whole recording are known}

A recording without annotations takes its labels from its label column, if there is one; otherwise
it is skipped, because a lack of marks tells nothing.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import ClassLabel, IterableDataset

from feature_extraction import AudioDecodingError, audio_duration

from ..common.options import did_you_mean
from .annotations import Annotation, read_annotations
from .fingerprint import ClassFingerprint, Fingerprint, checksum, short_name
from .holdout import NO_LABEL, hold_out
from .labelled import LabelledAudio, _labels, _sound_key, sound_name
from .options import LabelledOptions
from .sources import data_files, hub_revision, open_sounds, open_stream

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def open_annotated_audio(
    dataset: str, annotations: str, options: LabelledOptions, label_column: str | None = None
) -> LabelledAudio:
    """Open recordings with their annotations for training, with their evaluation part.

    Args:
        dataset: see above.
        annotations: file or folder, see `read_annotations`.
        options: columns and parts, as for `open_labelled_audio`; with the same split for training
            and evaluation all of it is for evaluation.
        label_column: of the annotations, if it has an unusual name.

    Raises:
        ValueError: as for `read_annotations` and `open_labelled_audio`. Skipped rows are logged.
    """
    splits = [options.train_split]
    # A whole split is measured: it is not a part of another.
    is_whole = options.evaluation_split == options.train_split
    if options.evaluation_split is not None and not is_whole:
        splits.append(options.evaluation_split)
    if (options.fold_column is None) != (options.evaluation_fold is None):
        raise ValueError("--fold_column and --evaluation_fold belong together.")
    streams = [_open_recordings(dataset, split, options) for split in splits]
    columns = streams[0].column_names or list(next(iter(streams[0]), {}))
    _check_columns(dataset, columns, options)

    recordings: dict[str, _Recording] = {}
    feature = (streams[0].features or {}).get(options.label_column)
    for number, stream in enumerate(streams):
        for row in stream:
            name = sound_name(row, options.audio_column)
            if name in recordings:
                raise ValueError(f"{dataset} holds {name} twice; names tell recordings apart here.")
            recordings[name] = _read_recording(row, is_whole or number == 1, options, feature)
    found = read_annotations(
        annotations, recordings, lambda name: recordings[name].duration, label_column
    )
    if problems := found.describe_problems():
        logger.warning("%s", problems)
    for name, events in found.of_recording.items():
        recordings[name].events = events
    known = {name: r for name, r in recordings.items() if r.labels is not None}
    if len(known) < len(recordings):
        logger.warning(
            "Skipped %d of %d recordings, because nothing says what can be heard in them. An empty "
            "annotation file says: nothing.",
            len(recordings) - len(known),
            len(recordings),
        )
    if options.evaluation_split is None:
        _hold_out(known, options)
    label_names = sorted({label for r in known.values() for label in r.labels or ()})
    classes = {name: ClassFingerprint() for name in label_names}
    clips = {False: 0, True: 0}
    for name, recording in known.items():
        clips[recording.is_held_out] += 1
        for label in recording.labels or ():
            content = checksum(short_name(name), recording.events, label)
            classes[label].add(content, is_train=not recording.is_held_out)
    for is_held_out, title in ((False, "train"), (True, "evaluation")):
        if not clips[is_held_out] and (is_held_out or not is_whole):
            raise ValueError(
                f"There are no annotated recordings in the {title} part of {dataset}. Check the "
                "split, fold, group or fraction."
            )
    index = {name: position for position, name in enumerate(label_names)}

    def part(stream: IterableDataset, is_held_out: bool) -> IterableDataset:
        of_part = {n: r for n, r in known.items() if r.is_held_out == is_held_out}
        rows = stream.filter(partial(_is_among, audio_column=options.audio_column, names=of_part))
        keep = partial(_keep, audio_column=options.audio_column, recordings=of_part, index=index)
        return rows.map(keep, remove_columns=columns)

    return LabelledAudio(
        train=part(streams[0], is_held_out=False),
        evaluation=part(streams[-1], is_held_out=True),
        label_names=label_names,
        train_counts=[classes[name].train for name in label_names],
        evaluation_counts=[classes[name].evaluation for name in label_names],
        problem_type="multi_label_classification",
        train_clips=clips[False],
        evaluation_clips=clips[True],
        fingerprint=Fingerprint(classes, data_files(dataset, splits), hub_revision(dataset)),
    )


@dataclass
class _Recording:
    """What is known of a recording."""

    duration: float | None  # seconds
    key: int  # of it, or of its group
    is_held_out: bool
    weak_labels: list[str] | None
    events: list[Annotation] | None = None

    @property
    def labels(self) -> list[str] | None:
        """All labels in it; None if unknown."""
        if self.events is None:
            return self.weak_labels
        return sorted({annotation.label for annotation in self.events})


def _read_recording(
    row: Row, is_held_out: bool, options: LabelledOptions, feature: Any
) -> _Recording:
    try:
        duration = audio_duration(row[options.audio_column])
    except AudioDecodingError:
        duration = None  # reported on decoding
    if options.fold_column is not None:
        is_held_out = str(row[options.fold_column]) == options.evaluation_fold
    key = _sound_key(row[options.audio_column])
    if options.group_column is not None:
        key = checksum(row[options.group_column])
    value = row.get(options.label_column)
    weak_labels = None
    if value not in (None, "", -1):
        values = _labels(value, options.label_separator)
        weak_labels = [_label_name(of_class, feature) for of_class in values]
    return _Recording(duration, key, is_held_out, weak_labels)


def _hold_out(recordings: dict[str, _Recording], options: LabelledOptions) -> None:
    """Choose the evaluation part if neither split nor fold does: a share of each class."""
    if options.fold_column is not None:
        return
    groups: dict[int, Counter] = {}
    for recording in recordings.values():
        labels: list[Any] = list(recording.labels or ()) or [NO_LABEL]
        groups.setdefault(recording.key, Counter()).update(labels)
    held_out = hold_out(groups, options.evaluation_fraction)
    for recording in recordings.values():
        recording.is_held_out = recording.key in held_out


def _open_recordings(dataset: str, split: str, options: LabelledOptions) -> IterableDataset:
    """Also accepts a folder that holds only sounds."""
    if stream := open_sounds(dataset, options.audio_column):
        if options.evaluation_split not in (None, options.train_split):
            raise ValueError(f"{dataset} is a folder of sounds and has no splits.")
        return stream
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


def _is_among(row: Row, audio_column: str, names: Mapping[str, Any]) -> bool:
    return sound_name(row, audio_column) in names


def _keep(
    row: Row, audio_column: str, recordings: Mapping[str, _Recording], index: Mapping[str, int]
) -> Row:
    name = sound_name(row, audio_column)
    recording = recordings[name]
    events = recording.events
    return {
        "audio": row[audio_column],
        "label": [index[label] for label in recording.labels or ()],
        "name": name,
        "events": None
        if events is None
        else [[start, end, index[label]] for start, end, label in events],
    }
