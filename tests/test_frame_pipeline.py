"""Frame models and stored window pooling in the pipeline, the classifier, ONNX and ast-classify."""

import itertools

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioFrameClassification, ASTFrameConfig, find_events
from modeling_ast.export_ast import export_onnx
from modeling_ast.onnx_ast import OnnxClassifier
from modeling_ast.pooling_ast import pool_scores
from scripts import classify
from scripts.data.annotations import read_annotations
from scripts.inference import onnx_files
from scripts.inference.classifier import Classifier
from scripts.inference.options import ExportOptions

from .conftest import TINY_MODEL, tiny_model

RATE = 16000
LABELS = ["dog", "=cat", "sea gull", "rain", "owl"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}


def save(model, folder, **extractor):
    model.save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=64, max_length=128, **extractor).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "masked"])
def frame_folder(request, tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = ASTFrameConfig(**{**TINY_MODEL, **NAMES, "initializer_range": 0.2})
    folder = tmp_path_factory.mktemp("frames")
    model = ASTForAudioFrameClassification(config)
    torch.nn.init.zeros_(model.frame_classifier.dense.bias)  # a new head's scores are low
    return save(model, folder, return_attention_mask=request.param)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Of a level that changes, so that scores do."""
    samples = int(seconds * RATE)
    level = 0.02 + 0.2 * np.sin(np.arange(samples) / RATE * 2.0) ** 2
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.05, 1.0, 1.9, 7.3])
def test_columns_cover_a_sound_of_any_length(frame_folder, seconds):
    classifier = pipeline("audio-classification", model=frame_folder)
    answer = classifier(noise(seconds), return_timestamps=True, top_k=None)
    windows = answer["windows"]
    assert windows[0]["start"] == 0
    assert windows[-1]["end"] == pytest.approx(seconds)
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(windows))
    frames = 1 + max(0, int(seconds * RATE) - 400) // 160
    assert len(windows) == max(0, frames - 16) // 10 + 1
    scores = torch.tensor(
        [[{e["label"]: e["score"] for e in w["labels"]}[n] for n in LABELS] for w in windows]
    )
    lengths = torch.tensor([w["end"] - w["start"] for w in windows])
    pooled = pool_scores(scores, "linear_softmax", lengths)
    found = {entry["label"]: entry["score"] for entry in answer["labels"]}
    torch.testing.assert_close(torch.tensor([found[n] for n in LABELS]), pooled)


def test_one_window_is_what_the_model_says(frame_folder):
    classifier = pipeline("audio-classification", model=frame_folder)
    sound = noise(1.0)
    answer = classifier(sound, return_timestamps=True, top_k=None)
    extractor, model = classifier.feature_extractor, classifier.model
    features = extractor(sound, sampling_rate=RATE, return_tensors="pt")
    expected = model(**features).logits[0].sigmoid()
    for window, scores in zip(answer["windows"], expected, strict=False):
        found = {entry["label"]: entry["score"] for entry in window["labels"]}
        assert [found[n] for n in LABELS] == pytest.approx(scores.tolist(), abs=1e-5)


def test_scores_do_not_jump_at_window_borders(frame_folder):
    """Steps across windows' edges are like those inside them."""
    heard = Classifier(frame_folder).hear(noise(30.0))
    steps = np.abs(np.diff(heard.scores, axis=0)).max(axis=1)
    hop = 6  # columns: half of the 12 of a window
    borders = np.zeros(len(steps), bool)
    borders[hop - 1 :: hop] = True
    assert np.median(steps[borders]) < 1.5 * np.median(steps[~borders])
    assert steps[borders].max() <= 1.5 * steps[~borders].max()


def test_classifier_and_pipeline_agree(frame_folder):
    sounds = [noise(5.3), noise(0.4, 1), noise(2.6, 2)]
    answers = pipeline("audio-classification", model=frame_folder)(
        [{"array": sound, "sampling_rate": RATE} for sound in sounds],
        return_timestamps=True, top_k=None, batch_size=4,
    )  # fmt: skip
    sources = [(i, {"array": s, "sampling_rate": RATE}) for i, s in enumerate(sounds)]
    heard = dict(Classifier(frame_folder, batch_size=3).hear_each(sources))
    for number, answer in enumerate(answers):
        found = heard[number]
        np.testing.assert_allclose(
            found.spans, [(w["start"], w["end"]) for w in answer["windows"]], atol=1e-9
        )
        first = {e["label"]: e["score"] for e in answer["windows"][0]["labels"]}
        assert found.scores[0].tolist() == pytest.approx([first[n] for n in LABELS], abs=1e-5)
        labels = {e["label"]: e["score"] for e in answer["labels"]}
        assert {e.label: e.score for e in found.labels()} == pytest.approx(labels, abs=1e-5)


def test_a_damaged_sound_leaves_the_next_one_alone(frame_folder, tmp_path):
    classifier = Classifier(frame_folder, batch_size=2)
    good = noise(3.0)
    soundfile.write(tmp_path / "good.wav", good, RATE)
    damaged = noise(3.0)
    damaged[40_000] = np.nan
    soundfile.write(tmp_path / "damaged.wav", damaged, RATE, subtype="FLOAT")
    files = [("bad", str(tmp_path / "damaged.wav")), ("good", str(tmp_path / "good.wav"))]
    heard = dict(classifier.hear_each(files))
    assert "NaN" in heard["bad"]
    alone = classifier.hear(str(tmp_path / "good.wav"))
    np.testing.assert_allclose(heard["good"].scores, alone.scores, atol=1e-6)


@pytest.mark.slow  # the export
def test_onnx(tmp_path, frame_folder):
    pytest.importorskip("onnxruntime")
    model = ASTForAudioFrameClassification.from_pretrained(frame_folder)
    extractor = ASTFeatureExtractor.from_pretrained(frame_folder)
    if extractor.return_attention_mask:
        pytest.skip("an export takes seconds: once is enough")
    files = export_onnx(model, extractor, tmp_path, ["fp32"])
    sound = noise(4.1)
    expected = pipeline("audio-classification", model=frame_folder)(sound, return_timestamps=True)
    found = OnnxClassifier(files["fp32"])(sound, return_timestamps=True)
    assert len(found["windows"]) == len(expected["windows"])
    for a, b in zip(found["windows"], expected["windows"], strict=True):
        assert a["labels"][0]["score"] == pytest.approx(b["labels"][0]["score"], abs=1e-4)


def test_median_filter_of_events():
    scores = [0.1, 0.9, 0.1, 0.1, 0.8, 0.2, 0.8, 0.9, 0.1]
    windows = [
        {"start": i / 10, "end": (i + 1) / 10, "labels": [{"label": "dog", "score": s}]}
        for i, s in enumerate(scores)
    ]
    assert len(find_events(windows)) == 3
    (event,) = find_events(windows, median_filter_s=0.3)
    assert (event["start"], event["end"]) == (
        pytest.approx(0.5, abs=0.05),
        pytest.approx(0.8, abs=0.05),
    )
    with pytest.raises(ValueError, match="median_filter_s must be 0 or more"):
        find_events(windows, median_filter_s=-1)


def test_window_pooling_of_a_classifier(tmp_path):
    model = tiny_model(problem_type="multi_label_classification", window_pooling="max", **NAMES)
    folder = save(model, tmp_path / "max")
    classifier = pipeline("audio-classification", model=folder)
    sound = noise(5.0)
    answer = classifier(sound, return_timestamps=True, top_k=None)
    highest = {
        name: max(e["score"] for w in answer["windows"] for e in w["labels"] if e["label"] == name)
        for name in LABELS
    }
    assert {e["label"]: e["score"] for e in answer["labels"]} == pytest.approx(highest)
    assert {e.label: e.score for e in Classifier(folder).hear(sound).labels()} == pytest.approx(
        highest, abs=1e-5
    )
    mean = {e["label"]: e["score"] for e in classifier(sound, window_pooling="mean", top_k=None)}
    heard = Classifier(folder, window_pooling="mean").hear(sound)
    assert {e.label: e.score for e in heard.labels()} == pytest.approx(mean, abs=1e-5)
    assert all(mean[name] < highest[name] for name in LABELS)
    with pytest.raises(ValueError, match="window_pooling must be one of mean, max"):
        classifier(sound, window_pooling="median")

    model.config.window_pooling = None  # as of published checkpoints
    plain = pipeline("audio-classification", model=save(model, tmp_path / "plain"))
    assert {e["label"]: e["score"] for e in plain(sound, top_k=None)} == pytest.approx(mean)


def test_the_export_command_takes_detectors(tmp_path, frame_folder, monkeypatch):
    taken = []
    monkeypatch.setattr(onnx_files, "export_onnx", lambda model, *_: taken.append(model) or {})
    onnx_files.export_and_check(ExportOptions(checkpoint=frame_folder, output=tmp_path))
    assert isinstance(taken[0], ASTForAudioFrameClassification)
    options = ExportOptions(checkpoint=frame_folder, output=tmp_path, web=tmp_path / "web")
    with pytest.raises(ValueError, match="is a detector: --check and --web are for classifiers"):
        onnx_files.export_and_check(options)


def test_what_ast_classify_writes_is_read_back(tmp_path, frame_folder, monkeypatch):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    files = [str(sounds / name) for name in ("a.wav", "b b.wav")]
    for seed, file in enumerate(files):
        soundfile.write(file, noise(4.0, seed), RATE)
    output = tmp_path / "out"
    arguments = [*files, "--model", frame_folder, "--output", str(output), "--threshold", "0.45"]
    arguments += ["--formats", "csv", "raven", "audacity", "--median_filter_s", "0.3"]
    with pytest.raises(SystemExit) as exit_status:
        classify.main(arguments)
    assert not exit_status.value.code
    heard = {}
    for file in files:
        from modeling_ast.events_ast import EventRules

        events = Classifier(frame_folder).hear(file).events(EventRules(0.45, median_filter_s=0.3))
        heard[file] = sorted((round(e.start, 6), round(e.end, 6), e.label) for e in events)
    assert sum(map(len, heard.values())) > 3
    for written in ("events.csv", "raven", "audacity"):
        read = read_annotations(output / written, files)
        assert read.problems == []
        found = {
            file: [(round(e.start, 6), round(e.end, 6), e.label) for e in events]
            for file, events in read.of_recording.items()
        }
        assert found == heard, written


def test_some_labels_of_a_frame_model(frame_folder):
    sound = noise(3.0)
    every = Classifier(frame_folder).hear(sound)
    some = Classifier(frame_folder, labels=["rain", "dog"]).hear(sound)
    np.testing.assert_array_equal(some.scores, every.scores[:, [3, 0]])
