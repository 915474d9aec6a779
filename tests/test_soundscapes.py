"""Soundscapes: events are where the annotations say, at the requested level."""

from itertools import pairwise

import numpy as np
import pytest

from feature_extraction import load_audio
from scripts.data.annotated import open_annotated_audio
from scripts.data.mixtures import mix_clips
from scripts.data.options import LabelledOptions, MixOptions
from scripts.data.soundscapes import active_part, soundscape
from scripts.data.sources import open_stream

from .sounds import tone, write_parquet

RATE = 16000


def test_silent_ends_are_cut_off():
    clip = np.concatenate([np.zeros(8000), tone(440.0, 0, 0.5), np.zeros(4000)])
    part = active_part(clip.astype(np.float32), RATE)
    assert 0.45 * RATE <= len(part) <= 0.55 * RATE
    assert len(active_part(np.zeros(9000, np.float32), RATE)) == 9000
    assert len(active_part(np.ones(10, np.float32), RATE)) == 10


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_events_are_where_and_as_loud_as_is_said(snr_db):
    clips = [("low", tone(440.0, 0, 1.0)), ("high", tone(2000.0, 1, 0.5))]
    random = np.random.default_rng(3)
    waveform, events = soundscape(clips, 20.0, (snr_db, snr_db), RATE, random)
    assert len(waveform) == 20 * RATE
    assert np.abs(waveform).max() <= 1
    assert {event.label for event in events} == {"low", "high"}
    in_event = np.zeros(len(waveform), bool)
    for event in events:
        in_event[round(event.start * RATE) : round(event.end * RATE)] = True
    background = np.square(waveform[~in_event]).mean()
    for event in events:
        part = waveform[round(event.start * RATE) : round(event.end * RATE)]
        found = 10 * np.log10(np.square(part).mean() / background - 1)
        assert found == pytest.approx(snr_db, abs=1.0)


def test_events_of_one_label_that_overlap_are_one():
    clips = [("a", tone(440.0, seed, 3.0)) for seed in range(8)]
    _, events = soundscape(clips, 8.0, (10, 10), RATE, np.random.default_rng(0))
    assert all(a.end < b.start for a, b in pairwise(events))


def test_soundscapes_train_a_detector(tmp_path):
    """Folds are kept, and `--annotations` reads what is written."""
    for fold in (1, 2):
        write_parquet(tmp_path / "clips" / f"fold{fold}.parquet", 3, seed=fold, fold=fold)
    options = MixOptions(
        dataset=str(tmp_path / "clips"), output=str(tmp_path / "mixed"),
        mixtures_per_fold=4, soundscape_s=5.0,
    )  # fmt: skip
    files = mix_clips(options)
    assert [file.name for file in files] == ["fold1.parquet", "fold2.parquet", "events.csv"]
    again = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in mix_clips(options)] == again
    for row in open_stream(str(tmp_path / "mixed"), "train"):
        assert len(load_audio(row["audio"])) == 5 * RATE
        assert all(f"{row['fold']}_" in source for source in row["sources"])
    data = open_annotated_audio(
        str(tmp_path / "mixed"), str(files[-1]),
        LabelledOptions(fold_column="fold", evaluation_fold="2", label_column="labels"),
    )  # fmt: skip
    assert (data.train_clips, data.evaluation_clips) == (4, 4)
    for row in data.evaluation:
        assert row["name"].startswith("fold2_")
        assert {event[2] for event in row["events"]} == set(row["label"])
    with pytest.raises(ValueError, match=r"--snr_to \(1\) must not be below --snr_from \(2\)"):
        MixOptions(snr_from=2.0, snr_to=1.0)
