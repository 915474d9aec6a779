"""Measuring detection: known answers, the library's own figures, ast-evaluate on annotations."""

import csv
import json

import numpy as np
import pytest
import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification, ASTForAudioFrameClassification
from modeling_ast.configuration_ast import ASTConfig
from modeling_ast.detection_ast import ASTFrameConfig
from modeling_ast.events_ast import Event, EventRules
from scripts import evaluate as command
from scripts.data.annotations import Annotation
from scripts.inference.heard import Heard

from .conftest import TINY_MODEL
from .test_annotated import write_recordings

detection = pytest.importorskip(
    "scripts.evaluation.detection", reason="needs sed_scores_eval", exc_type=ImportError
)
LABELS = ["bark", "rain"]
RULES = EventRules()


def heard_of(events, seconds: float = 20.0, late: float = 0.0) -> Heard:
    """Columns of 0.1 s that score 0.99 where an event is, `late` seconds later, else 0.01."""
    edges = np.round(np.arange(0, seconds + 0.05, 0.1), 6)
    middles = (edges[1:] + edges[:-1]) / 2
    scores = np.full((len(middles), 2), 0.01, np.float32)
    for start, end, label in events:
        inside = (start + late <= middles) & (middles < end + late)
        scores[inside, LABELS.index(label)] = 0.99
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    return Heard.of_arrays(LABELS, spans, scores, np.empty((len(spans), 0)))


def recording(number: int, late: float = 0.0, **changes):
    events = [Annotation(2.0 + number, 4.0 + number, "bark"), Annotation(9.0, 15.0, "rain")]
    return detection.Recording(str(number), heard_of(events, late=late), events)


def metrics(report) -> dict[str, float]:
    return {name: metric["value"] for name, metric in report["metrics"].items()}


def test_what_is_found_exactly_scores_one():
    recordings = [recording(number) for number in range(4)]
    report = detection.measure_detection(recordings, RULES, resamples=5)
    assert metrics(report) == pytest.approx(dict.fromkeys(detection.DETECTION_METRICS, 1.0))
    assert (report["recordings"], report["events"], report["found"]) == (4, 8, 8)
    assert report["onsets"]["errors_s"] == pytest.approx(np.zeros(8), abs=0.05)
    for metric in report["metrics"].values():
        assert metric["low"] == pytest.approx(1) == metric["high"]
    assert [row["label"] for row in report["per_class"]] == LABELS


def test_late_onsets_cost_the_figures_that_ask_for_times():
    recordings = [recording(number, late=0.4) for number in range(4)]
    report = detection.measure_detection(recordings, RULES, resamples=5)
    found = metrics(report)
    assert found["event_f1"] == 0
    assert found["psds_2"] == pytest.approx(1)
    assert 0.7 < found["segment_f1"] < 1
    assert report["onsets"]["errors_s"] == pytest.approx(np.full(8, 0.4), abs=0.051)
    assert report["onsets"]["within_200_ms"] == 0
    assert report["onsets"]["median_error_s"] == pytest.approx(0.4, abs=0.051)


def test_a_class_that_is_not_annotated_is_left_out():
    events = [Annotation(2.0, 4.0, "bark")]
    heard = heard_of([*events, Annotation(9.0, 15.0, "rain")])
    report = detection.measure_detection(
        [detection.Recording("a", heard, events)] * 2, RULES, resamples=5
    )
    assert [row["label"] for row in report["per_class"]] == ["bark"]
    assert metrics(report) == pytest.approx(dict.fromkeys(detection.DETECTION_METRICS, 1.0))
    with pytest.raises(ValueError, match="no annotated events"):
        detection.measure_detection([detection.Recording("a", heard, [])], RULES)


def random_recordings(count: int = 12):
    random = np.random.default_rng(0)
    recordings = []
    for number in range(count):
        events = []
        for label in LABELS:
            start = random.uniform(0, 15)
            events.append(Annotation(start, start + random.uniform(0.5, 4), label))
        heard = heard_of(events[: random.integers(3)], late=float(random.uniform(-0.3, 0.3)))
        noisy = np.clip(heard.scores * random.uniform(0.3, 1) + random.normal(0, 0.05), 0.001, 0.99)
        noisy = noisy + 0.005 * random.random(noisy.shape)
        heard = Heard.of_arrays(LABELS, heard.spans, noisy, np.empty((len(noisy), 0)))
        recordings.append(detection.Recording(str(number), heard, events))
    return recordings


def test_figures_are_the_librarys():
    """On the same tables it gives the same values; weights are copies of recordings."""
    recordings = random_recordings()
    measured = detection._Detection(recordings, RULES)
    library, truth = measured._library, measured._truth
    tables = measured._of_each(measured._event_tables)
    durations = dict.fromkeys(truth, 20.0)
    ones = np.ones(len(recordings))
    f1, *_ = library.collar_based.fscore(
        tables, truth, 0.5, onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2
    )
    assert 0 < f1["macro_average"] < 1
    assert detection._f1(measured.event_counts, ones)[0] == pytest.approx(f1["macro_average"])
    f1, *_ = library.segment_based.fscore(tables, truth, durations, 0.5, segment_length=1.0)
    assert detection._f1(measured.segment_counts, ones)[0] == pytest.approx(f1["macro_average"])

    twice = np.array([2, 0, *[1] * (len(recordings) - 2)])
    for metric, criteria in detection._PSDS.items():
        for weights in (ones, twice):
            names = [str(n) for n in range(len(weights)) for _ in range(int(weights[n]))]
            value, *_ = library.intersection_based.psds(
                {str(i): measured._curves[int(name)] for i, name in enumerate(names)},
                {str(i): truth[name] for i, name in enumerate(names)},
                {str(i): 20.0 for i in range(len(names))},
                alpha_st=1.0,
                max_efpr=100.0,
                **criteria,
            )
            assert 0 < value < 1
            assert measured.psds(metric, weights)[0] == pytest.approx(value)


def test_intervals_are_of_resampled_recordings():
    recordings = random_recordings()
    report = detection.measure_detection(recordings, RULES, resamples=50)
    again = detection.measure_detection(recordings, RULES, resamples=50)
    assert report == again
    for metric in report["metrics"].values():
        assert metric["low"] < metric["high"]
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_windows_of_a_classifier_are_read_between_their_middles():
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]
    heard = Heard.of_arrays(["bark"], spans, np.array([[0.0], [1.0], [0.0]]), np.empty((3, 0)))
    edges, scores = detection.score_curve(heard)
    assert edges == pytest.approx(np.arange(41) / 10)
    assert scores[9, 0] == 0.0  # before the first middle
    assert scores[14, 0] == pytest.approx(0.45)
    assert scores.max() == pytest.approx(0.95)


def test_onset_pairs_take_each_event_once():
    there = [Annotation(0.0, 4.0, "bark"), Annotation(5.0, 6.0, "bark"), Annotation(8, 9, "rain")]
    found = [Event(0.5, 5.6, "bark", 0.9), Event(5.7, 6.0, "bark", 0.8), Event(8, 9, "bark", 0.7)]
    pairs = detection.onset_pairs(there, found)
    assert pairs == [(there[0], found[0]), (there[1], found[1])]


def test_onset_errors_are_drawn(tmp_path):
    found = {"frames": ([-3.0, 0.1, 0.15, 0.5], 6), "windows": ([], 6)}
    detection.draw_onset_errors(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_annotated_recordings_are_evaluated(kind, tmp_path, capsys):
    recordings = write_recordings(tmp_path / "recordings", count=4)
    settings = {**TINY_MODEL, "num_labels": 2, "num_mel_bins": 32, "initializer_range": 0.5}
    labels = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}}
    torch.manual_seed(0)
    if kind == "detector":
        model = ASTForAudioFrameClassification(ASTFrameConfig(**settings, **labels))
    else:
        labels["problem_type"] = "multi_label_classification"
        model = ASTForAudioClassification(ASTConfig(**settings, **labels))
    model.save_pretrained(tmp_path / "checkpoint")
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=128)
    extractor.save_pretrained(tmp_path / "checkpoint")
    words = [str(tmp_path / "checkpoint"), str(recordings), "--annotations", str(recordings)]
    words += [
        "--evaluation_split",
        "train",
        "--output",
        str(tmp_path / "out"),
        "--num_workers",
        "0",
    ]
    words += ["--threshold", "0.3", "--bootstrap_resamples", "5"]
    with pytest.raises(SystemExit) as ending:
        command.main(words)
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert "detection in 4 recordings: 4 annotated events" in text
    assert "\nevent F1 " in text
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["clips"] == 4
    assert "mean_average_precision" in report["metrics"]
    assert report["detection"]["rules"]["threshold"] == 0.3
    with (tmp_path / "out" / "detection_per_class.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"low", "high"}
    assert (tmp_path / "out" / "onset_errors.png").is_file()


def test_an_ensemble_makes_no_events(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["ast-tiny-esc10", "ast-tiny-esc10", ".", "--annotations", str(tmp_path)])
    assert "name one checkpoint: events are not averaged" in capsys.readouterr().err
