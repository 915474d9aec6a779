"""Clips longer than the model's input: which windows are read, bags of them, whole clips."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_extraction import ASTFeatureExtractor, AudioDecodingError, audio_duration
from modeling_ast.loss_ast import classification_loss
from modeling_ast.pooling_ast import pool_logits, pool_scores
from scripts.data.batches import Collator, batches
from scripts.data.windows import describe_long_clips, tiling, training_windows
from scripts.training import with_accelerate, with_trainer
from scripts.training.options import FinetuneOptions
from scripts.training.steps import training_loss

from .conftest import TINY_RECIPE, tiny_model

RATE = 16000
EXTRACTOR = ASTFeatureExtractor(num_mel_bins=8, max_length=64)
MASKING = ASTFeatureExtractor(num_mel_bins=8, max_length=64, return_attention_mask=True)
WINDOW = 400 + 63 * 160  # samples
DOORS = (with_accelerate, with_trainer)


def counting_sound(samples: int) -> np.ndarray:
    """Each sample encodes its position, in 24 bits."""
    return (np.arange(samples) / 2**20).astype(np.float32)


def flac(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="FLAC", subtype="PCM_24")
    return file.getvalue()


def row_of(samples: int, **fields) -> dict:
    audio = {"bytes": flac(counting_sound(samples))}
    return {"audio": audio, "label": 0, "name": str(samples), **fields}


def noise_row(samples: int, seed: int = 0, label: int = 0) -> dict:
    sound = 0.1 * np.random.default_rng(seed).standard_normal(samples)
    return {"audio": {"bytes": flac(sound)}, "label": label, "name": str(samples)}


def places(waveform: torch.Tensor) -> np.ndarray:
    """The position of each sample of a `counting_sound`."""
    return np.round(waveform.numpy() * 2**20).astype(int)


# Which windows


@settings(deadline=None)
@given(duration=st.floats(0.01, 500), window_s=st.floats(0.2, 30))
def test_tiles_cover_the_clip_and_no_fewer_would(duration, window_s):
    starts = np.array(tiling(duration, window_s))
    ends = np.minimum(starts + window_s, duration)
    assert starts[0] == 0
    assert duration - ends[-1] <= 0.01 + 1e-9  # holds no further frame
    assert (starts[1:] <= ends[:-1] + 1e-9).all()
    assert (len(starts) - 1) * window_s < duration
    np.testing.assert_allclose(np.diff(starts, 2), 0, atol=1e-6)


@settings(deadline=None)
@given(
    duration=st.floats(0.01, 500), window_s=st.floats(0.2, 30),
    count=st.integers(1, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_training_windows(duration, window_s, count, seed):
    generator = torch.Generator().manual_seed(seed)
    state = generator.get_state()
    starts = training_windows(duration, window_s, count, generator)
    if len(tiling(duration, window_s)) <= count:
        assert starts == tiling(duration, window_s)
        assert torch.equal(generator.get_state(), state)  # nothing is drawn
        return
    assert len(starts) == count
    assert all(0 <= start <= duration - window_s for start in starts)
    stratum = (duration - window_s) / count
    assert [int(start / stratum + 1e-9) for start in starts] == pytest.approx(range(count), abs=1)
    again = training_windows(duration, window_s, count, torch.Generator().manual_seed(seed))
    assert again == starts


def test_every_part_of_a_clip_is_heard_over_the_epochs():
    generator = torch.Generator().manual_seed(0)
    drawn = [training_windows(100.0, 10.0, 1, generator)[0] for _ in range(400)]
    counts, _ = np.histogram(drawn, 9, (0, 90))
    assert counts.min() > 20


def test_durations():
    assert audio_duration({"bytes": flac(counting_sound(24_000))}) == 1.5
    assert audio_duration(np.zeros(8000, np.float32)) == 0.5
    assert audio_duration({"array": np.zeros((2, 8000)), "sampling_rate": 8000}) == 1.0
    with pytest.raises(AudioDecodingError, match="No such file"):
        audio_duration("missing.wav")


def test_what_happens_to_long_clips_is_said():
    assert describe_long_clips(0, 9, 3.0, 9, 10.26, 1) == ""
    one = describe_long_clips(7, 9, 120.0, 9, 10.26, 1)
    assert one.startswith("7 of 9 training clips are longer than the model's 10.26 s, up to")
    assert "up to 120 s" in one
    assert "one random window of each" in one
    some = describe_long_clips(7, 2000, 120.0, 5000, 10.26, 4)
    assert "7 of the first 2000 training clips" in some
    assert "4 random windows of each, together" in some
    assert "uses all of each, in windows" in describe_long_clips(7, 9, 120.0, 9, 10.26, 12)


# Decoding


def test_a_window_of_a_long_clip_is_drawn():
    collator = Collator(EXTRACTOR, 2)
    row, generator = row_of(100_000), torch.Generator().manual_seed(0)
    starts = []
    for _ in range(5):
        found = places(collator.decode(row, generator).waveform)
        assert len(found) == WINDOW
        assert (np.diff(found) == 1).all()
        starts.append(found[0])
    assert len(set(starts)) == 5


def test_windows_of_a_bag_lie_one_behind_the_other():
    generator = torch.Generator().manual_seed(0)
    drawn = Collator(EXTRACTOR, 2, windows_per_clip=3).decode(row_of(100_000), generator)
    assert len(drawn.waveform) == 3 * WINDOW
    starts = places(drawn.waveform)[::WINDOW]
    assert (np.diff(starts) > 0).all()
    tiled = Collator(EXTRACTOR, 2, windows_per_clip=9).decode(row_of(25_000), generator)
    found = places(tiled.waveform)
    assert len(found) == 3 * WINDOW
    assert set(found) == set(range(25_000))
    short = Collator(EXTRACTOR, 2, windows_per_clip=9).decode(row_of(5000), generator)
    assert len(short.waveform) == 5000


def test_speed_perturbation_keeps_windows_whole():
    collator = Collator(EXTRACTOR, 2, windows_per_clip=3, speed_perturbation=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert len(collator.decode(row_of(100_000), generator).waveform) == 3 * WINDOW


def test_only_the_windows_are_decoded(monkeypatch):
    asked = []

    def load(source, rate, offset=0.0, duration=None):
        asked.append((offset, duration))
        return np.zeros(round(duration * rate), np.float32)

    monkeypatch.setattr("scripts.data.batches.load_audio", load)
    monkeypatch.setattr("scripts.data.batches.audio_duration", lambda *_: 36_000.0)
    row = {"audio": "ten_hours.wav", "label": 0, "name": "long"}
    Collator(EXTRACTOR, 2, windows_per_clip=3).decode(row, torch.Generator())
    assert [duration for _, duration in asked] == [WINDOW / RATE] * 3
    assert all(12_000 * i <= offset <= 12_000 * (i + 1) for i, (offset, _) in enumerate(asked))


def test_a_file_that_ends_before_its_header_says(monkeypatch):
    """What is there is used, as with a short file."""
    monkeypatch.setattr("scripts.data.batches.audio_duration", lambda *_: 500.0)
    clip = Collator(EXTRACTOR, 2, windows_per_clip=4).decode(row_of(20_000), torch.Generator())
    assert places(clip.waveform).tolist() == list(range(WINDOW))
    with pytest.raises(AudioDecodingError, match="Cannot read"):
        Collator(EXTRACTOR, 2).decode({"audio": b"no sound", "label": 0}, torch.Generator())


# Batches


@pytest.mark.parametrize("extractor", [EXTRACTOR, MASKING])
def test_bags_hold_the_windows_as_they_are_alone(extractor):
    rows = [noise_row(25_000), noise_row(5000), noise_row(30_000)]
    bags = Collator(extractor, 2, windows_per_clip=3)(rows)
    assert bags["input_values"].shape == (3, 3, 64, 8)
    assert bags["window_weights"].tolist() == [[WINDOW] * 3, [5000, 0, 0], [WINDOW] * 3]
    for row, bag in zip(rows, bags["input_values"], strict=True):
        seconds = int(row["name"]) / RATE
        for start, window in zip(tiling(seconds, WINDOW / RATE), bag, strict=False):
            alone = Collator(extractor, 2)([{**row, "offset": start}])["input_values"][0]
            assert torch.equal(window[: len(alone)], alone)
    if extractor is MASKING:
        assert bags["attention_mask"].sum(dim=2).tolist()[1] == [29, 0, 0]


def test_mixup_gives_a_bag_one_weight():
    rows = [noise_row(100_000), noise_row(100_000, seed=1, label=1)]
    bags = Collator(EXTRACTOR, 2, mixup_rate=1.0, windows_per_clip=3)(rows)
    assert bags["input_values"].shape == (2, 3, 64, 8)
    torch.testing.assert_close(bags["labels"].sum(dim=1), torch.ones(2))


def stream_rows(lengths):
    for number, samples in enumerate(lengths):
        yield noise_row(samples, seed=number, label=number % 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_hears_whole_clips(num_workers):
    lengths = [25_000, 5000, 100_000, WINDOW, 11_000]
    stream = IterableDataset.from_generator(stream_rows, gen_kwargs={"lengths": lengths})
    found: dict[int, list] = {}
    for batch in batches(stream, 4, num_workers, Collator(EXTRACTOR, 2), whole=True):
        assert len(batch["input_values"]) <= 4
        parts = zip(*(batch[k].tolist() for k in ("clip", "window_weights", "labels")), strict=True)
        for clip, weight, label in parts:
            found.setdefault(clip, []).append((weight, label))
    windows = [len(tiling(samples / RATE, WINDOW / RATE)) for samples in lengths]
    assert sorted(map(len, found.values())) == sorted(windows)
    assert all(len({label for _, label in parts}) == 1 for parts in found.values())


def test_batches_are_the_same_for_the_same_seed():
    def one_pass(epoch: int):
        stream = IterableDataset.from_generator(stream_rows, gen_kwargs={"lengths": [60_000] * 8})
        collator = Collator(EXTRACTOR, 2, 0.5, (3, epoch, 0), windows_per_clip=2)
        return [b["input_values"] for b in batches(stream, 4, 0, collator, shuffle_buffer=8)]

    first, again, other = one_pass(1), one_pass(1), one_pass(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


# Loss


@pytest.mark.parametrize("pooling", ["mean", "max", "linear_softmax"])
@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([1, 4, 0])),
        ("multi_label_classification", torch.eye(5)[:3]),
    ],
)
def test_loss_of_bags(problem_type, labels, pooling):
    model = tiny_model(problem_type=problem_type)
    windows = torch.randn(3, 4, 64, 64)
    weights = torch.tensor([[2.0, 2, 2, 1], [2, 0, 0, 0], [2, 2, 0, 0]])
    batch = {"input_values": windows, "window_weights": weights, "labels": labels}
    loss = training_loss(model, batch, pooling, None)

    logits = model(windows.flatten(0, 1)).logits.view(3, 4, 5)
    is_single = problem_type.startswith("single")
    scores = logits.softmax(-1) if is_single else logits.sigmoid()
    expected = []
    for of_clip, weight, label in zip(scores, weights, labels, strict=True):
        pooled = pool_scores(of_clip[weight > 0], pooling, weight[weight > 0])
        if is_single:
            expected.append(-(pooled[label] / pooled.sum()).log())
        else:
            bce = torch.nn.functional.binary_cross_entropy
            expected.append(bce(pooled.clamp(1e-6, 1 - 1e-6), label))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)
    # A clip of one window has its own logits, and parts add up.
    alone = classification_loss(logits[1:2, 0], labels[1:2], problem_type)
    one = {key: value[1:2] for key, value in batch.items()}
    torch.testing.assert_close(training_loss(model, one, pooling, None), alone)
    items = labels.numel()
    parts = [
        training_loss(model, {k: v[part] for k, v in batch.items()}, pooling, items)
        for part in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(sum(parts), loss)


def test_pooled_logits_have_the_pooled_scores():
    logits = torch.randn(4, 3)
    for pooling in ("mean", "max", "linear_softmax"):
        pooled = pool_logits(logits, "multi_label_classification", pooling)
        torch.testing.assert_close(pooled.sigmoid(), pool_scores(logits.sigmoid(), pooling))
        torch.testing.assert_close(pool_logits(logits, "regression", "mean"), logits.mean(dim=0))
    mean = pool_logits(logits, None, "mean").softmax(-1)
    torch.testing.assert_close(mean, logits.softmax(-1).mean(dim=0))


# A run


def write_long_clips(folder, seconds: float = 4.0, clips: int = 6):
    """A tone for 0.5 s, somewhere in soft noise; its pitch is the class."""
    random = np.random.default_rng(0)
    for name, pitch in (("high", 3000.0), ("low", 300.0)):
        (folder / name).mkdir(parents=True)
        for number in range(clips):
            sound = 0.003 * random.standard_normal(int(seconds * RATE))
            start = int(random.uniform(0, seconds - 0.5) * RATE)
            t = np.arange(RATE // 2) / RATE
            sound[start : start + RATE // 2] += 0.3 * np.sin(2 * np.pi * pitch * t)
            soundfile.write(folder / name / f"{number}.flac", sound, RATE)
    return folder


@pytest.mark.parametrize("door", DOORS)
def test_a_run_on_long_clips(door, tmp_path, capsys):
    sounds = write_long_clips(tmp_path / "sounds")
    settings = {
        **TINY_RECIPE, "dataset": str(sounds), "output": str(tmp_path / "run"), "num_epochs": 1,
        "windows_per_clip": 4, "window_pooling": "max", "loss": "binary_cross_entropy",
        "batch_size": 2, "gradient_accumulation_steps": 2, "evaluation_fraction": 0.3,
    }  # fmt: skip
    record = door.finetune(FinetuneOptions(**settings))
    assert "are longer than the" in capsys.readouterr().out
    assert record["evaluation_clips"] < 12  # clips, not windows
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["window_pooling"] == "max"
