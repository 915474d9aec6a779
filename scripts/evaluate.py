"""Measure a checkpoint, or several as an ensemble, on labelled sound.

    ast-evaluate runs/my_sounds/checkpoint my_sounds/

It uses the part of the dataset that fine-tuning with the same options held out, or, with
`--evaluation_split train`, the whole split. Several checkpoints form an ensemble: the mean of their
probabilities. Labels are matched by name, whatever their order. Clips are scored as by
`pipeline("audio-classification")`: one longer than the model's length is cut into half-overlapping
windows, and gets the mean of their probabilities, weighted by the sound in each. Sounds that cannot
be read are reported and skipped. Several processes share the clips, each counted once:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m ast_scripts.evaluate …

With `--annotations` it also measures when sounds are heard, for a detector or a classifier: PSDS,
event-based and segment-based F1, onsets. Events are made as by ast-classify, with the same options:

    ast-evaluate runs/detector/checkpoint recordings/ --annotations raven/ --median_filter_s 0.3

It prints a table and writes into `--output`:

    evaluation.json       everything below; see `evaluate_checkpoints` for the fields
    per_class.csv         label, positives, precision, recall, f1, average_precision, roc_auc
    mistakes.csv          the most confident ones, with their files
    confusion_matrix.png  one label per clip;  average_precision.png  any number of labels
    detection_per_class.csv, onset_errors.png   with --annotations
"""

import json
import sys
from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.lean import quiet_libraries
from .common.options import run_command
from .evaluation.options import EvaluateOptions


def run(options: EvaluateOptions) -> None:
    if len(options.paths) < 2:
        given = f"; got {options.paths[0]!r} only" if options.paths else ""
        raise ValueError(f"Name a checkpoint and a dataset{given} (see ast-evaluate --help).")
    check_checkpoints(*options.paths[:-1])
    quiet_libraries()
    from .evaluation.report import SHOWN_MISTAKES, format_report
    from .evaluation.scoring import evaluate_checkpoints

    *checkpoints, dataset = options.paths
    report = evaluate_checkpoints(checkpoints, dataset, options)
    if not report:  # not the main process
        return
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(format_report(report))
        print(f"\nTables, picture and evaluation.json are in {options.output}")
    for unreadable in report["unreadable"][:SHOWN_MISTAKES]:
        print(f"ast-evaluate: left out: {unreadable['error']}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-evaluate", EvaluateOptions, run, argv)


if __name__ == "__main__":
    main()
