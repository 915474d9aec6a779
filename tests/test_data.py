"""Opening labelled sound: every kind of dataset, held-out parts, errors before any model."""

import shutil

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from feature_extraction import load_audio
from scripts.data import open_labelled_audio
from scripts.sources import open_stream

from .conftest import SHARED, shared
from .sounds import PITCHES, write_class_folders, write_parquet, write_webdataset


def test_class_folders(tmp_path):
    folder = write_class_folders(tmp_path / "sounds", 5)
    (folder / "low" / "notes.txt").write_text("no sound")
    data = open_labelled_audio(str(folder), evaluation_fraction=0.4)
    assert data.label_names == ["high", "low", "mid"]
    assert sum(data.train_counts) + sum(data.evaluation_counts) == 15
    for row in data.train:
        assert list(PITCHES)[row["label"]] in row["audio"]
        assert load_audio(row["audio"]).shape == (8000,)


def test_class_folders_with_splits(tmp_path):
    write_class_folders(tmp_path / "train", 3)
    write_class_folders(tmp_path / "valid", 2, seed=50)
    data = open_labelled_audio(str(tmp_path), evaluation_split="validation")
    assert data.train_counts == [3, 3, 3]
    assert data.evaluation_counts == [2, 2, 2]
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'valid'\]"):
        open_labelled_audio(str(tmp_path), evaluation_split="test")


def test_parquet_folder_with_splits_in_names(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", 2)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", 2, seed=10)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", 1, seed=20)
    data = open_labelled_audio(str(tmp_path), evaluation_split="test")
    assert data.train_counts == [4, 4, 4]
    assert data.evaluation_counts == [1, 1, 1]
    assert data.label_names == list(PITCHES)
    assert load_audio(next(iter(data.train))["audio"]).shape == (8000,)


def test_folds(tmp_path):
    for fold in (1, 2, 3):
        write_parquet(tmp_path / f"fold{fold}.parquet", fold, seed=10 * fold, fold=fold)
    data = open_labelled_audio(str(tmp_path), fold_column="fold", evaluation_fold="2")
    assert data.train_counts == [4, 4, 4]
    assert data.evaluation_counts == [2, 2, 2]


def test_webdataset(tmp_path):
    tar = write_webdataset(tmp_path / "clips.tar", 4)
    data = open_labelled_audio(
        str(tar), audio_column="flac", label_column="cls", evaluation_fraction=0.3
    )
    assert data.label_names == ["0", "1", "2"]
    assert sum(data.train_counts) + sum(data.evaluation_counts) == 12
    assert load_audio(next(iter(data.train))["audio"]).shape == (8000,)


def test_held_out_part_is_fixed_however_the_stream_is_read(tmp_path):
    folder = write_class_folders(tmp_path / "a", 8)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "b")

    def clips(stream, num_workers):
        rows = DataLoader(stream, batch_size=None, num_workers=num_workers)
        return sorted(row["audio"].rsplit("/", 1)[-1] for row in rows)

    here, there = (
        open_labelled_audio(str(path), evaluation_fraction=0.3) for path in (folder, moved)
    )
    train, evaluation = clips(here.train, 0), clips(here.evaluation, 0)
    assert not set(train) & set(evaluation)
    assert len(train) + len(evaluation) == 24
    assert clips(here.train, 2) == train
    assert clips(there.evaluation, 2) == evaluation


def test_string_labels(tmp_path):
    rows = [
        {"audio": {"bytes": bytes([i] * 9), "path": f"{i}"}, "kind": "owl" if i % 2 else "fox"}
        for i in range(40)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "birds.parquet")
    data = open_labelled_audio(str(tmp_path / "birds.parquet"), label_column="kind")
    assert data.label_names == ["fox", "owl"]
    assert torch.tensor([row["label"] for row in data.train]).unique().tolist() == [0, 1]


def test_errors_name_the_way_out(tmp_path):
    parquet = str(write_parquet(tmp_path / "p" / "train.parquet", 3, fold=1))
    for arguments, message in (
        ({"dataset": str(tmp_path / "missing")}, "No such folder or file"),
        ({"dataset": str(tmp_path / "missing.parquet")}, "No such file"),
        ({"dataset": parquet, "label_column": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        ({"dataset": parquet, "audio_column": "sound"}, "no column 'sound'.*Known: audio, label"),
        ({"dataset": parquet, "evaluation_split": "test"}, "test"),
        ({"dataset": parquet, "fold_column": "fold"}, "--fold_column needs --evaluation_fold"),
        (
            {"dataset": parquet, "fold_column": "fold", "evaluation_fold": "9"},
            "no clips in the evaluation part.*Check the split, fold, group or fraction",
        ),
        (
            {"dataset": parquet, "fold_column": "fold", "evaluation_fold": "1"},
            "no clips in the train part",
        ),
        ({"dataset": parquet, "evaluation_fraction": 1.5}, "must be between 0 and 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            open_labelled_audio(**arguments)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data: expected one sub-folder of sounds"):
        open_labelled_audio(str(tmp_path / "empty"))

    rows = [{"audio": {"bytes": b"x", "path": "a"}, "label": label} for label in ("owl", None)]
    Dataset.from_list(rows).to_parquet(tmp_path / "holes.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of the .* has no label in the column 'label'"):
        open_labelled_audio(str(tmp_path / "holes.parquet"), evaluation_split="train")

    rows = [{"audio": {"bytes": bytes([i] * 9), "path": "a"}, "label": "owl"} for i in range(40)]
    Dataset.from_list(rows).to_parquet(tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=r"one label only \('owl'\)"):
        open_labelled_audio(str(tmp_path / "one.parquet"))


def test_esc10_streams():
    data = open_labelled_audio(str(shared("data/esc10")), fold_column="fold", evaluation_fold="1")
    assert data.train_counts == [32] * 10
    assert data.evaluation_counts == [8] * 10
    assert len(data.label_names) == 10
    assert load_audio(next(iter(data.evaluation))["audio"]).shape == (
        80016,
    )  # 5 s and what Vorbis adds


def test_arabic_speech_commands_streams():
    shared("data/arabic_speech_commands")
    stream = open_stream(str(SHARED / "data/arabic_speech_commands"), "validation")
    row = next(iter(stream))
    assert load_audio(row["audio"]).shape == (16000,)
    assert stream.features["label"].num_classes == 40
