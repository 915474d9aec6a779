"""Marks, heads, queues, thresholds: from marks to a detector, on synthetic embeddings."""

import json
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.tables import write_csv
from scripts.workbench import queues
from scripts.workbench.calibration import (
    Wish,
    calibrate,
    choose_thresholds,
    interval,
    recordings_needed,
)
from scripts.workbench.heads import (
    Standard,
    are_exclusive,
    choose_strength,
    fit_head,
    layer_normed,
    log_loss,
    recording_folds,
)
from scripts.workbench.marks import (
    Mark,
    MarkBook,
    label_names,
    match_files,
    read_marks,
    to_label_studio,
    window_targets,
    write_marks,
)
from scripts.workbench.queues import (
    committee,
    disagreement,
    disputed_apart,
    farthest_first,
    pick,
    uncertainty,
)

from .conftest import tiny_model

SOUNDS = ["a/one.wav", "a/two.wav", "b/one.wav"]
# Each sound in three windows of 2 s, one every second.
OF_WINDOW = np.repeat(np.arange(3), 3)
SPANS = np.array([[0, 2], [1, 3], [2, 4]] * 3, float)


def targets_of(marks, labels=("bark", "rain")):
    return window_targets(marks, SOUNDS, OF_WINDOW, SPANS, labels)


def test_a_mark_labels_the_windows_that_it_covers():
    nan = np.nan
    targets = targets_of([Mark("a/one.wav", 0.0, 2.0, "bark")])
    # The second window holds half of it; the third does not touch it.
    np.testing.assert_array_equal(targets[:3], [[1, 0], [1, 0], [nan, nan]])
    assert np.isnan(targets[3:]).all()


def test_a_short_mark_counts_where_it_lies_and_a_touch_leaves_its_label_open():
    marks = [Mark("a/two.wav", 2.6, 2.7, "bark"), Mark("a/two.wav", 0.0, 2.4, "rain")]
    targets = targets_of(marks)
    np.testing.assert_array_equal(targets[3:6, 0], [0, 1, 1])
    np.testing.assert_array_equal(targets[3:5, 1], [1, 1])
    assert np.isnan(targets[5, 1])  # rain reaches 0.4 s into it: neither with nor without


def test_background_and_absence_say_nothing_more_than_they_say():
    nan = np.nan
    background = targets_of([Mark("a/one.wav", None, None, "background")])
    np.testing.assert_array_equal(background[:3], np.zeros((3, 2)))
    absent = targets_of([Mark("a/one.wav", 0.0, 2.0, "not bark")])
    np.testing.assert_array_equal(absent[0], [0, nan])
    assert np.isnan(absent[1]).all()
    both = [Mark("a/one.wav", 0.0, 4.0, "background"), Mark("a/one.wav", 0.5, 1.0, "bark;rain")]
    np.testing.assert_array_equal(targets_of(both)[0], [1, 1])
    np.testing.assert_array_equal(targets_of(both)[2], [0, 0])


def test_files_of_marks_are_found_by_the_end_of_their_path():
    found = match_files(
        [Mark("/far/a/one.wav", None, None, "x"), Mark("two.wav", 0, 1, "x")], SOUNDS
    )
    assert found == {"/far/a/one.wav": "a/one.wav", "two.wav": "a/two.wav"}
    with pytest.raises(ValueError, match=r"may be a/one.wav or b/one.wav"):
        match_files([Mark("one.wav", None, None, "x")], SOUNDS)
    with pytest.raises(ValueError, match=r"other.wav, which is not in the index"):
        match_files([Mark("other.wav", None, None, "x")], SOUNDS)


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip)
labels = names.filter(lambda name: name and not name.startswith("not "))
spans = st.floats(0, 1e6).map(lambda start: (start, start + 2.0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(names.filter(bool), spans | st.just((None, None)), labels), max_size=5))
def test_marks_come_back_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("marks") / "marks.csv"
    marks = [Mark(file, *span, label) for file, span, label in rows]
    write_marks(path, marks)
    book = MarkBook(path)
    for mark, back in zip(marks, book.marks, strict=True):
        assert (mark.file, mark.label) == (back.file, back.label)
        assert (back.start is None) == (mark.start is None)
        assert mark.start is None or back.start == pytest.approx(mark.start, abs=6e-4)


def test_a_mark_is_on_the_disk_at_once_and_can_be_taken_back(tmp_path):
    path = tmp_path / "new" / "marks.csv"
    book = MarkBook(path)
    book.add(Mark("x.wav", 0.0, 1.0, "bark"))
    book.add(Mark("x, y.wav", 1.0, 2.5, "rain"))
    assert read_marks(path) == book.marks
    assert book.undo() == Mark("x, y.wav", 1.0, 2.5, "rain")
    assert read_marks(path) == [Mark("x.wav", 0.0, 1.0, "bark")]
    # Some editor left no newline at the end.
    path.write_text(path.read_text().rstrip("\n"))
    book.add(Mark("z.wav", None, None, "background"))
    assert len(read_marks(path)) == 2
    assert book.undo()
    assert book.undo()
    assert book.undo() is None


def test_a_mark_fits_the_columns_of_a_table_made_elsewhere(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text("label,start,note,end,file\nbark,1,mine,2,x.wav\n")
    book = MarkBook(path)
    book.add(Mark("y.wav", 3.0, 4.5, "rain"))
    assert read_marks(path) == [Mark("x.wav", 1, 2, "bark"), Mark("y.wav", 3, 4.5, "rain")]
    assert book.undo() == Mark("y.wav", 3.0, 4.5, "rain")
    assert path.read_text() == "label,start,note,end,file\nbark,1,mine,2,x.wav\n"
    path.write_text("file,label\nx.wav,bark\n")
    with pytest.raises(ValueError, match=r"has no column 'start'"):
        MarkBook(path)
    with pytest.raises(ValueError, match=r"marks\.json.*CSV"):
        MarkBook(tmp_path / "marks.json")


def test_undo_leaves_what_others_wrote(tmp_path):
    """A second page, or a spreadsheet, on the same file."""
    path = tmp_path / "marks.csv"
    here, there = MarkBook(path), MarkBook(path)
    here.add(Mark("x.wav", 0.12345, 1.0, "bark"))
    there.add(Mark("y.wav", 0.0, 1.0, "rain"))
    here.undo()
    assert read_marks(path) == [Mark("y.wav", 0.0, 1.0, "rain")]
    there.add(Mark("z.wav", 0.0, 1.0, "rain"))
    path.write_text(path.read_text().replace("y.wav", "w.wav").replace("1.000", "1"))
    there.undo()
    assert read_marks(path) == [Mark("w.wav", 0.0, 1.0, "rain")]


def test_names_that_a_spreadsheet_must_not_compute_come_back(tmp_path):
    book = MarkBook(tmp_path / "marked.csv")
    book.add(Mark("=1+1.wav", 0.0, 2.0, "@x"))
    assert (tmp_path / "marked.csv").read_text().splitlines()[1] == "'=1+1.wav,0.000,2.000,'@x"
    assert read_marks(book.path) == book.marks
    row = {"file": "=1+1.wav", "start": 0.0, "end": 2.0, "label": "-x"}
    write_csv(tmp_path / "marks.csv", list(row), [row])
    assert read_marks(tmp_path / "marks.csv") == [Mark("=1+1.wav", 0.0, 2.0, "-x")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sound,label\nx,y\n", "no column 'file'"),
        ("file,start,end,label\nx.wav,1,,bark\n", "give start and end, or neither"),
        ("file,start,end,label\nx.wav,2,1,bark\n", "before it starts"),
        ("file,start,end,label\nx.wav,soon,3,bark\n", "must be seconds"),
        ("file,start,end,label\nx.wav,,,\n,0,3,bark\n", "line 3: a mark needs a file"),
        ('file,start,end,label\n"x.wav,0,3,a\ny.wav,0,3,a\n', "after line 1: unexpected end"),
        ("file,start,end,label\nx.wav,0,3," + 140_000 * "a", "after line 1: field larger"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, text, message):
    path = tmp_path / "marks.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_marks(path)


def test_label_studio_there_and_back(tmp_path):
    sound = tmp_path / "a b" / "50% é?d=.wav"
    sound.parent.mkdir()
    sound.touch()
    marks = [Mark(str(sound), 1.0, 2.0, "bark;rain"), Mark("of%20a/dataset", 0.0, 3.0, "bark")]
    tasks = to_label_studio(marks, scores=[0.9, 0.4])
    # Where Label Studio finds a local file below its root, "/".
    address = "/data/local-files/?d=" + quote(str(sound).lstrip("/"))
    assert [task["data"]["audio"] for task in tasks] == [address, "of%20a/dataset"]
    assert tasks[0]["predictions"][0]["result"][0]["score"] == 0.9
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    assert read_marks(path) == []  # predictions are no marks until a person accepts them
    for task in tasks:
        task["annotations"] = task.pop("predictions")
    path.write_text(json.dumps(tasks))
    back = read_marks(path)
    assert back == [marks[0]._replace(file=str(sound).lstrip("/")), marks[1]]
    assert match_files(back[:1], [str(sound)]) == {back[0].file: str(sound)}
    tasks[0]["data"]["audio"] = "/data/upload/3/0a1b2c3d-call.wav"  # uploaded in the browser
    path.write_text(json.dumps(tasks[:1]))
    assert read_marks(path)[0].file == "call.wav"
    assert label_names(marks) == ["bark", "rain"]
    path.write_text('{"no": "export"}')
    with pytest.raises(ValueError, match="not a JSON export of Label Studio"):
        read_marks(path)


def made_up(windows, labels=3, width=16, seed=0, noise=1.0):
    """Embeddings around a centre per label, two windows to a recording."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((labels, width))
    classes = np.repeat(random.integers(labels, size=(windows + 1) // 2), 2)[:windows]
    embeddings = centres[classes] + noise * random.standard_normal((windows, width))
    recordings = np.arange(windows) // 2
    return embeddings.astype(np.float32), np.eye(labels, dtype=np.float32)[classes], recordings


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_checkpoint_s_classifier_holds_the_head_exactly(exclusive):
    """Whatever is fitted, standardised and calibrated: the model's own logits are the head's."""
    embeddings, targets, _ = made_up(60, labels=5, width=48)
    normed = layer_normed(embeddings, 1e-6)
    head = fit_head(normed, targets, exclusive, Standard.of(normed), 0.1)
    head = head.calibrated(np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5))
    model = tiny_model(layer_norm_eps=1e-6)
    with torch.no_grad():
        model.classifier.layernorm.weight.fill_(1)
        model.classifier.layernorm.bias.zero_()
        model.classifier.dense.weight.copy_(torch.from_numpy(head.weight))
        model.classifier.dense.bias.copy_(torch.from_numpy(head.bias))
        logits = model.classifier(torch.from_numpy(embeddings)).numpy()
    np.testing.assert_allclose(logits, head.logits(normed), atol=2e-5)


def test_heads_tell_unheard_recordings_apart_and_ignore_what_nobody_marked():
    embeddings, targets, recordings = made_up(200)
    normed = layer_normed(embeddings, 1e-6)
    standard = Standard.of(normed)
    right = targets.argmax(axis=1)
    for exclusive in (True, False):
        marked = targets.copy()
        marked[100:] = np.nan
        # Other rows' features cannot matter: they are not labelled.
        choice = choose_strength(normed, marked, recordings, exclusive, standard)
        head = fit_head(normed, marked, exclusive, standard, choice.strength)
        assert (head.logits(normed[100:]).argmax(axis=1) == right[100:]).mean() > 0.9
        held_out = choice.logits[:100]
        assert not np.isnan(held_out).any()
        assert np.isnan(choice.logits[100:]).all()
        assert (held_out.argmax(axis=1) == right[:100]).mean() > 0.9


def test_the_penalty_follows_the_noise():
    """Pure noise asks for a strong penalty, clear classes for a weak one."""
    embeddings, targets, recordings = made_up(80, width=64, noise=0.3)
    normed = layer_normed(embeddings, 1e-6)
    standard = Standard.of(normed)
    clear = choose_strength(normed, targets, recordings, True, standard)
    noise = np.random.default_rng(1).standard_normal(normed.shape).astype(np.float32)
    unclear = choose_strength(noise, targets, recordings, True, Standard.of(noise))
    assert clear.strength > unclear.strength
    assert clear.losses[clear.strength] < 0.1 < 0.9 < unclear.losses[unclear.strength]


def test_one_label_unknown_is_left_out_of_that_label_only():
    embeddings, targets, _ = made_up(100, labels=2)
    normed = layer_normed(embeddings, 1e-6)
    standard = Standard.of(normed)
    open_label = targets.copy()
    open_label[:60, 1] = np.nan
    whole = fit_head(normed, targets, False, standard, 1.0)
    partial = fit_head(normed, open_label, False, standard, 1.0)
    fewer = fit_head(normed[60:], targets[60:], False, standard, 1.0)
    np.testing.assert_allclose(partial.weight[0], whole.weight[0], atol=1e-9)
    np.testing.assert_allclose(partial.weight[1], fewer.weight[1], atol=1e-9)
    assert are_exclusive(targets)
    assert not are_exclusive(open_label)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(0, 9),
)
def test_no_recording_is_on_both_sides_and_every_label_stays_to_be_learnt(rows, seed):
    recordings = np.array([recording for recording, _ in rows])
    targets = np.eye(4)[[label for _, label in rows]]
    folds = recording_folds(targets, recordings, seed)
    for recording in np.unique(recordings):
        assert len(np.unique(folds[recordings == recording])) == 1
    for label in range(4):
        mine = np.unique(recordings[targets[:, label] > 0])
        if len(mine) == 1:
            assert (folds[recordings == mine[0]] == -1).all()


def test_labels_with_two_recordings_are_in_two_folds():
    recordings = np.arange(40)
    targets = np.eye(20)[recordings // 2]
    folds = recording_folds(targets, recordings)
    assert (folds[0::2] != folds[1::2]).all()
    assert np.bincount(folds).min() >= 4


def test_calibration_repairs_scores_that_claim_too_much():
    random = np.random.default_rng(0)
    honest = 2 * random.standard_normal((4000, 3))
    there = (random.random((4000, 3)) < 1 / (1 + np.exp(-honest))).astype(float)
    boastful = honest * [3.0, 0.4, 1.0] + [1.0, 0.0, -2.0]
    recordings = np.arange(4000)
    found = calibrate(boastful[:2000], there[:2000], recordings[:2000], exclusive=False)
    assert np.abs(found(boastful) - honest).mean() < 0.2 < 1 < np.abs(boastful - honest).mean()
    assert not found.shared.any()
    before = log_loss(boastful[2000:], there[2000:], False)
    assert log_loss(found(boastful[2000:]), there[2000:], False) < before - 0.1


def test_a_temperature_leaves_the_ranking_alone_and_few_marks_get_a_shared_one():
    random = np.random.default_rng(0)
    logits = random.standard_normal((500, 4))
    classes = np.array([random.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    found = calibrate(5 * logits, np.eye(4)[classes], np.arange(500), exclusive=True)
    np.testing.assert_allclose(found.scale, 0.2, rtol=0.15)
    assert (found(logits).argmax(1) == logits.argmax(1)).all()
    few = calibrate(5 * logits[:8], np.eye(4)[classes[:8]], np.arange(8), exclusive=False)
    assert few.shared.all()
    assert np.isfinite(few.scale).all()
    assert (few.shift == 0).all()


def test_a_promised_precision_is_kept_on_other_recordings():
    """In at least nine of ten draws, as the interval says (95 % one-sided)."""
    kept = promised = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        logits = 2 * random.standard_normal((3000, 1))
        there = (random.random((3000, 1)) < 1 / (1 + np.exp(-logits))).astype(float)
        (choice,) = choose_thresholds(
            logits[:300], there[:300], np.arange(300), ["bark"], Wish(0.85)
        )
        if choice.kept:
            promised += 1
            above = logits[300:, 0] >= choice.value
            kept += there[300:, 0][above].mean() >= 0.85
    assert promised > 30
    assert kept / promised >= 0.9


def test_too_few_marks_get_an_honest_answer():
    scores, there = np.linspace(1, 0, 40)[:, None], (np.arange(40) < 12).astype(float)[:, None]
    (choice,) = choose_thresholds(scores, there, np.arange(40), ["bark"], Wish(0.9))
    assert not choice.kept
    assert choice.precision == 1.0
    assert "takes 29 recordings detected without a mistake" in choice.message
    assert choice.precision_interval[0] == pytest.approx(0.05 ** (1 / 12))
    (one,) = choose_thresholds(scores, 0 * there, np.arange(40), ["bark"], Wish())
    assert one.value == 0.5
    assert not one.kept
    assert "no marked recording with it" in one.message
    assert recordings_needed(0.9) == 29
    assert interval(29, 29)[0] >= 0.9 > interval(28, 28)[0]


def test_windows_of_one_recording_count_as_one():
    """Forty windows from four recordings promise no more than four recordings."""
    scores, there = np.linspace(1, 0, 80)[:, None], (np.arange(80) < 40).astype(float)[:, None]
    (apart,) = choose_thresholds(scores, there, np.arange(80), ["bark"], Wish(0.9))
    (same,) = choose_thresholds(scores, there, np.arange(80) // 10, ["bark"], Wish(0.9))
    assert apart.kept
    assert not same.kept
    assert same.precision_interval[0] == pytest.approx(0.05 ** (1 / 4))


def test_the_highest_f1_lies_between_the_labels():
    scores, there = np.linspace(1, 0, 60)[:, None], (np.arange(60) < 30).astype(float)[:, None]
    (choice,) = choose_thresholds(scores, there, np.arange(60), ["bark"], Wish())
    assert scores[30, 0] < choice.value < scores[29, 0]
    assert choice.f1 == pytest.approx(1)
    assert choice.kept
    assert choice.f1_interval == pytest.approx((1, 1))


@pytest.mark.parametrize(
    "word", ["", "f2", "precision", "precision=1", "precision=x", "recall=0.5"]
)
def test_a_wish_that_is_none(word):
    with pytest.raises(ValueError, match=r"must be f1, or for example precision=0.9"):
        Wish.read(word)
    assert Wish.read("precision=0.95") == Wish(0.95)


def test_uncertain_is_where_the_best_two_tie():
    scores = np.array([[0.9, 0.1, 0.0], [0.45, 0.44, 0.11], [0.5, 0.3, 0.2]])
    assert np.argsort(-uncertainty(scores, True)).tolist() == [1, 2, 0]
    assert uncertainty(np.array([[0.5, 0.0], [0.9, 0.1]]), False).tolist() == [
        pytest.approx(1.0),
        pytest.approx(0.2),
    ]


def test_a_committee_disputes_what_lies_between_the_marks():
    embeddings, targets, recordings = made_up(60, noise=0.5)
    normed = layer_normed(embeddings, 1e-6)
    classes = targets.argmax(axis=1)
    means = np.stack([normed[classes == label].mean(axis=0) for label in range(3)])
    between = layer_normed((means[[0]] + means[[1]]) / 2, 1e-6)
    asked = np.concatenate([means, between])
    members = committee(normed, targets, recordings, True, Standard.of(normed), 1.0)
    values = disagreement(members, asked)
    assert values.argmax() == 3
    assert (values >= -1e-9).all()


def test_farthest_first_takes_what_nothing_marked_is_like():
    angles = np.deg2rad([0, 5, 90, 100, 180])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    allowed = np.array([False, True, True, True, True])
    assert farthest_first(features, np.array([0]), 3, allowed) == [4, 2, 3]


def test_a_round_of_disputed_windows_is_not_one_sound_many_times():
    """Ten likes of one sound, disputed most; the round has the other disputed sound, too."""
    features = np.zeros((40, 3), np.float32)
    features[:10, 0] = features[10:20, 1] = features[20:, 2] = 1
    values = np.r_[np.full(10, 0.9), np.full(10, 0.8), np.zeros(20)]
    left = np.arange(40) != 39
    chosen = disputed_apart(values, features, np.array([39]), 4, left)
    assert {index // 10 for index in chosen} == {0, 1}
    assert len(set(chosen)) == 4


def test_a_queue_is_spread_over_recordings_and_never_repeats_itself():
    spans = np.array([[0, 4], [1, 5], [4, 8], [8, 12], [0, 4], [0, 4]], float)
    recordings = np.array([0, 0, 0, 0, 1, 2])
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert pick(values, recordings, spans, 6) == [0, 2, 3, 4, 5]
    assert pick(values, recordings, spans, 6, at_a_time=1) == [0, 4, 5, 2, 3]
    assert pick(values, recordings, spans, 2, at_a_time=2) == [0, 2]
    assert pick(values, recordings, spans, 9, np.array([0, 1, 0, 0, 0, 1], bool)) == [1, 5]


@pytest.mark.parametrize("at_a_time", [None, 2])
def test_a_day_in_one_recording_is_picked_from_in_one_pass(monkeypatch, at_a_time):
    """Windows beyond those that can be returned are not compared with each other."""
    windows = 20_000
    values = np.random.default_rng(0).integers(0, 500, windows).astype(float)  # ties, too
    starts = np.arange(windows, dtype=float)
    spans = np.stack([starts, starts + 1], axis=1)
    compared = []
    monkeypatch.setattr(queues, "_repeats", lambda one, other: compared.append(1))
    found = pick(values, np.zeros(windows, int), spans, 20, at_a_time=at_a_time)
    assert found == np.argsort(-values, kind="stable")[:20].tolist()
    assert len(compared) <= 20 * 20


def test_picking_sorts_as_the_whole_would_be():
    values = np.random.default_rng(0).integers(0, 50, 9000).astype(float)
    spans = np.tile([[0.0, 1.0]], (9000, 1))
    everything = pick(values, np.arange(9000), spans, 9000)
    assert everything == np.argsort(-values, kind="stable").tolist()
