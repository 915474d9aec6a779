"""`ast-benchmark hours` and `processes`: hours of sound that an hour of computing hears."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from transformers import AudioClassificationPipeline
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor, load_audio, stream_audio
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.export_ast import export_onnx
from modeling_ast.speed_ast import export_merged

from ..common.checkpoints import resolve_checkpoint
from ..common.timing import measure, report
from ..inference.classifier import Classifier
from .conditions import on_threads
from .options import HoursOptions, ProcessesOptions

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
_FRAMES = 998  # of 10 s
_FILE_S = 60
_RATE = 44100
_BATCH = 4


@on_threads
def benchmark_hours(options: HoursOptions) -> None:
    """Ogg files of a minute to labels; models of random weights, or checkpoints.

    The stock pipeline hears a file's first window only: it gets the same sound in files of 10 s,
    decoded beforehand.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_recordings(folder / "sound", options.minutes)
        cases: dict[str, Callable[[], object]] = {}
        if options.stock:
            cases["stock pipeline, tiny, 128 mel bins, stride 10"] = _stock(files)
        for label, checkpoint in _checkpoints(options, folder):
            for hop in options.hops:
                cases[f"{label}, exact, {hop}"] = _hears(checkpoint, files, hop)
            if options.int8:
                for way, merges in (("8 bits", False), ("8 bits, merged tokens", True)):
                    case = f"{label}, {way}, whole hop"
                    onnx = _int8_file(checkpoint, options, case, folder, merges)
                    cases[case] = _hears(onnx, files, "whole hop")
        if options.tagger:
            cases["convolutional tagger, whole hop"] = _tagger(files)
        parts: dict[str, Callable[[], object]] = {
            "of these, decoding and features, 128 mel bins": _features(files),
            "of these, decoding": _decodes(files),
        }
        for suffix in ("flac", "wav"):
            others = write_recordings(folder / "sound", options.minutes, suffix)
            parts[f"decoding {suffix.upper()} instead"] = _decodes(others)
        seconds = measure({**cases, **parts}, options.repeats)
    report(
        f"{options.minutes} files of 1 min, 44.1 kHz, Ogg Vorbis, windows of 10 s unless a "
        "checkpoint has others",
        seconds,
        dict.fromkeys(seconds, options.minutes),
        "min",
        options.json,
        hours_of_sound_per_hour=_hours(options.minutes, seconds),
    )


def write_recordings(folder: Path, minutes: int, suffix: str = "ogg") -> list[str]:
    """Files of a minute of natural-looking noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random, files = np.random.default_rng(0), []
    for number in range(minutes):
        samples = random.standard_normal(_FILE_S * _RATE)
        spectrum = np.fft.rfft(samples)
        spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
        noise = np.fft.irfft(spectrum, len(samples))
        files.append(str(folder / f"{number:03d}.{suffix}"))
        noise *= 0.5 / np.abs(noise).max()
        with soundfile.SoundFile(files[-1], "w", _RATE, 1, format=suffix.upper()) as file:
            for second in np.split(noise, _FILE_S):  # libsndfile crashes on a minute at once
                file.write(second)
    return files


def _decodes(files: list[str]) -> Callable[[], object]:
    return lambda: [list(stream_audio(file)) for file in files]


def _checkpoints(options: HoursOptions, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and folder of each model."""
    for name in options.checkpoints:
        checkpoint = resolve_checkpoint(name)
        path = Path(checkpoint)
        yield (path.parent.name if path.name == "checkpoint" else path.name), checkpoint
    shapes = [] if options.checkpoints else options.models
    for shape in shapes:
        size, mel_bins, stride = shape.split("-")
        width = WIDTHS[size]
        config = ASTConfig(
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_mel_bins=int(mel_bins),
            frequency_stride=int(stride),
            time_stride=int(stride),
            max_length=_FRAMES,
            num_labels=527,
        )
        torch.manual_seed(0)
        checkpoint = str(folder / shape)
        ASTForAudioClassification(config).save_pretrained(checkpoint)
        extractor = ASTFeatureExtractor(num_mel_bins=int(mel_bins), max_length=_FRAMES)
        extractor.save_pretrained(checkpoint)
        yield f"{size}, {mel_bins} mel bins, stride {stride}", checkpoint


def _hears(model: str, files: list[str], hop: str) -> Callable[[], object]:
    classifier = Classifier(model, batch_size=_BATCH)
    length, _ = classifier.window_samples()
    if hop == "whole hop":
        classifier.hop_length_s = length / classifier.sampling_rate
    return lambda: [heard.labels(3) for _, heard in _readable(classifier, files)]


def _readable(classifier: Classifier, files: list[str]) -> Iterator[tuple[Any, Any]]:
    yield from classifier.hear_each((file, file) for file in files)


def _int8_file(
    checkpoint: str, options: HoursOptions, case: str, folder: Path, merges: bool
) -> str:
    """An 8-bit file: exported, or kept from an earlier run (`--onnx`)."""
    kept = options.onnx or folder
    name = "".join(letter if letter.isalnum() else "_" for letter in case)
    path = kept / f"{name}.onnx"
    if not path.is_file():
        model = ASTForAudioClassification.from_pretrained(checkpoint).eval()
        extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
        kept.mkdir(parents=True, exist_ok=True)
        if merges:
            export_merged(model, extractor, path)
        else:
            files = export_onnx(model, extractor, folder / f"export_{name}", ["int8"])
            shutil.move(files["int8"], path)
    return str(path)


def _stock(files: list[str]) -> Callable[[], object]:
    config = native.ASTConfig(
        hidden_size=WIDTHS["tiny"],
        num_attention_heads=3,
        intermediate_size=4 * WIDTHS["tiny"],
        max_length=_FRAMES,
        num_labels=527,
    )
    torch.manual_seed(0)
    stock = AudioClassificationPipeline(
        model=native.ASTForAudioClassification(config).eval(),
        feature_extractor=native_features.ASTFeatureExtractor(max_length=_FRAMES),
        device="cpu",
    )
    windows = [
        window
        for file in files
        for window in np.split(load_audio(file)[: _FILE_S * 16000], _FILE_S // 10)
    ]
    return lambda: stock(windows, batch_size=_BATCH, top_k=3)


def _features(files: list[str]) -> Callable[[], object]:
    extractor = ASTFeatureExtractor(max_length=_FRAMES)

    def run() -> None:
        for file in files:
            windows = np.split(load_audio(file)[: _FILE_S * 16000], _FILE_S // 10)
            extractor(windows, sampling_rate=16000, return_tensors="pt")

    return run


class ConvolutionalTagger(nn.Module):
    """Log-mel (B, T, F) -> logits (B, 527): MobileNetV2's shape (Sandler et al., arXiv 1801.04381).

    Random weights: it says what such a model costs, not what it hears.

    Args:
        width: times MobileNetV2's channels.
    """

    # Expansion, channels, blocks, stride of each stage: the paper's table 2.
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, width: float = 0.5):
        super().__init__()
        channels = round(32 * width)
        layers: list[nn.Module] = [_normed(nn.Conv2d(1, channels, 3, 2, 1, bias=False))]
        for expansion, out, blocks, stride in self.STAGES:
            for block in range(blocks):
                layer = _Inverted(channels, round(out * width), expansion, 1 if block else stride)
                layers.append(layer)
                channels = round(out * width)
        layers.append(_normed(nn.Conv2d(channels, round(1280 * width), 1, bias=False)))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(round(1280 * width), 527)

    def forward(self, log_mel: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(log_mel[:, None]).mean(dim=(2, 3)))
        return logits


class _Inverted(nn.Module):
    def __init__(self, channels: int, out: int, expansion: int, stride: int):
        super().__init__()
        wide = channels * expansion
        expand = [_normed(nn.Conv2d(channels, wide, 1, bias=False))] if expansion > 1 else []
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        narrow = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.layers = nn.Sequential(*expand, _normed(depthwise), narrow)
        self.is_residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.is_residual else y


def _normed(layer: nn.Conv2d) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU6(inplace=True))


def _tagger(files: list[str]) -> Callable[[], object]:
    torch.manual_seed(0)
    model = ConvolutionalTagger().eval()
    extractor = ASTFeatureExtractor(max_length=_FRAMES)

    @torch.inference_mode()
    def run() -> None:
        for file in files:
            windows = np.split(load_audio(file)[: _FILE_S * 16000], _FILE_S // 10)
            for first in range(0, len(windows), _BATCH):
                some = windows[first : first + _BATCH]
                features = extractor(some, sampling_rate=16000, return_tensors="pt")
                model(features["input_values"])

    return run


def benchmark_processes(options: ProcessesOptions) -> None:
    """`ast-classify` on the same files: as it comes, then with more and more processes."""
    with tempfile.TemporaryDirectory() as name:
        files = write_recordings(Path(name) / "sound", options.minutes)
        words = ["--model", options.model]
        cases: dict[str, Callable[[], object]] = {"no option": partial(_classify, files, words)}
        for speed in options.speed:
            for count in options.processes:
                chosen = [*words, "--speed", speed, "--processes", str(count)]
                case = f"{speed}, {count} process{'es' if count > 1 else ''} of 1 thread"
                cases[case] = partial(_classify, files, chosen, OMP_NUM_THREADS="1")
        seconds = measure(cases, options.repeats)
    report(
        f"{options.minutes} files of 1 min, 44.1 kHz, Ogg Vorbis, through ast-classify --model "
        f"{options.model}, start included",
        seconds,
        dict.fromkeys(cases, options.minutes),
        "min",
        options.json,
        hours_of_sound_per_hour=_hours(options.minutes, seconds),
    )


def _hours(minutes: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    return {case: round(60 * minutes / np.median(runs), 1) for case, runs in seconds.items()}


def _classify(files: list[str], options: list[str], **environment: str) -> None:
    import os

    words = [sys.executable, "-m", f"{__package__.rpartition('.')[0]}.classify", *files, *options]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environment})
