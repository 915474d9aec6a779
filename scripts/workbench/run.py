"""What `ast-index` and `ast-teach` do."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checkpoints import DEFAULT_MODEL
from ..common.files import write_whole
from ..common.options import did_you_mean
from ..common.shown import clock, shown
from ..common.tables import write_csv
from ..inference.clips import clip_name, write_clip
from ..inference.options import ClassifyOptions
from ..inference.parts import Parts
from .index import SoundIndex, build_index, embed, read_vectors, settings_of
from .marks import Mark, marks_of_annotations, read_marks, to_label_studio
from .options import IndexOptions, TeachOptions
from .queues import pick
from .teach import (
    Lesson,
    background_marks,
    calibrate_model,
    head_of,
    next_windows,
    targets_of,
    write_checkpoint,
)
from .teach import teach as fit

_SHOWN_LABELS = 50


def index(options: IndexOptions) -> int:
    """Run ast-index. Returns the exit status."""
    folder = options.output
    status = 0
    if options.sounds:
        built = build_index(folder, _listening(options))
        if built is None:
            return 0  # the first process continues
        run, errors = built
        sounds, windows = Parts(folder).count()
        print(
            f"{run} {shown(folder)} holds {windows} windows of {sounds} recordings.",
            file=sys.stderr,
        )
        from ..inference.run import report_errors

        report_errors("ast-index", errors)
        status = 1 if errors else 0
    if options.like or options.label:
        _search(options)
    return status


def _listening(options: IndexOptions) -> ClassifyOptions:
    """What to index. An existing index fixes the settings; the command line must not differ."""
    known = settings_of(options.output)
    model = options.model or known.get("model") or DEFAULT_MODEL
    windows: dict[str, Any] = {
        name: known.get(name) if getattr(options, name) is None else getattr(options, name)
        for name in ("chunk_length_s", "hop_length_s")
    }
    names = ("sounds", "output", "batch_size", "split", "dataset_config", "audio_column")
    same: dict[str, Any] = {name: getattr(options, name) for name in names}
    return ClassifyOptions(
        model=model,
        top_k=1,
        embeddings=True,
        **windows,
        **same,
    )


def _search(options: IndexOptions) -> None:
    from ..inference.classifier import Classifier

    found = SoundIndex.open(options.output)
    if options.label is not None or any(not name.endswith(".npy") for name in options.like):
        classifier = Classifier(
            options.model or found.about["model"],
            batch_size=options.batch_size,
            chunk_length_s=found.settings["chunk_length_s"],
            hop_length_s=found.settings["hop_length_s"],
        )
        found.check(classifier)
    if options.label is None:
        examples = [
            read_vectors(name) if name.endswith(".npy") else embed(classifier, name)
            for name in options.like
        ]
        values = found.similarity(np.concatenate(examples))
        label = ""
    else:
        label = options.label
        if label not in classifier.label_names:
            raise ValueError(
                f"{classifier.model_name} has no label {label!r}"
                f"{did_you_mean(label, classifier.label_names)}"
            )
        values = found.scores(head_of(classifier), classifier.label_names.index(label))
    windows = pick(
        values, found.sound_of_window, found.spans, options.count, None, options.per_recording
    )
    rows = rows_of(found, windows, values, label)
    for row in rows:
        span = f"{clock(row['start'], 1)} – {clock(row['end'], 1)}"
        print(f"{row['score']:6.3f}  {span:>19}  {shown(row['file'])}")
    if options.table is not None:
        write_csv(options.table, ["file", "start", "end", "label", "score"], rows)
    if options.label_studio is not None:
        _write_tasks(options.label_studio, rows)
    if options.clips is not None:
        write_clips(found, rows, options.clips, f".{options.clip_format}")


def rows_of(
    found: SoundIndex, windows: Sequence[int], values: np.ndarray, label: str
) -> list[dict[str, Any]]:
    """Windows as rows of a table: file, start, end, label, score."""
    return [
        {
            "file": found.sounds[found.sound_of_window[window]],
            "start": float(found.spans[window, 0]),
            "end": float(found.spans[window, 1]),
            "label": label,
            "score": float(values[window]),
        }
        for window in windows
    ]


def _write_tasks(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import json

    marks = [Mark(row["file"], row["start"], row["end"], row["label"] or "found") for row in rows]
    tasks = to_label_studio(marks, [row["score"] for row in rows])
    text = json.dumps(tasks, indent=2, ensure_ascii=False)
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_clips(
    found: SoundIndex, rows: Sequence[dict[str, Any]], folder: Path, suffix: str
) -> None:
    """Cut stretches out of their recordings."""
    where = found.locate(dict.fromkeys(row["file"] for row in rows))
    for row in rows:
        name = clip_name(row["file"], row["start"], row["end"], row["score"], suffix)
        write_clip(folder / name, where[row["file"]], row["start"], row["end"])
    print(f"{len(rows)} clips: {shown(folder)}", file=sys.stderr)


def teach(options: TeachOptions) -> int:
    """Run ast-teach. Returns the exit status."""
    from ..inference.classifier import Classifier

    found = SoundIndex.open(options.index)
    marks = [mark for name in options.marks for mark in read_marks(Path(name))]
    if options.annotations is not None:
        annotated, problems = marks_of_annotations(
            options.annotations,
            found.sounds,
            options.unmarked == "background",
            options.annotation_label_column,
        )
        marks += annotated
        if problems:
            print(shown(problems), file=sys.stderr)
    if options.background is not None:
        marks += background_marks(options.background, found.sounds)
    classifier = Classifier(options.model or found.about["model"])
    found.check(classifier)
    if options.head == "keep":
        lesson = calibrate_model(found, marks, options.wish, classifier)
    else:
        exclusive = {"auto": None, "exclusive": True, "independent": False}[options.labels]
        lesson = fit(found, marks, options.wish, exclusive)
    report = lesson.report(found)
    write_checkpoint(lesson, classifier, options.output, report)
    print(format_report(lesson, report, str(options.wish)))
    print(f"Checkpoint: {shown(options.output)}", file=sys.stderr)
    if options.queue is not None:
        _queue(options, found, marks, lesson)
    return 0


def format_report(lesson: Lesson, report: dict[str, Any], wish: str) -> str:
    """The lesson's table, for a terminal."""
    lines = [
        f"{report['marked_windows']} marked windows of {report['marked_recordings']} recordings, "
        f"{len(lesson.labels)} labels ({report['labels']}), {lesson.seconds:.1f} s."
    ]
    figures = []
    if "accuracy" in report:
        figures.append(f"accuracy {report['accuracy']:.1%}")
    figures.append(f"mean average precision {report['mean_average_precision']:.3f}")
    errors = report.get("calibration_error")
    if errors:
        figures.append(f"calibration error {errors['before']:.3f} -> {errors['after']:.3f}")
    held_out = "held-out recordings"
    if lesson.strength is None:
        held_out = "the marked recordings, on which the model must not have been trained"
    lines.append(f"On {held_out}: {', '.join(figures)}.")
    width = max([len(shown(label)) for label in lesson.labels] + [5])
    lines.append("")
    lines.append(
        f"{'label':<{width}}  recordings     AP  threshold  precision           recall    F1   "
        f"({wish})"
    )
    for threshold in lesson.thresholds[:_SHOWN_LABELS]:
        low, high = threshold.precision_interval
        lines.append(
            f"{shown(threshold.label):<{width}}  {threshold.recordings:10d}  "
            f"{report['average_precision'][threshold.label]:5.2f}  {threshold.value:9.3f}  "
            f"{threshold.precision:5.2f} ({low:.2f}–{high:.2f})  {threshold.recall:6.2f}  "
            f"{threshold.f1:4.2f}{'  ' if threshold.message else ''}{threshold.message}"
        )
    more = len(lesson.thresholds) - _SHOWN_LABELS
    if more > 0:
        lines.append(f"… and {more} more: teaching.json")
    return "\n".join(lines)


def _queue(options: TeachOptions, found: SoundIndex, marks: Sequence[Mark], lesson: Lesson) -> None:
    label = None
    if options.queue_label is not None:
        if options.queue_label not in lesson.labels:
            raise ValueError(
                f"--queue_label {options.queue_label!r} is not one of the labels"
                f"{did_you_mean(options.queue_label, lesson.labels)}"
            )
        label = lesson.labels.index(options.queue_label)
    targets = targets_of(found, marks, lesson.labels)
    assert options.queue is not None
    windows = next_windows(found, options.queue, options.count, targets, lesson.head, label)
    rows = queue_rows(found, windows, lesson)
    columns = ["file", "start", "end", "label", "suggestion", "score"]
    write_csv(options.queue_file, columns, rows)
    print(
        f"{len(rows)} windows to mark next ({options.queue}): {shown(options.queue_file)}. Fill in "
        "the column label, and give the file to ast-teach with the others.",
        file=sys.stderr,
    )
    if options.clips is not None:
        write_clips(found, rows, options.clips, ".wav")


def queue_rows(found: SoundIndex, windows: Sequence[int], lesson: Lesson) -> list[dict[str, Any]]:
    """Windows of a queue with the head's suggestions, and an empty label to fill in."""
    scores = lesson.head.scores(found.normed(np.array(windows, int)))
    rows = rows_of(found, windows, np.zeros(len(found)), "")
    for row, of_labels in zip(rows, scores, strict=True):
        best = int(of_labels.argmax())
        row["suggestion"], row["score"] = lesson.labels[best], float(of_labels[best])
    return rows
