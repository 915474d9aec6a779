"""Synthetic mixtures of labelled clips: turns a single-label set into a multi-label one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, List, Value
from tqdm.auto import tqdm

from feature_extraction import load_audio

from ..common.options import did_you_mean
from ..common.tables import write_csv
from .annotations import Annotation
from .options import MixOptions
from .soundscapes import soundscape
from .sources import open_stream

_SAMPLING_RATE = 16000
_MAX_ATTENUATION_DB = 6.0


def mix(sounds: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """Sum of sounds (samples,) at equal peaks, each turned down by 0 to 6 dB; within -1..1, as long
    as the longest."""
    mixture = np.zeros(max(map(len, sounds)), np.float32)
    for sound in sounds:
        gain = 10 ** (-random.uniform(0, _MAX_ATTENUATION_DB) / 20)
        mixture[: len(sound)] += sound * (gain / max(np.abs(sound).max(), 1e-9))
    return mixture / max(1.0, np.abs(mixture).max())


def mix_clips(options: MixOptions) -> list[Path]:
    """Write the mixtures, one Parquet file per fold, and for soundscapes events.csv.

    Returns:
        The files.

    Raises:
        ValueError: for a wrong path, column or option, or a sound that cannot be read.
    """
    if not options.dataset:
        raise ValueError("Name a dataset: python -m scripts.mix_clips DATASET (see --help).")
    stream = open_stream(options.dataset, options.split)
    columns = stream.column_names or list(next(iter(stream), {}))
    for option in ("audio_column", "label_column", "fold_column"):
        if (column := getattr(options, option)) not in columns:
            raise ValueError(
                f"{options.dataset} has no column {column!r} (--{option})"
                + did_you_mean(column, columns)
            )
    folds: dict[Any, dict[Any, list[Any]]] = {}  # undecoded sounds by fold and class
    for row in stream:
        classes = folds.setdefault(row[options.fold_column], {})
        classes.setdefault(row[options.label_column], []).append(row[options.audio_column])
    label_feature = (stream.features or {}).get(options.label_column)
    if not isinstance(label_feature, ClassLabel):
        values = sorted({label for classes in folds.values() for label in classes})
        label_feature = ClassLabel(names=[str(value) for value in values])
        folds = {
            fold: {values.index(label): sounds for label, sounds in classes.items()}
            for fold, classes in folds.items()
        }
    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "labels": List(label_feature),
            "fold": Value("string"),
            "sources": List(Value("string")),
        }
    )
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    files = []
    events: list[dict[str, Any]] = []
    for number, (fold, classes) in enumerate(sorted(folds.items())):
        random = np.random.default_rng([options.seed, number])
        rows = []
        for index in tqdm(range(options.mixtures_per_fold), desc=f"fold {fold}", unit="mixture"):
            name = f"fold{fold}_{index}.flac"
            row, heard = _mixture(classes, options, random, name, str(fold), label_feature.names)
            rows.append(row)
            events += [{"file": name, **event._asdict()} for event in heard]
        files.append(output / f"fold{fold}.parquet")
        Dataset.from_list(rows, features=features).to_parquet(files[-1])
    if options.soundscape_s:
        files.append(output / "events.csv")
        write_csv(files[-1], ["file", "start", "end", "label"], events)
    return files


def _mixture(
    classes: dict[Any, list[Any]],
    options: MixOptions,
    random: np.random.Generator,
    name: str,
    fold: str,
    label_names: list[str],
) -> tuple[dict[str, Any], list[Annotation]]:
    """A row, and the events of a soundscape."""
    num_clips = random.integers(1, min(options.max_clips, len(classes)) + 1)
    labels = sorted(random.permutation(sorted(classes))[:num_clips].tolist())
    sources = [classes[label][random.integers(len(classes[label]))] for label in labels]
    sounds = [load_audio(source, _SAMPLING_RATE) for source in sources]
    events: list[Annotation] = []
    if options.soundscape_s:
        clips = [(label_names[label], sound) for label, sound in zip(labels, sounds, strict=True)]
        snr_db = (options.snr_from, options.snr_to)
        mixture, events = soundscape(clips, options.soundscape_s, snr_db, _SAMPLING_RATE, random)
    else:
        mixture = mix(sounds, random)
    encoded = io.BytesIO()
    soundfile.write(encoded, mixture, _SAMPLING_RATE, format="FLAC")
    paths = [source.get("path") if isinstance(source, dict) else str(source) for source in sources]
    row = {
        "audio": {"bytes": encoded.getvalue(), "path": name},
        "labels": labels,
        "fold": fold,
        "sources": paths,
    }
    return row, events
