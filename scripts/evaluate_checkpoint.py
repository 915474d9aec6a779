"""Measure a checkpoint, or several as an ensemble, on labelled sound.

    ast-evaluate runs/my_sounds/checkpoint my_sounds/

It measures the part of the dataset that fine-tuning with the same options held out; with
`--evaluation_split train` the whole split. Several checkpoints are an ensemble: the mean of their
probabilities. Labels are matched by name, whatever their order. Clips are scored as
`pipeline("audio-classification")` does: one longer than the model's length is heard in windows of
that length, every half of it, and has the mean of their probabilities, weighted by their sound.
Sounds that cannot be read are named and left out. Several processes share the clips, each counted
once:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m scripts.evaluate_checkpoint …

Prints a table and writes into `--output_dir`:

    evaluation.json       everything below; see `evaluate_checkpoints` for the fields
    per_class.csv         label, positives, precision, recall, f1, average_precision, roc_auc
    mistakes.csv          the most confident ones, with their files
    confusion_matrix.png  one label per clip;  average_precision.png  any number of labels
"""

import csv
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from feature_extraction import AudioDecodingError, load_audio

from .arguments import did_you_mean, run_command, setting
from .batches import rank_share
from .classify import load_classifier
from .data import LabelledAudio, open_labelled_audio
from .metrics import ScoredClips

_CONFIDENCE = 0.95
_MISTAKES = 50  # in the files
_SHOWN_MISTAKES = 10  # on the terminal
_SHOWN_CLASSES = 50  # on the terminal and in pictures: more cannot be read
_METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mean_average_precision": "mAP",
    "roc_auc": "ROC-AUC",
    "d_prime": "d′",
    "expected_calibration_error": "ECE",
}


@dataclass
class EvaluateArguments:
    """Options of an evaluation; those of the data are as in fine-tuning."""

    dataset_config: str | None = setting(None, "configuration of the Hub dataset")
    audio_column: str = setting("audio", "column with the sound")
    label_column: str = setting("label", "column with the label or labels")
    train_split: str = setting("train", "split that the fold or fraction is held out of")
    evaluation_split: str | None = setting(None, "evaluate this whole split")
    fold_column: str | None = setting(None, "column with the fold, instead of a split")
    evaluation_fold: str | None = setting(None, "the fold to evaluate on")
    evaluation_fraction: float = setting(0.2, "held out when there is no split and no fold")
    group_column: str | None = setting(None, "column of what the fraction is of: a speaker, say")
    label_separator: str | None = setting(None, "between the labels of a clip in one string")

    output_dir: str = setting("runs/evaluation", "folder for the report, the tables, the picture")
    json: bool = setting(False, "print the report as JSON instead of tables")
    batch_size: int = setting(16, "windows per forward pass")
    num_workers: int = setting(2, "processes that decode")
    bootstrap_resamples: int = setting(1000, "for the confidence intervals")
    seed: int = setting(0, "of the bootstrap")


@dataclass
class _Clip:
    """A clip as it comes from the data set: decoded, or with what is wrong with it; then scored."""

    file: str
    label: Any  # index, or list of indices, in the data set's order
    waveform: np.ndarray | None = None  # (samples,)
    error: str | None = None
    scores: np.ndarray | None = None  # (labels,)
    windows: int = 0


@dataclass
class _Decoder:
    """Rows to clips, in a worker."""

    sampling_rate: int

    def __call__(self, rows: list[dict[str, Any]]) -> list[_Clip]:
        return [self._clip(row) for row in rows]

    def _clip(self, row: dict[str, Any]) -> _Clip:
        clip = _Clip(row["name"], row["label"])
        try:
            clip.waveform = load_audio(row["audio"], self.sampling_rate)
        except AudioDecodingError as error:
            clip.error = str(error)
        return clip


def evaluate_checkpoints(
    checkpoints: Sequence[str], dataset: str, args: EvaluateArguments
) -> dict[str, Any]:
    """Score a dataset's clips, measure, and write the report's files.

    Args:
        checkpoints: folders or Hub names; of several, the mean probability counts.
        dataset: as for fine-tuning.
        args: the options.

    Returns:
        The report, as in evaluation.json, in the main process; {} in the others:
            "checkpoints"   as given
            "dataset", "dataset_config", "split", "fold_column", "fold", "fraction"
                            what was measured; null where it does not apply
            "task"          "single_label_classification" or "multi_label_classification", by the
                            data; a checkpoint whose config says the other is measured as it is
            "clips"         how many were measured
            "unreadable"    [{"file", "error"}, …]: not among them
            "windowed_clips"    how many of them are longer than (one of) the models' length
            "labels"        the checkpoint's, in its order
            "classes_without_positives"     names: left out of all means over classes
            "metrics"       {name: {"value", "low", "high"}}, names as in `compute_metrics`; null
                            where undefined, or infinite, as d′ is when ROC-AUC is 1
            "confidence", "bootstrap_resamples", "seed"     of low and high
            "per_class"     [{"label", "positives", "precision", "recall", "f1",
                            "average_precision", "roc_auc"}, …], in the order of "labels"
            "mistakes"      the most confident first, [{"file", "labels", "predicted", "score"}, …]
                            for one label per clip; for several
                            {"file", "labels", "label", "mistake": "false alarm" or "miss", "score"}
            "seconds"       for reading and scoring

    Raises:
        ValueError: for wrong paths, columns or options, labels that do not fit, or no sound that
            can be read.
    """
    if args.batch_size < 1 or args.num_workers < 0 or args.bootstrap_resamples < 1:
        raise ValueError(
            "--batch_size and --bootstrap_resamples must be 1 or more, --num_workers 0."
        )
    accelerator = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but without GPUs Accelerate lets each do all the "
            "work alone. Set ACCELERATE_USE_CPU=true."
        )
    classifiers = [load_classifier(name, device=accelerator.device) for name in checkpoints]
    labels = _common_labels(checkpoints, classifiers)
    whole_split = args.evaluation_split is not None
    data = open_labelled_audio(
        dataset,
        args.dataset_config,
        args.audio_column,
        args.label_column,
        args.evaluation_split or args.train_split,  # no other split is read
        args.evaluation_split,
        args.fold_column,
        args.evaluation_fold,
        args.evaluation_fraction,
        None if whole_split else args.group_column,
        args.label_separator,
    )
    columns = _match_labels(data, labels)

    start = time.perf_counter()
    scored = list(_score(classifiers, labels, data, args, accelerator))
    # In an order that does not depend on how many processes there are, as the bootstrap sees it.
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
    by_fold = args.fold_column is not None
    intervals = measured.confidence_intervals(args.bootstrap_resamples, args.seed, _CONFIDENCE)
    report = {
        "checkpoints": list(checkpoints),
        "dataset": dataset,
        "dataset_config": args.dataset_config,
        "split": args.evaluation_split or args.train_split,
        "fold_column": args.fold_column if by_fold else None,
        "fold": args.evaluation_fold if by_fold else None,
        "fraction": None if by_fold or whole_split else args.evaluation_fraction,
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
        "bootstrap_resamples": args.bootstrap_resamples,
        "seed": args.seed,
        "per_class": _per_class(measured, labels),
        "mistakes": _mistakes(measured, labels, [clip.file for clip in readable]),
        "seconds": seconds,
    }
    report = _finite(report)
    _write(report, measured, Path(args.output_dir))
    return report


def _common_labels(checkpoints: Sequence[str], classifiers: Sequence[Any]) -> list[str]:
    """The label names of all checkpoints, in the first one's order."""
    first: list[str] = []
    for name, classifier in zip(checkpoints, classifiers, strict=True):
        config = classifier.model.config
        if config.model_type != "audio-spectrogram-transformer":
            raise ValueError(f"{name} is a {config.model_type} model, expected an AST checkpoint.")
        if config.problem_type == "regression":
            raise ValueError(f"{name} is a regression model, expected a classifier.")
        labels = [config.id2label[index] for index in range(config.num_labels)]
        first = first or labels
        if len(set(labels)) < len(labels):
            raise ValueError(f"{name} gives several of its labels the same name.")
        if set(labels) != set(first):
            odd = sorted(set(labels) ^ set(first))[0]
            raise ValueError(
                f"{name} has other labels than {checkpoints[0]} (only one has {odd!r}): an "
                "ensemble needs the same in all."
            )
    kinds = {classifier.model.config.problem_type for classifier in classifiers}
    if len(kinds) > 1:
        raise ValueError(
            f"The checkpoints' configs have different problem types ({', '.join(map(str, kinds))})"
            ": their probabilities mean different things and cannot be averaged."
        )
    return first


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
    classifiers: Sequence[Any],
    labels: list[str],
    data: LabelledAudio,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> Iterator[_Clip]:
    """This process's clips with their scores, or with what is wrong with them."""
    rate = max(classifier.feature_extractor.sampling_rate for classifier in classifiers)
    stream = rank_share(
        data.evaluation, accelerator.process_index, accelerator.num_processes, args.num_workers
    )
    loader = DataLoader(
        stream,
        batch_size=args.batch_size,
        num_workers=min(args.num_workers, stream.num_shards),
        collate_fn=_Decoder(rate),
    )
    # Published AudioSet checkpoints do not say that they are multi-label; then the data tell.
    problem_type = classifiers[0].model.config.problem_type or data.problem_type
    function = "sigmoid" if problem_type == "multi_label_classification" else "softmax"
    share = math.ceil(data.evaluation_clips / accelerator.num_processes)
    with tqdm(
        desc="scoring", total=share, unit=" clips", disable=not accelerator.is_main_process
    ) as progress:
        for clips in loader:
            readable = [clip for clip in clips if clip.waveform is not None]
            sounds = [{"array": clip.waveform, "sampling_rate": rate} for clip in readable]
            answers = [
                classifier(
                    sounds,
                    batch_size=args.batch_size,
                    top_k=len(labels),
                    return_timestamps=True,
                    function_to_apply=function,
                )
                for classifier in classifiers
                if sounds
            ]
            for clip, *heard in zip(readable, *answers, strict=False):
                by_name = [{a["label"]: a["score"] for a in answer["labels"]} for answer in heard]
                clip.scores = np.mean([[b[name] for name in labels] for b in by_name], axis=0)
                clip.windows = max(len(answer["windows"]) for answer in heard)
                clip.waveform = None
            progress.update(len(clips))
            yield from clips


def _per_class(measured: ScoredClips, labels: list[str]) -> list[dict[str, Any]]:
    columns = {
        "positives": measured.relevant.sum(axis=0),
        **dict(zip(("precision", "recall", "f1"), measured.decisions(), strict=True)),
        **dict(zip(("average_precision", "roc_auc"), measured.rankings(), strict=True)),
    }
    return [
        {"label": label, **{name: values[index].item() for name, values in columns.items()}}
        for index, label in enumerate(labels)
    ]


def _mistakes(measured: ScoredClips, labels: list[str], files: list[str]) -> list[dict[str, Any]]:
    """The wrong answers that the model is surest of."""
    wrong = measured.decided != measured.relevant
    if not measured.is_multi_label:
        wrong &= measured.decided  # a label that was given in another's place is one mistake
    sureness = np.where(measured.decided, measured.scores, 1 - measured.scores)
    clips, given = np.nonzero(wrong)
    surest = np.argsort(-sureness[clips, given], kind="stable")[:_MISTAKES]
    mistakes = []
    for clip, label in zip(clips[surest], given[surest], strict=True):
        mistake: dict[str, Any] = {
            "file": files[clip],
            "labels": [labels[index] for index in np.flatnonzero(measured.relevant[clip])],
        }
        if measured.is_multi_label:
            mistake["label"] = labels[label]
            mistake["mistake"] = "false alarm" if measured.decided[clip, label] else "miss"
        else:
            mistake["predicted"] = labels[label]
        mistakes.append({**mistake, "score": measured.scores[clip, label].item()})
    return mistakes


def _finite(value: Any) -> Any:
    """With None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(report: dict[str, Any], measured: ScoredClips, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    mistakes = [{**row, "labels": "; ".join(row["labels"])} for row in report["mistakes"]]
    for name, rows in (("per_class", report["per_class"]), ("mistakes", mistakes)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    if measured.is_multi_label:
        draw_average_precision(report, folder / "average_precision.png")
    else:
        draw_confusion_matrix(measured, report["labels"], folder / "confusion_matrix.png")


def draw_confusion_matrix(measured: ScoredClips, labels: list[str], path: Path) -> None:
    """Counts of (true, predicted) labels; of many classes, those with the most mistakes."""
    from matplotlib.figure import Figure

    matrix = measured.relevant.T.astype(int) @ measured.decided  # (true, predicted)
    mistakes = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    chosen = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    title = f"{matrix.sum()} clips, {matrix.diagonal().sum()} right"
    if len(chosen) > _SHOWN_CLASSES:
        title += f"; the {_SHOWN_CLASSES} of {len(chosen)} classes with the most mistakes"
        chosen = np.sort(chosen[np.argsort(-mistakes[chosen], kind="stable")[:_SHOWN_CLASSES]])
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    matrix, shares = (values[np.ix_(chosen, chosen)] for values in (matrix, shares))
    names = [_shortened(labels[index]) for index in chosen]

    size = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, matrix[row, column], ha="center", va="center", color=color)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    figure.colorbar(image, label="share of the row's clips", shrink=0.7)
    figure.savefig(path, dpi=110)


def draw_average_precision(report: dict[str, Any], path: Path) -> None:
    """A bar per class with positives, best on top; of many classes, the lowest ones."""
    from matplotlib.figure import Figure

    rows = [row for row in report["per_class"] if row["positives"]]
    rows.sort(key=lambda row: row["average_precision"])
    mean = report["metrics"]["mean_average_precision"]["value"]
    title = f"average precision, {report['clips']} clips"
    if len(rows) > _SHOWN_CLASSES:
        title += f"; the lowest {_SHOWN_CLASSES} of {len(rows)} classes"
        rows = rows[:_SHOWN_CLASSES]
    figure = Figure(figsize=(7, 1.6 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    values = [row["average_precision"] for row in rows]
    axes.barh(places, values, color="#6a9fcf")
    chance = [row["positives"] / report["clips"] for row in rows]
    axes.plot(chance, places, "|", color="black", markersize=9, label="by chance")
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.2f}", (value, place), (3, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    if mean is not None:
        axes.axvline(mean, color="tab:orange", label=f"mean {mean:.3f}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes.set_yticks(places, [f"{_shortened(row['label'])} ({row['positives']})" for row in rows])
    axes.set(xlim=(0, 1.08), ylim=(-0.7, len(rows) - 0.3), xlabel="average precision")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def format_report(report: dict[str, Any]) -> str:
    """The report as tables for the terminal."""
    part = f"split {report['split']}"
    if report["fold_column"]:
        part += f", {report['fold_column']} {report['fold']}"
    elif report["fraction"]:
        part += f", the held-out {100 * report['fraction']:g} % (--evaluation_split for all)"
    lines = [
        f"{report['clips']} clips of {report['dataset']} ({part})",
        *(f"  scored by {name}" for name in report["checkpoints"]),
    ]
    if len(report["checkpoints"]) > 1:
        lines.append("  (an ensemble: the mean of their probabilities)")
    if report["windowed_clips"]:
        lines.append(f"  {report['windowed_clips']} longer than the model: heard in windows")
    if report["unreadable"]:
        lines.append(f"  {len(report['unreadable'])} more cannot be read: left out")
    if missing := report["classes_without_positives"]:
        names = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        lines.append(f"  {len(missing)} classes have no clip, left out of the means: {names}")

    lines += ["", f"{'':12}{'value':>9}   {100 * report['confidence']:g} % interval"]
    for name, metric in report["metrics"].items():
        low, high = _number(metric["low"]), _number(metric["high"])
        lines.append(f"{_METRIC_NAMES[name]:12}{_number(metric['value']):>9}   {low} – {high}")

    rows = [row for row in report["per_class"] if row["positives"]]
    rows.sort(key=lambda row: row["average_precision"])
    width = max(5, *(len(_shortened(row["label"])) for row in rows)) if rows else 5
    lines += ["", f"{'class':{width}}  clips  precision  recall     F1     AP  ROC-AUC"]
    for row in rows[:_SHOWN_CLASSES]:
        precision, recall, f1, ap, auc = (
            _number(row[name], 3)
            for name in ("precision", "recall", "f1", "average_precision", "roc_auc")
        )
        lines.append(
            f"{_shortened(row['label']):{width}}  {row['positives']:>5}  {precision:>9}  "
            f"{recall:>6}  {f1:>5}  {ap:>5}  {auc:>7}"
        )
    if len(rows) > _SHOWN_CLASSES:
        lines.append(f"… and {len(rows) - _SHOWN_CLASSES} better ones in per_class.csv")

    if report["mistakes"]:
        lines += ["", "most confident mistakes"]
    for mistake in report["mistakes"][:_SHOWN_MISTAKES]:
        said = mistake.get("predicted") or f"{mistake['mistake']}: {mistake['label']}"
        is_really = ", ".join(mistake["labels"]) or "none of the labels"
        lines.append(
            f"{100 * mistake['score']:5.1f} %  {said}  (is {is_really})  {mistake['file']}"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = HfArgumentParser(
        EvaluateArguments, description="Measure AST checkpoints on labelled sound."
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="CHECKPOINT … DATASET",
        help="checkpoint folder(s) or Hub name(s), of several the mean probability counts; then a "
        "folder of class folders, Parquet or tar file(s), or a Hub dataset",
    )
    options = vars(parser.parse_args())
    *checkpoints, dataset = options.pop("paths")
    args = EvaluateArguments(**options)
    logging.disable_progress_bar()

    def command() -> None:
        if not checkpoints:
            raise ValueError(f"Name a checkpoint and a dataset; got {dataset!r} only (see --help).")
        report = evaluate_checkpoints(checkpoints, dataset, args)
        if not report:  # not the main process
            return
        if args.json:
            print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
        else:
            print(format_report(report))
            print(f"\nTables, picture and evaluation.json: {args.output_dir}")
        for unreadable in report["unreadable"][:_SHOWN_MISTAKES]:
            print(f"ast-evaluate: left out: {unreadable['error']}", file=sys.stderr)

    run_command("ast-evaluate", command)


if __name__ == "__main__":
    main()
