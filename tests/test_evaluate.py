"""ast-evaluate against the pipeline and scikit-learn, its files and messages; mixtures."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import pipeline

from feature_extraction import ASTFeatureExtractor, load_audio
from modeling_ast import ASTConfig, ASTForAudioClassification
from scripts import evaluate as evaluate_command
from scripts.data.labelled import open_labelled_audio
from scripts.data.mixtures import mix_clips
from scripts.data.options import LabelledOptions, MixOptions
from scripts.evaluation.metrics import ScoredClips
from scripts.evaluation.options import EvaluateOptions
from scripts.evaluation.report import draw_confusion_matrix, finite, format_report
from scripts.evaluation.scoring import evaluate_checkpoints

from .conftest import REPOSITORY
from .sounds import PITCHES, encode, tone, write_class_folders, write_parquet

LABELS = list(PITCHES)
WHOLE = {"evaluation_split": "train", "num_workers": 0, "bootstrap_resamples": 20}


def write_checkpoint(folder, labels=LABELS, seed=0, problem_type="single_label_classification"):
    """A tiny model for 0.5 s with random weights; its scores depend on the sound."""
    torch.manual_seed(seed)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=48,
        num_mel_bins=32,
        frequency_stride=16,
        time_stride=16,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        problem_type=problem_type,
    )
    model = ASTForAudioClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    ASTFeatureExtractor(max_length=48, num_mel_bins=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """18 clips in class folders, one of them long, and one file that is not a sound."""
    folder = write_class_folders(tmp_path_factory.mktemp("data") / "sounds", 6)
    (folder / "low" / "broken.flac").write_text("no sound")
    (folder / "mid" / "mid0_0.flac").write_bytes(encode(tone(1000.0, seed=0, seconds=1.3)))
    return folder


def evaluate(checkpoints, dataset, output_dir, **arguments):
    if isinstance(checkpoints, str):
        checkpoints = [checkpoints]
    settings = EvaluateOptions(output=str(output_dir), **{**WHOLE, **arguments})
    return evaluate_checkpoints(checkpoints, str(dataset), settings)


def heard(checkpoint, files, labels=LABELS, **arguments) -> np.ndarray:
    """(N, labels) probabilities by the pipeline, file by file."""
    classifier = pipeline("audio-classification", model=checkpoint)
    answers = [classifier(str(file), top_k=None, **arguments) for file in files]
    by_name = [{label["label"]: label["score"] for label in answer} for answer in answers]
    return np.array([[scores[name] for name in labels] for scores in by_name])


def by_scikit_learn(scores, targets) -> dict[str, float]:
    one_hot = np.eye(scores.shape[1], dtype=int)[targets]
    best = scores.argmax(axis=1)
    return {
        "accuracy": sklearn.metrics.accuracy_score(targets, best),
        "macro_f1": sklearn.metrics.f1_score(targets, best, average="macro"),
        "mean_average_precision": sklearn.metrics.average_precision_score(one_hot, scores),
        "roc_auc": sklearn.metrics.roc_auc_score(one_hot, scores),
    }


def check(report, expected) -> None:
    for name, value in expected.items():
        metric = report["metrics"][name]
        assert metric["value"] == pytest.approx(value, abs=1e-6), name
        assert metric["low"] <= metric["high"]


def test_report(checkpoint, sounds, tmp_path):
    report = evaluate(checkpoint, sounds, tmp_path)
    files = [path for path in sorted(sounds.rglob("*.flac")) if path.name != "broken.flac"]
    targets = np.array([LABELS.index(path.parent.name) for path in files])
    scores = heard(checkpoint, files)
    check(report, by_scikit_learn(scores, targets))

    assert report["clips"] == len(files) == 18
    assert report["windowed_clips"] == 1
    (unreadable,) = report["unreadable"]
    assert unreadable["file"] == str(sounds / "low" / "broken.flac")
    assert "broken.flac as audio" in unreadable["error"]
    assert (report["split"], report["fold"], report["fraction"]) == ("train", None, None)
    assert report["task"] == "single_label_classification"
    assert [row["label"] for row in report["per_class"]] == report["labels"] == LABELS
    assert [row["positives"] for row in report["per_class"]] == [6, 6, 6]
    recalls = sklearn.metrics.recall_score(targets, scores.argmax(axis=1), average=None)
    assert [row["recall"] for row in report["per_class"]] == pytest.approx(recalls)

    best = scores.argmax(axis=1)
    wrong = {
        str(files[clip]): (LABELS[best[clip]], scores[clip, best[clip]])
        for clip in np.flatnonzero(best != targets)
    }
    assert {mistake["file"] for mistake in report["mistakes"]} == set(wrong)
    sureness = [mistake["score"] for mistake in report["mistakes"]]
    assert sureness == sorted(sureness, reverse=True)
    for mistake in report["mistakes"]:
        assert mistake["predicted"] == wrong[mistake["file"]][0]
        assert mistake["score"] == pytest.approx(wrong[mistake["file"]][1], abs=1e-6)
        assert mistake["file"].split("/")[-2] == mistake["labels"][0]

    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    with (tmp_path / "per_class.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == LABELS
    assert float(table[0]["recall"]) == pytest.approx(recalls[0])
    with (tmp_path / "mistakes.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [
            mistake["file"] for mistake in report["mistakes"]
        ]
    assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    text = format_report(report)
    assert f"18 clips of {sounds} (split train)" in text
    assert "1 longer than the model: cut into windows" in text
    assert "1 more cannot be read" in text


def test_workers_and_batches_change_nothing(checkpoint, sounds, tmp_path):
    alone = evaluate(checkpoint, sounds, tmp_path, batch_size=1)
    together = evaluate(checkpoint, sounds, tmp_path, num_workers=2, batch_size=7)
    for name, metric in alone["metrics"].items():
        assert together["metrics"][name] == pytest.approx(metric, abs=1e-6)
    assert together["clips"] == 18


def test_labels_are_matched_by_name(checkpoint, sounds, tmp_path):
    """The same model with its labels in another order gets the same report."""
    order = [2, 0, 1]
    model = ASTForAudioClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        dense = model.classifier.dense
        dense.weight.copy_(dense.weight[order])
        dense.bias.copy_(dense.bias[order])
    names = [LABELS[index] for index in order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(tmp_path / "other")
    ASTFeatureExtractor.from_pretrained(checkpoint).save_pretrained(tmp_path / "other")
    one = evaluate(checkpoint, sounds, tmp_path / "report")
    other = evaluate(str(tmp_path / "other"), sounds, tmp_path / "report")
    assert other["labels"] == names
    for name, metric in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(metric, abs=1e-6)
    both = evaluate([checkpoint, str(tmp_path / "other")], sounds, tmp_path / "report")
    assert both["metrics"]["roc_auc"] == pytest.approx(one["metrics"]["roc_auc"], abs=1e-6)


def test_a_dataset_with_names_of_its_own(checkpoint, sounds, tmp_path):
    """Its labels are matched with the checkpoint's; the highest score of those counts."""
    own = tmp_path / "own"
    shutil.copytree(sounds, own)
    for name in LABELS:
        (own / name).rename(own / f"my {name}")
    matches = tmp_path / "matches.json"
    with pytest.raises(ValueError, match="The dataset's label 'my high' is none of"):
        evaluate(checkpoint, own, tmp_path / "report")
    matches.write_text(json.dumps({f"my {name}": [name] for name in LABELS}))
    plain = evaluate(checkpoint, sounds, tmp_path / "report")
    matched = evaluate(checkpoint, own, tmp_path / "report", match_labels=str(matches))
    assert sorted(matched["labels"]) == sorted(f"my {name}" for name in LABELS)
    assert matched["metrics"] == plain["metrics"]

    # Two of the checkpoint's labels, "low" and "mid", mean the same.
    shutil.rmtree(own / "my mid")
    joint = {"my low": ["low", "mid"], "my high": ["high"]}
    matches.write_text(json.dumps(joint))
    joined = evaluate(checkpoint, own, tmp_path / "report", match_labels=str(matches))
    assert joined["labels"] == list(joint)
    files = [path for path in sorted(own.rglob("*.flac")) if path.name != "broken.flac"]
    scores = heard(checkpoint, files)[:, [LABELS.index(n) for n in ("low", "mid", "high")]]
    is_high = scores[:, 2] > scores[:, :2].max(axis=1)
    right = np.mean(is_high == [path.parent.name == "my high" for path in files])
    assert joined["metrics"]["accuracy"]["value"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be a JSON object, .*holds list"),
        ('{"low": "low"}', "'low' has 'low'"),
        ('{"low": ["lo"]}', "'lo', for 'low', is none of the checkpoint's 3 labels.*'low'"),
        ("{", "Cannot read match_labels"),
    ],
)
def test_wrong_matches_are_refused(checkpoint, sounds, tmp_path, content, message):
    (tmp_path / "matches.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, sounds, tmp_path / "r", match_labels=str(tmp_path / "matches.json"))


def test_an_ensemble_is_the_mean_probability(checkpoint, sounds, tmp_path):
    second = write_checkpoint(tmp_path / "second", labels=LABELS[::-1], seed=5)
    files = [path for path in sorted(sounds.rglob("*.flac")) if path.name != "broken.flac"]
    targets = np.array([LABELS.index(path.parent.name) for path in files])
    scores = (heard(checkpoint, files) + heard(second, files)) / 2
    assert (scores.argmax(axis=1) != heard(checkpoint, files).argmax(axis=1)).any()
    report = evaluate([checkpoint, second], sounds, tmp_path / "report")
    check(report, by_scikit_learn(scores, targets))
    assert report["checkpoints"] == [checkpoint, second]
    assert "an ensemble: the mean of their probabilities" in format_report(report)


def test_a_class_without_clips_is_said(sounds, tmp_path):
    wide = write_checkpoint(tmp_path / "wide", labels=["silence", *LABELS])
    report = evaluate(wide, sounds, tmp_path / "report")
    assert report["classes_without_positives"] == ["silence"]
    nothing = report["per_class"][0]
    assert (nothing["label"], nothing["positives"]) == ("silence", 0)
    assert nothing["average_precision"] is nothing["roc_auc"] is nothing["recall"] is None
    assert "1 classes without clips, excluded from means: silence" in format_report(report)
    values = [row["average_precision"] for row in report["per_class"][1:]]
    mean = report["metrics"]["mean_average_precision"]["value"]
    assert mean == pytest.approx(np.mean(values))


def test_sounds_of_one_class(checkpoint, sounds, tmp_path):
    """Like recordings of the only species of interest: they only tell the recall."""
    shutil.copytree(sounds / "low", tmp_path / "sounds" / "low")
    report = evaluate(checkpoint, tmp_path / "sounds", tmp_path / "report")
    assert report["clips"] == 6
    assert report["classes_without_positives"] == [name for name in LABELS if name != "low"]
    low = next(row for row in report["per_class"] if row["label"] == "low")
    assert low["recall"] == report["metrics"]["accuracy"]["value"]
    assert report["metrics"]["roc_auc"]["value"] is None
    assert "2 classes without clips, excluded from means" in format_report(report)


def test_folds_and_fractions_are_those_of_fine_tuning(checkpoint, tmp_path):
    for fold in (1, 2):
        write_parquet(tmp_path / "data" / f"fold{fold}.parquet", fold, seed=10 * fold, fold=fold)
    settings = {"evaluation_split": None, "fold_column": "fold", "evaluation_fold": "2"}
    report = evaluate(checkpoint, tmp_path / "data", tmp_path / "report", **settings)
    assert (report["clips"], report["fold_column"], report["fold"]) == (6, "fold", "2")
    assert "fold 2" in format_report(report)

    folder = write_class_folders(tmp_path / "many", 8)
    settings = {"evaluation_split": None, "evaluation_fraction": 0.4}
    report = evaluate(checkpoint, folder, tmp_path / "report", **settings)
    data = open_labelled_audio(str(folder), LabelledOptions(evaluation_fraction=0.4))
    assert report["clips"] == data.evaluation_clips < 24
    assert report["fraction"] == 0.4
    assert "the held-out 40 %" in format_report(report)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", None])
def test_multi_label(tmp_path, problem_type):
    """Also with a checkpoint that, like the published AudioSet ones, does not say what it is."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", problem_type=problem_type)
    random = np.random.default_rng(0)
    rows, files = [], []
    for number in range(16):
        labels = np.flatnonzero(random.random(3) < [0.6, 0.4, 0]).tolist()
        sound = sum((tone(PITCHES[LABELS[label]], seed=number) for label in labels), np.zeros(8000))
        files.append(tmp_path / f"{number:02d}.flac")
        files[-1].write_bytes(encode(0.3 * sound))
        rows.append({"audio": {"bytes": files[-1].read_bytes(), "path": files[-1].name},
                     "labels": labels})  # fmt: skip
    audio = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": audio, "labels": List(ClassLabel(names=LABELS))})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")

    report = evaluate(checkpoint, tmp_path / "data.parquet", tmp_path / "r", label_column="labels")
    scores = heard(checkpoint, files, function_to_apply="sigmoid")
    targets = np.array([[label in row["labels"] for label in range(3)] for row in rows]).astype(int)
    average_precision = sklearn.metrics.average_precision_score(
        targets[:, :2], scores[:, :2], average=None
    )
    check(
        report,
        {
            "mean_average_precision": average_precision.mean(),
            "roc_auc": sklearn.metrics.roc_auc_score(targets[:, :2], scores[:, :2]),
            "macro_f1": sklearn.metrics.f1_score(
                targets, scores >= 0.5, labels=[0, 1], average="macro", zero_division=0
            ),
        },
    )
    assert "accuracy" not in report["metrics"]
    assert report["task"] == "multi_label_classification"
    assert report["classes_without_positives"] == ["mid"]
    wrong = {
        (f"{clip:02d}.flac", LABELS[label])
        for clip, label in zip(*np.nonzero((scores >= 0.5) != targets), strict=True)
    }
    assert {(m["file"], m["label"]) for m in report["mistakes"]} == wrong
    for mistake in report["mistakes"]:
        is_miss = mistake["label"] in mistake["labels"]
        assert mistake["mistake"] == ("miss" if is_miss else "false alarm")
        assert (mistake["score"] >= 0.5) != is_miss
    assert (tmp_path / "r" / "average_precision.png").read_bytes().startswith(b"\x89PNG")
    assert "mAP" in format_report(report)


def test_names_are_text_wherever_they_appear(tmp_path, capsys):
    """No formula in a table, no escape sequence in a terminal, no mathematics in a picture."""
    labels = ["$x_1^$", "=SUM(A1)", "-red"]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", labels=labels, seed=3)
    for number, label in enumerate(labels):
        for name in ("=1+1.flac", "+2.flac", "\x1b]0;title\x07.flac"):
            file = tmp_path / "sounds" / label / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(tone(300.0 * (1 + number), seed=len(name))))
    report = evaluate(checkpoint, tmp_path / "sounds", tmp_path / "report")
    assert report["mistakes"]
    assert "\x1b" not in format_report(report)
    assert (tmp_path / "report" / "confusion_matrix.png").stat().st_size > 5000
    with (tmp_path / "report" / "per_class.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert "'=SUM(A1)" in cells


def test_pictures_of_many_classes_stay_readable(tmp_path):
    random = np.random.default_rng(0)
    clips = ScoredClips(random.dirichlet(np.ones(300), 400), random.integers(0, 300, 400))
    path = tmp_path / "matrix.png"
    draw_confusion_matrix(clips, [f"a class with number {index}" for index in range(300)], path)
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert 1500 < width < 3500
    assert 1500 < height < 3500


def test_perfect_scores_leave_valid_json(tmp_path):
    """d′ of a perfect ranking is infinite, which JSON cannot express."""
    report = finite({"a": [1.5, float("inf")], "b": {"c": float("nan")}})
    assert report == {"a": [1.5, None], "b": {"c": None}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"label_column": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        ({"evaluation_split": "test"}, "no split 'test'"),
    ],
)
def test_mistakes_in_options(checkpoint, sounds, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, sounds, tmp_path, **arguments)


def test_processes_that_do_not_know_of_each_other(checkpoint, sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started.*Set ACCELERATE_USE_CPU=true"):
        evaluate(checkpoint, sounds, tmp_path)


def test_labels_that_do_not_fit(checkpoint, sounds, tmp_path):
    other = write_checkpoint(tmp_path / "other", labels=["hihg", "low", "mid"])
    message = "'high' is none of the checkpoint's 3 labels. Did you mean 'hihg'"
    with pytest.raises(ValueError, match=message):
        evaluate(other, sounds, tmp_path / "report")
    with pytest.raises(ValueError, match=r"other labels than .* \(only one has 'high'\)"):
        evaluate([checkpoint, other], sounds, tmp_path / "report")
    several = write_checkpoint(tmp_path / "m", problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="different problem types"):
        evaluate([checkpoint, several], sounds, tmp_path / "report")
    regression = write_checkpoint(tmp_path / "r", problem_type="regression")
    with pytest.raises(ValueError, match="is a regression model; expected a classifier"):
        evaluate(regression, sounds, tmp_path / "report")


def test_nothing_readable(checkpoint, tmp_path):
    for name in LABELS:
        (tmp_path / "sounds" / name).mkdir(parents=True)
        (tmp_path / "sounds" / name / "a.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"None of the 3 sounds can be read\. Cannot read"):
        evaluate(checkpoint, tmp_path / "sounds", tmp_path / "report")


def test_command(checkpoint, sounds, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ast-evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            evaluate_command.main()
        return ending.value.code, *capsys.readouterr()

    options = ["--evaluation_split", "train", "--num_workers", "0", "--bootstrap_resamples", "5"]
    options += ["--output", tmp_path]
    status, out, error = run(checkpoint, sounds, *options)
    assert status == 0, error
    assert "accuracy" in out
    assert f"Tables, picture and evaluation.json are in {tmp_path}" in out
    assert "left out: Cannot read" in error
    status, out, _ = run(checkpoint, checkpoint, sounds, *options, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "evaluation.json").read_text())

    status, _, error = run(sounds)
    assert status == 2
    assert "Name a checkpoint and a dataset; got" in error
    status, _, error = run(tmp_path / "nowhere", sounds)
    assert (status, len(error.splitlines())) == (2, 1)
    assert "No such checkpoint folder" in error


@pytest.mark.slow
def test_two_processes_count_each_clip_once(checkpoint, tmp_path):
    for part in range(3):  # of three files one process has two
        write_parquet(tmp_path / "data" / f"train-{part}.parquet", 3 + part, seed=10 * part)
    alone = evaluate(checkpoint, tmp_path / "data", tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29633"]
    command += ["-m", "scripts.evaluate", checkpoint, str(tmp_path / "data")]
    command += ["--evaluation_split", "train", "--num_workers", "1", "--json"]
    command += ["--bootstrap_resamples", "20", "--output", str(tmp_path / "together")]
    done = subprocess.run(
        command,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["clips"] == alone["clips"] == 36
    assert together["per_class"] == [pytest.approx(row, abs=1e-6) for row in alone["per_class"]]
    for name, metric in alone["metrics"].items():
        assert together["metrics"][name] == pytest.approx(metric, abs=1e-6)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    for fold in (1, 2):
        write_parquet(folder / "clips" / f"fold{fold}.parquet", 4, seed=10 * fold, fold=fold)
    arguments = MixOptions(
        dataset=str(folder / "clips"), output=str(folder / "mixed"), mixtures_per_fold=12
    )
    return folder, arguments, mix_clips(arguments)


def test_mixtures_are_of_one_fold_and_name_what_is_in_them(mixtures):
    _, _, files = mixtures
    assert [file.name for file in files] == ["fold1.parquet", "fold2.parquet"]
    sizes = set()
    for fold, file in enumerate(files, start=1):
        rows = Dataset.from_parquet(str(file))
        assert len(rows) == 12
        for row in rows:
            assert row["fold"] == str(fold)
            sounds = [LABELS[label] + str(10 * fold) for label in row["labels"]]
            assert [source.split("_")[0] for source in row["sources"]] == sounds
            assert len(set(row["labels"])) == len(row["labels"])
            sizes.add(len(row["labels"]))
            mixture = load_audio(row["audio"])
            assert 0.4 < np.abs(mixture).max() <= 1
            # Every label's pitch is heard: a peak of the spectrum within 10 % of it.
            spectrum = np.abs(np.fft.rfft(mixture))
            hertz = np.fft.rfftfreq(len(mixture), 1 / 16000)
            for label, pitch in enumerate(PITCHES.values()):
                near = spectrum[np.abs(hertz - pitch) < 0.11 * pitch].max()
                assert (near > 0.1 * spectrum.max()) == (label in row["labels"])
    assert sizes == {1, 2, 3}


def test_mixtures_are_seeded(mixtures, tmp_path):
    _, arguments, files = mixtures

    def sounds(seed):
        settings = {**vars(arguments), "output": str(tmp_path / str(seed)), "seed": seed}
        again = mix_clips(MixOptions(**settings))
        return [row["bytes"] for file in again for row in Dataset.from_parquet(str(file))["audio"]]

    once = [row["bytes"] for file in files for row in Dataset.from_parquet(str(file))["audio"]]
    assert sounds(0) == once
    assert sounds(1) != once


def test_mixtures_open_as_multi_label_data(mixtures):
    folder, _, _ = mixtures
    options = LabelledOptions(label_column="labels", fold_column="fold", evaluation_fold="2")
    data = open_labelled_audio(str(folder / "mixed"), options)
    assert data.problem_type == "multi_label_classification"
    assert data.label_names == LABELS
    assert (data.train_clips, data.evaluation_clips) == (12, 12)


def test_mixtures_of_class_names(tmp_path):
    rows = []
    for number in range(6):
        name = LABELS[number % 3]
        audio = {"bytes": encode(tone(PITCHES[name], seed=number)), "path": f"{name}{number}.flac"}
        rows.append({"audio": audio, "kind": name, "part": "a"})
    Dataset.from_list(rows).to_parquet(tmp_path / "clips.parquet")
    (file,) = mix_clips(
        MixOptions(
            dataset=str(tmp_path / "clips.parquet"),
            label_column="kind",
            fold_column="part",
            output=str(tmp_path / "mixed"),
            mixtures_per_fold=5,
        )
    )
    mixed = Dataset.from_parquet(str(file))
    assert mixed.features["labels"].feature.names == sorted(PITCHES)
    for row in mixed:
        assert [source[:3] for source in row["sources"]] == [LABELS[i][:3] for i in row["labels"]]


def test_mixing_mistakes(tmp_path):
    parquet = str(write_parquet(tmp_path / "clips.parquet", 1))
    for arguments, message in (
        ({"dataset": ""}, "Name a dataset"),
        ({"dataset": parquet}, r"no column 'fold' \(--fold_column\). Known: audio, label"),
        ({"dataset": parquet, "max_clips": 0}, "--max_clips must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_clips(MixOptions(**arguments))
