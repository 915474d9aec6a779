"""ast-finetune-accelerate and ast-classify as a user runs them, on tones."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import pipeline
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification
from scripts import classify, finetune_accelerate
from scripts.data.batches import Collator
from scripts.training.options import FinetuneOptions
from scripts.training.start import open_data, start_model
from scripts.training.with_accelerate import finetune

from .conftest import REPOSITORY, TINY_RECIPE
from .sounds import PITCHES, encode, tone, write_class_folders, write_parquet


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on class folders of tones."""
    folder = tmp_path_factory.mktemp("finetune")
    sounds = write_class_folders(folder / "sounds", 20)
    arguments = FinetuneOptions(
        dataset=str(sounds), output=str(folder / "run"), num_epochs=6, time_roll=48, **TINY_RECIPE
    )
    return folder / "run", finetune(arguments)


def test_learns_and_leaves_a_run_folder(trained):
    run_folder, last = trained
    assert last["evaluation_accuracy"] >= 0.9
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1] == last
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert (run_folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    arguments = yaml.safe_load((run_folder / "arguments.yaml").read_text())
    assert FinetuneOptions(**arguments).num_epochs == 6


def test_checkpoint_loads_everywhere(trained):
    checkpoint = trained[0] / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["id2label"] == {"0": "high", "1": "low", "2": "mid"}
    assert (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "preprocessor_config.json").exists()
    inputs = torch.randn(2, 48, 32)
    with torch.no_grad():
        theirs = native.ASTForAudioClassification.from_pretrained(checkpoint)(inputs).logits
        ours = ASTForAudioClassification.from_pretrained(checkpoint)(inputs).logits
    assert (ours - theirs).abs().max() <= 1e-5
    classifier = pipeline("audio-classification", model=str(checkpoint))
    for name, pitch in PITCHES.items():
        assert classifier(tone(pitch, seed=99))[0]["label"] == name


def test_same_seed_same_weights(trained, tmp_path):
    run_folder, _ = trained
    arguments = yaml.safe_load((run_folder / "arguments.yaml").read_text())
    finetune(FinetuneOptions(**{**arguments, "output": str(tmp_path)}))
    for name in ("model.safetensors", "preprocessor_config.json", "config.json"):
        again, once = (folder / "checkpoint" / name for folder in (tmp_path, run_folder))
        assert again.read_bytes() == once.read_bytes(), name


def test_mixup_mixes_sound_and_labels_in_a_seeded_way():
    extractor = ASTFeatureExtractor(max_length=48)
    rows = [
        {"audio": {"array": tone(pitch, seed=3), "sampling_rate": 16000}, "label": label}
        for label, pitch in enumerate(PITCHES.values())
    ] * 2
    plain = Collator(extractor, 3)(rows)
    mixed, again = (Collator(extractor, 3, 1.0, (7, 3, 0))(rows) for _ in range(2))
    other_epoch = Collator(extractor, 3, 1.0, (7, 2, 0))(rows)
    assert plain["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert mixed["labels"].shape == (6, 3)
    torch.testing.assert_close(mixed["labels"].sum(dim=1), torch.ones(6))
    assert mixed["input_values"].equal(again["input_values"])
    assert not mixed["labels"].equal(other_epoch["labels"])
    # λ is a half or near it: a mixed clip's label has no class at 100 %.
    changed = (mixed["labels"].max(dim=1).values < 0.999).nonzero().flatten().tolist()
    assert changed
    for clip in changed:
        assert not torch.allclose(mixed["input_values"][clip], plain["input_values"][clip])


def test_weights_of_the_last_epochs_are_averaged(tmp_path):
    sounds = str(write_class_folders(tmp_path / "sounds", 6))
    weights = {}
    for name, settings in {
        "one": {"num_epochs": 1},
        "two": {"num_epochs": 2},
        "mean": {"num_epochs": 2, "averaged_epochs": 2},
    }.items():
        output = tmp_path / name
        constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
        finetune(
            FinetuneOptions(
                dataset=sounds, output=str(output), **{**TINY_RECIPE, **constant, **settings}
            )
        )
        weights[name] = load_file(output / "checkpoint" / "model.safetensors")
    for key, mean in weights["mean"].items():
        expected = (weights["one"][key] + weights["two"][key]) / 2
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)


def test_classify_command(trained, tmp_path):
    checkpoint = str(trained[0] / "checkpoint")
    (tmp_path / "a.flac").write_bytes(encode(tone(300.0, seed=5)))
    (tmp_path / "b.wav").write_bytes(encode(tone(3000.0, seed=6), "WAV"))
    (tmp_path / "broken.mp3").write_bytes(b"no audio at all")
    files = [str(tmp_path / name) for name in ("a.flac", "broken.mp3", "b.wav", "missing.ogg")]
    table = subprocess.run(
        [sys.executable, "-m", "scripts.classify", *files, "--model", checkpoint, "--top-k", "2"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert table.returncode == 1, table.stderr
    lines = table.stdout.splitlines()
    assert len(lines) == 4, table.stdout
    assert lines[0].startswith(files[0])
    assert lines[0].endswith("%  low")
    assert lines[2].endswith("%  high")
    # libmpg123 adds notes of its own.
    errors = [line for line in table.stderr.splitlines() if line.startswith("ast-classify:")]
    assert len(errors) == 2, table.stderr
    assert "broken.mp3" in errors[0]
    assert "missing.ogg" in errors[1]


def test_classify_json(trained, tmp_path, command):
    sound = tmp_path / "a.flac"
    sound.write_bytes(encode(tone(300.0, seed=5)))
    model = str(trained[0] / "checkpoint")
    status, out, _ = command(classify.main, str(sound), "--model", model, "--top-k", "1", "--json")
    assert status == 0
    (result,) = json.loads(out)
    assert result["file"] == str(sound)
    assert result["labels"][0]["label"] == "low"
    assert 0.5 < result["labels"][0]["score"] <= 1


def test_classify_errors(tmp_path, command):
    status, _, error = command(classify.main, "a.wav", "--model", str(tmp_path / "nothing"))
    assert status == 2
    assert error.startswith("ast-classify: error: No such checkpoint folder")
    assert len(error.splitlines()) == 1
    status, _, error = command(classify.main, "a.wav", "--top-k", "0")
    assert (status, error) == (2, "ast-classify: error: --top_k must be at least 1, got 0.\n")


def test_command_line_overrides_recipe(tmp_path, command):
    sounds = write_class_folders(tmp_path / "sounds", 6)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TINY_RECIPE, "num_epochs": 3, "dataset": str(sounds)}))
    output = tmp_path / "run"
    arguments = [str(recipe), "--num_epochs", "1", "--output", str(output)]
    status, out, error = command(finetune_accelerate.main, *arguments)
    assert status == 0, error
    assert "clips to train on" in out
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((output / "arguments.yaml").read_text())["hidden_size"] == 32

    status, _, error = command(finetune_accelerate.main, *arguments)
    assert status == 2
    assert "holds a finished run; choose another --output or pass --overwrite" in error


def test_errors_take_one_line(tmp_path, command):
    parquet = str(write_parquet(tmp_path / "train.parquet", 2))
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("num_epoch: 3\n")
    (tmp_path / "one" / "owl").mkdir(parents=True)
    for number in range(9):
        (tmp_path / "one" / "owl" / f"{number}.flac").write_bytes(encode(tone(440.0, seed=number)))
    for arguments, message in (
        ([str(recipe), parquet], "unknown option 'num_epoch'. Did you mean 'num_epochs'?"),
        (
            ["nowhere.yaml", parquet],
            "No recipe nowhere.yaml: neither a file nor bundled (arabic_speech",
        ),
        ([], "Name a dataset, for example my_sounds/"),
        ([str(tmp_path / "no")], "No such folder or file"),
        ([str(tmp_path / "one")], "has only one label ('owl'); a classifier needs at least two."),
        ([parquet, "--label_column", "x"], "has no column 'x' (--label_column). Known: audio"),
    ):
        status, _, error = command(finetune_accelerate.main, *arguments)
        assert status == 2
        assert error.startswith("ast-finetune-accelerate: error: ")
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("start", ["native", "vision"])
def test_starts_from_checkpoints(tmp_path, native_folder, start):
    sounds = write_class_folders(tmp_path / "sounds", 4)
    settings = {
        **TINY_RECIPE,
        "num_epochs": 1,
        "dataset": str(sounds),
        "output": str(tmp_path / "r"),
    }
    if start == "native":
        settings |= {"model": str(native_folder), "max_length": 128, "num_mel_bins": 64}
        settings |= {"frequency_stride": 10, "time_stride": 10}
    else:
        size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.ViTConfig(**size, intermediate_size=64, image_size=32)
        transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
        settings |= {"model": str(tmp_path / "vit")}
    finetune(FinetuneOptions(**settings))
    model = ASTForAudioClassification.from_pretrained(tmp_path / "r" / "checkpoint")
    assert model.config.num_labels == 3
    assert model.config.hidden_size == {"native": 48, "vision": 64}[start]


def test_geometry_is_the_checkpoints_unless_asked_otherwise(tmp_path, native_folder):
    data = open_data(FinetuneOptions(dataset=str(write_class_folders(tmp_path / "sounds", 2))))

    def start(**options):
        model, extractor = start_model(FinetuneOptions(**options), data)
        config = model.config
        assert (extractor.max_length, extractor.num_mel_bins) == (
            config.max_length,
            config.num_mel_bins,
        )
        return (
            (config.max_length, config.num_mel_bins),
            (config.frequency_stride, config.time_stride),
            model.base_model.embeddings.position_embeddings.shape[1] - 2,
        )

    assert start(model=str(native_folder)) == ((128, 64), (10, 10), 5 * 12)
    assert start(model=str(native_folder), max_length=58) == ((58, 64), (10, 10), 5 * 5)
    assert start() == ((1000, 64), (16, 16), 4 * 62)  # the bundled checkpoint, offline
    assert start(time_stride=8) == ((1000, 64), (16, 8), 4 * 124)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert start(model="scratch", mean=0.0, std=1.0, **small)[:2] == ((1024, 128), (10, 10))


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under torchrun: every clip is evaluated once, both processes step together."""
    parquet = tmp_path / "data"
    for part in range(3):  # not divisible by two: each rank reads every other row
        write_parquet(parquet / f"train-{part}.parquet", 4, seed=10 * part)
    write_parquet(parquet / "test.parquet", 5, seed=100)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TINY_RECIPE, "num_epochs": 2, "evaluation_split": "test"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29611"]
    command += ["-m", "scripts.finetune_accelerate", str(recipe), str(parquet)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation_clips"] == 15
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
