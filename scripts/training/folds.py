"""Cross-validation: `--evaluation_fold all` holds out every fold in turn.

    OUTPUT/foldNAME/    a run folder each
    OUTPUT/folds.json   the main metric over the folds, and each fold's record

Finished folds are kept, an interrupted one is resumed.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common.files import file_name, write_whole
from ..common.options import did_you_mean
from ..data.sources import open_stream
from ..evaluation.metrics import METRICS, headline
from ..publishing.cards import write_model_card
from .options import FinetuneOptions
from .run_folder import finished_result, tidy_finished
from .start import open_data


def finetune_folds(
    finetune: Callable[[FinetuneOptions], dict[str, Any]], options: FinetuneOptions
) -> None:
    """Fine-tune once, or, if `options.evaluation_fold` is "all", once per fold.

    Args:
        finetune: does a run, or the rest of it.
        options: of the run, or of each fold's run.

    Raises:
        ValueError: as for `finetune`; for all folds without a fold column or with several
            processes; if a fold was finished with other options or other data.
    """
    if options.evaluation_fold != "all":
        _finetune_once(finetune, options)
        return
    if options.fold_column is None:
        raise ValueError("--evaluation_fold all needs --fold_column.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--evaluation_fold all needs a single process; with several, start each fold yourself."
        )
    folder = Path(options.output)
    records: dict[str, dict[str, Any]] = {}
    for fold in _folds(options):
        fold_options = replace(options, evaluation_fold=fold, output=str(fold_folder(folder, fold)))
        if options.overwrite or not _is_finished(fold_options):
            _finetune_once(finetune, fold_options)
        records[fold] = finished_result(fold_options) or {}
    metric = headline(name.removeprefix("evaluation_") for name in records[fold])
    values = [record[f"evaluation_{metric}"] for record in records.values()]
    summary = {
        "metric": metric,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "lowest": min(values),
        "highest": max(values),
        "folds": records,
    }
    text = json.dumps(summary, indent=2)
    write_whole(folder / "folds.json", lambda path: path.write_text(text, encoding="utf-8"))
    for fold in records:  # their cards name the mean
        write_model_card(fold_folder(folder, fold), fold_folder(folder, fold) / "checkpoint")
    name = METRICS[metric].title
    for fold, value in zip(records, values, strict=True):
        print(f"fold {fold}: {name} {100 * value:.2f} %")
    print(
        f"{len(values)} folds: mean {name} {100 * summary['mean']:.2f} %, standard deviation "
        f"{100 * summary['std']:.2f}"
    )


def fold_folder(folder: Path, fold: str) -> Path:
    return folder / f"fold{file_name(fold)}"


def _finetune_once(
    finetune: Callable[[FinetuneOptions], dict[str, Any]], options: FinetuneOptions
) -> None:
    if os.environ.get("RANK", "0") == "0" and tidy_finished(options):
        print(f"{options.output} was already finished; cleaned up what was left to tidy.")
    else:
        finetune(options)


def _is_finished(options: FinetuneOptions) -> bool:
    """Whether a fold already has a result with the same options and data."""
    if finished_result(options) is None:
        return False
    finished_result(options, open_data(options).fingerprint)
    tidy_finished(options)
    return True


def _folds(options: FinetuneOptions) -> list[str]:
    column = str(options.fold_column)
    open_rows = partial(
        open_stream,
        options.dataset,
        options.train_split,
        options.dataset_config,
        options.audio_column,
    )
    known = open_rows().column_names
    if known is not None and column not in known:
        raise ValueError(
            f"{options.dataset} has no column {column!r} (--fold_column)"
            + did_you_mean(column, known)
        )
    folds = sorted({str(row[column]) for row in open_rows([column])})
    if len(folds) < 2:
        raise ValueError(
            f"All clips of {options.dataset} have the same {column!r}; expected at least two folds."
        )
    return folds
