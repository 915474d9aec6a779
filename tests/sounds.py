"""Small labelled sounds for tests: tones whose pitch is the class, as any kind of dataset."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from datasets import ClassLabel, Dataset, Features, Value

PITCHES = {"high": 3000.0, "low": 300.0, "mid": 1000.0}  # Hz, in the order of the labels
TEACHERS_LABELS = ["beep", "hum"]
_TEACHERS_LOGITS = {"high": [4.0, -4.0], "mid": [1.0, 1.0], "low": [-4.0, 4.0]}


def tone(pitch: float, seed: int, seconds: float = 0.5) -> np.ndarray:
    """(samples,) at 16 kHz: a tone at a random level in weak noise."""
    random = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    level = random.uniform(0.1, 0.5)
    sound = level * np.sin(2 * np.pi * pitch * random.uniform(0.9, 1.1) * t)
    return (sound + 0.003 * random.standard_normal(len(t))).astype(np.float32)


def encode(sound: np.ndarray, file_format: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, 16000, format=file_format)
    return file.getvalue()


def write_class_folders(folder: Path, clips_per_class: int, seed: int = 0) -> Path:
    for name, pitch in PITCHES.items():
        (folder / name).mkdir(parents=True)
        for number in range(clips_per_class):
            file = folder / name / f"{name}{seed}_{number}.flac"
            file.write_bytes(encode(tone(pitch, seed=seed + number)))
    return folder


def write_parquet(path: Path, clips_per_class: int, seed: int = 0, **columns) -> Path:
    """A Hub-like Parquet file: audio {bytes, path}, label ClassLabel, and constant columns."""
    rows: dict[str, list] = {"audio": [], "label": []}
    for number in range(clips_per_class):
        for label, (name, pitch) in enumerate(PITCHES.items()):
            sound = encode(tone(pitch, seed=seed + number))
            rows["audio"].append({"bytes": sound, "path": f"{name}{seed}_{number}.flac"})
            rows["label"].append(label)
    features = {
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "label": ClassLabel(names=list(PITCHES)),
    }
    for column, value in columns.items():
        rows[column] = [value] * len(rows["label"])
        features[column] = Value("int64" if isinstance(value, int) else "string")
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=Features(features)).to_parquet(path)
    return path


def write_webdataset(path: Path, clips_per_class: int) -> Path:
    with tarfile.open(path, "w") as archive:
        for number in range(clips_per_class):
            for label, pitch in enumerate(PITCHES.values()):
                for suffix, content in (
                    ("flac", encode(tone(pitch, seed=number))),
                    ("cls", str(label).encode()),
                ):
                    entry = tarfile.TarInfo(f"{number:03d}_{label}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return path


def write_answers(path: Path, sounds: Path, names: bool = True) -> str:
    """Answers to class folders: a sure one to high and low tones, an undecided one between."""
    rows = [
        {"sound": str(file), "logits": _TEACHERS_LOGITS[file.parent.name], "embedding": [number, 1]}
        for number, file in enumerate(sorted(sounds.rglob("*.flac")))
    ]
    table = pyarrow.Table.from_pylist(rows)
    if names:
        table = table.replace_schema_metadata({"label_names": json.dumps(TEACHERS_LABELS)})
    pyarrow.parquet.write_table(table, path)
    return str(path)
