"""`Trainer` restores the best epoch and resumes exactly: with our AST, and with transformers' own.

pytest tests/test_trainer.py -rxX -q    prints what transformers' own does not do
"""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from modeling_ast import ASTConfig, ASTForAudioClassification

from .conftest import TINY_MODEL, tiny_native_config

# It saves under the checkpoints' names of the layers and reads with `load_state_dict`, which knows
# the names in memory only, and not strictly: all 16 tensors of every layer are left as they were.
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.xfail(reason="transformers' AST: its layers' weights are not read back"),
)


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "native":
        return native.ASTForAudioClassification(tiny_native_config())
    return ASTForAudioClassification(ASTConfig(**TINY_MODEL))


def clips() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_values": torch.randn(128, 64, generator=generator), "labels": index % 5}
        for index in range(8)
    ]


def make_trainer(kind: str, folder, **options) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=make_model(kind),
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=clips(),
        eval_dataset=clips(),
    )


@pytest.mark.parametrize("kind", ["ours", NATIVE])
def test_the_best_epoch_is_restored(kind, tmp_path):
    trainer = make_trainer(
        kind,
        tmp_path,
        num_train_epochs=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first epoch, so that it is not the last one anyway
    )
    trainer.train()
    best = trainer.state.best_metric
    assert best == max(
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("kind", ["ours", NATIVE])
def test_training_resumes_exactly(kind, tmp_path):
    whole = make_trainer(kind, tmp_path / "whole", num_train_epochs=2)
    whole.train()
    make_trainer(kind, tmp_path / "part", num_train_epochs=1).train()
    resumed = make_trainer(kind, tmp_path / "part", num_train_epochs=2)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
