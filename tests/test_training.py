"""Training options: schedules, what is trained, averaging, accumulation, selection, the report."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from modeling_ast import ASTConfig, ASTForAudioClassification
from scripts.training import with_accelerate, with_trainer
from scripts.training.optimisation import learning_rate_factor, make_average, parameter_groups
from scripts.training.options import FinetuneOptions
from scripts.training.run_folder import RunFolder
from scripts.training.start import choose_trained_weights

from .conftest import TINY_RECIPE
from .sounds import write_class_folders

DOORS = (with_accelerate, with_trainer)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> str:
    return str(write_class_folders(tmp_path_factory.mktemp("training") / "sounds", 8))


@pytest.fixture
def tiny() -> ASTForAudioClassification:
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    grid = {"max_length": 32, "num_mel_bins": 32, "frequency_stride": 16, "time_stride": 16}
    return ASTForAudioClassification(ASTConfig(**size, **grid, intermediate_size=64))


def test_step_schedules_of_the_papers():
    """Full rate in the first epochs; ESC-50, AudioSet full, AudioSet balanced."""
    for start, every, factor, epochs in (
        (5, 1, 0.85, [1, 1, 1, 1, 1, 0.85, 0.85**2, 0.85**3]),
        (2, 1, 0.5, [1, 1, 0.5, 0.25, 0.125]),
        (10, 5, 0.5, [1] * 10 + [0.5] * 5 + [0.25] * 5 + [0.125] * 5),
    ):
        args = FinetuneOptions(
            lr_scheduler_type="step", lr_step_start=start, lr_step_epochs=every,
            lr_step_factor=factor, num_epochs=len(epochs), warmup_ratio=0,
        )  # fmt: skip
        factors = [learning_rate_factor(step, args, 3) for step in range(3 * len(epochs))]
        assert factors == pytest.approx([value for value in epochs for _ in range(3)])


def test_warm_up_and_decay():
    cosine = FinetuneOptions(num_epochs=10, warmup_steps=20)
    assert [learning_rate_factor(step, cosine, 10) for step in (0, 5, 20, 60, 100, 130)] == (
        pytest.approx([0, 0.25, 1, 0.5, 0, 0])
    )
    linear = FinetuneOptions(num_epochs=10, warmup_ratio=0.2, lr_scheduler_type="linear")
    assert [learning_rate_factor(step, linear, 10) for step in (10, 20, 60, 100)] == (
        pytest.approx([0.5, 1, 0.5, 0])
    )
    constant = FinetuneOptions(num_epochs=10, warmup_steps=4, lr_scheduler_type="constant")
    assert [learning_rate_factor(step, constant, 10) for step in (1, 4, 99)] == [0.25, 1, 1]


def test_layer_wise_decay(tiny):
    groups = parameter_groups(tiny, 0.1, 0.01, layer_decay=0.5)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = dict(tiny.named_parameters())
    assert len(found) == len(names)
    base, layer = "audio_spectrogram_transformer.", "audio_spectrogram_transformer.encoder.layer."
    for name, expected in {
        "classifier.dense.weight": (0.1, 0.01),
        "classifier.dense.bias": (0.1, 0),
        f"{base}layernorm.weight": (0.1, 0),
        f"{layer}2.output.dense.weight": (0.05, 0.01),
        f"{layer}0.layernorm_before.bias": (0.0125, 0),
        f"{base}embeddings.patch_embeddings.projection.weight": (0.00625, 0.01),
        f"{base}embeddings.position_embeddings": (0.00625, 0),
        f"{base}embeddings.cls_token": (0.00625, 0),
    }.items():
        assert found[id(names[name])] == pytest.approx(expected), name


@pytest.mark.parametrize(("trained", "expected"), [("head", 4), ("linear", 2), ("all", 60)])
def test_frozen_parts(tiny, trained, expected):
    model = choose_trained_weights(tiny, FinetuneOptions(trained=trained))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained == "all":
        expected = len(list(model.parameters()))
    assert len(names) == expected
    if trained != "all":
        assert all(name.startswith("classifier.") for name in names)
    assert sum(len(g["params"]) for g in parameter_groups(model, 0.1, 0.01)) == expected


def test_moving_average():
    model = nn.Linear(1, 1, bias=False)
    average = make_average(model, FinetuneOptions(ema_decay=0.9))
    for value in (1.0, 2.0, 4.0):
        model.weight.data.fill_(value)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def run(door, sounds, output, **settings) -> dict[str, torch.Tensor]:
    args = {**TINY_RECIPE, "num_epochs": 2, "dataset": sounds, "output": str(output), **settings}
    door.finetune(FinetuneOptions(**args))
    return load_file(output / "checkpoint" / "model.safetensors")


def test_accumulation_changes_nothing_and_both_doors_agree(sounds, tmp_path):
    settings = {"mixup_rate": 0.5, "time_roll": 48, "loss": "binary_cross_entropy"}
    whole = run(with_accelerate, sounds, tmp_path / "whole", batch_size=8, **settings)
    settings |= {"batch_size": 3, "gradient_accumulation_steps": 2}
    cut = run(with_accelerate, sounds, tmp_path / "six", **settings)
    settings |= {"batch_size": 2, "gradient_accumulation_steps": 4}
    for number, door in enumerate(DOORS):
        parts = run(door, sounds, tmp_path / f"parts{number}", **settings)
        for name, weight in whole.items():
            if "key.bias" in name:
                continue  # its gradient is 0 up to rounding, which Adam blows up
            torch.testing.assert_close(parts[name], weight, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(cut["classifier.dense.weight"], whole["classifier.dense.weight"])


@pytest.mark.parametrize("door", DOORS)
def test_lora_checkpoint_is_an_ordinary_one(door, sounds, tmp_path):
    args = {"trained": "lora", "lora_rank": 2, "ema_decay": 0.5, "report_to": "tensorboard"}
    weights = run(door, sounds, tmp_path / "run", **args)
    _, info = native.ASTForAudioClassification.from_pretrained(
        tmp_path / "run" / "checkpoint", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert report["model"]["trained_parameters"] < report["model"]["parameters"] / 3
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    # The adapters have changed the encoder; what they are not attached to is as it was.
    start = run(door, sounds, tmp_path / "start", learning_rate=0.0)
    base = "audio_spectrogram_transformer."
    for name, changed in {
        f"{base}encoder.layer.0.attention.attention.query.weight": True,
        "classifier.dense.weight": True,
        f"{base}embeddings.position_embeddings": False,
    }.items():
        assert torch.equal(weights[name], start[name]) != changed, name


@pytest.mark.parametrize("door", DOORS)
def test_early_stopping(door, sounds, tmp_path):
    """Nothing learnt: the first epoch stays the best, and two more are the patience."""
    settings = {"learning_rate": 0.0, "best_metric": "accuracy", "early_stopping_epochs": 2}
    run(door, sounds, tmp_path / "run", num_epochs=6, **settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert report["result"]["epoch"] == 1


def test_best_epoch(tmp_path):
    for metric, values, best in (
        ("accuracy", [0.5, 0.7, 0.7, 0.6], 2),
        ("loss", [0.5, None, 0.3, 0.4], 3),
    ):
        args = FinetuneOptions(output=str(tmp_path), best_metric=metric)
        folder = RunFolder(args, "ast-finetune", 1)
        for epoch, value in enumerate(values, start=1):
            folder.record_epoch({"epoch": epoch, f"evaluation_{metric}": value})
        assert folder.progress.best_epoch == best


def test_unreadable_sounds_are_named(sounds, tmp_path):
    folder = write_class_folders(tmp_path / "sounds", 6)
    (folder / "low" / "broken.flac").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"broken\.flac"):
        run(with_accelerate, str(folder), tmp_path / "strict")
    run(with_accelerate, str(folder), tmp_path / "run", max_corrupt=1, bucket_batches=2)
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert [name.split("/")[-1] for name in report["unreadable_sounds"]] == ["broken.flac"]
    assert {"torch", "transformers", "accelerate"} <= set(report["versions"])
    assert report["git_revision"] is None or len(report["git_revision"].split()[0]) == 40
    assert report["dataset"]["clips_per_class"]["low"]["train"] >= 4


def test_other_options_do_not_go_on_with_a_run(tmp_path):
    args = {"output": str(tmp_path), "dataset": "sounds"}
    folder = RunFolder(FinetuneOptions(**args), "ast-finetune", 1)
    state = tmp_path / "resume" / "step-000000007"
    state.mkdir(parents=True)
    progress = {"epoch": 2, "step": 3, "clips": 5}
    (state / "progress.json").write_text(
        json.dumps({"run": folder._identity, "progress": progress})
    )
    (tmp_path / "resume" / ".step-000000009.tmp").mkdir()  # killed while it was saved
    again = RunFolder(FinetuneOptions(**args, save_steps=7), "ast-finetune", 1)
    assert again.newest_state == state
    assert again.progress.epoch == 2
    for changed, command, processes, message in (
        ({"learning_rate": 1.0}, "ast-finetune", 1, "learning_rate 0.0001, now 1.0"),
        ({}, "ast-finetune-accelerate", 1, "command 'ast-finetune', now 'ast-finetune-acc"),
        ({}, "ast-finetune", 2, "processes 1, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            RunFolder(FinetuneOptions(**args, **changed), command, processes)
        anew = RunFolder(FinetuneOptions(**args, **changed, overwrite=True), command, processes)
        assert anew.newest_state is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "--optimizer is 'adm'. Did you mean 'adam'"),
        ({"trained": "body"}, "Known: all, head, linear, lora"),
        ({"best_metric": "clips"}, "--best_metric is 'clips'.*Known: accuracy, macro_f1"),
        ({"num_epochs": 1.5}, "--num_epochs must be a whole number, got 1.5"),
        ({"save_steps": 0}, "--save_steps must be at least 1, got 0"),
        ({"ema_decay": 0.9, "averaged_epochs": 2}, "two ways of averaging"),
        ({"early_stopping_epochs": 2}, "needs --best_metric"),
        ({"bucket_batches": 4, "time_roll": 10}, "into the padding"),
    ],
)
def test_wrong_options(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**settings)
