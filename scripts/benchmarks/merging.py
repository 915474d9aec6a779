"""`ast-benchmark merging`: token merging, its speed and accuracy on a dataset."""

import functools
from pathlib import Path

import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification

from ..common.timing import measure, report
from ..data.batches import Collator
from ..data.sources import open_stream
from .conditions import on_threads
from .options import MergingOptions


@on_threads
@torch.no_grad()
def benchmark_merging(options: MergingOptions) -> None:
    """Accuracy and time of a pass over all clips for each number of tokens merged per layer."""
    model = ASTForAudioClassification.from_pretrained(options.checkpoint).eval()
    extractor = ASTFeatureExtractor.from_pretrained(options.checkpoint)
    collate = Collator(extractor, model.config.num_labels)
    rows = list(open_stream(options.dataset, options.split))
    for row in rows:
        if isinstance(row["label"], str):
            row["label"] = model.config.label2id[row["label"]]
    batches = [
        collate(rows[start : start + options.batch_size])
        for start in range(0, len(rows), options.batch_size)
    ]

    def run(merged: int) -> float:
        model.config.merged_tokens_per_layer = merged
        correct = 0
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            correct += int((model(**inputs).logits.argmax(-1) == batch["labels"]).sum())
        return 100 * correct / len(rows)

    accuracy = {f"{merged} tokens merged per layer": run(merged) for merged in options.merged}
    seconds = measure(
        {
            name: functools.partial(run, merged)
            for name, merged in zip(accuracy, options.merged, strict=True)
        },
        options.repeats,
    )
    _, frames, mel_bins = batches[0]["input_values"].shape
    grid = model.config.grid_shape(frames, mel_bins)
    report(
        f"{len(rows)} clips of {frames} frames, {grid[0]} x {grid[1]} patches, "
        f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}",
        seconds,
        dict.fromkeys(accuracy, len(rows)),
        "clip",
        options.json,
        accuracy_in_percent=accuracy,
    )
    if options.plot:
        # The fastest run: other work on the machine can only slow a run down.
        speed = [len(rows) / min(runs) for runs in seconds.values()]
        _plot_merging(options.merged, speed, list(accuracy.values()), options.plot)


def _plot_merging(merged: list[int], speed: list[float], accuracy: list[float], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(speed, accuracy, "o")
    for count, x, y in zip(merged, speed, accuracy, strict=True):
        axis.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, 6))
    axis.set(xlabel="clips per second", ylabel="accuracy (%)", title="tokens merged per layer")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
