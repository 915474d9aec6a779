"""The held-out part: every class's share, groups whole, the same however the data is stored."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.data.holdout import hold_out
from scripts.data.labelled import open_labelled_audio
from scripts.data.options import LabelledOptions
from scripts.training.options import FinetuneOptions
from scripts.training.start import open_data

from .sounds import write_class_folders

classes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
fractions = st.floats(0.05, 0.95)


@given(classes, fractions, st.randoms(use_true_random=False))
def test_each_class_gives_its_share(sizes, fraction, random):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    keys = random.sample(range(10**6), len(labels))
    groups = {key: Counter([label]) for key, label in zip(keys, labels, strict=True)}
    chosen = hold_out(groups, fraction)
    held = Counter(labels[keys.index(key)] for key in chosen)
    for label, size in enumerate(sizes):
        # As close to the share as whole clips allow, but one clip of two or more in each part.
        nearest = max(1, min(size - 1, fraction * size)) if size > 1 else 0
        assert abs(held[label] - nearest) <= 0.5
    shuffled = dict(random.sample(sorted(groups.items()), len(groups)))
    assert hold_out(shuffled, fraction) == chosen


@settings(max_examples=60)
@given(st.data())
def test_groups_of_several_classes(data):
    """Both parts keep every class with two groups, if each group has one class."""
    count = data.draw(st.integers(2, 30))
    counters = st.dictionaries(st.integers(0, 4), st.integers(1, 9), min_size=1, max_size=3)
    groups = {key: Counter(data.draw(counters)) for key in range(count)}
    chosen = hold_out(groups, data.draw(fractions))
    assert chosen <= set(groups)
    trained: Counter = Counter()
    for key in set(groups) - chosen:
        trained.update(groups[key])
    assert set(trained) == set().union(*groups.values())  # no class loses all its training clips


def test_speakers_who_say_every_word():
    groups = {speaker: Counter(dict.fromkeys(range(8), 10)) for speaker in range(20)}
    assert len(hold_out(groups, 0.2)) == 4


def test_class_folders_are_held_out_evenly(tmp_path):
    folder = write_class_folders(tmp_path / "sounds", 25)
    data = open_labelled_audio(str(folder), LabelledOptions())
    assert data.train_counts == [20, 20, 20]
    assert data.evaluation_counts == [5, 5, 5]
    names = [{row["name"] for row in part} for part in (data.train, data.evaluation)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 75


def test_a_class_too_small_to_be_divided_is_named(tmp_path, caplog):
    folder = write_class_folders(tmp_path / "sounds", 2)
    (folder / "mid" / "mid0_1.flac").unlink()
    data = open_labelled_audio(str(folder), LabelledOptions())
    assert data.evaluation_counts == [1, 1, 0]
    assert data.train_counts == [1, 1, 1]
    assert "Too few clips to hold any out; trained on but not evaluated: mid." in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fold_column": "fold", "evaluation_fold": "1", "label_column": "category"},
            "ignored --label_column category, --fold_column fold, --evaluation_fold 1. "
            "20 % of each class is held out.",
        ),
        ({"evaluation_split": "validation"}, "and no splits: ignored --evaluation_split val"),
        ({"group_column": "speaker"}, "ignored --group_column speaker"),
    ],
)
def test_a_tables_options_do_not_stop_class_folders(tmp_path, caplog, changes, message):
    folder = write_class_folders(tmp_path / "sounds", 10)
    data = open_data(FinetuneOptions(dataset=str(folder), **changes))
    assert data.evaluation_counts == [2, 2, 2]
    assert message in caplog.text
