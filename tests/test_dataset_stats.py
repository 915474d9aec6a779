"""ast-dataset-stats against numpy on all frames at once, its files, and its warnings."""

import json
import logging
import re

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor, kaldi_fbank, load_audio
from scripts.data.normalisation import dataset_stats
from scripts.data.options import StatsOptions
from scripts.data.sources import open_stream
from scripts.data.statistics import Statistics, measure_dataset, measure_sounds, statistics_of

from .conftest import shared


@pytest.fixture(scope="module")
def sounds_folder(tmp_path_factory):
    """Two classes, unequal lengths, levels and rates, with a broken and a too short file."""
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    for index, seconds in enumerate([0.3, 1.0, 2.5, 0.7, 1.3]):
        rate = 16000 if index % 2 else 22050
        noise = generator.normal(0, 10.0 ** -(index + 1), int(seconds * rate))
        path = folder / "ab"[index % 2] / f"{index}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, noise.astype(np.float32), rate, subtype="FLOAT")
    (folder / "a" / "broken.wav").write_text("no sound")
    soundfile.write(folder / "b" / "click.wav", np.ones(100), 16000)
    return folder


def directly(sounds, num_mel_bins=128) -> tuple[float, float, int]:
    """Mean, standard deviation and number of all frames, held in memory together."""
    frames = np.concatenate(
        [
            kaldi_fbank(torch.from_numpy(load_audio(sound)), num_mel_bins=num_mel_bins).numpy()
            for sound in sounds
        ]
    ).astype(np.float64)
    return frames.mean(), frames.std(), len(frames)


def test_equals_numpy_on_esc10():
    fold = shared("data/esc10/data/fold1.parquet")
    stream = open_stream(str(fold), "train")
    statistics = measure_dataset(stream)
    mean, std, frames = directly(row["audio"] for row in stream)
    assert (statistics.clips, statistics.frames) == (80, frames)
    assert abs(statistics.mean - mean) < 1e-6
    assert abs(statistics.std - std) < 1e-6


def test_command(sounds_folder, tmp_path, capsys, caplog):
    arguments = StatsOptions(
        dataset=str(sounds_folder), output=str(tmp_path), num_mel_bins=64, num_workers=0
    )
    with caplog.at_level(logging.WARNING):
        statistics = dataset_stats(arguments)
    readable = sorted(sounds_folder.glob("*/[0-9].wav"))
    mean, std, frames = directly(readable, 64)
    assert abs(statistics.mean - mean) < 1e-6
    assert abs(statistics.std - std) < 1e-6
    assert (statistics.clips, statistics.frames, statistics.too_short) == (5, frames, 1)
    assert statistics.histogram.sum() == statistics.values == frames * 64
    assert statistics.samples == sum(len(load_audio(path)) for path in readable)
    assert "Skipped:" in caplog.text
    assert "broken.wav" in caplog.text

    printed = capsys.readouterr().out
    figures = dict(line.split()[:2] for line in printed.splitlines())
    assert float(figures["mean"]) == pytest.approx(mean, abs=1e-6)
    assert float(figures["std"]) == pytest.approx(std, abs=1e-6)
    assert (figures["clips"], figures["frames"]) == ("5", str(frames))
    assert "skipped: 1 unreadable, 1 too short" in printed
    assert (tmp_path / "log_mel_histogram.png").stat().st_size > 5000
    for extractor_class in (ASTFeatureExtractor, native.ASTFeatureExtractor):
        extractor = extractor_class.from_pretrained(tmp_path)
        assert extractor.num_mel_bins == 64
        assert abs(extractor.mean - mean) < 1e-6
        assert abs(extractor.std - std) < 1e-6


def test_floor():
    log_mel = np.full((4, 8), np.log(1.1920929e-07), np.float32)
    log_mel[0] = 2.0
    assert statistics_of(log_mel).floor == 0.75


def test_workers_change_nothing(sounds_folder):
    stream = open_stream(str(sounds_folder), "train")
    alone = measure_dataset(stream)
    together = measure_dataset(stream, num_workers=2)
    assert (alone.mean, alone.std) == pytest.approx((together.mean, together.std), abs=1e-6)
    assert alone.frames == together.frames


def test_csv(sounds_folder, tmp_path, capsys):
    """The command finds the sounds named in any column of a table."""
    sounds = sorted(sounds_folder.rglob("*.wav"))
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["file", *map(str, sounds)]))
    measured = dataset_stats(StatsOptions(dataset=str(table), audio_column="file", num_workers=0))
    assert measured.mean == measure_dataset(open_stream(str(sounds_folder), "train")).mean


def test_an_existing_file_is_updated(sounds_folder, tmp_path, caplog):
    ASTFeatureExtractor(num_mel_bins=40, max_length=77, mean=5.0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    arguments = StatsOptions(dataset=str(sounds_folder), output=str(tmp_path), num_workers=0)
    with caplog.at_level(logging.WARNING):
        dataset_stats(arguments)
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path)
    assert (extractor.num_mel_bins, extractor.max_length) == (40, 77)
    assert extractor.mean < 0
    assert "holds weights that were trained with 5.0" in caplog.text


@pytest.mark.parametrize(
    ("mean", "spread", "warning"),
    [
        (0.0, 1.0, None),
        (20.0, 1.0, "mean is far from the data's .*Fine-tune it with the data's: --mean -"),
        (0.0, 1 / 3, "deviation differs from the data's .*can be deliberate.*Keep the one the wei"),
    ],
)
def test_a_far_checkpoint_is_warned_about(sounds_folder, tmp_path, caplog, mean, spread, warning):
    measured = measure_dataset(open_stream(str(sounds_folder), "train"))
    ASTFeatureExtractor(mean=measured.mean + mean, std=spread * measured.std).save_pretrained(
        tmp_path
    )
    arguments = StatsOptions(dataset=str(sounds_folder), checkpoint=str(tmp_path), num_workers=0)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset_stats(arguments)
    warnings = [text for text in caplog.messages if "checkpoint" in text]
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert re.search(warning, warnings[0])


def test_frames_across_blocks(monkeypatch):
    """A sound read in several blocks has the same frames as the whole."""
    waveform = np.random.default_rng(0).normal(0, 0.1, 16000 * 70).astype(np.float32)
    statistics = measure_sounds([waveform], 16000, 64)
    log_mel = kaldi_fbank(torch.from_numpy(waveform), num_mel_bins=64).double()
    assert statistics.frames == len(log_mel)
    assert statistics.samples == len(waveform)
    assert abs(statistics.mean - float(log_mel.mean())) < 1e-6
    assert abs(statistics.std - float(log_mel.std(correction=0))) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(-1e6, 1e6))
def test_parts_add_up(sizes, level):
    """However the frames are divided, and however far from zero they are."""
    generator = np.random.default_rng(len(sizes))
    parts = [generator.normal(level, 1, (size, 3)).astype(np.float32) for size in sizes]
    total = Statistics()
    for part in parts:
        total.add(statistics_of(part))
    everything = np.concatenate(parts).astype(np.float64)
    assert total.frames == len(everything)
    assert total.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-9)
    assert total.std == pytest.approx(everything.std(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": ""}, "Name a dataset: a folder, Parquet or tar"),
        ({"dataset": "/no/such/folder"}, "No such folder or file: /no/such/folder"),
        ({"audio_column": "sound"}, r"no column 'sound' \(--audio_column\).*Known: audio, label"),
        ({"num_workers": -1}, "--num_workers must be at least 0, got -1"),
        ({"checkpoint": "/no/such/model"}, "No such checkpoint folder: /no/such/model"),
    ],
)
def test_mistakes(sounds_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset_stats(
            StatsOptions(**{"dataset": str(sounds_folder), "num_workers": 0, **arguments})
        )


def test_nothing_to_measure(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"No sound .* could be measured: 1 unreadable, 0 shorter"):
        dataset_stats(StatsOptions(dataset=str(tmp_path), num_workers=0))


def test_another_models_file_is_left_alone(sounds_folder, tmp_path):
    other = tmp_path / "preprocessor_config.json"
    other.write_text(json.dumps({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}))
    with pytest.raises(ValueError, match=r"is of a Wav2Vec2Fea.*, expected an ASTFeatureExtractor"):
        dataset_stats(StatsOptions(dataset=str(sounds_folder), output=str(tmp_path), num_workers=0))
    assert "Wav2Vec2" in other.read_text()
