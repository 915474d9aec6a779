"""find_events: windows to events, by two thresholds."""

import pytest

from modeling_ast import find_events


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
    return [(event["label"], event["start"], event["end"]) for event in events]


def test_neighbours_are_one_event_with_the_highest_score():
    found = find_events(windows(dog=[0.1, 0.6, 0.9, 0.7, 0.1]), threshold=0.5)
    assert found == [{"start": 1.5, "end": 4.5, "label": "dog", "score": 0.9}]
    assert find_events(windows(dog=[0.1, 0.2]), threshold=0.5) == []
    assert find_events([]) == []


def test_hysteresis():
    """The release threshold bridges a dip and reaches both ways, and makes no event by itself."""
    dip = windows(dog=[0.4, 0.6, 0.4, 0.6, 0.1, 0.4, 0.1])
    assert spans(find_events(dip, 0.5)) == [("dog", 1.5, 2.5), ("dog", 3.5, 4.5)]
    assert spans(find_events(dip, 0.5, release_threshold=0.3)) == [("dog", 0.0, 4.5)]


def test_minimum_length():
    curve = windows(dog=[0.9, 0.1, 0.9, 0.9, 0.1])
    assert spans(find_events(curve, 0.5, minimum_length_s=1.75)) == [("dog", 2.5, 4.5)]
    assert len(find_events(curve, 0.5, minimum_length_s=1.5)) == 2  # the first begins at 0


def test_labels_are_apart_and_have_their_own_thresholds():
    both = windows(dog=[0.9, 0.9, 0.1], cat=[0.1, 0.3, 0.3])
    assert spans(find_events(both, 0.2)) == [("dog", 0.0, 2.5), ("cat", 1.5, 4.0)]
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
