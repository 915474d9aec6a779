"""The figures of docs/general_model.md, printed as the page has them:

    python -m docs.measure_general_model TEACHER ESC10 [--model CHECKPOINT]

TEACHER is a folder of Parquet files with `audio`, `source` and a teacher's `logits` (float16 bytes,
in AudioSet's order); ESC10 one with `audio` and `label`. Nothing measured here was trained on.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ast_scripts.common.checkpoints import DEFAULT_MODEL
from ast_scripts.evaluation.options import EvaluateOptions
from ast_scripts.evaluation.scoring import evaluate_checkpoints
from ast_scripts.inference.classifier import Classifier
from ast_scripts.inference.heard import Heard
from datasets import Features
from sklearn.metrics import average_precision_score

HELD_OUT = (
    "ufoai-sound",
    "gh_Fris0uman+CDDA-Soundpacks",
    "unknown-horizons",
    "sonic-pi-samples",
    "klettres-data",
)
HEARD_BY_TEACHER = 0.3  # the probability from which the teacher counts as having heard a label
FEWEST = 3  # clips in which it did, for a label's average precision to mean something
# AudioSet's list of labels runs through its ontology from top to bottom.
GROUPS = {
    "human": (0, 72),
    "animals": (72, 137),
    "music": (137, 283),
    "nature": (283, 300),
    "things, and what they do": (300, 500),
    "scene and channel": (500, 527),
}


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.rglob("*.parquet")):
        yield from pq.read_table(file).to_pylist()


def heard_by(classifier: Classifier, sounds: list[bytes]) -> np.ndarray:
    answers = dict(classifier.hear_each(enumerate(sounds)))
    scores = []
    for index in range(len(sounds)):
        heard = answers[index]
        assert isinstance(heard, Heard), heard
        scores.append(heard.clip_scores())
    return np.stack(scores)


def agreement(classifier: Classifier, teacher: Path) -> None:
    rows = [row for row in rows_of(teacher) if row.get("source") in HELD_OUT]
    logits = np.stack([np.frombuffer(row["logits"], np.float16) for row in rows]).astype(float)
    scores = heard_by(classifier, [audio_of(row) for row in rows])
    heard = 1 / (1 + np.exp(-logits)) > HEARD_BY_TEACHER
    measurable = heard.sum(axis=0) >= FEWEST
    precision = {
        label: average_precision_score(heard[:, label], scores[:, label])
        for label in np.flatnonzero(measurable)
    }
    same = (scores.argmax(axis=1) == logits.argmax(axis=1)).mean()
    best, said = logits.argmax(axis=1), np.argsort(-scores, axis=1)[:, :3]
    in_three = (said == best[:, None]).any(axis=1).mean()
    print(f"{len(rows)} clips of {len(HELD_OUT)} held-out sources: the teacher's best label is the")
    print(f"student's in {same:.1%}, among its best three in {in_three:.1%}.\n")
    print("| group | labels measured | mAP against the teacher's answers |\n| --- | --- | --- |")
    print(f"| all | {len(precision)} | {np.mean(list(precision.values())):.3f} |")
    for name, (first, last) in GROUPS.items():
        group = [value for label, value in precision.items() if first <= label < last]
        print(
            f"| {name} | {len(group)} | {np.mean(group):.3f} |" if group else f"| {name} | 0 | – |"
        )


def naming(model: str, esc10: str) -> None:
    options = EvaluateOptions(
        evaluation_split="train",
        match_labels="esc10_in_audioset",
        output="runs/general_model",
        num_workers=0,
    )
    report = evaluate_checkpoints([model], esc10, options)
    accuracy = report["metrics"]["accuracy"]
    print(
        f"\nESC-10 by AudioSet's names, {report['clips']} clips: {accuracy['value']:.2%} "
        f"({accuracy['low']:.2%} to {accuracy['high']:.2%})\n"
    )
    print("| class | recall | precision |\n| --- | --- | --- |")
    for row in report["per_class"]:
        print(
            f"| {row['label'].replace('_', ' ')} | {row['recall']:.2f} | {row['precision']:.2f} |"
        )


def examples(classifier: Classifier, esc10: Path) -> None:
    """The first clip of each class, whatever comes out."""
    first: dict[int, bytes] = {}
    columns = Features.from_arrow_schema(pq.read_schema(next(esc10.rglob("*.parquet"))))
    for row in rows_of(esc10):
        first.setdefault(row["label"], audio_of(row))
    scores = heard_by(classifier, [first[label] for label in sorted(first)])
    print("\n| the first clip of class | says |\n| --- | --- |")
    for label, row in zip(sorted(first), scores, strict=True):
        best = np.argsort(-row)[:3]
        said = ", ".join(f"{classifier.label_names[index]} {row[index]:.2f}" for index in best)
        print(f"| {columns['label'].int2str(label).replace('_', ' ')} | {said} |")


def speed(classifier: Classifier, seconds: int = 300) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 16000 * seconds).astype(np.float32)
    classifier.hear(sound[: 16000 * 20])
    start = time.process_time()
    classifier.hear(sound)
    print(
        f"\n{seconds / (time.process_time() - start):.0f} s of sound per second of processor time"
    )


def audio_of(row: dict[str, Any]) -> bytes:
    audio = row["audio"]
    return audio["bytes"] if isinstance(audio, dict) else audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("esc10", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    classifier = Classifier(options.model)
    agreement(classifier, options.teacher)
    naming(options.model, str(options.esc10))
    examples(classifier, options.esc10)
    speed(classifier)


if __name__ == "__main__":
    main()
