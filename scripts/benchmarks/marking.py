"""What marks are worth: accuracy with few of them, and how many a queue saves.

embeddings  (clips, D)   of a labelled dataset, from one checkpoint, computed once
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.files import write_whole
from ..workbench.calibration import calibrate, choose_thresholds
from ..workbench.heads import (
    DEFAULT_STRENGTH,
    Head,
    Standard,
    choose_strength,
    fit_head,
    layer_normed,
    scores_of,
)
from ..workbench.queues import committee, disagreement, disputed_apart, farthest_first, uncertainty
from .cached import cached_arrays

if TYPE_CHECKING:
    from .options import CalibrationOptions, FewOptions, MarkedOptions, QueuesOptions

_HEAD_EPSILON = 1e-6
_GROWTH = 1.12  # of the marks from round to round, if that is more than the batch


@dataclass
class Clips:
    """A labelled dataset as a model's embeddings."""

    normed: np.ndarray  # (clips, D)
    classes: np.ndarray  # (clips,)
    groups: np.ndarray  # (clips,) recording or speaker
    parts: np.ndarray  # (clips,) fold or split

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1

    def draws(self, options: "MarkedOptions") -> list[tuple[np.ndarray, np.ndarray]]:
        """Clips to mark and clips to test on, for each draw: folds rotate."""
        if options.test_part is not None:
            test = self.parts == options.test_part
            unused = np.isin(self.parts, options.unused_part or [])
            if not test.any():
                raise ValueError(
                    f"--test_part {options.test_part}: the clips are of {set(self.parts)}."
                )
            return [(np.flatnonzero(~test & ~unused), np.flatnonzero(test))] * options.draws
        folds = np.unique(self.parts)
        chosen = [folds[draw % len(folds)] for draw in range(options.draws)]
        return [(np.flatnonzero(self.parts != f), np.flatnonzero(self.parts == f)) for f in chosen]


def open_clips(options: "MarkedOptions") -> Clips:
    """The clips of a dataset; their embeddings are cached in a file if the options name one."""
    settings = {
        "dataset": options.dataset,
        "splits": options.splits,
        "fold_column": options.fold_column,
        "group_column": options.group_column,
    }
    arrays = cached_arrays(
        options.embeddings, options.checkpoint, settings, lambda: _embed(options)
    )
    normed = layer_normed(arrays["embeddings"], _HEAD_EPSILON)
    return Clips(normed, arrays["classes"], arrays["groups"], arrays["parts"])


def _embed(options: "MarkedOptions") -> dict[str, Any]:
    from ..data.sources import open_stream
    from ..inference.classifier import Classifier, Unreadable

    classifier = Classifier(options.checkpoint)
    rows: list[tuple[int, str, str]] = []

    def sounds() -> Iterator[tuple[int, Any, int]]:
        for split in options.splits:
            for row in open_stream(options.dataset, split):
                group = row[options.group_column] if options.group_column else len(rows)
                part = row[options.fold_column] if options.fold_column else split
                rows.append((int(row["label"]), str(group), str(part)))
                yield len(rows) - 1, row["audio"], 0

    vectors: dict[int, list[np.ndarray]] = {}
    for answer in classifier.listen(sounds()):
        if isinstance(answer, Unreadable):
            raise ValueError(f"Clip {answer.sound}: {answer.error}")
        vectors.setdefault(answer.sound, []).append(answer.embedding)
    classes, groups, parts = zip(*rows, strict=True)
    return {
        "embeddings": np.stack([np.mean(vectors[row], axis=0) for row in range(len(rows))]),
        "classes": np.array(classes),
        "groups": np.array(groups),
        "parts": np.array(parts),
    }


def benchmark_few(options: "FewOptions") -> None:
    """Accuracy with k marked clips per class."""
    clips = open_clips(options)
    print(f"{options.checkpoint} on {options.dataset}: {options.draws} draws, accuracy in %")
    table = {}
    for shots in options.shots:
        accuracies = []
        began = time.perf_counter()
        for draw, (pool, test) in enumerate(clips.draws(options)):
            random = np.random.default_rng(draw)
            marked = np.concatenate(
                [
                    random.permutation(pool[clips.classes[pool] == label])[:shots]
                    for label in range(clips.num_classes)
                ]
            )
            accuracies.append(_accuracy(clips, marked, test, pool))
        seconds = (time.perf_counter() - began) / options.draws
        mean, deviation = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
        table[shots] = {"mean": mean, "deviation": deviation, "seconds": seconds}
        print(
            f"{shots:4d} per class  {mean:5.1f} ± {deviation:4.1f}  ({seconds:.2f} s)", flush=True
        )
    full = [_accuracy(clips, pool, test, pool) for pool, test in _distinct(clips.draws(options))]
    print(f" all of them     {100 * np.mean(full):5.1f}")
    if options.json:
        _write(options.json, {"few": table, "full": 100 * float(np.mean(full))})


def _distinct(draws: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return list({test.tobytes(): (pool, test) for pool, test in draws}.values())


def _accuracy(clips: Clips, marked: np.ndarray, test: np.ndarray, pool: np.ndarray) -> float:
    """Accuracy of the head that ast-teach fits on the marked clips; the pool needs no labels."""
    standard = Standard.of(clips.normed[pool])
    targets = np.eye(clips.num_classes)[clips.classes[marked]]
    normed = clips.normed[marked]
    choice = choose_strength(normed, targets, clips.groups[marked], True, standard)
    head = fit_head(normed, targets, True, standard, choice.strength)
    return _right(clips, head, test)


def _right(clips: Clips, head: Head, test: np.ndarray) -> float:
    return float((head.logits(clips.normed[test]).argmax(1) == clips.classes[test]).mean())


def benchmark_queues(options: "QueuesOptions") -> None:
    """Marks needed to reach 90 and 95 % of the accuracy with all marks, by queue."""
    clips = open_clips(options)
    draws = clips.draws(options)
    curves: dict[str, list[list[tuple[int, float]]]] = {queue: [] for queue in options.queues}
    full = []
    for draw, (pool, test) in enumerate(draws):
        targets = np.eye(clips.num_classes)[clips.classes[pool]]
        standard = Standard.of(clips.normed[pool])
        head = fit_head(clips.normed[pool], targets, True, standard, DEFAULT_STRENGTH)
        full.append(_right(clips, head, test))
        for queue in options.queues:
            curves[queue].append(_mark(clips, pool, test, queue, full[-1], draw, options))
    print(
        f"{options.checkpoint} on {options.dataset}: {options.draws} draws; all "
        f"{len(draws[0][0])} marks give {100 * np.mean(full):.1f} %"
    )
    shares = (0.90, 0.95)
    print("marks needed for" + "".join(f"{share:>22.0%}" for share in shares))
    table: dict[str, Any] = {}
    for queue, of_draws in curves.items():
        row = []
        for share in shares:
            needed = np.array(
                [_needed(curve, share * whole) for curve, whole in zip(of_draws, full, strict=True)]
            )
            row.append(
                (float(needed.mean()), float(needed.std(ddof=1)), int(np.isnan(needed).sum()))
            )
        table[queue] = row
        print(f"{queue:16s}" + "".join(f"{mean:14.0f} ± {dev:4.0f}" for mean, dev, _ in row))
    if options.plot:
        _plot(options.plot, curves, float(np.mean(full)), shares)
    if options.json:
        _write(options.json, {"needed": table, "full": full, "curves": curves})


def _mark(
    clips: Clips,
    pool: np.ndarray,
    test: np.ndarray,
    queue: str,
    full: float,
    draw: int,
    options: "QueuesOptions",
) -> list[tuple[int, float]]:
    """Marks and accuracy per round, until 97 % of the full accuracy is reached or all is marked."""
    random = np.random.default_rng(draw)  # the same first marks for every queue
    normed, classes, groups = clips.normed[pool], clips.classes[pool], clips.groups[pool]
    standard = Standard.of(normed)
    features = standard(normed).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    every = np.eye(clips.num_classes)[classes]
    targets = np.full(every.shape, np.nan)
    marked = random.permutation(len(pool))[: clips.num_classes]
    curve = []
    while True:
        targets[marked] = every[marked]
        head = fit_head(normed, targets, True, standard, DEFAULT_STRENGTH)
        curve.append((len(marked), _right(clips, head, test)))
        # One lucky round is not enough.
        if len(marked) == len(pool) or min(a for _, a in curve[-2:]) >= 0.97 * full:
            return curve
        count = max(options.batch, round((_GROWTH - 1) * len(marked)))
        left = np.isnan(targets[:, 0])
        if queue == "random":
            more = random.permutation(np.flatnonzero(left))[:count].tolist()
        elif queue == "novel":
            more = farthest_first(features, marked, count, left)
        elif queue == "disputed":
            members = committee(normed, targets, groups, True, standard, DEFAULT_STRENGTH, draw)
            values = disagreement(members, normed)
            more = disputed_apart(values, features, marked, count, left)
        else:
            values = np.where(left, uncertainty(head.scores(normed), True), -np.inf)
            more = np.argsort(-values, kind="stable")[: min(count, int(left.sum()))].tolist()
        marked = np.concatenate([marked, np.array(more, int)])


def _needed(curve: list[tuple[int, float]], accuracy: float) -> float:
    """Marks at which a curve first reaches an accuracy, interpolated between rounds."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if high >= accuracy:
            if low >= accuracy:
                return before
            return before + (after - before) * (accuracy - low) / (high - low)
    return float("nan")


def benchmark_calibration(options: "CalibrationOptions") -> None:
    """Calibration error, and promised precision, on clips the calibration has not seen."""
    from ..evaluation.metrics import ScoredClips

    clips = open_clips(options)
    own = _own_head(options.checkpoint, clips) if options.head == "keep" else None
    every = np.eye(clips.num_classes)[clips.classes]
    names = [str(label) for label in range(clips.num_classes)]
    errors: dict[str, list[float]] = {"before": [], "after": []}
    attained: list[float] = []  # one per promise
    labels = 0
    for draw, (pool, test) in enumerate(clips.draws(options)):
        if own is None:
            standard = Standard.of(clips.normed[pool])
            choice = choose_strength(
                clips.normed[pool], every[pool], clips.groups[pool], True, standard
            )
            head = fit_head(clips.normed[pool], every[pool], True, standard, choice.strength)
            logits = choice.logits  # each by a head that had not seen the clip
        else:
            head = own
            pool, test = _halves(clips.groups, test, draw)
            logits = head.logits(clips.normed[pool])
        exclusive = head.exclusive
        calibration = calibrate(logits, every[pool], clips.groups[pool], exclusive)
        raw = head.logits(clips.normed[test])
        scores = scores_of(calibration(raw), exclusive)
        for name, values in (("before", scores_of(raw, exclusive)), ("after", scores)):
            measured = ScoredClips(values, clips.classes[test])
            errors[name].append(measured.expected_calibration_error())
        thresholds = choose_thresholds(
            scores_of(calibration(logits), exclusive), every[pool], clips.groups[pool], names,
            options.wish,
        )  # fmt: skip
        for label, threshold in enumerate(thresholds):
            above = scores[:, label] >= threshold.value
            labels += 1
            if threshold.kept and above.any():
                attained.append(float((clips.classes[test][above] == label).mean()))
    print(f"{options.checkpoint} on {options.dataset}: {options.draws} draws, {options.head} head")
    for name, of_draws in errors.items():
        mean, deviation = np.mean(of_draws), np.std(of_draws, ddof=1)
        print(f"calibration error {name:6s}  {mean:.3f} ± {deviation:.3f}")
    print(f"{options.wish}: promised for {len(attained)} of {labels} labels", end="")
    if attained:
        wanted = options.wish.precision or 0.0
        kept = np.mean(np.array(attained) >= wanted)
        print(f"; attained {np.mean(attained):.3f} on average, kept in {kept:.0%}", end="")
    print()
    if options.json:
        _write(options.json, {"calibration_error": errors, "attained": attained, "labels": labels})


def _own_head(checkpoint: str, clips: Clips) -> Head:
    """A checkpoint's head, whose labels must be the dataset's, in its order."""
    from ..inference.classifier import Classifier
    from ..workbench.teach import head_of

    head = head_of(Classifier(checkpoint))
    if len(head.bias) != clips.num_classes:
        raise ValueError(
            f"{checkpoint} has {len(head.bias)} labels, the dataset {clips.num_classes}: --head "
            "keep is for a model of these labels."
        )
    return head


def _halves(groups: np.ndarray, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, halved at random, no group in both halves."""
    known, number = np.unique(groups[rows], return_inverse=True)
    first = np.random.default_rng(seed).permutation(len(known))[number] % 2 == 0
    return rows[first], rows[~first]


def _write(path: Path, measured: dict[str, Any]) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(measured, indent=2)))


def _plot(
    path: Path,
    curves: dict[str, list[list[tuple[int, float]]]],
    full: float,
    shares: tuple[float, ...],
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = min(max(curve[-1][0] for curve in of) for of in curves.values())
    for queue, of_draws in curves.items():
        marks = np.unique([count for curve in of_draws for count, _ in curve if count <= longest])
        values = np.array(
            [np.interp(marks, [n for n, _ in curve], [a for _, a in curve]) for curve in of_draws]
        )
        mean, error = values.mean(axis=0), values.std(axis=0) / np.sqrt(len(values))
        style: dict[str, Any] = {"color": "black", "linestyle": ":"} if queue == "random" else {}
        (line,) = axes.plot(marks, 100 * mean, label=queue, **style)
        axes.fill_between(
            marks, 100 * (mean - error), 100 * (mean + error), color=line.get_color(), alpha=0.2
        )
    for share in shares:
        axes.axhline(100 * share * full, color="grey", linewidth=0.8)
        axes.annotate(f"{share:.0%} of all marks'", (marks[0], 100 * share * full), va="bottom")
    axes.set(xlabel="marked clips", ylabel="accuracy (%)", xscale="log")
    axes.legend(frameon=False)
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=150, format="png"))
