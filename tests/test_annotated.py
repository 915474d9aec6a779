"""Annotated recordings train a detector: rows, column targets, runs of both commands."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioFrameClassification, ASTFrameConfig
from modeling_ast.frames_ast import column_spans
from modeling_ast.pooling_ast import pool_logits
from scripts.data.annotated import open_annotated_audio
from scripts.data.batches import Collator, FrameGrid
from scripts.training import with_accelerate, with_trainer
from scripts.training.options import FinetuneOptions
from scripts.training.steps import training_loss

from .conftest import TINY_MODEL, TINY_RECIPE
from .sounds import encode, tone

RATE = 16000
EXTRACTOR = ASTFeatureExtractor(num_mel_bins=32, max_length=64)
GRID = FrameGrid(time_stride=10, patch_frames=16)


def write_recordings(folder, count: int = 8, seconds: float = 3.0):
    """Soft noise with a half-second tone, and a Raven table for each recording."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        name, pitch = (("high", 3000.0), ("low", 300.0))[number % 2]
        sound = 0.003 * random.standard_normal(int(seconds * RATE))
        start = random.uniform(0, seconds - 0.5)
        first = int(start * RATE)
        sound[first : first + RATE // 2] += tone(pitch, number)
        soundfile.write(folder / f"{number}.flac", sound, RATE)
        (folder / f"{number}.Table.1.selections.txt").write_text(
            "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n"
            f"1\t{start:.4f}\t{start + 0.5:.4f}\t{name}\n"
        )
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("annotated") / "recordings")


def options_for(recordings, **settings) -> FinetuneOptions:
    settings = {"dataset": str(recordings), "annotations": str(recordings), **settings}
    return FinetuneOptions(**{**TINY_RECIPE, "evaluation_fraction": 0.4, **settings})


def test_rows(recordings, caplog):
    options = options_for(recordings)
    data = open_annotated_audio(str(recordings), str(recordings), options)
    assert data.label_names == ["high", "low"]
    assert data.problem_type == "multi_label_classification"
    rows = [*data.train, *data.evaluation]
    assert len(rows) == data.train_clips + data.evaluation_clips == 8
    assert sum(data.train_counts) + sum(data.evaluation_counts) == 8
    for row in rows:
        ((start, end, label),) = row["events"]
        assert row["label"] == [label] == [int(row["name"].split("/")[-1][0]) % 2]
        assert end - start == pytest.approx(0.5, abs=1e-3)


def test_what_nobody_annotated_is_left_out_unless_it_has_a_label(recordings, tmp_path, caplog):
    table = "file,start,end,label\n" + "".join(f"{n}.flac,0.5,1,low\n" for n in range(6))
    (tmp_path / "events.csv").write_text(table + "7.flac,2.5,9,low\n")
    annotations = str(tmp_path / "events.csv")
    options = options_for(recordings)
    with caplog.at_level(logging.WARNING):
        data = open_annotated_audio(str(recordings), annotations, options)
    assert data.train_clips + data.evaluation_clips == 6
    assert "line 8: it ends at 9 s, after the end of the sound, which lasts 3 s" in caplog.text
    assert "Skipped 2 of 8 recordings, because nothing says what" in caplog.text

    names = "\n".join(f"{recordings}/{n}.flac,{'high' if n == 6 else ''}" for n in range(7))
    (tmp_path / "train.csv").write_text("audio,label\n" + names + "\n")
    data = open_annotated_audio(str(tmp_path / "train.csv"), annotations, options)
    rows = {row["name"].split("/")[-1]: row for row in [*data.train, *data.evaluation]}
    assert rows["6.flac"]["events"] is None
    assert rows["6.flac"]["label"] == [data.label_names.index("high")]
    assert rows["0.flac"]["events"] == [[0.5, 1.0, data.label_names.index("low")]]


@pytest.mark.parametrize("windows", [1, 3])
def test_targets_follow_the_windows(windows):
    """Wherever the windows are, the marked columns are where the tone is."""
    sound = 0.001 * np.random.default_rng(0).standard_normal(4 * RATE)
    sound[2 * RATE : 3 * RATE] += tone(1000.0, 0, seconds=1.0)
    row = {"audio": {"bytes": encode(sound)}, "label": [1], "name": "x", "events": [[2.0, 3.0, 1]]}
    collator = Collator(EXTRACTOR, 2, frames=GRID, windows_per_clip=windows)
    generator, marked = torch.Generator().manual_seed(0), 0
    for _ in range(30 // windows):
        clip = collator.decode(row, generator)
        pieces = clip.waveform.chunk(windows)
        for piece, label in zip(pieces, clip.label[:-1].chunk(windows), strict=True):
            spans = column_spans(len(label), 10, duration=len(piece) / RATE)
            for (start, end), target in zip(spans, label, strict=True):
                part = piece[int(start * RATE) : int(end * RATE)].numpy()
                is_loud = np.mean(np.abs(part) > 0.01) > 0.25
                if np.mean(np.abs(part) > 0.01) < 0.1 or np.mean(np.abs(part) > 0.01) > 0.7:
                    assert bool(target[1]) == is_loud
                marked += int(target[1])
        assert clip.label[-1].tolist() == [-1, -1]
    assert marked > 10


def test_loss_of_a_bag_of_windows():
    """Strong labels: the mean of its windows' losses. Weak ones: all columns pooled together."""
    long = {"bytes": encode(tone(300.0, 0, seconds=1.5))}
    strong = {"audio": long, "label": [0], "name": "a", "events": [[0.2, 0.9, 0]]}
    weak = {"audio": long, "label": [1], "name": "b", "events": None}
    short = {"audio": {"bytes": encode(tone(300.0, 0, seconds=0.4))}, "label": [1], "name": "c",
             "events": [[0.0, 0.2, 1]]}  # fmt: skip
    torch.manual_seed(0)
    config = ASTFrameConfig(
        **{**TINY_MODEL, "num_labels": 2, "num_mel_bins": 32, "initializer_range": 0.5}
    )
    model = ASTForAudioFrameClassification(config).eval()
    collator = Collator(EXTRACTOR, 2, frames=GRID, windows_per_clip=3)

    batch = collator([strong])
    assert batch["input_values"].shape[:2] == (1, 3)
    labels = batch["labels"].unflatten(1, (3, -1))[0]  # (3, columns, classes)
    assert labels[:, :, 0].sum() > 3
    assert (labels >= 0).all()
    of_windows = model(batch["input_values"][0], labels=labels).loss
    assert training_loss(model, batch, "mean", None).item() == pytest.approx(of_windows.item())

    batch = collator([weak])
    logits = model(batch["input_values"][0]).logits.flatten(0, 1)
    pooled = pool_logits(logits[None], "multi_label_classification", "linear_softmax")
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        pooled, torch.tensor([[0.0, 1.0]])
    )
    assert training_loss(model, batch, "mean", None).item() == pytest.approx(
        expected.item(), rel=1e-5
    )

    alone = [training_loss(model, collator([row]), "mean", None) for row in (strong, weak, short)]
    together = training_loss(model, collator([strong, weak, short]), "mean", None)
    assert together.item() == pytest.approx(sum(alone).item() / 3, rel=1e-5)


def test_batches_of_strong_and_weak_labels():
    sound = {"bytes": encode(tone(300.0, 0, seconds=0.4))}
    strong = {"audio": sound, "label": [0], "name": "a", "events": [[0.0, 0.2, 0]]}
    weak = {"audio": sound, "label": [1], "name": "b", "events": None}
    batch = Collator(EXTRACTOR, 2, frames=GRID)([strong, weak])
    assert batch["labels"].shape == (2, 5, 2)
    assert batch["labels"][0, :, 0].tolist() == [1, 1, 0, -1, -1]  # 0.4 s: three columns of sound
    assert (batch["labels"][1] == -1).all()
    assert batch["clip_labels"].tolist() == [[-1, -1], [0, 1]]

    unknown = FrameGrid(10, 16, unmarked_is_unknown=True)
    batch = Collator(EXTRACTOR, 2, frames=unknown)([strong])
    assert batch["labels"][0].tolist() == [*[[1, 0]] * 2, *[[-1, -1]] * 3]

    mixed = Collator(EXTRACTOR, 2, mixup_rate=1.0, frames=GRID)([strong, weak])
    assert mixed["labels"].shape == (2, 5, 2)
    assert (mixed["labels"][:, 3:] == -1).all()


@pytest.mark.parametrize("door", [with_accelerate, with_trainer])
def test_a_detector_is_trained(door, recordings, tmp_path, capsys):
    options = options_for(
        recordings, output=str(tmp_path / "run"), num_epochs=1, batch_size=2,
        gradient_accumulation_steps=2, mixup_rate=0.3, windows_per_clip=2,
    )  # fmt: skip
    record = door.finetune(options)
    assert "each epoch uses 2 random windows of each, together" in capsys.readouterr().out
    assert 0 <= record["evaluation_mean_average_precision"] <= 1
    assert record["evaluation_clips"] < 8  # recordings, not windows or columns
    checkpoint = tmp_path / "run" / "checkpoint"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == (
        "ast-frame-classification"
    )
    model = ASTForAudioFrameClassification.from_pretrained(checkpoint)
    assert [*model.config.label2id] == ["high", "low"]


def test_options_that_move_sound_away_from_its_labels_are_refused(recordings):
    for option, value in (("time_roll", 5), ("speed_perturbation", 0.1), ("time_patchout", 1)):
        with pytest.raises(ValueError, match=f"With --annotations, --{option} must be"):
            options_for(recordings, **{option: value})
