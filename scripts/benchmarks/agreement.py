"""`ast-benchmark agreement`: how far a student says what its teacher says of sounds.

    teacher     probabilities (clips, labels) from a column of the data or from stored answers
    student     scores (clips, labels), over windows of longer clips

mAP takes for true what the teacher gives at least `--threshold`; labels it never gives are left
out. Top-1 is the share of clips with the same likeliest label.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..common.bundled import read_label_names
from ..common.options import did_you_mean
from ..data.answers import LOGITS, Answers, ColumnAnswers, read_answers, read_vector
from ..data.labelled import sound_name
from ..data.sources import open_stream
from ..evaluation.metrics import ScoredClips
from ..inference.classifier import Classifier
from .conditions import on_threads
from .options import AgreementOptions

# The first labels, in AudioSet's order, of its ontology's top groups.
_GROUPS = {
    "Speech": "human sounds",
    "Animal": "animals",
    "Music": "music",
    "Wind": "natural sounds",
    "Vehicle": "sounds of things",
    "Basketball bounce": "source-ambiguous sounds",
    "Inside, small room": "environment and background",
}


def groups_of(labels: list[str]) -> dict[str, list[int]]:
    """AudioSet's labels by group; other labels are one group."""
    groups: dict[str, list[int]] = {}
    is_audioset = labels == read_label_names("audioset")
    name = "all labels"
    for index, label in enumerate(labels):
        name = _GROUPS.get(label, name) if is_audioset else name
        groups.setdefault(name, []).append(index)
    return groups


def agreement(
    student: np.ndarray, teacher: np.ndarray, labels: list[str], threshold: float
) -> dict[str, dict[str, float]]:
    """Of all clips and of each group of labels: clips, labels that the teacher gives, mAP, top-1.

    Args:
        student, teacher: scores (clips, labels).
        labels: their names.
        threshold: of the teacher's scores.
    """
    relevant = teacher >= threshold
    precisions = ScoredClips(student, relevant.astype(int)).rankings()[0]  # NaN without positives
    same = student.argmax(axis=1) == teacher.argmax(axis=1)
    found = {}
    for name, indices in {"all": list(range(len(labels))), **groups_of(labels)}.items():
        given = [index for index in indices if relevant[:, index].any()]
        clips = np.isin(teacher.argmax(axis=1), indices)
        found[name] = {
            "clips": int(clips.sum()),
            "labels": len(given),
            "mean_average_precision": float(np.mean(precisions[given])) if given else float("nan"),
            "top_1": float(same[clips].mean()) if clips.any() else float("nan"),
        }
    return found


def _sounds(options: AgreementOptions) -> Iterator[tuple[dict[str, Any], Any]]:
    """What tells a clip and holds its answer, if the dataset does; and its sound."""
    stream = open_stream(options.dataset, options.split)
    count = 0
    for row in stream:
        if options.sources and str(row.get(options.source_column)) not in options.sources:
            continue
        count += 1
        about = {"name": sound_name(row, "audio")}
        if not options.teacher:
            if options.teacher_column not in row:
                known = did_you_mean(options.teacher_column, row)
                raise ValueError(f"{options.dataset} has no such column{known}")
            about[LOGITS] = row[options.teacher_column]
        yield about, row["audio"]
    if not count:
        raise ValueError(f"{options.dataset} has no clip of {', '.join(options.sources)}.")


@on_threads
def benchmark_agreement(options: AgreementOptions) -> None:
    """Hear all clips, or those of some sources, and compare."""
    classifier = Classifier(options.checkpoint)
    labels = classifier.label_names
    stored: Answers
    if options.teacher:
        stored = read_answers(options.teacher)
        stored.activation = stored.activation or "sigmoid"
    else:
        first = next(_sounds(options))[0]
        stored = ColumnAnswers(len(read_vector(first[LOGITS])), 0, "sigmoid")
    names = stored.label_names or read_label_names(options.teacher_labels)
    if set(names) != set(labels):
        raise ValueError(
            f"{options.checkpoint} has {len(labels)} labels, the teacher {len(names)}: they must "
            "be the same."
        )
    order = [names.index(label) for label in labels]
    student, teacher, seconds, began = [], [], 0.0, time.perf_counter()
    for row, heard in classifier.hear_each(_sounds(options)):
        if isinstance(heard, str):
            print(f"Left out: {row['name']}: {heard}")
            continue
        seconds += heard.duration
        student.append(heard.clip_scores())
        answer = stored(row, [(0.0, heard.duration)])[: len(names)]
        teacher.append(answer.numpy()[order])
    elapsed = time.perf_counter() - began
    found = agreement(np.stack(student), np.stack(teacher), labels, options.threshold)
    print(
        f"{len(student)} clips, {seconds / 3600:.2f} h, {seconds / elapsed:.0f} x real time; the "
        f"teacher gives a label at {options.threshold:g} or more"
    )
    print(f"{'':26}{'clips':>7}{'labels':>8}{'mAP':>8}{'top-1':>9}")
    for group, values in found.items():
        print(
            f"{group:26}{values['clips']:>7}{values['labels']:>8}"
            f"{values['mean_average_precision']:>8.3f}{100 * values['top_1']:>8.1f}%"
        )
    if options.json is not None:
        text = json.dumps({"threshold": options.threshold, "agreement": found}, indent=2)
        options.json.write_text(text, encoding="utf-8")
