"""ast-classify on folders, globs and datasets: what it writes, interruptions, processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import find_events
from scripts import classify
from scripts.common.lock import hold
from scripts.common.shown import how_long
from scripts.common.tables import write_csv
from scripts.data.answers import read_answers
from scripts.data.recordings import Recordings
from scripts.inference.classifier import Classifier
from scripts.inference.parts import Parts
from scripts.inference.progress import Progress
from scripts.inference.results import path_of
from scripts.workbench.marks import match_files, read_marks

from .conftest import REPOSITORY, shared
from .sounds import write_class_folders, write_parquet, write_webdataset


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * 16000)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sounds of 0.3 to 5 s at several depths, one damaged in the middle, one not a sound at all.

    The tiny model takes 1.3 s: the longest are several windows.
    """
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "a" / "b").mkdir(parents=True)
    for number, seconds in enumerate((5.0, 0.3, 2.0)):
        soundfile.write(folder / f"{number}.wav", noise(seconds, number), 16000)
    soundfile.write(folder / "a" / "deep.flac", noise(3.0, 3), 16000)
    soundfile.write(folder / "a" / "b" / "deeper.OGG", noise(1.0, 4), 16000, format="OGG")
    soundfile.write(folder / "a" / "damaged.flac", noise(60.0, 5), 16000)
    whole = (folder / "a" / "damaged.flac").read_bytes()
    half = len(whole) // 2
    (folder / "a" / "damaged.flac").write_bytes(whole[:half] + bytes(1000) + whole[half + 1000 :])
    (folder / "notes.mp3").write_bytes(b"no sound at all")
    (folder / "readme.txt").write_text("not tried")
    return folder


READABLE = ["0.wav", "1.wav", "2.wav", "a/b/deeper.OGG", "a/deep.flac"]


@pytest.fixture
def run(native_folder, capsys):
    """Run ast-classify in this process: -> exit status, stdout, stderr."""

    def run(*arguments: object, model: Path = native_folder) -> tuple[int, str, str]:
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ending:
            classify.main([*map(str, arguments), "--model", str(model)])
        signal.signal(signal.SIGTERM, before)
        return ending.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def reference(native_folder, folder):
    """The pipeline's answer for every readable sound, all labels of all windows."""
    classifier = pipeline("audio-classification", model=str(native_folder), top_k=None)
    return {
        str(folder / name): classifier(str(folder / name), return_timestamps=True)
        for name in READABLE
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_without_a_model_it_is_the_bundled_one(capsys, tmp_path):
    """Real sounds that it was not trained on, without a network (conftest.py)."""
    rows = pq.read_table(shared("data/esc10/data/fold5.parquet")).to_pylist()
    wanted = {0: "Dog", 2: "Waves, surf", 8: "Chicken, rooster"}  # not close on any processor
    for label, name in wanted.items():
        clip = next(row for row in rows if row["label"] == label)
        (tmp_path / f"{name}.ogg").write_bytes(clip["audio"]["bytes"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ending:
        classify.main([str(tmp_path), "--json"])
    signal.signal(signal.SIGTERM, before)
    assert not ending.value.code
    output, error = capsys.readouterr()
    best = {
        Path(row["file"]).stem: [label["label"] for label in row["labels"][:3]]
        for row in json.loads(output)
    }
    assert best.keys() == set(wanted.values())
    for name, labels in best.items():
        assert name in labels
    assert "Classified by the bundled ast-tiny-audioset, a small model." in error


def test_what_is_written_is_what_the_pipeline_says(run, folder, reference, tmp_path):
    output = tmp_path / "out"
    options = ["--formats", "csv", "json", "parquet", "audacity", "raven", "--per", "window"]
    every_score = [
        label["score"]
        for answer in reference.values()
        for window in answer["windows"]
        for label in window["labels"]
    ]
    high, low = np.quantile(every_score, [0.9, 0.8]).tolist()
    options += ["--threshold", str(high), "--release-threshold", str(low), "--batch-size", "3"]
    status, _, stderr = run(folder, "--output", output, "--top-k", "2", "--embeddings", *options)
    assert status == 1  # two sounds cannot be read
    assert "7/7" in stderr
    assert " s of sound in" in stderr
    assert "x real time" in stderr
    assert {row["sound"] for row in read_csv(output / "errors.csv")} == {
        str(folder / "a" / "damaged.flac"),
        str(folder / "notes.mp3"),
    }

    rows = read_csv(output / "windows.csv")
    assert list(rows[0]) == ["sound", "start", "end", "label_1", "score_1", "label_2", "score_2"]
    expected = [
        (name, window) for name, answer in reference.items() for window in answer["windows"]
    ]
    assert len(rows) == len(expected)
    by_place = {(row["sound"], round(float(row["start"]), 4)): row for row in rows}
    for name, window in expected:
        row = by_place[name, round(window["start"], 4)]
        assert float(row["end"]) == pytest.approx(window["end"], abs=1e-5)
        for rank in (1, 2):
            assert row[f"label_{rank}"] == window["labels"][rank - 1]["label"]
            score = window["labels"][rank - 1]["score"]
            assert float(row[f"score_{rank}"]) == pytest.approx(score, abs=1e-5)
    as_json = json.loads((output / "windows.json").read_text())
    assert [row["label_1"] for row in as_json] == [row["label_1"] for row in rows]
    assert pq.read_table(output / "windows.parquet").num_rows == len(rows)

    events = {name: find_events(answer["windows"], high, low) for name, answer in reference.items()}
    assert any(events.values())
    assert len(read_csv(output / "events.csv")) == sum(map(len, events.values()))
    for name, of_sound in events.items():
        track = (output / "audacity" / f"{path_of(name)}.txt").read_text().splitlines()
        lines = [line.split("\t") for line in track]
        assert [(float(start), float(end), label) for start, end, label in lines] == [
            (round(event["start"], 6), round(event["end"], 6), event["label"]) for event in of_sound
        ]
        table = output / "raven" / f"{path_of(name)}.Table.1.selections.txt"
        with table.open(newline="") as file:
            selections = list(csv.DictReader(file, delimiter="\t"))
        assert [selection["Label"] for selection in selections] == [e["label"] for e in of_sound]
        for number, selection in enumerate(selections, start=1):
            assert selection["Selection"] == str(number)
            assert float(selection["Begin Time (s)"]) < float(selection["End Time (s)"])
            assert float(selection["Low Freq (Hz)"]) < float(selection["High Freq (Hz)"]) == 8000


def test_rows_and_embeddings_per_window_and_per_file(run, native_folder, folder, tmp_path):
    """The second run classifies nothing: it only writes other formats."""
    output = tmp_path / "out"
    sound = folder / "0.wav"
    assert run(sound, "--output", output, "--embeddings", "--per", "window")[0] == 0
    by_window = pq.read_table(output / "embeddings.parquet").to_pylist()
    assert run(sound, "--output", output, "--embeddings", "--formats", "json")[0] == 0
    (by_file,) = pq.read_table(output / "embeddings.parquet").to_pylist()
    (row,) = json.loads((output / "files.json").read_text())

    classifier = pipeline("audio-classification", model=str(native_folder))
    extractor = ASTFeatureExtractor.from_pretrained(native_folder)
    waveform, _ = soundfile.read(sound, dtype="float32")
    assert row["duration"] == by_file["duration"] == 5.0
    assert row["score_1"] == pytest.approx(classifier(str(sound))[0]["score"], abs=1e-5)
    lengths = []
    for window in by_window:
        part = waveform[round(window["start"] * 16000) : round(window["end"] * 16000)]
        features = extractor(part, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            model = classifier.model.audio_spectrogram_transformer
            expected = model(**features).pooler_output[0].numpy()
        np.testing.assert_allclose(window["embedding"], expected, atol=1e-5)
        lengths.append(len(part))
    mean = np.average([window["embedding"] for window in by_window], axis=0, weights=lengths)
    np.testing.assert_allclose(by_file["embedding"], mean, atol=1e-5)


def test_answers_that_a_student_learns_from(run, native_folder, folder, tmp_path):
    """Each window's logits, the source of its scores, and how fine-tuning reads them."""
    output = tmp_path / "out"
    options = ["--logits", "--embeddings", "--per", "window", "--formats", "parquet"]
    status, _, _ = run(folder, "--output", output, "--top_k", "5", *options)
    assert status == 1  # two sounds are damaged
    rows = pq.read_table(output / "windows.parquet").to_pylist()
    answers = pq.read_table(output / "answers.parquet").to_pylist()
    vectors = pq.read_table(output / "embeddings.parquet").to_pylist()
    names = Classifier(str(native_folder)).label_names
    for row, answer, vector in zip(rows, answers, vectors, strict=True):
        span = {"sound": row["sound"], "start": row["start"], "end": row["end"]}
        assert span == {name: answer[name] for name in span}
        scores = torch.tensor(answer["logits"]).softmax(dim=0).tolist()
        for rank in range(1, 6):
            index = names.index(row[f"label_{rank}"])
            assert row[f"score_{rank}"] == pytest.approx(scores[index], abs=1e-5)
        assert answer["embedding"] == vector["embedding"]
    stored = read_answers([str(output / "answers.parquet")])
    assert (stored.label_names, stored.activation) == (names, "softmax")
    first = answers[0]
    found = stored({"name": first["sound"]}, [(0.0, 0.01)])
    expected = [*torch.tensor(first["logits"]).softmax(dim=0).tolist(), *first["embedding"]]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_interrupted_and_started_again(run, folder, tmp_path, monkeypatch, stop_after):
    """Nothing twice, nothing lost: together, both runs read each sound once."""
    files = [str(folder / name) for name in READABLE]
    read = []
    windows = Classifier.windows

    def counting(self, source, *arguments):
        if len(read) == stop_after and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        read.append(source)
        return windows(self, source, *arguments)

    interrupted: list[bool] = []
    monkeypatch.setattr(Classifier, "windows", counting)
    output = tmp_path / "out"
    # Batches of one window: all that was read is classified when the interruption comes.
    status, _, stderr = run(*files, "--output", output, "--batch-size", "1")
    assert status == 130, stderr
    assert len(Parts(output).done()) == stop_after
    assert not (output / "files.csv").exists()
    status, _, stderr = run(*files, "--output", output)
    assert status == 0, stderr
    assert sorted(read) == sorted(files)
    assert sorted(row["sound"] for row in read_csv(output / "files.csv")) == sorted(files)

    whole = tmp_path / "whole"
    run(*files, "--output", whole)
    for one, other in zip(
        read_csv(whole / "files.csv"), read_csv(output / "files.csv"), strict=True
    ):
        assert (one["sound"], one["label_1"]) == (other["sound"], other["label_1"])
        assert float(one["score_1"]) == pytest.approx(float(other["score_1"]), abs=1e-5)


def test_sounds_that_failed_are_tried_again(run, folder, tmp_path):
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"still being copied")
    output = tmp_path / "out"
    assert run(sound, folder / "1.wav", "--output", output)[0] == 1
    assert [row["sound"] for row in read_csv(output / "errors.csv")] == [str(sound)]
    soundfile.write(sound, noise(0.5, 0), 16000)
    assert run(sound, folder / "1.wav", "--output", output)[0] == 0
    assert not (output / "errors.csv").exists()
    assert len(read_csv(output / "files.csv")) == 2


def test_pages(run, folder, tmp_path):
    output = tmp_path / "out"
    assert run(folder / "0.wav", folder / "1.wav", "--output", output, "--plot")[0] == 0
    for name in ("0.wav", "1.wav"):
        page = output / "plots" / f"{path_of(str(folder / name))}.png"
        assert page.read_bytes().startswith(b"\x89PNG")


def test_dataset(run, folder, reference, tmp_path):
    parquet = write_parquet(tmp_path / "data" / "train-0.parquet", 2)
    write_parquet(tmp_path / "data" / "train-1.parquet", 1, seed=5)
    status, out, _ = run(parquet.parent, "--json", "--top-k", "1")
    assert status == 0
    results = json.loads(out)
    assert len(results) == 9
    assert results[7]["file"] == f"{parquet.parent}#1-1/low5_0.flac"
    assert [len(result["labels"]) for result in results] == [1] * 9


def test_printed_windows(run, folder, reference):
    name = str(folder / "0.wav")
    _, table, _ = run(name, "--per", "window", "--top-k", "1")
    windows = reference[name]["windows"]
    assert len(table.splitlines()) == len(windows)
    assert table.splitlines()[0].startswith(f"{name}      0.00 –     1.29 s  ")
    (result,) = json.loads(run(name, "--per", "window", "--json")[1])
    assert [window["end"] for window in result["windows"]] == [w["end"] for w in windows]


def test_thresholds_of_some_labels(run, folder, reference, tmp_path):
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(json.dumps({"LABEL_1": 0.0}))
    output = tmp_path / "out"
    assert run(folder / "2.wav", "--output", output, "--threshold", thresholds)[0] == 0
    (event,) = read_csv(output / "events.csv")
    assert (event["label"], event["start"], event["end"]) == ("LABEL_1", "0.0", "2.0")


def test_listing(folder, tmp_path):
    listed = Recordings([str(folder), str(folder / "0.wav")])  # named twice, listed once
    names = sorted([*READABLE, "a/damaged.flac", "notes.mp3"])
    assert sorted(listed.files) == [str(folder / name) for name in names]
    assert Recordings([f"{folder}/**/*.wav"]).files == [str(folder / f"{n}.wav") for n in range(3)]
    assert Recordings([f"{folder}/a*"]).files == sorted(
        str(folder / name) for name in names if name.startswith("a/")
    )
    assert Recordings(["https://a.org/b.ogg", "missing.wav"]).files == [
        "https://a.org/b.ogg",
        "missing.wav",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no sounds: expected audio files"):
        Recordings([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"No sound matches .*\*\.wav"):
        Recordings([str(tmp_path / "*.wav")])
    parquet = write_parquet(tmp_path / "train.parquet", 1)
    with pytest.raises(ValueError, match=r"no column 'sound' \(--audio_column\)"):
        Recordings([str(parquet)], audio_column="sound")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_all_once(tmp_path, count):
    """Files, three Parquet files, and a tar file that all processes must read."""
    folder = write_class_folders(tmp_path / "folder", 2)
    for number in range(3):
        write_parquet(tmp_path / "parquet" / f"{number}.parquet", 2, seed=10 * number)
    write_webdataset(tmp_path / "sounds.tar", 2)
    arguments = [str(folder), str(tmp_path / "parquet")]
    listed = Recordings(arguments)
    shares = [[sound.name for sound in listed.share(index, count)] for index in range(count)]
    everything = [name for share in shares for name in share]
    assert len(everything) == len(set(everything)) == 6 + 18
    assert set(everything) == {sound.name for sound in listed.share(0, 1)}
    assert all(shares)
    tar = Recordings([str(tmp_path / "sounds.tar")], audio_column="flac")
    names = [sound.name for index in range(count) for sound in tar.share(index, count)]
    assert len(names) == len(set(names)) == 6


@given(st.lists(st.text("ab./:?_\\root", max_size=6), min_size=2, max_size=8, unique=True))
def test_paths_are_apart_and_short(names):
    """Whatever their names, no two sounds share a file."""
    paths = [path_of(f"{name}.wav") for name in names]
    assert len({str(path) for path in paths}) == len(names)
    for path in paths:
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert not set(':?*"<>|\\') & set(str(path))


def test_paths_stay_inside_the_output_and_apart():
    names = ["a/b.wav", "./a/b.wav", "a//b.wav", "root/a/b.wav", "a:b", "a?b", "a_b", "/", ""]
    names += ["/a/b.wav", "../a/b.wav", "a/../b.wav", "https://x.org/b.wav?c=1", "d#0-1/b.wav"]
    paths = [path_of(name) for name in names]
    assert len(set(paths)) == len(names)
    assert not any(path.is_absolute() or ".." in path.parts for path in paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch_size must be at least 1, got 0."),
        (["--embeddings"], "--embeddings writes files: it needs --output FOLDER."),
        (["--threshold", "0.3", "--release-threshold", "0.5"], "release_threshold (0.5) is above"),
        (["--output", "OUT", "--json"], "choose --formats json"),
        (["--chunk-length-s", "1", "--hop-length-s", "2"], "hop_length_s (2) is longer"),
    ],
)
def test_mistakes(run, folder, tmp_path, options, message):
    options = [tmp_path if option == "OUT" else option for option in options]
    status, _, stderr = run(folder / "0.wav", *options)
    assert status == 2
    assert message in stderr.splitlines()[-1]


def test_the_best_of_some_labels_are_cut_out(run, folder, reference, tmp_path):
    """`--labels` does not change the labels' scores; `--clips` cuts out their best events."""
    names = tmp_path / "labels.txt"
    names.write_text("LABEL_3\n\nLABEL_1\n", encoding="utf-8")
    options = ["--labels", names, "--clips", tmp_path / "clips", "--best", 2, "--threshold", 0]
    status, _, errors = run(folder, "--output", tmp_path / "out", *options)
    assert status == 1  # some cannot be read
    for row in read_csv(tmp_path / "out" / "files.csv"):
        scores = {label["label"]: label["score"] for label in reference[row["sound"]]["labels"]}
        assert {row["label_1"], row["label_2"]} == {"LABEL_1", "LABEL_3"}
        for rank in "12":
            assert float(row[f"score_{rank}"]) == pytest.approx(
                scores[row[f"label_{rank}"]], abs=1e-5
            )
        assert "label_3" not in row
    events = read_csv(tmp_path / "out" / "events.csv")
    for label in ("LABEL_1", "LABEL_3"):
        mine = sorted((e for e in events if e["label"] == label), key=lambda e: -float(e["score"]))
        clips = sorted((tmp_path / "clips" / label).iterdir(), reverse=True)
        assert len(clips) == 2
        for event, clip in zip(mine, clips, strict=False):
            score, source, span = clip.name.split("_")
            assert float(score) == pytest.approx(float(event["score"]), abs=6e-4)
            assert source == Path(event["sound"]).stem
            assert span == f"{float(event['start']):.1f}-{float(event['end']):.1f}s.wav"
            info = soundfile.info(clip)
            start, end = max(0, float(event["start"]) - 1), float(event["end"]) + 1
            duration = min(end, soundfile.info(event["sound"]).duration) - start
            assert info.duration == pytest.approx(duration, abs=0.01)
    assert "4 clips" in errors


def test_events_go_to_label_studio_and_come_back(run, folder, tmp_path):
    options = ["--formats", "csv", "label_studio", "--threshold", 0]
    assert run(folder, "--output", tmp_path / "out", *options)[0] == 1  # some cannot be read
    tasks = json.loads((tmp_path / "out" / "label_studio.json").read_text())
    for task in tasks:  # a person accepts every prediction
        task["annotations"] = task["predictions"]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    marks = read_marks(tmp_path / "export.json")
    events = read_csv(tmp_path / "out" / "events.csv")
    names = match_files(marks, sorted({event["sound"] for event in events}))
    back = {(names[mark.file], f"{mark.start:.3f}", mark.label) for mark in marks}
    assert back == {(e["sound"], f"{float(e['start']):.3f}", e["label"]) for e in events}
    assert len(marks) == len(events)


def test_a_list_of_labels_that_is_none(run, folder, tmp_path):
    names = tmp_path / "labels.txt"
    for text, message in (
        ("\n", "names no label"),
        ("LABEL_1\nLABEL_1\n", "names 'LABEL_1' twice"),
        ("LABEL_7\n", "has no label 'LABEL_7'"),
    ):
        names.write_text(text, encoding="utf-8")
        status, _, errors = run(folder / "0.wav", "--labels", names)
        assert status == 2
        assert message in errors


def test_other_settings_need_another_folder(run, folder, tmp_path):
    assert run(folder / "0.wav", "--output", tmp_path)[0] == 0
    status, _, stderr = run(folder / "0.wav", "--output", tmp_path, "--chunk-length-s", "1")
    assert status == 2
    assert "holds results with chunk_length_s None, but this run has 1.0" in stderr


def test_other_models_are_refused(run, folder, tmp_path):
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16,
    )  # fmt: skip
    transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    status, _, stderr = run(folder / "0.wav", model=tmp_path)
    assert status == 2
    assert "is a wav2vec2 checkpoint; expected an Audio Spectrogram Transformer" in stderr


def test_a_long_recording_is_told_by_time(run, folder, reference):
    """The mean over everything comes last."""
    name = str(folder / "0.wav")
    status, table, _ = run(name, "--threshold", "0.2")
    assert status == 0
    title, *lines = table.splitlines()
    assert title == f"{name}, 0:05:"
    events = find_events(reference[name]["windows"], 0.2)
    assert len(lines) == len(events) + 1
    for line, event in zip(lines, events, strict=False):
        assert line.endswith(f"{100 * event['score']:.1f} %  {event['label']}")
        assert line.split()[0] == f"0:{event['start']:04.1f}"
    assert lines[-1].startswith(f"  on average: {reference[name]['labels'][0]['label']} ")
    _, table, _ = run(name, "--threshold", "0.999")
    highest = max(e["score"] for w in reference[name]["windows"] for e in w["labels"])
    assert f"the highest score is {100 * highest:.1f} %, " in table.splitlines()[1]
    (result,) = json.loads(run(name, "--threshold", "0.2", "--json")[1])
    assert result["duration"] == 5.0
    assert [e["label"] for e in result["events"]] == [e["label"] for e in events]


def test_resumed_within_a_recording(run, folder, tmp_path, monkeypatch):
    """Windows done before an interruption are not done again."""
    sound = folder / "0.wav"
    score, heard = Classifier.score, []

    def interrupted(self, windows):
        if len(heard) == 3:
            raise KeyboardInterrupt
        heard.extend(windows)
        return score(self, windows)

    output = tmp_path / "out"
    arguments = [sound, "--output", output, "--batch-size", "1", "--embeddings"]
    arguments += ["--per", "window", "--formats", "csv", "json"]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "score", interrupted)
        assert run(*arguments)[0] == 130
    assert not list(output.rglob("*.csv"))
    again = []

    def counted(self, windows):
        again.extend(windows)
        return score(self, windows)

    monkeypatch.setattr(Classifier, "score", counted)
    status, _, stderr = run(*arguments)
    assert status == 0, stderr
    whole = tmp_path / "whole"
    windows = []
    monkeypatch.setattr(Classifier, "score", lambda self, w: windows.extend(w) or score(self, w))
    run(*[whole if argument == output else argument for argument in arguments])
    starts = [window.start for window in windows]
    assert [window.start for window in heard + again] == starts
    for name in ("windows.json", "events.json"):
        assert (output / name).read_text() == (whole / name).read_text()
    assert pq.read_table(output / "embeddings.parquet").equals(
        pq.read_table(whole / "embeddings.parquet")
    )
    assert not list(output.rglob("*unfinished*"))


def test_tables_are_renewed_while_a_file_is_heard(run, tmp_path, monkeypatch):
    """The rows so far of a long file and of what came before it."""
    monkeypatch.setattr("scripts.inference.run.PART_S", 0.0)
    monkeypatch.setattr("scripts.inference.run.SHOWING", 1.0)
    soundfile.write(tmp_path / "a.wav", noise(1.0, 1), 16000)
    soundfile.write(tmp_path / "b.wav", noise(9.0, 2), 16000)
    output, score, seen = tmp_path / "out", Classifier.score, []

    def table():
        return [(row["sound"], row["end"]) for row in read_csv(output / "windows.csv")]

    def watched(self, windows):
        if (output / "windows.csv").exists():
            seen.append(table())
        return score(self, windows)

    monkeypatch.setattr(Classifier, "score", watched)
    arguments = [tmp_path / "a.wav", tmp_path / "b.wav", "--output", output, "--batch-size", "1"]
    assert run(*arguments, "--per", "window")[0] == 0
    whole = table()
    assert {Path(rows[-1][0]).name for rows in seen} == {"a.wav", "b.wav"}
    for rows in seen:
        assert rows == whole[: len(rows)]
    assert len(seen[-1]) > 3


def test_half_heard_sounds_that_changed_begin_again(native_folder, folder, tmp_path):
    classifier = Classifier(str(native_folder))
    heard = classifier.hear(str(folder / "0.wav"))
    parts = Parts(tmp_path)
    parts.write_unfinished("a", "1", heard)
    kept = parts.unfinished("a", "1", classifier.label_names)
    assert kept.spans == heard.spans
    np.testing.assert_array_equal(kept.scores, heard.scores)
    assert parts.unfinished("a", "2", classifier.label_names).spans == []
    assert parts.unfinished("b", "1", classifier.label_names).spans == []
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert parts.unfinished("a", "1", classifier.label_names).spans == []


def test_changed_sounds_are_heard_again(run, tmp_path):
    """Their old rows go; those of unchanged sounds stay."""
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number, seconds in enumerate((1.0, 2.0)):
        soundfile.write(sounds / f"{number}.wav", noise(seconds, number), 16000)
    output = tmp_path / "out"
    assert run(sounds, "--output", output)[0] == 0
    soundfile.write(sounds / "0.wav", noise(3.0, 5), 16000)
    _, _, stderr = run(sounds, "--output", output)
    assert "1/1 files" in stderr
    durations = {row["sound"]: row["duration"] for row in read_csv(output / "files.csv")}
    assert durations == {str(sounds / "0.wav"): "3.0", str(sounds / "1.wav"): "2.0"}
    (sounds / "0.wav").write_bytes(b"damaged")
    assert run(sounds, "--output", output)[0] == 1
    assert [row["sound"] for row in read_csv(output / "files.csv")] == [str(sounds / "1.wav")]
    assert [row["sound"] for row in read_csv(output / "errors.csv")] == [str(sounds / "0.wav")]


def test_other_weights_need_another_folder(run, native_folder, folder, tmp_path):
    model = shutil.copytree(native_folder, tmp_path / "model")
    output = tmp_path / "out"
    assert run(folder / "1.wav", "--output", output, model=model)[0] == 0
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    status, _, stderr = run(folder / "1.wav", "--output", output, model=model)
    assert status == 2
    assert "holds results with model_version" in stderr


def test_one_run_in_a_folder_at_a_time(run, folder, tmp_path):
    output = tmp_path / "out"
    with hold(output, "rank00000"):
        status, _, stderr = run(folder / "1.wav", "--output", output)
        assert status == 2
        assert f"is being written by process {os.getpid()} on " in stderr
        # Another process of the same run has another rank.
        with hold(output, "rank00001"):
            pass
    # What a killed run leaves behind keeps nobody out.
    (output / ".rank00000.lock").touch()
    (output / ".rank00000.holder.json").write_text('{"process": 1')
    assert run(folder / "1.wav", "--output", output)[0] == 0
    assert not (output / ".rank00000.holder.json").exists()


def test_names_that_trouble_terminals_spreadsheets_and_file_systems(run, tmp_path, monkeypatch):
    """Every sound keeps its row, its label track and its page."""
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    names = [
        "=1+1.wav", "@SUM(A1).wav", "a:b.wav", "a?b.wav", "a_b.wav", "$x$ and $\\frac{.wav",
        "\x1b]0;owned\x07.wav", "line\nbreak.wav", "e" * 240 + ".wav", "ä" * 120 + ".wav",
        os.fsdecode(b"caf\xe9.wav"),
    ]  # fmt: skip
    for name in names:
        soundfile.write(os.fsencode(sounds / name), noise(0.3, len(name)), 16000)
    output = tmp_path / "out"
    formats = ["--formats", "csv", "json", "parquet", "audacity", "raven"]
    arguments = ["--plot", "--embeddings", "--threshold", "0"]
    status, _, stderr = run(sounds, "--output", output, *formats, *arguments)
    assert status == 0, stderr
    listed = {str(sounds / name) for name in names[:-1]} | {str(sounds / "caf\\xe9.wav")}
    for kind in ("files", "events"):
        assert {row["sound"] for row in read_csv(output / f"{kind}.csv")} == listed
        assert {row["sound"] for row in json.loads((output / f"{kind}.json").read_text())} == listed
        assert set(pq.read_table(output / f"{kind}.parquet")["sound"].to_pylist()) == listed
    for kind, pattern in (("audacity", "*.txt"), ("raven", "*.txt"), ("plots", "*.png")):
        assert len(list((output / kind).rglob(pattern))) == len(names), kind
    # By their own names, as somebody in that folder would give them.
    monkeypatch.chdir(sounds)
    assert run(*(f"./{name}" for name in names), "--output", tmp_path / "here")[0] == 0
    status, table, _ = run(*names)
    assert status == 0
    assert len(read_csv(tmp_path / "here" / "files.csv")) == len(names)
    assert "\x1b" not in table
    assert "\\x1b]0;owned\\x07.wav" in table
    assert "line\\nbreak.wav" in table
    assert "caf\\xe9.wav" in table


def test_errors_do_not_reach_the_terminal_raw(run, tmp_path):
    status, _, stderr = run("\x1b]0;owned\x07.wav", os.fsdecode(b"caf\xe9.wav"))
    assert status == 1
    assert "\x1b" not in stderr
    assert "\\x1b]0;owned" in stderr
    status, _, stderr = run("x.wav", model="./\x1b]0;owned\x07")
    assert status == 2
    assert "\x1b" not in stderr
    assert "No such checkpoint folder: ./\\x1b]0;owned" in stderr
    status, _, stderr = run("x.wav", "--\x1b]0;owned\x07")
    assert status == 2
    assert "\x1b" not in stderr


def test_durations_read_well():
    seconds = (0, 0.54321, 12, 59.99, 61, 290, 3599.9, 3600, 100_000)
    texts = [
        "0 s",
        "0.543 s",
        "12 s",
        "60 s",
        "1.02 min",
        "4.83 min",
        "60 min",
        "1.00 h",
        "27.78 h",
    ]
    assert list(map(how_long, seconds)) == texts


def test_formulas_are_text(tmp_path):
    rows = [{"sound": name, "score": -0.5} for name in ("=1+1", "+1", "-1", "@A1", "\t=1", "a=1")]
    write_csv(tmp_path / "table.csv", ["sound", "score"], [*rows, {"sound": "\udce9"}])
    read = read_csv(tmp_path / "table.csv")
    assert [row["sound"] for row in read[:-1]] == ["'=1+1", "'+1", "'-1", "'@A1", "'\t=1", "a=1"]
    assert {row["score"] for row in read[:-1]} == {"-0.5"}
    assert read[-1] == {"sound": "\\udce9", "score": ""}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_read_errors_are_one_sounds_trouble(run, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    trouble = [tmp_path / "pipe.wav"]
    if Path("/proc/self/mem").exists():  # reading its beginning is an input/output error
        (tmp_path / "mem.wav").symlink_to("/proc/self/mem")
        trouble.append(tmp_path / "mem.wav")
    output = tmp_path / "out"
    status, *_ = run(*trouble, folder / "1.wav", "--output", output)
    assert status == 1
    assert [row["sound"] for row in read_csv(output / "files.csv")] == [str(folder / "1.wav")]
    errors = {row["sound"]: row["error"] for row in read_csv(output / "errors.csv")}
    assert (
        "pipe.wav is a pipe, a socket or a device; expected an audio file"
        in errors[str(tmp_path / "pipe.wav")]
    )
    assert len(errors) == len(trouble)


def test_an_empty_name_is_not_this_folder(run):
    status, _, stderr = run("")
    assert status == 2
    assert "got an empty name" in stderr


def test_thresholds_of_unknown_labels_are_refused(run, folder, tmp_path):
    (tmp_path / "thresholds.json").write_text('{"LABEL_9": 0.5}')
    status, _, stderr = run(folder / "1.wav", "--threshold", tmp_path / "thresholds.json")
    assert status == 2
    assert "--threshold: unknown label 'LABEL_9'. Did you mean 'LABEL_4'?" in stderr


def test_what_killed_runs_left_half_written_goes(run, folder, tmp_path):
    output = tmp_path / "out"
    left = output / "plots" / "x.png.0123abcd.unfinished"
    left.parent.mkdir(parents=True)
    left.touch()
    assert run(folder / "1.wav", "--output", output)[0] == 0
    assert not left.exists()


def test_progress_within_a_recording(folder, capsys):
    """Measured in duration; what an earlier run has done counts, but not as speed."""
    files = [str(folder / "0.wav"), str(folder / "2.wav"), "https://example.org/unknown.wav"]
    with Progress(files) as progress:
        assert progress.total_s == pytest.approx(10.5)  # an unknown one is as long as the mean
        progress.skip(2.0)
        progress.heard(1.0)
        assert "0/3 files, 0:03 of 0:10 heard" in progress.text
        assert " left" in progress.text
        progress.finished()
        assert progress.seconds == 1.0
    with Progress(["x.wav"] * 600) as progress:  # too many to look into
        progress.heard(90.0)
        progress.finished()
        assert "1/600 files, 1:30 heard" in progress.text
        assert " left" in progress.text
    capsys.readouterr()
    with Progress(files, disabled=True) as progress:  # every process but the first
        progress.heard(1.0)
        progress.finished()
    assert capsys.readouterr().err == ""
    with Progress(None) as progress:
        progress.heard(1.0)
        assert progress.text.startswith("0 files, 0:01 heard")
    capsys.readouterr()


# A process that dies without a word, as one that the kernel kills: rank 1, after its second part.
KILLED = """
import os, signal
from scripts import classify
from scripts.inference import run
run.PART_S = 0.0  # every sound a part
write = run.Parts.write
written = []
def write_and_die(self, results):
    write(self, results)
    written.extend(results)
    if self.rank == 1 and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("KILL"):
    run.Parts.write = write_and_die
classify.main()
"""


@pytest.mark.slow
def test_two_processes_one_killed(native_folder, run, tmp_path):
    """A restart does what the killed process had not; no sound twice, none lost."""
    data = tmp_path / "data"
    for number in range(4):
        write_parquet(data / f"{number}.parquet", 3, seed=10 * number)
    (tmp_path / "main.py").write_text(KILLED)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29617"]
    command += [str(tmp_path / "main.py"), str(data), "--model", str(native_folder)]
    command += ["--output", str(output), "--batch-size", "1", "--embeddings"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

    def launch(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            env={**environment, **more},
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )

    killed = launch(KILL="1")
    assert killed.returncode != 0
    rank_1 = list((output / "parts").glob("rank00001-*.parquet"))
    assert len(rank_1) == 2
    before = Parts(output).done()
    assert 2 <= len(before) < 36

    restarted = launch()
    assert restarted.returncode == 0, restarted.stderr
    assert "by process 0 of 2" in restarted.stderr
    # In the parts themselves: nothing was done twice.
    names = [
        name
        for part in (output / "parts").glob("*.parquet")
        for name in pq.read_table(part, columns=["sound"])["sound"].to_pylist()
    ]
    assert len(names) == len(set(names)) == 36
    rows = {row["sound"]: row for row in read_csv(output / "files.csv")}
    assert set(rows) == set(names)
    assert pq.read_table(output / "embeddings.parquet").num_rows == 36

    alone = tmp_path / "alone"
    assert run(data, "--output", alone)[0] == 0
    for row in read_csv(alone / "files.csv"):
        assert rows[row["sound"]]["label_1"] == row["label_1"]
        assert float(rows[row["sound"]]["score_1"]) == pytest.approx(
            float(row["score_1"]), abs=1e-4
        )
