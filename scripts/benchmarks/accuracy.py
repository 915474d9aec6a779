"""`ast-benchmark accuracy`: how long fine-tuning takes to reach an accuracy, ours and native."""

import json
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import load_audio, roll, spec_augment

from ..common.options import parse_arguments
from ..common.timing import machine
from ..data.labelled import LabelledAudio
from ..training.options import FinetuneOptions
from ..training.start import open_data, start_model
from ..training.with_accelerate import finetune
from .conditions import on_threads
from .options import AccuracyOptions

_BATCH_SIZE = 16
_LEARNING_RATE = 1e-4
_TIME_MASK, _FREQUENCY_MASK = 96, 24

Curve = list[tuple[float, float]]  # after each epoch: seconds since the start, accuracy in percent


@on_threads
def benchmark_accuracy(options: AccuracyOptions) -> None:
    """One run of each, evaluated after each epoch; times include reading, features, evaluation.

    The plain loop is what one writes in an afternoon around `transformers`' AST: its feature
    extractor, once, before the first epoch; AdamW at 1e-4, batches of 16, cross-entropy,
    SpecAugment with masks of 24 and 96 and a random roll in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [options.recipe, options.dataset, "--model", options.weights]
        words += ["--output", str(Path(folder) / "run")]
        words += shlex.split(options.ours)
        args = parse_arguments("ast-benchmark", FinetuneOptions, "", words, recipes=True)
        curves = {
            "native AST, plain loop": _plain_loop(args, options.plain_epochs, Path(folder)),
            f"ours, {Path(options.recipe).name}": _recipe(args),
        }
    _report(curves, options)


def _recipe(args: FinetuneOptions) -> Curve:
    finetune(args)
    lines = (Path(args.output) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["seconds"], 100 * record["evaluation_accuracy"]) for record in records]


def _plain_loop(args: FinetuneOptions, epochs: int, folder: Path) -> Curve:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    data = open_data(args)
    model = _native_model(args, data, folder)
    extractor = native_features.ASTFeatureExtractor(
        max_length=model.config.max_length, num_mel_bins=model.config.num_mel_bins
    )
    train, evaluation = _featurised(data.train, extractor), _featurised(data.evaluation, extractor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    curve = []
    for epoch in range(1, epochs + 1):
        model.train()
        for indices in torch.randperm(len(train[1]), generator=generator).split(_BATCH_SIZE):
            features = spec_augment(
                train[0][indices], _TIME_MASK, _FREQUENCY_MASK, generator=generator
            )
            features = roll(features, model.config.max_length, generator=generator)
            # Explicit loss: our recipe may have made the config multi-label.
            torch.nn.functional.cross_entropy(model(features).logits, train[1][indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            parts = zip(*(tensor.split(_BATCH_SIZE) for tensor in evaluation), strict=True)
            hits = sum(int((model(x).logits.argmax(-1) == y).sum()) for x, y in parts)
        curve.append((time.perf_counter() - begin, 100 * hits / len(evaluation[1])))
        print(f"plain loop, epoch {epoch}: {curve[-1][1]:.2f} % after {curve[-1][0]:.0f} s")
    return curve


def _native_model(args: FinetuneOptions, data: LabelledAudio, folder: Path) -> Any:
    # With unused statistics, so that none are measured.
    ours, _ = start_model(replace(args, mean=0.0, std=1.0), data)
    ours.save_pretrained(folder / "start")
    return native.ASTForAudioClassification.from_pretrained(folder / "start")


def _featurised(rows: Any, extractor: Any) -> tuple[Tensor, Tensor]:
    """All clips in memory: input_values (N, T, F), labels (N,)."""
    features, labels = [], []
    for row in rows:
        clip = load_audio(row["audio"], extractor.sampling_rate)
        inputs = extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        features.append(inputs["input_values"][0])
        labels.append(row["label"])
    return torch.stack(features), torch.tensor(labels)


def _seconds_to(curve: Curve, target: float) -> float | None:
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def _report(curves: dict[str, Curve], options: AccuracyOptions) -> None:
    reached = {name: _seconds_to(curve, options.target) for name, curve in curves.items()}
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value))
    print(f"{'':28}{f'to {options.target:g} %':>12}{'best':>9}{'last':>9}{'seconds in all':>16}")
    for name, curve in curves.items():
        first = f"{reached[name]:.0f} s" if reached[name] is not None else "never"
        best = max(accuracy for _, accuracy in curve)
        print(f"{name:28}{first:>12}{best:9.2f}{curve[-1][1]:9.2f}{curve[-1][0]:16.0f}")
    native_seconds, our_seconds = reached.values()
    faster = native_seconds / our_seconds if native_seconds and our_seconds else None
    if faster is not None:
        print(f"times faster: {faster:.1f}")
    elif our_seconds:
        ended = next(iter(curves.values()))[-1][0]
        print(f"times faster: more than {ended / our_seconds:.1f}, when the plain loop ended")
    if options.json:
        report = {"machine": machine(), "target": options.target, "times_faster": faster}
        report["our_options"] = options.ours
        report["curves"] = curves
        options.json.write_text(json.dumps(report, indent=2))
    if options.plot:
        _plot(curves, options.target, options.plot)


def _plot(curves: dict[str, Curve], target: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), "o-", label=name)
    axis.axhline(target, color="grey", linewidth=1)
    axis.set(xlabel="seconds", ylabel="held-out accuracy (%)", ylim=(None, 100))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
