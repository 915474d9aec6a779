"""Scores checkpoints on labelled sound: clips in, a report out."""

import difflib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from feature_extraction import AudioDecodingError, load_audio

from ..common.bundled import find_bundled
from ..common.options import did_you_mean
from ..data.annotated import open_annotated_audio
from ..data.annotations import Annotation
from ..data.batches import rank_share
from ..data.labelled import LabelledAudio, open_labelled_audio
from ..inference.classifier import Classifier
from ..inference.heard import Heard
from .detection import Recording, measure_detection
from .metrics import ScoredClips
from .options import EvaluateOptions
from .report import finite, most_confident_mistakes, per_class, write_report

_CONFIDENCE = 0.95


@dataclass
class _Clip:
    """A clip from the dataset: decoded, or with what is wrong with it; later scored."""

    file: str
    label: Any  # index, or list of indices, in the dataset's order
    events: list[list[float]] | None = None  # start, end, index; None: nobody annotated it
    waveform: np.ndarray | None = None  # (samples,)
    error: str | None = None
    scores: np.ndarray | None = None  # (labels,)
    windows: int = 0
    heard: Heard | None = None  # of annotated clips


@dataclass
class _Decoder:
    """Rows to clips, in a worker."""

    sampling_rate: int

    def __call__(self, rows: list[dict[str, Any]]) -> list[_Clip]:
        return [self._clip(row) for row in rows]

    def _clip(self, row: dict[str, Any]) -> _Clip:
        clip = _Clip(row["name"], row["label"], row.get("events"))
        try:
            clip.waveform = load_audio(row["audio"], self.sampling_rate)
        except AudioDecodingError as error:
            clip.error = str(error)
        return clip


def evaluate_checkpoints(
    checkpoints: Sequence[str], dataset: str, options: EvaluateOptions
) -> dict[str, Any]:
    """Score a dataset's clips, measure, and write the report's files.

    Args:
        checkpoints: folders or Hub names; several are an ensemble: their mean probability counts.
        dataset: as for fine-tuning.
        options: which clips, and how to score them.

    Returns:
        The report, as in evaluation.json, in the main process; {} in the others:
            "checkpoints"   as given
            "dataset", "dataset_config", "split", "fold_column", "fold", "fraction"
                            what was measured; null if it does not apply
            "task"          "single_label_classification" or "multi_label_classification", by the
                            data; a checkpoint whose config says otherwise is measured all the same
            "clips"         how many were measured
            "unreadable"    [{"file", "error"}, …]: not among them
            "windowed_clips"    how many of them are longer than (one of) the models' length
            "labels"        the checkpoint's, in its order, or the dataset's of `match_labels`
            "classes_without_positives"     names: excluded from all means over classes
            "metrics"       {name: {"value", "low", "high"}}, names as in `compute_metrics`; null
                            where undefined, or infinite, as d′ is when ROC-AUC is 1
            "confidence", "bootstrap_resamples", "seed"     of low and high
            "per_class"     [{"label", "positives", "precision", "recall", "f1",
                            "average_precision", "roc_auc"}, …], in the order of "labels"
            "mistakes"      the most confident first, [{"file", "labels", "predicted", "score"}, …]
                            for one label per clip; for several
                            {"file", "labels", "label", "mistake": "false alarm" or "miss", "score"}
            "seconds"       for reading and scoring
            "detection"     with annotations only: see `measure_detection`; and the rules of events

    Raises:
        ValueError: for wrong paths, columns or options, labels that do not fit, or if no sound can
            be read.
    """
    rules = options.event_rules()
    if options.annotations is not None and len(checkpoints) > 1:
        raise ValueError("With --annotations, name one checkpoint: events are not averaged.")
    accelerator = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but without GPUs Accelerate would let each do all "
            "the work alone. Set ACCELERATE_USE_CPU=true."
        )
    classifiers = [
        Classifier(
            name,
            accelerator.device,
            batch_size=options.batch_size,
            window_pooling=options.window_pooling,
            chunk_length_s=options.chunk_length_s,
            hop_length_s=options.hop_length_s,
        )
        for name in checkpoints
    ]
    labels = _common_labels(checkpoints, classifiers)
    meanings = _read_meanings(options.match_labels, labels) if options.match_labels else None
    whole_split = options.evaluation_split is not None
    which = options
    if options.evaluation_split is not None:
        # No other split is read, and no clip is excluded because of its group.
        which = replace(options, train_split=options.evaluation_split, group_column=None)
    if options.annotations is None:
        data = open_labelled_audio(dataset, which)
    else:
        data = open_annotated_audio(
            dataset, options.annotations, which, options.annotation_label_column
        )
    answered = list(meanings) if meanings else labels
    columns = _match_labels(data, answered)

    start = time.perf_counter()
    scored = list(_score(classifiers, labels, meanings, data, options, accelerator))
    labels = answered
    # In an order that does not depend on the number of processes, because it affects the bootstrap.
    clips = sorted(gather_object(scored), key=lambda clip: (clip.file, str(clip.label)))
    seconds = time.perf_counter() - start
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}

    readable = [clip for clip in clips if clip.error is None]
    if not readable:
        raise ValueError(
            f"None of the {len(clips)} sounds can be read. {clips[0].error if clips else ''}"
        )
    targets: Any
    if data.problem_type == "multi_label_classification":
        targets = np.zeros((len(readable), len(labels)), int)
        for row, clip in zip(targets, readable, strict=True):
            row[[columns[label] for label in clip.label]] = 1
    else:
        targets = [columns[clip.label] for clip in readable]
    measured = ScoredClips(np.stack([clip.scores for clip in readable]), targets)
    by_fold = options.fold_column is not None
    intervals = measured.confidence_intervals(
        options.bootstrap_resamples, options.seed, _CONFIDENCE
    )
    report = {
        "checkpoints": list(checkpoints),
        "dataset": dataset,
        "dataset_config": options.dataset_config,
        "split": options.evaluation_split or options.train_split,
        "fold_column": options.fold_column if by_fold else None,
        "fold": options.evaluation_fold if by_fold else None,
        "fraction": None if by_fold or whole_split else options.evaluation_fraction,
        "task": data.problem_type,
        "clips": len(readable),
        "unreadable": [{"file": c.file, "error": c.error} for c in clips if c.error is not None],
        "windowed_clips": sum(clip.windows > 1 for clip in readable),
        "labels": labels,
        "classes_without_positives": [labels[i] for i in measured.classes_without_positives],
        "metrics": {
            name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
            for name, value in measured.metrics().items()
        },
        "confidence": _CONFIDENCE,
        "bootstrap_resamples": options.bootstrap_resamples,
        "seed": options.seed,
        "per_class": per_class(measured, labels),
        "mistakes": most_confident_mistakes(measured, labels, [clip.file for clip in readable]),
        "seconds": seconds,
    }
    if options.annotations is not None:
        recordings = [
            Recording(
                clip.file,
                clip.heard,
                [Annotation(a, b, data.label_names[int(of)]) for a, b, of in clip.events or ()],
            )
            for clip in readable
            if clip.heard is not None
        ]
        report["detection"] = measure_detection(
            recordings, rules, options.bootstrap_resamples, options.seed, _CONFIDENCE
        )
        report["detection"]["rules"] = vars(rules)
    report = finite(report)
    write_report(report, measured, Path(options.output))
    return report


def _common_labels(checkpoints: Sequence[str], classifiers: Sequence[Classifier]) -> list[str]:
    """The label names of all checkpoints, in the first one's order."""
    first: list[str] = []
    for name, classifier in zip(checkpoints, classifiers, strict=True):
        if classifier.problem_type == "regression":
            raise ValueError(f"{name} is a regression model; expected a classifier.")
        labels = classifier.label_names
        first = first or labels
        if len(set(labels)) < len(labels):
            raise ValueError(f"{name} has several labels with the same name.")
        if set(labels) != set(first):
            odd = sorted(set(labels) ^ set(first))[0]
            raise ValueError(
                f"{name} has other labels than {checkpoints[0]} (only one has {odd!r}): an "
                "ensemble needs the same labels in all."
            )
    kinds = {classifier.problem_type for classifier in classifiers}
    if len(kinds) > 1:
        raise ValueError(
            f"The checkpoints' configs have different problem types ({', '.join(map(str, kinds))})"
            ": their probabilities mean different things and cannot be averaged."
        )
    return first


def _read_meanings(file: str, labels: list[str]) -> dict[str, list[str]]:
    """The checkpoint's labels for each of the dataset's, from a JSON object."""
    path = find_bundled(file, "label_matches", ".json", "label matches")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read match_labels {file!r}: {error}") from error
    wanted = "a JSON object, {label of the dataset: [labels of the checkpoint]}"
    if not (isinstance(content, dict) and content):
        raise ValueError(f"match_labels must be {wanted}; {file} holds {type(content).__name__}.")
    for label, names in content.items():
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise ValueError(f"match_labels must be {wanted}; in {file}, {label!r} has {names!r}.")
        for name in names:
            if name not in labels:
                closest = difflib.get_close_matches(name, labels, n=10, cutoff=0.0)
                raise ValueError(
                    f"{file}: {name!r}, for {label!r}, is none of the checkpoint's {len(labels)} "
                    "labels" + did_you_mean(name, closest)
                )
    return content


def _match_labels(data: LabelledAudio, labels: list[str]) -> list[int | None]:
    """The checkpoint's column of each of the dataset's labels, by name; None for unused ones."""
    columns: list[int | None] = []
    for name, count in zip(data.label_names, data.evaluation_counts, strict=True):
        if count and name not in labels:
            closest = difflib.get_close_matches(name, labels, n=10, cutoff=0.0)
            raise ValueError(
                f"The dataset's label {name!r} is none of the checkpoint's {len(labels)} labels"
                + did_you_mean(name, closest)
            )
        columns.append(labels.index(name) if name in labels else None)
    return columns


def _score(
    classifiers: Sequence[Classifier],
    labels: list[str],
    meanings: dict[str, list[str]] | None,
    data: LabelledAudio,
    options: EvaluateOptions,
    accelerator: Accelerator,
) -> Iterator[_Clip]:
    """This process's clips with their scores, or what is wrong with them."""
    rate = max(classifier.sampling_rate for classifier in classifiers)
    stream = rank_share(
        data.evaluation, accelerator.process_index, accelerator.num_processes, options.num_workers
    )
    loader = DataLoader(
        stream,
        batch_size=options.batch_size,
        num_workers=min(options.num_workers, stream.num_shards),
        collate_fn=_Decoder(rate),
    )
    # Published AudioSet checkpoints do not say that they are multi-label; the data decide then.
    problem_type = classifiers[0].problem_type or data.problem_type
    for classifier in classifiers:
        is_multi_label = problem_type == "multi_label_classification"
        classifier.function_to_apply = "sigmoid" if is_multi_label else "softmax"
    columns = [[c.label_names.index(name) for name in labels] for c in classifiers]
    groups = [[labels.index(n) for n in names] for names in meanings.values()] if meanings else None
    share = math.ceil(data.evaluation_clips / accelerator.num_processes)
    with tqdm(
        desc="scoring", total=share, unit=" clips", disable=not accelerator.is_main_process
    ) as progress:
        for clips in loader:
            readable = [clip for clip in clips if clip.waveform is not None]
            sounds = [{"array": clip.waveform, "sampling_rate": rate} for clip in readable]
            answers = [dict(classifier.hear_each(enumerate(sounds))) for classifier in classifiers]
            for index, clip in enumerate(readable):
                # Arrays that the decoder has checked: none is unreadable.
                heard = [h for answer in answers if isinstance(h := answer[index], Heard)]
                scores = [h.clip_scores()[order] for h, order in zip(heard, columns, strict=True)]
                clip.scores = np.mean(scores, axis=0)
                if groups is not None:
                    clip.scores = np.array([clip.scores[group].max() for group in groups])
                clip.windows = max(len(h.spans) for h in heard)
                if clip.events is not None:
                    names, of_windows = labels, heard[0].scores[:, columns[0]]
                    if groups is not None:
                        names = list(meanings or ())
                        of_windows = np.stack([of_windows[:, g].max(axis=1) for g in groups], 1)
                    known = [i for i, name in enumerate(names) if name in data.label_names]
                    clip.heard = Heard.of_arrays(
                        [names[i] for i in known],
                        heard[0].spans,
                        of_windows[:, known],
                        np.empty((clip.windows, 0)),
                    )
                clip.waveform = None
            progress.update(len(clips))
            yield from clips
