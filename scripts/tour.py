"""The whole path on made-up sound: synthesise, fine-tune, save, load, classify, draw.

    make demo

Writes a small sound-event set as Parquet, fine-tunes a small AST on it from random weights with
`ast-finetune-accelerate`, loads the checkpoint in `pipeline("audio-classification")`, names sounds
that it has not heard, and leaves a picture of them. Needs no network and no data.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, Value
from transformers.utils import logging

from feature_extraction import kaldi_fbank, load_audio

from .common.options import Options, run_command, setting
from .inference.classifier import DEFAULT_MODEL, load_classifier

RATE = 16000
SECONDS = 2.0
TRAIN_CLIPS_PER_CLASS = 60
HELD_OUT_CLIPS_PER_CLASS = 15

Random = np.random.Generator


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * RATE)) / RATE


def _tick(random: Random) -> np.ndarray:
    """A clock: short clicks at a steady pace."""
    sound = np.zeros(int(SECONDS * RATE))
    period, pitch = random.uniform(0.15, 0.35), random.uniform(2000, 5000)
    t = _time(0.01)
    click = np.exp(-t * 600) * np.sin(2 * np.pi * pitch * t)
    for start in np.arange(random.uniform(0, period), SECONDS - 0.01, period):
        begin = int(start * RATE)
        sound[begin : begin + len(click)] += click
    return sound


def _chirp(random: Random) -> np.ndarray:
    """A bird: a few notes that each glide upwards."""
    sound = np.zeros(int(SECONDS * RATE))
    low = random.uniform(2000, 3500)
    for _ in range(random.integers(3, 7)):
        t = _time(random.uniform(0.06, 0.15))
        rise = random.uniform(800, 2500) / t[-1]
        note = np.sin(2 * np.pi * (low * t + rise * t**2 / 2)) * np.hanning(len(t))
        begin = random.integers(0, len(sound) - len(t))
        sound[begin : begin + len(t)] += note
    return sound


def _hum(random: Random) -> np.ndarray:
    """A transformer: a low tone with harmonics, all the time."""
    t, pitch = _time(SECONDS), random.uniform(80, 160)
    parts = [np.sin(2 * np.pi * pitch * k * t + random.uniform(0, 6)) / k for k in (1, 2, 3, 5)]
    return np.sum(parts, axis=0)


def _noise_burst(random: Random) -> np.ndarray:
    """A spray: one or two blocks of white noise."""
    sound = np.zeros(int(SECONDS * RATE))
    for _ in range(random.integers(1, 3)):
        length = int(random.uniform(0.25, 0.6) * RATE)
        begin = random.integers(0, len(sound) - length)
        sound[begin : begin + length] += random.standard_normal(length) * 0.5
    return sound


def _siren(random: Random) -> np.ndarray:
    """A siren: a tone that swings up and down."""
    t, centre = _time(SECONDS), random.uniform(700, 1200)
    swing, pace = random.uniform(0.2, 0.4) * centre, random.uniform(0.8, 2.5)
    phase = random.uniform(0, 2 * np.pi)
    pitch = centre + swing * np.sin(2 * np.pi * pace * t + phase)
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def _drip(random: Random) -> np.ndarray:
    """A tap: rare drops, each a falling blip."""
    sound = np.zeros(int(SECONDS * RATE))
    for _ in range(random.integers(2, 5)):
        t, pitch = _time(0.12), random.uniform(900, 1800)
        drop = np.sin(2 * np.pi * (pitch * t - pitch * 2 * t**2)) * np.exp(-t * 35)
        begin = random.integers(0, len(sound) - len(t))
        sound[begin : begin + len(t)] += drop
    return sound


def _beep(random: Random) -> np.ndarray:
    """An alarm clock: a steady high tone, on and off."""
    t, pitch = _time(SECONDS), random.uniform(1500, 3500)
    pace, phase = random.uniform(2, 5), random.uniform(0, 1)
    return np.sin(2 * np.pi * pitch * t) * ((t * pace + phase) % 1 < 0.5)


def _engine(random: Random) -> np.ndarray:
    """A motor: low-passed noise in fast, regular puffs."""
    t, pace = _time(SECONDS), random.uniform(15, 35)
    noise = np.convolve(random.standard_normal(len(t)), np.ones(24) / 24, mode="same")
    return 4 * noise * (0.5 + 0.5 * np.sin(2 * np.pi * pace * t)) ** 4


SOUNDS: dict[str, Callable[[Random], np.ndarray]] = {
    "beep": _beep,
    "chirp": _chirp,
    "drip": _drip,
    "engine": _engine,
    "hum": _hum,
    "noise burst": _noise_burst,
    "siren": _siren,
    "tick": _tick,
}


def synthesise(name: str, random: Random) -> np.ndarray:
    """One clip (samples,) at 16 kHz: the event at a random level over background noise."""
    event = SOUNDS[name](random)
    event = event / np.abs(event).max() * 10 ** random.uniform(-1.2, -0.2)
    smooth = np.convolve(random.standard_normal(len(event)), np.ones(4) / 4, mode="same")
    noise = smooth * 10 ** random.uniform(-2.6, -1.7)
    return np.clip(event + noise, -1, 1).astype(np.float32)


def write_split(path: Path, clips_per_class: int, seed: int) -> None:
    """A Parquet file in the layout of a Hub dataset: audio {bytes, path}, label ClassLabel."""
    random = np.random.default_rng(seed)
    rows: dict[str, list] = {"audio": [], "label": []}
    for number in range(clips_per_class):
        for label, name in enumerate(SOUNDS):
            file = io.BytesIO()
            soundfile.write(file, synthesise(name, random), RATE, format="FLAC")
            file_name = f"{name.replace(' ', '_')}_{seed}_{number}.flac"
            rows["audio"].append({"bytes": file.getvalue(), "path": file_name})
            rows["label"].append(label)
    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "label": ClassLabel(names=list(SOUNDS)),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(path)


def draw(clips: list[tuple[str, np.ndarray, list[dict]]], path: Path) -> None:
    """Spectrograms of (true name, waveform, predicted labels) with what the model says of each."""
    import matplotlib.pyplot as plt
    import torch

    columns = 4
    rows = -(-len(clips) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", sharex=True
    )
    for axes, (name, waveform, labels) in zip(grid.flat, clips, strict=False):
        image = kaldi_fbank(torch.from_numpy(waveform)).T
        axes.imshow(image, origin="lower", aspect="auto", extent=(0, SECONDS, 0, 128))
        right = labels[0]["label"] == name
        title = f"{labels[0]['label']}  {100 * labels[0]['score']:.0f} %"
        axes.set_title(title if right else f"{title}\nis: {name}", color="black" if right else "r")
        axes.set_yticks([0, 64, 128])
    for axes in grid[-1]:
        axes.set_xlabel("time (s)")
    for axes in grid[:, 0]:
        axes.set_ylabel("mel bin")
    figure.suptitle("Unseen sounds and what the model hears")
    figure.savefig(path, dpi=100)
    plt.close(figure)


@dataclass
class TourOptions(Options):
    output: Path = setting(Path("runs/demo"), "folder for data, run and picture")


def tour(options: TourOptions) -> None:
    """Take the whole path."""
    logging.disable_progress_bar()
    folder = options.output
    data, run_folder = folder / "data", folder / "run"

    start = time.perf_counter()
    write_split(data / "train.parquet", TRAIN_CLIPS_PER_CLASS, seed=0)
    write_split(data / "test.parquet", HELD_OUT_CLIPS_PER_CLASS, seed=1)
    print(f"1. Made {len(SOUNDS)} kinds of sound: {', '.join(SOUNDS)} ({data})")

    print("2. Fine-tuning a small AST on them, from random weights:", flush=True)
    package = __package__ or "scripts"
    command = [sys.executable, "-m", f"{package}.finetune_accelerate", "demo.yaml", str(data)]
    subprocess.run([*command, "--output_dir", str(run_folder), "--overwrite"], check=True)
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])

    classifier = load_classifier(str(run_folder / "checkpoint"))
    random = np.random.default_rng(2)
    clips = []
    print("3. Sounds that it has never heard, through pipeline('audio-classification'):")
    for name in SOUNDS:
        file = folder / f"unseen_{name.replace(' ', '_')}.flac"
        soundfile.write(file, synthesise(name, random), RATE)
        labels = classifier(str(file))
        clips.append((name, load_audio(file), labels))
        print(f"   {name:<12} -> {labels[0]['label']:<12} {100 * labels[0]['score']:5.1f} %")
    picture = folder / "demo.png"
    draw(clips, picture)

    bundled = load_classifier(DEFAULT_MODEL)
    print("4. The bundled model, which learnt ten real sounds (ESC-10), says of them:")
    for name in ("tick", "engine", "noise burst"):
        label = bundled(str(folder / f"unseen_{name.replace(' ', '_')}.flac"))[0]
        print(f"   {name:<12} -> {label['label']:<12} {100 * label['score']:5.1f} %")

    print(
        f"\nHeld-out accuracy: {100 * last['evaluation_accuracy']:.1f} % of "
        f"{last['evaluation_clips']} clips, {time.perf_counter() - start:.0f} s in all.\n"
        f"Picture: {picture}   Learning curve: {run_folder / 'learning_curve.png'}\n\n"
        "Now your own sounds: put them into one folder per class, then\n"
        f"  source {Path(sys.prefix).name}/bin/activate\n"
        "  ast-finetune-accelerate my_sounds/ --model scratch --output_dir runs/my_sounds\n"
        "  ast-classify recording.wav --model runs/my_sounds/checkpoint\n"
        "(without --model scratch it starts from the AudioSet checkpoint on the Hub: far better)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_command("make demo", TourOptions, tour, argv)


if __name__ == "__main__":
    main()
