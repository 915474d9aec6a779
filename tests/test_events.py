"""find_events: windows to events, by two thresholds."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_extraction import load_audio
from modeling_ast import find_events
from modeling_ast.events_ast import EventRules

from .conftest import shared


def windows(length=2.0, hop=1.0, **curves):
    """Windows of `length` every `hop` seconds with the scores of each label."""
    return [
        {
            "start": index * hop,
            "end": index * hop + length,
            "labels": [{"label": k, "score": s} for k, s in zip(curves, scores, strict=True)],
        }
        for index, scores in enumerate(zip(*curves.values(), strict=True))
    ]


def spans(events):
    return [(e["label"], round(e["start"], 6), round(e["end"], 6)) for e in events]


def test_neighbours_are_one_event_with_the_highest_score():
    found = find_events(windows(dog=[0.1, 0.6, 0.9, 0.7, 0.1]), threshold=0.5)
    # From 0.1 to 0.6 the score goes through 0.4, four fifths of the threshold, at 0.6.
    assert spans(found) == [("dog", 1.6, 4.5)]
    assert found[0]["score"] == 0.9
    assert find_events(windows(dog=[0.1, 0.2]), threshold=0.5) == []
    assert find_events([]) == []


def test_hysteresis():
    """The release threshold bridges dips and extends events, but makes none by itself."""
    dip = windows(dog=[0.4, 0.6, 0.4, 0.6, 0.1, 0.4, 0.1])
    apart = find_events(dip, 0.5, release_threshold=0.5)
    assert spans(apart) == [("dog", 1.5, 2.5), ("dog", 3.5, 4.2)]
    assert spans(find_events(dip, 0.5, release_threshold=0.3)) == [("dog", 0.0, 4.6)]
    assert spans(find_events(dip, 0.5)) == [("dog", 0.0, 4.4)]


def test_minimum_length():
    curve = windows(dog=[0.9, 0.1, 0.9, 0.9, 0.1])
    assert spans(find_events(curve, 0.5, minimum_length_s=1.75)) == [("dog", 2.375, 4.625)]
    assert len(find_events(curve, 0.5, minimum_length_s=1.5)) == 2  # the first begins at 0


def test_labels_are_apart_and_have_their_own_thresholds():
    both = windows(dog=[0.9, 0.9, 0.1], cat=[0.1, 0.3, 0.3])
    assert spans(find_events(both, 0.2)) == [("dog", 0.0, 2.925), ("cat", 1.3, 4.0)]
    assert spans(find_events(both, {"cat": 0.25})) == [("cat", 1.5, 4.0)]
    # A label that a window does not name is not heard there.
    both[1]["labels"] = []
    assert spans(find_events(both, 0.2)) == [("dog", 0.0, 1.5), ("cat", 2.5, 4.0)]


def test_a_gap_between_windows_ends_an_event():
    apart = windows(length=1.0, hop=3.0, dog=[0.9, 0.9])
    assert spans(find_events(apart)) == [("dog", 0.0, 1.0), ("dog", 3.0, 4.0)]
    touching = windows(length=1.0, hop=1.0, dog=[0.9, 0.9])
    assert spans(find_events(touching)) == [("dog", 0.0, 2.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5, "release_threshold": 0.6}, r"\(0.6\) is above the threshold \(0.5\)"),
        ({"threshold": "high"}, "threshold must be a number, got 'high'"),
        ({"threshold": {"dog": None}}, "The threshold of 'dog' must be a number, got None"),
        ({"minimum_length_s": -1}, "minimum_length_s must be 0 or more, got -1"),
        ({"release_threshold": float("nan")}, "release_threshold must be a number, got nan"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        find_events([], **options)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0.1, 1),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
def test_laws(scores, threshold, hop):
    """A label's events are in order and apart, inside the sound, and around a window with the
    label; the middle of every such window is in one."""
    curve = windows(length=2.0, hop=hop, dog=scores)
    found = find_events(curve, threshold)
    assert all(event["start"] <= event["end"] for event in found)
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(found))
    if found:
        assert found[0]["start"] >= 0
        assert found[-1]["end"] <= curve[-1]["end"]
        assert min(event["score"] for event in found) >= threshold
    for index, score in enumerate(scores):
        inside = [e for e in found if e["start"] <= index * hop + 1 <= e["end"]]
        assert len(inside) >= (score >= threshold)


@pytest.mark.slow
def test_real_sounds_one_after_the_other():
    """The bundled model on ESC-10's held-out fold 5, 80 clips joined in a
    random order, with the default settings (`pytest -m slow -s tests/test_events.py`)."""
    from scripts.inference.classifier import Classifier

    rows = pq.read_table(shared("data/esc10/data/fold5.parquet")).to_pylist()
    classifier = Classifier("ast-tiny-esc10")
    clips, truth, end = [], [], 0.0
    for index in np.random.default_rng(0).permutation(len(rows)):
        clips.append(load_audio(rows[index]["audio"]["bytes"])[: 5 * 16000])
        start, end = end, end + len(clips[-1]) / 16000
        if truth and truth[-1][0] == rows[index]["label"]:
            start = truth.pop()[1]
        truth.append((rows[index]["label"], start, end))
    heard = classifier.hear(np.concatenate(clips))
    events = [
        (classifier.label_names.index(event.label), event.start, event.end)
        for event in heard.events(EventRules())
    ]

    def frames(spans):  # of 0.1 s
        active = np.zeros((round(10 * end), len(classifier.label_names)), bool)
        for label, start, stop in spans:
            active[round(10 * start) : round(10 * stop), label] = True
        return active

    found, wanted = frames(events), frames(truth)
    f1 = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    several = (found.sum(axis=1) > 1).mean()
    onsets = []
    for label, start, stop in truth:
        near = [b for a, b, c in events if a == label and b < stop and c > start]
        onsets += [min(abs(b - start) for b in near)] if near else []
    length = np.mean([stop - start for _, start, stop in events])
    print(
        f"\n{len(events)} events of {len(truth)}: frame F1 {f1:.3f}, onsets "
        f"{np.mean(onsets):.2f} s off (median {np.median(onsets):.2f}), {length:.2f} s long, "
        f"several at a time in {several:.1%} of the frames"
    )
    assert f1 > 0.74
    assert np.mean(onsets) < 1.0
    assert length < 6
    assert several < 0.05
