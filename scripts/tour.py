"""The whole path on made-up sound: synthesise, fine-tune, save, load, classify, draw.

    make demo

Writes a small sound-event set as Parquet, fine-tunes a small AST on it from random weights with
`ast-finetune-accelerate`, loads the checkpoint in `pipeline("audio-classification")`, classifies
sounds it has never heard, and draws a picture of them. Needs no network and no data.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, Value
from transformers.utils import logging

from feature_extraction import kaldi_fbank, load_audio

from .common.checkpoints import DEFAULT_MODEL
from .common.options import Options, run_command, setting
from .data.synthetic import RATE, SECONDS, SOUNDS, synthesise
from .inference.torch_engine import load_classifier

TRAIN_CLIPS_PER_CLASS = 60
HELD_OUT_CLIPS_PER_CLASS = 15


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
    """Draw spectrograms of (true name, waveform, predicted labels) with the predictions."""
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
    """Run the whole path."""
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
    subprocess.run([*command, "--output", str(run_folder), "--overwrite"], check=True)
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])

    classifier = load_classifier(str(run_folder / "checkpoint"))
    random = np.random.default_rng(2)
    clips = []
    print("3. Sounds it has never heard, through pipeline('audio-classification'):")
    for name in SOUNDS:
        file = folder / f"unseen_{name.replace(' ', '_')}.flac"
        soundfile.write(file, synthesise(name, random), RATE)
        labels = classifier(str(file))
        clips.append((name, load_audio(file), labels))
        print(f"   {name:<12} -> {labels[0]['label']:<12} {100 * labels[0]['score']:5.1f} %")
    picture = folder / "demo.png"
    draw(clips, picture)

    bundled = load_classifier(DEFAULT_MODEL)
    print("4. The same sounds, by the bundled model, which knows AudioSet's 527 labels:")
    for name in ("tick", "engine", "noise burst"):
        label = bundled(str(folder / f"unseen_{name.replace(' ', '_')}.flac"))[0]
        print(f"   {name:<12} -> {label['label']:<12} {100 * label['score']:5.1f} %")

    print(
        f"\nHeld-out accuracy: {100 * last['evaluation_accuracy']:.1f} % of "
        f"{last['evaluation_clips']} clips, {time.perf_counter() - start:.0f} s in all.\n"
        f"Picture: {picture}   Learning curve: {run_folder / 'learning_curve.png'}\n\n"
        "Now your own sounds: put them into one folder per class, then run\n"
        f"  source {Path(sys.prefix).name}/bin/activate\n"
        "  ast-finetune-accelerate my_sounds/ --output runs/my_sounds\n"
        "  ast-classify recording.wav --model runs/my_sounds/checkpoint\n"
        "(it starts from a small bundled model; --model MIT/ast-finetuned-audioset-10-10-0.4593, "
        "from the Hub, is larger and has learned far more)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_command("make demo", TourOptions, tour, argv)


if __name__ == "__main__":
    main()
