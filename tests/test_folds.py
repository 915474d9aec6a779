"""--evaluation_fold all: each fold held out in turn, killed and started again, summed up."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest

from scripts.training import with_accelerate, with_trainer
from scripts.training.folds import finetune_folds
from scripts.training.options import FinetuneOptions

from .conftest import TINY_RECIPE
from .sounds import write_class_folders


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FinetuneOptions:
    folder = tmp_path_factory.mktemp("folds")
    rows = ["file_name,label,fold"]
    for file in sorted(write_class_folders(folder / "data", 9).rglob("*.flac")):
        fold = int(file.stem[-1]) % 3 + 1
        rows.append(f"{file.relative_to(folder / 'data')},{file.parent.name},{fold}")
    (folder / "data" / "train.csv").write_text("\n".join(rows) + "\n")
    return FinetuneOptions(
        dataset=str(folder / "data" / "train.csv"),
        audio_column="file_name",
        fold_column="fold",
        evaluation_fold="all",
        num_epochs=1,
        **TINY_RECIPE,
    )


@pytest.mark.parametrize("door", [with_accelerate, with_trainer])
def test_every_fold_is_held_out_once(door, settings, tmp_path, capsys):
    args = replace(settings, output=str(tmp_path / "run"))
    begun = []

    def stopping(fold_options: FinetuneOptions):
        begun.append(fold_options.evaluation_fold)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return door.finetune(fold_options)

    with pytest.raises(KeyboardInterrupt):
        finetune_folds(stopping, args)
    finetune_folds(stopping, args)
    assert begun == ["1", "2", "2", "3"]  # the finished one is kept
    summary = json.loads((tmp_path / "run" / "folds.json").read_text())
    assert list(summary["folds"]) == ["1", "2", "3"]
    accuracies = []
    for fold, record in summary["folds"].items():
        lines = (tmp_path / "run" / f"fold{fold}" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["evaluation_clips"] == 9
        assert record["evaluation_accuracy"] == last["evaluation_accuracy"]
        accuracies.append(last["evaluation_accuracy"])
    assert summary["mean"] == pytest.approx(statistics.mean(accuracies))
    assert f"3 folds: mean accuracy {100 * summary['mean']:.2f} %" in capsys.readouterr().out
    card = (tmp_path / "run" / "fold3" / "checkpoint" / "README.md").read_text()
    assert f"3 folds held out in turn: mean accuracy {summary['mean']:.4f}" in card


def test_mistakes(settings, tmp_path, monkeypatch):
    args = replace(settings, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="evaluation_fold all needs --fold_column"):
        finetune_folds(with_accelerate.finetune, replace(args, fold_column=None))
    with pytest.raises(ValueError, match=r"no column 'nothing' \(--fold_column\)\. Known"):
        finetune_folds(with_accelerate.finetune, replace(args, fold_column="nothing"))
    one = replace(args, evaluation_fold="1", output=str(tmp_path / "run" / "fold1"))
    finetune_folds(with_accelerate.finetune, one)
    with pytest.raises(ValueError, match=r"holds a finished run with seed 0, now 5\. Give the"):
        finetune_folds(with_accelerate.finetune, replace(args, seed=5))
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="needs a single process; with several, start each fold"):
        finetune_folds(with_accelerate.finetune, args)
