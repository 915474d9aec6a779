"""Training options: schedules, what is trained, averaging, accumulation, selection, the report."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification, ASTModel
from scripts.data.fingerprint import Fingerprint
from scripts.data.labelled import open_labelled_audio
from scripts.data.options import LabelledOptions
from scripts.training import run as training_run
from scripts.training import run_folder, with_accelerate, with_trainer
from scripts.training.optimisation import learning_rate_factor, make_average, parameter_groups
from scripts.training.options import FinetuneOptions
from scripts.training.run_folder import RunFolder
from scripts.training.start import choose_trained_weights, describe_device, open_data

from .conftest import TINY_RECIPE
from .sounds import write_class_folders, write_parquet

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
    faster = parameter_groups(tiny, 0.1, 0.01, layer_decay=0.5, head_learning_rate=0.7)
    rates = {id(p): g["lr"] for g in faster for p in g["params"]}
    changed = {name for name, p in names.items() if rates[id(p)] != found[id(p)][0]}
    assert changed == {name for name in names if name.startswith("classifier.")}
    assert {rates[id(names[name])] for name in changed} == {0.7}
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


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trained", ["head", "linear"])
def test_a_frozen_encoder_hears_each_clip_once(
    door, trained, sounds, tmp_path, monkeypatch, capsys
):
    """All epochs use its embeddings; the result equals that of running it on every clip."""
    heard = []
    forward = ASTModel.forward

    def counting(self, input_values, *args, **kwargs):
        heard.append(len(input_values))
        return forward(self, input_values, *args, **kwargs)

    monkeypatch.setattr(ASTModel, "forward", counting)
    settings = {"time_mask": 0, "frequency_mask": 0, "num_epochs": 4, "trained": trained}
    # All clips in one step, so that their order is nothing.
    settings |= {"batch_size": 24, "max_length": 64, "evaluation_fraction": 0.25}
    once = run(door, sounds, tmp_path / "once", **settings)
    assert sum(heard) == 24
    assert "it runs only once per clip" in capsys.readouterr().out
    monkeypatch.setattr(training_run, "is_constant", lambda *_: False)
    often = run(door, sounds, tmp_path / "often", **settings)
    assert sum(heard) == 24 + 4 * 24
    for name, weight in often.items():
        torch.testing.assert_close(once[name], weight, atol=1e-5, rtol=1e-4)
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("once", "often")
    ]
    for first, second in zip(*records, strict=True):
        assert first["evaluation_loss"] == pytest.approx(second["evaluation_loss"], abs=1e-5)
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-5)


@pytest.mark.parametrize("settings", [{"mixup_rate": 0.5}, {"time_roll": 3}, {"max_length": 32}])
def test_what_is_random_is_heard_anew(sounds, tmp_path, settings, capsys):
    frozen = {"trained": "linear", "time_mask": 0, "frequency_mask": 0, "max_length": 64}
    run(with_accelerate, sounds, tmp_path / "run", **{**frozen, "num_epochs": 1, **settings})
    assert "only once per clip" not in capsys.readouterr().out


def test_a_torch_for_gpus_without_one_is_mentioned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert describe_device() == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert describe_device().startswith("Training on the CPU: this torch is built for CUDA 13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert describe_device() == ""


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
    """Nothing is learned: the first epoch stays the best, and patience is two more."""
    settings = {"learning_rate": 0.0, "best_metric": "accuracy", "early_stopping_epochs": 2}
    run(door, sounds, tmp_path / "run", num_epochs=6, **settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert report["result"]["epoch"] == 1


def open_run(command: str = "ast-finetune", processes: int = 1, data=None, **options) -> RunFolder:
    return RunFolder(FinetuneOptions(**options), command, processes, data or Fingerprint())


def test_best_epoch(tmp_path):
    for metric, values, best in (
        ("accuracy", [0.5, 0.7, 0.7, 0.6], 2),
        ("loss", [0.5, None, 0.3, 0.4], 3),
        ("expected_calibration_error", [0.2, 0.1, 0.3, 0.1], 2),
    ):
        folder = open_run(output=str(tmp_path), best_metric=metric)
        for epoch, value in enumerate(values, start=1):
            folder.record_epoch({"epoch": epoch, f"evaluation_{metric}": value})
        assert folder.progress.best_epoch == best


def test_a_metric_of_other_labels_is_refused_before_any_model(sounds, tmp_path):
    table = tmp_path / "train.csv"
    files = sorted(Path(sounds).rglob("*.flac"))
    table.write_text("\n".join(["audio,label", *(f"{f},{f.parent.name};loud" for f in files)]))
    options = {"dataset": str(table), "label_separator": ";", "model": "/no/such/model"}
    with pytest.raises(ValueError, match="--best_metric accuracy does not work for multi_label"):
        open_data(FinetuneOptions(**options, best_metric="accuracy"))


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


def save_state(folder: RunFolder) -> Path:
    """A state after three steps of the second epoch; the name of its folder."""
    folder.progress.epoch, folder.progress.step, folder.progress.clips = 2, 3, 5
    folder.begin({"dataset": {}})
    write = {"model.safetensors": b"weights", "random-0.safetensors": b"generators"}
    folder.save_state(
        Accelerator(),
        7,
        lambda state: [(state / name).write_bytes(content) for name, content in write.items()],
    )
    return folder.path / "resume" / "step-000000007"


def test_other_options_are_another_run(tmp_path):
    args = {"output": str(tmp_path), "dataset": "sounds"}
    state = save_state(open_run(**args))
    (tmp_path / "resume" / ".step-000000009.tmp").mkdir()  # killed while it was saved
    again = open_run(**args, save_steps=7)
    assert again.newest_state == state
    assert (again.progress.epoch, again.progress.step) == (2, 3)
    for changed, command, processes, message in (
        ({"learning_rate": 1.0}, "ast-finetune", 1, "learning_rate 0.0001, now 1.0"),
        ({}, "ast-finetune-accelerate", 1, "command 'ast-finetune', now 'ast-finetune-acc"),
        ({}, "ast-finetune", 2, "processes 1, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            open_run(command, processes, **args, **changed)
        anew = open_run(command, processes, **args, **changed, overwrite=True)
        assert anew.newest_state is None
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert open_run(**{**args, "output": str(moved)}).progress.step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "mid").rename(folder / "aha"),
            r"classes high, low, mid, now aha",
        ),
        (
            lambda folder: (folder / "low" / "low0_1.flac").unlink(),
            r"8 \+ 0 clips of 'low' to train and evaluate on, now 7 \+ 0",
        ),
        (
            lambda folder: (folder / "low" / "low0_1.flac").write_bytes(b"shorter"),
            r"other sounds of 'low': their names, sizes or order differ",
        ),
        (
            lambda folder: (folder / "low" / "low0_1.flac").rename(folder / "low" / "new.flac"),
            r"other sounds of 'low'",
        ),
    ],
)
def test_other_data_is_another_run(tmp_path, change, message):
    sounds = write_class_folders(tmp_path / "sounds", 8)
    options = LabelledOptions(evaluation_split="train")

    def data() -> Fingerprint:
        fingerprint = open_labelled_audio(str(sounds), options).fingerprint
        for kind in fingerprint.classes.values():
            kind.evaluation = 0
        return fingerprint

    run = {"output": str(tmp_path / "run")}
    save_state(open_run(data=data(), **run))
    assert open_run(data=data(), **run).newest_state is not None
    change(sounds)
    with pytest.raises(ValueError, match=message):
        open_run(data=data(), **run)
    assert open_run(data=data(), **run, overwrite=True).newest_state is None


def test_other_parquet_files_are_other_data(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", 2)
    write_parquet(tmp_path / "data" / "test.parquet", 1)

    def data() -> Fingerprint:
        options = LabelledOptions(evaluation_split="test")
        return open_labelled_audio(str(tmp_path / "data"), options).fingerprint

    before = data()
    assert not data().differences(before.to_json())
    assert data().digest == before.digest
    write_parquet(tmp_path / "data" / "test.parquet", 1, seed=5)
    (difference,) = data().differences(before.to_json())
    assert difference.startswith("test.parquet ")


def test_other_statistics_are_other_data(tmp_path):
    run = {"output": str(tmp_path / "run")}
    folder = open_run(**run)
    folder.settle_statistics(ASTFeatureExtractor(mean=-6.5, std=5.0))
    save_state(folder)
    near = ASTFeatureExtractor(mean=-6.5000001, std=5.0)
    open_run(**run).settle_statistics(near)
    assert near.mean == -6.5  # the run's own, to the bit
    with pytest.raises(ValueError, match=r"log-mel mean was -6\.5000; now it is -6\.4000"):
        open_run(**run).settle_statistics(ASTFeatureExtractor(mean=-6.4, std=5.0))


@pytest.mark.parametrize("name", ["progress.json", "model.safetensors", "random-0.safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"0" + b[1:], None])
def test_a_damaged_state_is_refused(tmp_path, name, damage):
    run = {"output": str(tmp_path / "run")}
    state = save_state(open_run(**run))
    file = state / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"step-000000007 is damaged .*Remove that folder"):
        open_run(**run)


def test_a_state_lists_no_files_of_others(tmp_path):
    """A name that leaves the folder, or a device, is not even opened."""
    run = {"output": str(tmp_path / "run")}
    state = save_state(open_run(**run))
    os.mkfifo(state / "pipe")
    sealed = json.loads((state / "progress.json").read_text())
    for name in ("../../../../../../../dev/zero", "/dev/zero", "pipe"):
        content = {**sealed["state"], "files": {**sealed["state"]["files"], name: 0}}
        digest = run_folder._digest(content)
        (state / "progress.json").write_text(json.dumps({"checksum": digest, "state": content}))
        with pytest.raises(ValueError, match=r"step-000000007 is damaged"):
            open_run(**run)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"other"), Path.unlink])
def test_a_damaged_best_result_is_refused(tmp_path, damage):
    """It would become the checkpoint, unread."""
    run = {"output": str(tmp_path / "run"), "best_metric": "accuracy"}
    folder = open_run(**run)
    save_state(folder)
    folder.record_epoch({"epoch": 1, "evaluation_accuracy": 0.5})
    folder.save_best(Accelerator(), lambda best: (best / "model.safetensors").write_bytes(b"good"))
    folder.save_state(Accelerator(), 8, lambda state: (state / "a").write_bytes(b"weights"))
    assert open_run(**run).progress.best_epoch == 1
    damage(tmp_path / "run" / "resume" / "best-1" / "model.safetensors")
    with pytest.raises(ValueError, match=r"best-1, is damaged \(model.saf.*--overwrite"):
        open_run(**run)
    assert open_run(**run, overwrite=True).newest_state is None


def test_each_state_keeps_the_best_result_that_it_needs(tmp_path):
    """Without the newest state, the same command resumes from the one before it."""
    run = {"output": str(tmp_path), "best_metric": "accuracy"}
    folder = open_run(**run)
    save_state(folder)
    for epoch in (1, 2, 3):
        folder.record_epoch({"epoch": epoch, "evaluation_accuracy": epoch / 4})
        folder.save_best(Accelerator(), lambda best: (best / "model.safetensors").write_bytes(b"w"))
        folder.save_state(Accelerator(), 7 + epoch, lambda state: (state / "a").write_bytes(b"w"))
    names = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert names == ["best-2", "best-3", "step-000000009", "step-000000010"]
    shutil.rmtree(tmp_path / "resume" / "step-000000010")
    assert open_run(**run).progress.best_epoch == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "--optimizer is 'adm'. Did you mean 'adam'"),
        ({"trained": "body"}, "Known: all, head, linear, lora"),
        ({"best_metric": "clips"}, "--best_metric is 'clips'.*Known: accuracy, macro_f1"),
        ({"num_epochs": 1.5}, "--num_epochs must be a whole number, got 1.5"),
        ({"save_steps": 0}, "--save_steps must be at least 1, got 0"),
        ({"ema_decay": 0.9, "averaged_epochs": 2}, "both average the weights"),
        ({"early_stopping_epochs": 2}, "needs --best_metric"),
        ({"bucket_batches": 4, "time_roll": 10}, "into the padding"),
    ],
)
def test_wrong_options(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**settings)
