"""From marks and an index's embeddings to a checkpoint, in seconds.

marks -> targets (windows, labels) -> head, its strength chosen by cross-validation over recordings
      -> calibration and thresholds, from held-out logits of the windows -> checkpoint
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.files import write_whole
from ..common.options import did_you_mean
from ..evaluation.report import finite
from .calibration import Calibration, Threshold, Wish, calibrate, choose_thresholds
from .heads import (
    DEFAULT_STRENGTH,
    Head,
    are_exclusive,
    choose_strength,
    fit_head,
    scores_of,
)
from .index import SoundIndex
from .marks import BACKGROUND, Mark, label_names, window_targets
from .queues import committee, disagreement, disputed_apart, farthest_first, pick, uncertainty

if TYPE_CHECKING:
    from ..inference.classifier import Classifier

_FROM_ONE_RECORDING = 10  # a queue takes this share from one recording at first


@dataclass(frozen=True)
class Lesson:
    """What was learned from marks.

    Args:
        labels: names, in the order of the columns.
        targets: (windows, labels) of the whole index; NaN where unknown.
        logits: (windows, labels) of a head that had not seen the window's recording, before
            calibration; NaN where there is none.
        head: the classifier's, calibrated.
        strength: of the penalty; None: the head was not fitted.
        calibration: the head's.
        thresholds: one per label.
        seconds: taken.
    """

    labels: list[str]
    targets: np.ndarray
    logits: np.ndarray
    head: Head
    strength: float | None
    calibration: Calibration
    thresholds: list[Threshold]
    seconds: float

    @property
    def held_out(self) -> np.ndarray:
        """(windows,) bool: labelled, and scored by a head that had not seen it."""
        return ~np.isnan(self.targets).all(axis=1) & ~np.isnan(self.logits).any(axis=1)

    def report(self, index: SoundIndex) -> dict[str, Any]:
        """Figures for people, all on held-out windows."""
        from sklearn.metrics import average_precision_score

        rows = self.held_out
        targets, logits = self.targets[rows], self.logits[rows]
        recordings = index.sound_of_window
        labelled = ~np.isnan(self.targets).all(axis=1)
        precisions = []
        for label in range(len(self.labels)):
            known = ~np.isnan(targets[:, label])
            there = targets[known, label] > 0
            if there.any() and not there.all():
                precisions.append(average_precision_score(there, logits[known, label]))
            else:
                precisions.append(float("nan"))
        report: dict[str, Any] = {
            "model": index.about["model"],
            "labels": "exclusive" if self.head.exclusive else "independent",
            "marked_windows": int(labelled.sum()),
            "marked_recordings": len(np.unique(recordings[labelled])),
            "held_out_windows": int(rows.sum()),
            "strength": self.strength,
            "mean_average_precision": _mean(precisions),
            "average_precision": dict(zip(self.labels, precisions, strict=True)),
            "thresholds": [threshold.as_dict() for threshold in self.thresholds],
            "seconds": self.seconds,
        }
        if self.head.exclusive and rows.any():
            report["accuracy"] = float((logits.argmax(1) == targets.argmax(1)).mean())
        if rows.any():
            before, after = self._calibration_errors(recordings)
            report["calibration_error"] = {"before": before, "after": after}
        return report

    def _calibration_errors(self, recordings: np.ndarray) -> tuple[float, float]:
        """Before and after; each half of the recordings is calibrated on the other half."""
        from ..evaluation.metrics import ScoredClips

        exclusive = self.head.exclusive
        rows = np.flatnonzero(self.held_out & ~np.isnan(self.targets).any(axis=1))
        if not len(rows):
            return float("nan"), float("nan")
        targets, logits = self.targets[rows], self.logits[rows]
        half = np.random.default_rng(0).permutation(recordings.max() + 1)[recordings[rows]] % 2
        calibrated = np.empty_like(logits)
        for this in (0, 1):
            other = half != this
            found = calibrate(logits[other], targets[other], recordings[rows][other], exclusive)
            calibrated[~other] = found(logits[~other])
        wanted = targets.argmax(axis=1) if exclusive else targets.astype(int)
        before, after = (
            ScoredClips(scores_of(values, exclusive), wanted).expected_calibration_error()
            for values in (logits, calibrated)
        )
        return before, after


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def background_marks(folder: Path, sounds: Sequence[str]) -> list[Mark]:
    """Marks an index's recordings in a folder as containing none of the labels.

    Raises:
        ValueError: if there are none.
    """
    root = folder.absolute()
    found = [sound for sound in sounds if Path(sound).absolute().is_relative_to(root)]
    if not found:
        raise ValueError(
            f"The index holds no recording in {folder}: add it with ast-index {folder} --output …"
        )
    return [Mark(sound, None, None, BACKGROUND) for sound in found]


def targets_of(index: SoundIndex, marks: Sequence[Mark], labels: Sequence[str]) -> np.ndarray:
    """What marks say about an index's windows: (windows, labels), see `window_targets`."""
    return window_targets(marks, index.sounds, index.sound_of_window, index.spans, labels)


def teach(
    index: SoundIndex,
    marks: Sequence[Mark],
    wish: Wish,
    exclusive: bool | None = None,
) -> Lesson:
    """Fit a new head on what is marked.

    Args:
        index: of the marked recordings.
        marks: in the order they were made.
        wish: for the thresholds.
        exclusive: softmax over the labels; None: if every marked window has exactly one.

    Raises:
        ValueError: if the marks name no label, or recordings that the index does not hold.
    """
    began = time.perf_counter()
    labels = label_names(marks)
    if not labels:
        raise ValueError("The marks name no label: mark some windows first.")
    targets = targets_of(index, marks, labels)
    rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
    if not (np.nan_to_num(targets) > 0).any():
        raise ValueError("The marks cover no window of the index.")
    if exclusive is None:
        exclusive = len(labels) > 1 and are_exclusive(targets)
    elif exclusive and not are_exclusive(targets):
        raise ValueError(
            "Labels can only exclude each other if every marked window has exactly one, but some "
            "have several or none (background, `not …`)."
        )
    if len(labels) == 1 and not (targets[rows] == 0).any():
        raise ValueError(
            f"Only {labels[0]!r} is marked: mark some windows without it, too (background, or "
            "--background FOLDER)."
        )
    normed, marked, recordings = index.normed(rows), targets[rows], index.sound_of_window[rows]
    choice = choose_strength(normed, marked, recordings, exclusive, index.standard)
    head = fit_head(normed, marked, exclusive, index.standard, choice.strength)
    return _lesson(index, labels, targets, rows, choice.logits, head, choice.strength, wish, began)


def calibrate_model(
    index: SoundIndex, marks: Sequence[Mark], wish: Wish, classifier: "Classifier"
) -> Lesson:
    """Keep a checkpoint's own head and calibrate its scores on the marks.

    Raises:
        ValueError: for marks with labels that the checkpoint does not know.
    """
    began = time.perf_counter()
    labels = classifier.label_names
    unknown = [label for label in label_names(marks) if label not in labels]
    if unknown:
        raise ValueError(
            f"{classifier.model_name} has no label {unknown[0]!r}{did_you_mean(unknown[0], labels)}"
        )
    targets = targets_of(index, marks, labels)
    rows = np.flatnonzero(~np.isnan(targets).all(axis=1))
    if not len(rows):
        raise ValueError("The marks cover no window of the index.")
    head = head_of(classifier)
    return _lesson(
        index, labels, targets, rows, head.logits(index.normed(rows)), head, None, wish, began
    )


def _lesson(
    index: SoundIndex,
    labels: list[str],
    targets: np.ndarray,
    rows: np.ndarray,
    logits: np.ndarray,
    head: Head,
    strength: float | None,
    wish: Wish,
    began: float,
) -> Lesson:
    recordings, marked = index.sound_of_window[rows], targets[rows]
    calibration = calibrate(logits, marked, recordings, head.exclusive)
    missing = np.isnan(logits).any(axis=1, keepdims=True)
    scores = scores_of(calibration(np.where(missing, 0, logits)), head.exclusive)
    thresholds = choose_thresholds(
        np.where(missing, np.nan, scores), marked, recordings, labels, wish
    )
    everywhere = np.full(targets.shape, np.nan)
    everywhere[rows] = logits
    return Lesson(
        labels=labels,
        targets=targets,
        logits=everywhere,
        head=head.calibrated(calibration.scale, calibration.shift),
        strength=strength,
        calibration=calibration,
        thresholds=thresholds,
        seconds=time.perf_counter() - began,
    )


def head_of(classifier: "Classifier") -> Head:
    """A checkpoint's own head, its LayerNorm folded into the dense layer."""
    model = classifier.pipeline.model
    norm, dense = model.classifier.layernorm, model.classifier.dense
    weight, bias = (values.detach().double().cpu().numpy() for values in (dense.weight, dense.bias))
    gain, offset = (values.detach().double().cpu().numpy() for values in (norm.weight, norm.bias))
    exclusive = model.config.problem_type not in ("multi_label_classification", "regression")
    return Head(weight * gain, bias + weight @ offset, exclusive)


def write_checkpoint(
    lesson: Lesson, classifier: "Classifier", folder: Path, report: dict[str, Any]
) -> None:
    """Write an ordinary checkpoint, with thresholds.json and teaching.json next to it.

    The classifier's LayerNorm gets weight 1 and bias 0, and its dense layer the head: the model's
    logits are the head's, in every runtime.
    """
    import copy

    import torch

    model = copy.deepcopy(classifier.pipeline.model)
    config = model.config
    config.id2label = dict(enumerate(lesson.labels))
    config.label2id = {label: index for index, label in enumerate(lesson.labels)}
    config.problem_type = (
        "single_label_classification" if lesson.head.exclusive else "multi_label_classification"
    )
    model.num_labels = len(lesson.labels)
    dense = torch.nn.Linear(config.hidden_size, len(lesson.labels))
    with torch.no_grad():
        model.classifier.layernorm.weight.fill_(1)
        model.classifier.layernorm.bias.zero_()
        dense.weight.copy_(torch.from_numpy(lesson.head.weight))
        dense.bias.copy_(torch.from_numpy(lesson.head.bias))
    model.classifier.dense = dense.to(model.device, model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    classifier.pipeline.feature_extractor.save_pretrained(folder)
    thresholds = {threshold.label: threshold.value for threshold in lesson.thresholds}
    _write_json(folder / "thresholds.json", thresholds)
    _write_json(folder / "teaching.json", finite(report))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def next_windows(
    index: SoundIndex,
    queue: str,
    count: int,
    targets: np.ndarray,
    head: Head | None = None,
    label: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Windows to listen to next, best first: unmarked ones, spread over recordings.

    Args:
        index: to choose from.
        queue: one of `QUEUES`.
        count: how many.
        targets: (windows, labels), what is marked.
        head: the unsure one; not used by "novel" and "random".
        label: column for "likely".
        seed: for "random" and "disputed".
    """
    marked = ~np.isnan(targets).all(axis=1)
    allowed = ~marked
    share = max(1, count // _FROM_ONE_RECORDING)
    order = None
    if queue == "novel":
        # More than requested, because neighbours of one event are alike.
        order = farthest_first(index.features(), np.flatnonzero(marked), 2 * count, allowed)
    elif queue == "disputed":
        assert head is not None
        rows = np.flatnonzero(marked)
        members = committee(
            index.normed(rows), targets[rows], index.sound_of_window[rows], head.exclusive,
            index.standard, DEFAULT_STRENGTH, seed,
        )  # fmt: skip
        values = np.concatenate(
            [disagreement(members, index.normed(block)) for block in index.blocks()]
        )
        order = disputed_apart(values, index.features(), rows, 2 * count, allowed)
    elif queue == "random":
        values = np.random.default_rng(seed).random(len(index))
    else:
        assert head is not None
        logits = index.logits(head.weight, head.bias)
        if queue == "uncertain":
            values = uncertainty(scores_of(logits, head.exclusive), head.exclusive)
        else:
            assert label is not None
            values = logits[:, label]
            share = count
    if order is not None:
        values = np.full(len(index), -np.inf)
        values[order] = -np.arange(len(order), dtype=float)
        allowed = np.isfinite(values)
    return pick(values, index.sound_of_window, index.spans, count, allowed, share)
