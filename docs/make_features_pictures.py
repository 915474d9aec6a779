"""Pictures for docs/features.md: what each step does to one real sound.

    python -m docs.make_features_pictures ROOSTER.ogg RAIN.ogg

Without arguments: a rooster and rain from ESC-10 (K. J. Piczak, CC BY 3.0), read from
$AST_SHARED/data/esc10, which is not part of the repository.
"""

import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image

from feature_extraction import (
    ASTFeatureExtractor,
    add_noise,
    augmentation_generator,
    kaldi_fbank,
    load_audio,
    mixup,
    random_gain,
    roll,
    spec_augment,
    time_shift,
)
from scripts.data.labelled import open_stream

IMAGES = Path(__file__).parent / "images"
RATE = 16000
LOG_MEL = (-16, 8)  # range of the colours, for log-mel values …
INPUT = (-1.3, 1.3)  # … and for normalised ones


def esc10_sounds() -> list[Any]:
    """The first rooster and the first rain of fold 1, undecoded."""
    path = Path(os.environ.get("AST_SHARED", "../shared")) / "data/esc10/data/fold1.parquet"
    stream = open_stream(str(path), "train")
    wanted = [stream.features["label"].str2int(name) for name in ("rooster", "rain")]
    found: dict[int, Any] = {}
    for row in stream:
        found.setdefault(row["label"], row["audio"])
    return [found[label] for label in wanted]


def show(axes: Any, log_mel: torch.Tensor, title: str, low: float, high: float) -> None:
    """A spectrogram (T, F), time to the right, low frequencies at the bottom."""
    axes.imshow(log_mel.T, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)


def draw_steps(sound: Any) -> None:
    """From the stored sound to what the model reads."""
    waveform = load_audio(sound)
    log_mel = kaldi_fbank(torch.from_numpy(waveform))
    extractor = ASTFeatureExtractor()
    inputs = extractor(waveform, RATE, return_attention_mask=True, return_tensors="pt")
    start = int(np.abs(waveform).argmax()) // 160
    frame = waveform[start * 160 : start * 160 + 400]
    level = frame - frame.mean()
    emphasised = level - 0.97 * np.concatenate([level[:1], level[:-1]])
    spectrum = np.abs(np.fft.rfft(emphasised * np.hanning(400), 512)) ** 2

    figure, axes = pyplot.subplots(3, 2, figsize=(9, 7.5), layout="constrained")
    axes[0, 0].plot(np.arange(len(waveform)) / RATE, waveform, linewidth=0.4)
    axes[0, 0].set_title(f"load_audio: {len(waveform)} samples, mono, 16 kHz", fontsize=9)
    axes[0, 0].set_xlabel("seconds", fontsize=8)
    axes[0, 1].plot(np.arange(400) / 16, frame, linewidth=0.8)
    axes[0, 1].set_title(f"one frame: 25 ms, frame {start} of {len(log_mel)}", fontsize=9)
    axes[0, 1].set_xlabel("milliseconds", fontsize=8)
    axes[1, 0].semilogy(np.arange(257) * RATE / 512, spectrum, linewidth=0.8)
    axes[1, 0].set_title("its power spectrum after pre-emphasis: 257 values", fontsize=9)
    axes[1, 0].set_xlabel("Hz", fontsize=8)
    axes[1, 1].plot(log_mel[start], linewidth=0.8)
    axes[1, 1].set_title("its log-mel values: 128, logarithm of 128 weighted sums", fontsize=9)
    axes[1, 1].set_xlabel("mel bin", fontsize=8)
    show(axes[2, 0], log_mel, f"kaldi_fbank: all {len(log_mel)} frames", *LOG_MEL)
    values = inputs["input_values"][0]
    frames = int(inputs["attention_mask"].sum())
    show(axes[2, 1], values, "input_values: normalised, padded to 1024 frames", *INPUT)
    axes[2, 1].axvline(frames, color="white", linewidth=0.8)
    axes[2, 1].text(frames + 15, 60, "padding: attention_mask 0", fontsize=7, color="black")
    for each in axes[2]:
        each.set_xlabel("frame of 10 ms", fontsize=8)
        each.set_ylabel("mel bin", fontsize=8)
    save(figure, "features_steps.png")


def draw_augmentations(sound: Any, partner: Any) -> None:
    """What training does to the same sound."""
    waveforms = [torch.from_numpy(load_audio(x)) for x in (sound, partner)]
    generator = augmentation_generator(seed=3)
    labels = torch.eye(2)
    while labels[0, 0] == 1:  # the sound was its own partner
        mixed, labels = mixup(waveforms, torch.eye(2), rate=1.0, generator=generator)
    shifted = time_shift(waveforms, 24000, generator)
    louder = random_gain(waveforms, 12.0, generator)
    log_mel = kaldi_fbank(waveforms[0])[None]
    silence = float(log_mel.min())
    normalised = (log_mel + 4.2677393) / (2 * 4.5689974)

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 4.5), layout="constrained")
    show(axes[0, 0], log_mel[0], "the sound as it is", *LOG_MEL)
    show(axes[0, 1], kaldi_fbank(mixed[0]), f"mixup with rain, λ = {labels[0, 0]:.2f}", *LOG_MEL)
    show(axes[1, 0], kaldi_fbank(shifted[0]), "time_shift, 1.5 s at most", *LOG_MEL)
    show(axes[1, 1], kaldi_fbank(louder[0]), "random_gain, 12 dB at most", *LOG_MEL)
    save(figure, "features_waveform_augmentations.png")

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 4.5), layout="constrained")
    masked = spec_augment(log_mel, 96, 24, 0.0, generator)
    show(axes[0, 0], masked[0], "spec_augment, 96 frames, 24 bins, fill 0", *LOG_MEL)
    masked = spec_augment(log_mel, 96, 24, silence, generator)
    show(axes[0, 1], masked[0], "spec_augment, filled with silence", *LOG_MEL)
    noisy = add_noise(normalised, 1.0, generator)
    show(axes[1, 0], noisy[0], "add_noise, ten times the original's level", *INPUT)
    rolled = roll(normalised, 150, generator)
    show(axes[1, 1], rolled[0], "roll, 150 frames at most", *INPUT)
    save(figure, "features_spectrogram_augmentations.png")


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, dpi=75)
    pyplot.close(figure)
    # 64 colours are enough, and a third of the bytes.
    Image.open(IMAGES / name).convert("RGB").quantize(64).save(IMAGES / name, optimize=True)
    print(f"wrote {IMAGES / name}, {(IMAGES / name).stat().st_size // 1000} kB")


def main() -> None:
    sound, partner = sys.argv[1:3] if len(sys.argv) == 3 else esc10_sounds()
    draw_steps(sound)
    draw_augmentations(sound, partner)


if __name__ == "__main__":
    main()
