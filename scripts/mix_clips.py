"""Make synthetic mixtures of labelled clips: a multi-label set out of a single-label one.

    python -m scripts.mix_clips path/to/esc10 --output_dir runs/mixtures

A mixture is the sum of one to three clips of different classes, scaled to the same peak and then
turned down by 0 to 6 dB each. All are of one fold, so the folds stay as separate as they were.
Writes fold*.parquet: audio (FLAC), labels (a list), fold, sources (the names of the clips).
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, List, Value
from tqdm.auto import tqdm

from feature_extraction import load_audio

from .common.arguments import parse_arguments, run_command, setting
from .common.options import did_you_mean
from .data.sources import open_stream

_SAMPLING_RATE = 16000
_MAX_ATTENUATION_DB = 6.0


@dataclass
class MixArguments:
    dataset: str = setting("", "folder, Parquet or tar file(s), or a Hub dataset, with folds")
    split: str = setting("train", "its split")
    audio_column: str = setting("audio", "column with the sound")
    label_column: str = setting("label", "column with the class, a name or an index")
    fold_column: str = setting("fold", "column with the fold")
    output_dir: str = setting("runs/mixtures", "folder for the Parquet files")
    mixtures_per_fold: int = setting(160, "mixtures made of each fold's clips")
    max_clips: int = setting(3, "clips in a mixture: one to so many, each number as likely")
    seed: int = setting(0, "of what is mixed and how loud")


def mix(sounds: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """Sum of sounds (samples,) at equal peaks, each turned down by 0 to 6 dB; -1..1, the longest's
    length."""
    mixture = np.zeros(max(map(len, sounds)), np.float32)
    for sound in sounds:
        gain = 10 ** (-random.uniform(0, _MAX_ATTENUATION_DB) / 20)
        mixture[: len(sound)] += sound * (gain / max(np.abs(sound).max(), 1e-9))
    return mixture / max(1.0, np.abs(mixture).max())


def mix_clips(args: MixArguments) -> list[Path]:
    """Write the mixtures, a Parquet file per fold; returns the files.

    Raises:
        ValueError: for a wrong path, column or option, or a sound that cannot be read.
    """
    if not args.dataset:
        raise ValueError("Name a dataset: python -m scripts.mix_clips DATASET (see --help).")
    if args.max_clips < 1 or args.mixtures_per_fold < 1:
        raise ValueError("--max_clips and --mixtures_per_fold must be 1 or more.")
    stream = open_stream(args.dataset, args.split)
    columns = stream.column_names or list(next(iter(stream), {}))
    for option in ("audio_column", "label_column", "fold_column"):
        if (column := getattr(args, option)) not in columns:
            raise ValueError(
                f"{args.dataset} has no column {column!r} (--{option})"
                + did_you_mean(column, columns)
            )
    folds: dict[Any, dict[Any, list[Any]]] = {}  # undecoded sounds by fold and class
    for row in stream:
        classes = folds.setdefault(row[args.fold_column], {})
        classes.setdefault(row[args.label_column], []).append(row[args.audio_column])
    label_feature = (stream.features or {}).get(args.label_column)
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
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (fold, classes) in enumerate(sorted(folds.items())):
        random = np.random.default_rng([args.seed, number])
        rows = [
            _mixture(classes, args.max_clips, random, f"fold{fold}_{index}.flac", str(fold))
            for index in tqdm(range(args.mixtures_per_fold), desc=f"fold {fold}", unit="mixture")
        ]
        files.append(output / f"fold{fold}.parquet")
        Dataset.from_list(rows, features=features).to_parquet(files[-1])
    return files


def _mixture(
    classes: dict[Any, list[Any]], max_clips: int, random: np.random.Generator, name: str, fold: str
) -> dict[str, Any]:
    num_clips = random.integers(1, min(max_clips, len(classes)) + 1)
    labels = sorted(random.permutation(sorted(classes))[:num_clips].tolist())
    sounds = [classes[label][random.integers(len(classes[label]))] for label in labels]
    mixture = mix([load_audio(sound, _SAMPLING_RATE) for sound in sounds], random)
    encoded = io.BytesIO()
    soundfile.write(encoded, mixture, _SAMPLING_RATE, format="FLAC")
    paths = [sound.get("path") if isinstance(sound, dict) else str(sound) for sound in sounds]
    return {
        "audio": {"bytes": encoded.getvalue(), "path": name},
        "labels": labels,
        "fold": fold,
        "sources": paths,
    }


def main() -> None:
    def command() -> None:
        files = mix_clips(
            parse_arguments(MixArguments, "dataset", "Mix labelled clips within their folds.")
        )
        print("Wrote " + ", ".join(map(str, files)))

    run_command("mix_clips", command)


if __name__ == "__main__":
    main()
