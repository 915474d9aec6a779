"""Opening labelled sound: every kind of dataset, held-out parts, errors before any model."""

import hashlib
import os
import shutil
import time

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import config as datasets_config
from huggingface_hub import constants
from torch.utils.data import DataLoader

from feature_extraction import load_audio
from scripts.data import labelled, sources
from scripts.data.labelled import LabelledAudio, open_stream
from scripts.data.options import LabelledOptions

from .conftest import SHARED, shared
from .sounds import PITCHES, write_class_folders, write_parquet, write_webdataset


def open_labelled_audio(dataset: str, **options) -> LabelledAudio:
    return labelled.open_labelled_audio(dataset, LabelledOptions(**options))


def test_class_folders(tmp_path):
    folder = write_class_folders(tmp_path / "sounds", 5)
    (folder / "low" / "notes.txt").write_text("no sound")
    data = open_labelled_audio(str(folder), evaluation_fraction=0.4)
    assert data.label_names == ["high", "low", "mid"]
    assert sum(data.train_counts) + sum(data.evaluation_counts) == 15
    for row in data.train:
        assert list(PITCHES)[row["label"]] in row["audio"]
        assert load_audio(row["audio"]).shape == (8000,)


def test_names_that_are_not_utf8(tmp_path, caplog):
    """A sound with such a name is skipped and reported; a class cannot be."""
    folder = write_class_folders(tmp_path / "sounds", 3)
    odd = os.fsencode(folder / "low") + b"/caf\xe9.flac"
    os.rename(folder / "low" / "low0_0.flac", odd)
    data = open_labelled_audio(str(folder), evaluation_split="train")
    assert data.train_counts == [3, 2, 3]
    assert "Skipped 1 sounds with names that are not UTF-8, such as" in caplog.text
    assert r"caf\udce9.flac" in caplog.text
    os.rename(odd, folder / "low" / "low0_0.flac")
    os.rename(folder / "mid", os.fsencode(folder) + b"/m\xefd")
    with pytest.raises(
        ValueError, match=r"class folder 'm\\udcefd' in .* is not UTF-8\. Rename it"
    ):
        open_labelled_audio(str(folder))


def test_class_folders_with_splits(tmp_path):
    write_class_folders(tmp_path / "train", 3)
    write_class_folders(tmp_path / "valid", 2, seed=50)
    data = open_labelled_audio(str(tmp_path), evaluation_split="validation")
    assert data.train_counts == [3, 3, 3]
    assert data.evaluation_counts == [2, 2, 2]
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'valid'\]"):
        open_labelled_audio(str(tmp_path), evaluation_split="test")


def test_a_shuffled_pass_through_parquet_ends_at_once(tmp_path):
    """`datasets` would sleep for 5 s."""
    write_parquet(tmp_path / "train.parquet", 4)
    rows = open_stream(str(tmp_path), "train").shuffle(seed=0, buffer_size=4)
    began = time.perf_counter()
    assert len(list(rows)) == 12
    assert time.perf_counter() - began < 2.5


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


def test_counting_reads_no_sound(tmp_path):
    """Only the needed columns of Parquet: counting labels must not read all the sound."""
    parquet = str(write_parquet(tmp_path / "train.parquet", 2, fold=1))
    stream = open_stream(parquet, "train", columns=["fold", "label"])
    assert set(stream.features) == {"label", "fold"}
    assert next(iter(stream)) == {"label": 0, "fold": 1}


def write_rows(path, rows, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def clip(number: int, **columns) -> dict:
    return {"audio": {"bytes": bytes([number]) * 9, "path": f"{number}.wav"}, **columns}


# CSV


def write_table(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return str(folder / name)


def test_csv_with_paths_relative_to_it(tmp_path):
    sounds = write_class_folders(tmp_path / "data" / "sounds", 4)
    files = sorted(file.relative_to(tmp_path / "data") for file in sounds.rglob("*.flac"))
    lines = [f'{file},"{file.parent.name}, pitch"' for file in files]
    table = write_table(tmp_path / "data", "clips.csv", ["file,class", *lines])
    data = open_labelled_audio(
        table, audio_column="file", label_column="class", evaluation_fraction=0.3
    )
    assert data.label_names == ["high, pitch", "low, pitch", "mid, pitch"]
    assert data.problem_type == "single_label_classification"
    found = [*data.train, *data.evaluation]
    assert len(found) == 12
    for row in found:
        assert load_audio(row["audio"]).shape == (8000,)
        assert list(PITCHES)[row["label"]] in row["name"]


def test_csv_per_split(tmp_path):
    write_class_folders(tmp_path, 3)
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        lines = [f"{name}/{name}0_{number}.flac\t{name}" for name in PITCHES for number in numbers]
        write_table(tmp_path, f"{split}.tsv", ["audio\tlabel", *lines])
    data = open_labelled_audio(str(tmp_path), evaluation_split="test")
    assert (data.train_counts, data.evaluation_counts) == ([2, 2, 2], [1, 1, 1])
    assert {row["name"].rsplit("_")[-1] for row in data.evaluation} == {"2.flac"}
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        open_labelled_audio(str(tmp_path), evaluation_split="validation")


def test_rows_of_a_folder_or_table_do_not_go_class_by_class(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"x")
    lines = [f"a.wav,{'fox' if number < 50 else 'owl'}" for number in range(100)]
    stream = open_stream(write_table(tmp_path, "t.csv", ["audio,label", *lines]), "train")
    first = [row["label"] for row in stream.take(20)]
    assert 4 < first.count("fox") < 16


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "a.wav,x"], r"no column 'audio' \(--audio_column\).*Known: file, label"),
        (["audio,label", "b.wav,x"], r"names .*b\.wav, but there is no such file.*relative to"),
        (["audio,label", "a.wav,x", "a.wav,x,y"], r"Cannot read .*Expected 2 columns, got 3"),
        (["audio,label", "a.wav,x", "a.wav,"], r"Row 1 of .* has no label in the column 'label'"),
        (["audio,label"], "No rows in"),
        ([], "Cannot read .*Empty CSV file"),
    ],
)
def test_csv_errors(tmp_path, lines, message):
    (tmp_path / "a.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        open_labelled_audio(write_table(tmp_path, "t.csv", lines), evaluation_fraction=0.5)


# Several labels per clip


@pytest.mark.parametrize("kind", ["names", "indices", "separated"])
def test_several_labels_per_clip(tmp_path, kind):
    classes = [["owl", "rain"], ["fox"], [], ["rain"], ["owl", "owl"]]
    names = ["fox", "owl", "rain"]
    features = None
    separator = None
    stored: list = classes
    if kind == "indices":
        audio = {"bytes": Value("binary"), "path": Value("string")}
        features = Features({"audio": audio, "label": List(ClassLabel(names=names))})
        stored = [[names.index(name) for name in row] for row in classes]
    elif kind == "separated":
        separator = ";"
        stored = ["; ".join(row) for row in classes]
    rows = [clip(number, label=label) for number, label in enumerate(stored)]
    write_rows(tmp_path / "train.parquet", rows, features)
    write_rows(tmp_path / "test.parquet", rows[:2], features)
    data = open_labelled_audio(str(tmp_path), evaluation_split="test", label_separator=separator)
    assert data.label_names == names
    assert data.problem_type == "multi_label_classification"
    assert [row["label"] for row in data.train] == [[1, 2], [0], [], [2], [1]]
    assert (data.train_counts, data.train_clips) == ([1, 2, 2], 5)
    assert (data.evaluation_counts, data.evaluation_clips) == ([1, 1, 1], 2)


def test_several_labels_without_any(tmp_path):
    rows = [clip(number, label="") for number in range(4)]
    write_rows(tmp_path / "train.parquet", rows)
    with pytest.raises(ValueError, match=r"No clip of .* has a label in 'label'"):
        open_labelled_audio(str(tmp_path), evaluation_split="train", label_separator=",")


# Parts


def test_groups_never_cross(tmp_path):
    """Held out by speaker: each speaker on one side, the same however the rows are stored."""
    rows = [clip(n, label=n % 2, speaker=f"speaker{n % 60:02d}") for n in range(240)]
    one = write_rows(tmp_path / "a" / "train.parquet", rows)
    write_rows(tmp_path / "b" / "train-0.parquet", rows[::-1][:100])
    write_rows(tmp_path / "b" / "train-1.parquet", rows[::-1][100:])
    speaker = {row["audio"]["path"]: row["speaker"] for row in rows}

    def speakers(dataset):
        data = open_labelled_audio(dataset, group_column="speaker", evaluation_fraction=0.25)
        return [{speaker[row["name"]] for row in part} for part in (data.train, data.evaluation)]

    train, evaluation = speakers(one)
    assert not train & evaluation
    assert len(train | evaluation) == 60
    assert 7 <= len(evaluation) <= 24  # 15 on average
    assert [train, evaluation] == speakers(str(tmp_path / "b"))


def test_given_parts_are_checked_for_common_groups(tmp_path):
    rows = [clip(n, label=n % 2, fold=n % 4, recording=n // 4) for n in range(16)]
    dataset = write_rows(tmp_path / "train.parquet", rows)
    folds = {"fold_column": "fold", "evaluation_fold": "3"}
    assert open_labelled_audio(dataset, **folds).evaluation_clips == 4
    with pytest.raises(ValueError, match="4 values of the column 'recording', such as 0, 1, 2, ar"):
        open_labelled_audio(dataset, **folds, group_column="recording")
    rows[5]["recording"] = None
    dataset = write_rows(tmp_path / "train.parquet", rows)
    with pytest.raises(ValueError, match=r"Row 5 of .* has nothing in the column 'recording'"):
        open_labelled_audio(dataset, group_column="recording")


def test_each_clip_is_evaluated_in_one_of_k_folds(tmp_path):
    rows = [clip(n, label=n % 2, fold=f"f{n % 5}") for n in range(20)]
    dataset = write_rows(tmp_path / "train.parquet", rows)
    evaluated: list[str] = []
    for fold in range(5):
        data = open_labelled_audio(dataset, fold_column="fold", evaluation_fold=f"f{fold}")
        train, evaluation = (
            {row["name"] for row in part} for part in (data.train, data.evaluation)
        )
        assert not train & evaluation
        assert len(train | evaluation) == 20
        evaluated += evaluation
    assert len(evaluated) == len(set(evaluated)) == 20


def test_labels_of_no_class(tmp_path, caplog):
    for split, label in (("train", "dog"), ("train", "cat"), ("test", "Dog")):
        rows = [clip(number, label=label) for number in range(2)]
        write_rows(tmp_path / f"{split}-{label}.parquet", rows)
    with pytest.raises(
        ValueError, match=r"evaluation part .* not classes .*: Dog\. The .* cat, dog"
    ):
        open_labelled_audio(str(tmp_path), evaluation_split="test")
    # Within one split it is just bad luck, not another class; a warning says so.
    rows = [clip(number, label=label, fold=number) for number, label in enumerate(["a", "b", "c"])]
    folds = {"fold_column": "fold", "evaluation_fold": "1"}
    data = open_labelled_audio(write_rows(tmp_path / "folds.parquet", rows), **folds)
    assert data.train_counts == [1, 0, 1]
    assert "Classes without a clip to train on: b." in caplog.text
    # A declared class without training clips is allowed, with a warning.
    write_class_folders(tmp_path / "f" / "test", 1)
    write_class_folders(tmp_path / "f" / "train", 1)
    shutil.rmtree(tmp_path / "f" / "train" / "mid")
    data = open_labelled_audio(str(tmp_path / "f"), evaluation_split="test")
    assert data.train_counts == [1, 1, 0]
    assert "Classes without a clip to train on: mid" in caplog.text


def test_names_of_sounds(tmp_path):
    tar = write_webdataset(tmp_path / "clips.tar", 2)
    data = open_labelled_audio(
        str(tar), audio_column="flac", label_column="cls", evaluation_split="train"
    )
    assert sorted(row["name"] for row in data.train)[:2] == ["000_0", "000_1"]
    rows = [{"audio": bytes([n]), "label": n} for n in range(2)]
    data = open_labelled_audio(
        write_rows(tmp_path / "bare.parquet", rows), evaluation_split="train"
    )
    assert next(iter(data.train))["name"] == f"sound with MD5 {hashlib.md5(bytes([0])).hexdigest()}"


def test_balanced_draws_are_the_originals_weights():
    data = LabelledAudio(None, None, ["a", "b", "c"], [90, 10, 0], [0, 0, 0], "", 100, 0)
    draws = data.balanced_draws()
    assert draws[1] / draws[0] == pytest.approx(90.01 / 10.01)
    assert 90 * draws[0] + 10 * draws[1] == pytest.approx(100)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    for module in (constants, datasets_config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "can_reach", lambda url: False)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"Couldn't reach 'nowhere' .*no such folder or file, eit"):
        sources.open_stream("nowhere", "train")
    assert sources.hub_revision("nowhere") is None
    assert time.perf_counter() - start < 2
    assert not constants.HF_HUB_OFFLINE


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
        ({"dataset": parquet, "evaluation_fold": "1"}, "--evaluation_fold needs --fold_column"),
        (
            {"dataset": parquet, "evaluation_split": "train", "fold_column": "fold"},
            "either --evaluation_split or --fold_column",
        ),
        ({"dataset": parquet, "group_column": "speaker"}, r"no column 'speaker' \(--group_column"),
        ({"dataset": __file__}, r"is a file; expected a folder, CSV"),
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
