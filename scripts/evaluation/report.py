"""The report of an evaluation: tables for the terminal and for files, pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import write_whole
from ..common.shown import readable, shown
from ..common.tables import write_csv
from .curves import draw_precision_recall, draw_reliability
from .detection import DETECTION_METRICS, draw_onset_errors
from .metrics import METRICS, ScoredClips

_MISTAKES = 50  # in the files
SHOWN_MISTAKES = 10  # on the terminal
_SHOWN_CLASSES = 50  # on the terminal and in pictures: more cannot be read


def per_class(measured: ScoredClips, labels: list[str]) -> list[dict[str, Any]]:
    columns = {
        "positives": measured.relevant.sum(axis=0),
        **dict(zip(("precision", "recall", "f1"), measured.decisions(), strict=True)),
        **dict(zip(("average_precision", "roc_auc"), measured.rankings(), strict=True)),
    }
    return [
        {"label": label, **{name: values[index].item() for name, values in columns.items()}}
        for index, label in enumerate(labels)
    ]


def most_confident_mistakes(
    measured: ScoredClips, labels: list[str], files: list[str]
) -> list[dict[str, Any]]:
    """The model's most confident wrong answers."""
    wrong = measured.decided != measured.relevant
    if not measured.is_multi_label:
        wrong &= measured.decided  # predicting one label instead of another is one mistake
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


def finite(value: Any) -> Any:
    """With None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(report: dict[str, Any], measured: ScoredClips, folder: Path) -> None:
    """Write the files of `ast-evaluate`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(
        folder / "evaluation.json",
        lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )
    mistakes = [{**row, "labels": "; ".join(row["labels"])} for row in report["mistakes"]]
    for name, rows in (("per_class", report["per_class"]), ("mistakes", mistakes)):
        write_csv(folder / f"{name}.csv", list(rows[0]) if rows else [], rows)
    if (detection := report.get("detection")) is not None:
        rows = detection["per_class"]
        write_csv(folder / "detection_per_class.csv", list(rows[0]), rows)
        found = {"": (detection["onsets"]["errors_s"], detection["events"])}
        draw_onset_errors(found, folder / "onset_errors.png")
    if measured.is_multi_label:
        draw_average_precision(report, folder / "average_precision.png")
    else:
        draw_confusion_matrix(measured, report["labels"], folder / "confusion_matrix.png")
    draw_reliability(measured, folder / "reliability.png")
    draw_precision_recall(measured, report["labels"], folder / "precision_recall.png")


def draw_confusion_matrix(measured: ScoredClips, labels: list[str], path: Path) -> None:
    """Counts of (true, predicted) labels; with many classes, those with the most mistakes."""
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
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor",
                    parse_math=False)  # fmt: skip
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    figure.colorbar(image, label="share of the row's clips", shrink=0.7)
    figure.savefig(path, dpi=110)


def draw_average_precision(report: dict[str, Any], path: Path) -> None:
    """A bar per class with positives, best on top; with many classes, the lowest ones."""
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
    names = [f"{_shortened(row['label'])} ({row['positives']})" for row in rows]
    axes.set_yticks(places, names, parse_math=False)  # a name can contain $
    axes.set(xlim=(0, 1.08), ylim=(-0.7, len(rows) - 0.3), xlabel="average precision")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _shortened(label: str) -> str:
    name = readable(label)
    return name if len(name) <= 28 else name[:27] + "…"


def format_report(report: dict[str, Any]) -> str:
    """The report as tables for the terminal."""
    part = f"split {report['split']}"
    if report["fold_column"]:
        part += f", {report['fold_column']} {report['fold']}"
    elif report["fraction"]:
        part += f", the held-out {100 * report['fraction']:g} % (--evaluation_split for all)"
    lines = [
        f"{report['clips']} clips of {shown(report['dataset'])} ({part})",
        *(f"  scored by {name}" for name in report["checkpoints"]),
    ]
    if len(report["checkpoints"]) > 1:
        lines.append("  (an ensemble: the mean of their probabilities)")
    if report["windowed_clips"]:
        lines.append(f"  {report['windowed_clips']} longer than the model: cut into windows")
    if report["unreadable"]:
        lines.append(f"  {len(report['unreadable'])} more cannot be read: skipped")
    if missing := report["classes_without_positives"]:
        names = shown(", ".join(missing[:10])) + (", …" if len(missing) > 10 else "")
        lines.append(f"  {len(missing)} classes without clips, excluded from means: {names}")

    lines += ["", f"{'':12}{'value':>9}   {100 * report['confidence']:g} % interval"]
    for name, metric in report["metrics"].items():
        low, high = _number(metric["low"]), _number(metric["high"])
        lines.append(f"{METRICS[name].title:12}{_number(metric['value']):>9}   {low} – {high}")

    if "detection" in report:
        lines += _format_detection(report["detection"])
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
    for mistake in report["mistakes"][:SHOWN_MISTAKES]:
        said = mistake.get("predicted") or f"{mistake['mistake']}: {mistake['label']}"
        is_really = ", ".join(mistake["labels"]) or "none of the labels"
        lines.append(
            f"{100 * mistake['score']:5.1f} %  {shown(said)}  (is {shown(is_really)})  "
            f"{shown(mistake['file'])}"
        )
    return "\n".join(lines)


def _format_detection(detection: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"detection in {detection['recordings']} recordings: {detection['events']} annotated "
        f"events, {detection['found']} found",
    ]
    for name, title in DETECTION_METRICS.items():
        value, low, high = (
            _number(detection["metrics"][name][k]) for k in ("value", "low", "high")
        )
        lines.append(f"{title:12}{value:>9}   {low} – {high}")
    onsets = detection["onsets"]
    lines.append(
        f"onsets: {100 * onsets['within_200_ms']:.0f} % of the events within 200 ms, "
        f"median distance {_number(onsets['median_error_s'], 2)} s"
    )
    rows = sorted(detection["per_class"], key=lambda row: row["event_f1"])
    width = max(5, *(len(_shortened(row["label"])) for row in rows))
    lines += ["", f"{'class':{width}}  events  found  PSDS 1  PSDS 2  event F1  segment F1"]
    for row in rows[:_SHOWN_CLASSES]:
        psds_1, psds_2, event_f1, segment_f1 = (_number(row[n], 3) for n in DETECTION_METRICS)
        lines.append(
            f"{_shortened(row['label']):{width}}  {row['events']:>6}  {row['found']:>5}  "
            f"{psds_1:>6}  {psds_2:>6}  {event_f1:>8}  {segment_f1:>10}"
        )
    return lines


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
