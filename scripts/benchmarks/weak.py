"""`ast-benchmark weak`: what can be learned from long recordings with one label each.

The encoder is frozen: its embeddings of all windows are computed once, and a head (LayerNorm and
one linear layer, like the classifier's) learns from them in seconds. This allows comparing poolings
over many seeds; the figures do not include what fine-tuning the encoder would add.

    embeddings      (recordings, windows, D)    windows that tile each recording
    event           (recordings, D)             the window around its longest event: the oracle's
"""

import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from feature_extraction import load_audio
from modeling_ast.loss_ast import classification_loss
from modeling_ast.pooling_ast import WINDOW_POOLINGS, pool_logits

from ..data.annotations import read_annotations
from ..data.sources import open_stream
from ..data.windows import tiling
from ..inference.classifier import Classifier, Window
from .cached import Arrays, cached_arrays
from .conditions import on_threads
from .options import WeakOptions

_KIND = "multi_label_classification"  # a window can contain nothing
_POOLINGS = (*WINDOW_POOLINGS, "attention")
_RESAMPLES = 1000


@on_threads
def benchmark_weak(options: WeakOptions) -> None:
    """Held-out accuracy of each method, with its interval, and as a share of the oracle's."""
    settings = {
        "dataset": options.dataset,
        "events": options.events,
    }
    arrays = cached_arrays(
        options.embeddings, options.checkpoint, settings, lambda: _embed(options)
    )
    is_test = arrays["folds"] == options.evaluation_fold
    if not is_test.any() or is_test.all():
        raise ValueError(
            f"--evaluation_fold {options.evaluation_fold}: there is nothing to compare."
        )
    results = compare(arrays, is_test, options.seeds, options.steps, options.learning_rate)
    oracle = np.mean(results["oracle: event windows"]["right"])
    windows = arrays["embeddings"].shape[1]
    print(
        f"{is_test.sum()} recordings of fold {options.evaluation_fold}, {(~is_test).sum()} to "
        f"learn from, {windows} windows each; {options.seeds} seeds, accuracy in % with 95 % "
        "intervals over recordings; frozen encoder, embeddings in "
        f"{float(arrays['seconds']):.0f} s"
    )
    print(f"{'':28}{'accuracy':>9}{'interval':>16}{'seeds':>8}{'of the oracle':>15}{'seconds':>9}")
    for name, result in results.items():
        right = result["right"]  # (seeds, recordings)
        low, high = _interval(right.mean(axis=0))
        print(
            f"{name:28}{100 * right.mean():9.1f}{f'{100 * low:.1f} – {100 * high:.1f}':>16}"
            f"{f'± {100 * right.mean(axis=1).std():.1f}':>8}"
            f"{f'{100 * right.mean() / oracle:.0f} %':>15}{result['seconds']:9.1f}"
        )
    if options.json:
        report = {
            name: {"accuracy": r["right"].mean(axis=1).tolist(), "seconds": r["seconds"]}
            for name, r in results.items()
        }
        options.json.write_text(json.dumps(report, indent=2))


def compare(
    arrays: Arrays, is_test: np.ndarray, seeds: int, steps: int, learning_rate: float
) -> dict[str, dict[str, Any]]:
    """Train and test each method.

    Args:
        arrays: "embeddings" and "event", see above, and "classes" (recordings,).
        is_test: (recordings,)
        seeds: runs of each method.
        steps: of AdamW, each over all training recordings.
        learning_rate: initial; it falls to 0 along a cosine.

    Returns:
        method -> {"right": (seeds, test recordings) bool, "seconds": of a run}.
    """
    bags = torch.from_numpy(arrays["embeddings"]).float()
    event = torch.from_numpy(arrays["event"]).float()[:, None]
    first = bags[:, :1]
    ways: dict[str, tuple[Tensor, Tensor, str, bool]] = {  # train, test, pooling, one at random
        "first window": (first, first, "mean", False),
        "random window, mean": (bags, bags, "mean", True),
        **{f"bags, {pooling}": (bags, bags, pooling, False) for pooling in _POOLINGS},
        "oracle: event windows": (event, event, "mean", False),
    }
    classes = torch.from_numpy(arrays["classes"])
    results = {}
    for name, (train, test, pooling, draws_one) in ways.items():
        begin = time.perf_counter()
        right = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = _BagClassifier(bags.shape[-1], int(classes.max()) + 1, pooling)
            _train(model, train[~is_test], classes[~is_test], draws_one, steps, learning_rate)
            with torch.no_grad():
                answers = model(test[is_test]).argmax(dim=-1)
            right.append((answers == classes[is_test]).numpy())
        seconds = (time.perf_counter() - begin) / seeds
        results[name] = {"right": np.stack(right), "seconds": seconds}
    return results


class _BagClassifier(nn.Module):
    """Bags (N, windows, D) to logits (N, labels): a head on every window, and a pooling.

    "attention" weighs the windows by a second linear layer, for each label (Kong et al.,
    arXiv 1903.00765).
    """

    def __init__(self, size: int, labels: int, pooling: str):
        super().__init__()
        self.pooling = pooling
        self.layernorm = nn.LayerNorm(size, eps=1e-6)
        self.dense = nn.Linear(size, labels)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        self.attention = None
        if pooling == "attention":
            self.attention = nn.Linear(size, labels)
            nn.init.zeros_(self.attention.weight)  # at first, all windows weigh the same
            nn.init.zeros_(self.attention.bias)

    def forward(self, bags: Tensor) -> Tensor:
        normed = self.layernorm(bags)
        logits = self.dense(normed)
        if self.attention is None:
            return pool_logits(logits, _KIND, self.pooling)
        weights = self.attention(normed).softmax(dim=1)
        return (weights * logits.sigmoid()).sum(dim=1).clamp(1e-6, 1 - 1e-6).logit()


def _train(
    model: _BagClassifier,
    bags: Tensor,
    classes: Tensor,
    draws_one: bool,
    steps: int,
    learning_rate: float,
) -> None:
    """On bags (N, windows, D) of classes (N,), or on one window of each, drawn at each step."""
    targets = one_hot(classes, model.dense.out_features).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        heard = bags
        if draws_one:
            drawn = torch.randint(bags.shape[1], (len(bags),))
            heard = bags[torch.arange(len(bags)), drawn][:, None]
        classification_loss(model(heard), targets, _KIND).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _interval(right: np.ndarray) -> tuple[float, float]:
    """Interval of the mean over recordings (N,), by resampling them."""
    random = np.random.default_rng(0)
    means = [right[random.integers(len(right), size=len(right))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _embed(options: WeakOptions) -> Arrays:
    begin = time.perf_counter()
    classifier = Classifier(options.checkpoint)
    rate, extractor = classifier.sampling_rate, classifier.pipeline.feature_extractor
    samples = extractor.filterbank.num_samples(extractor.max_length)
    window_s = samples / rate
    rows = list(open_stream(options.dataset, "train"))
    names = [row["audio"]["path"] for row in rows]
    events = read_annotations(options.events, names).of_recording

    def embed(waveform: np.ndarray, starts: list[float]) -> np.ndarray:
        windows = []
        for start in starts:
            piece = waveform[round(start * rate) :][:samples]
            (window,) = classifier.windows({"array": piece, "sampling_rate": rate})
            windows.append(Window(0.0, window_s, True, window.content))
        size = classifier.batch_size
        parts = [windows[i : i + size] for i in range(0, len(windows), size)]
        return np.concatenate([classifier.score(part)[2] for part in parts])

    embeddings, of_events = [], []
    for name, row in zip(names, rows, strict=True):
        waveform = load_audio(row["audio"], rate)
        duration = len(waveform) / rate
        longest = max(events[name], key=lambda event: event.end - event.start)
        middle = (longest.start + longest.end) / 2
        around = min(max(middle - window_s / 2, 0.0), duration - window_s)
        vectors = embed(waveform, [*tiling(duration, window_s), around])
        embeddings.append(vectors[:-1])
        of_events.append(vectors[-1])
    _, classes = np.unique([row["label"] for row in rows], return_inverse=True)
    return {
        "embeddings": np.stack(embeddings),
        "event": np.stack(of_events),
        "classes": classes,
        "folds": np.array([str(row["fold"]) for row in rows]),
        "seconds": np.array(time.perf_counter() - begin),
    }
