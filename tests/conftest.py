"""Shared by all tests: an offline, temporary Hugging Face home, a tiny model, golden files."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
# Two threads on a busy machine make tiny models many times slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from filelock import FileLock

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.export_ast import VARIANTS, export_onnx

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
# Real data and weights that are not part of the repository; AST_SHARED says where they are.
SHARED = Path(os.environ.get("AST_SHARED", REPOSITORY.parent / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the shared data; skips the test, visibly, if it is missing."""
    if not (SHARED / path).exists():
        pytest.skip(f"{SHARED / path} is not here (set AST_SHARED)")
    return SHARED / path


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TINY_MODEL = {  # takes milliseconds
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_length": 128,
    "num_mel_bins": 64,
    "num_labels": 5,
}


TINY_RECIPE = {  # a run of seconds; see `FinetuneOptions`
    "model": "scratch",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_length": 48,
    "num_mel_bins": 32,
    "frequency_stride": 16,
    "time_stride": 16,
    "time_mask": 8,
    "frequency_mask": 2,
    "num_workers": 0,
    "learning_rate": 3e-3,
    "batch_size": 8,
}


def tiny_native_config(**overrides) -> transformers.ASTConfig:
    """transformers' own config of a tiny model."""
    return transformers.ASTConfig(**{**TINY_MODEL, **overrides})


def tiny_model(**overrides) -> ASTForAudioClassification:
    """Our tiny model, with weights large enough that its inputs make a difference."""
    settings = {**TINY_MODEL, "initializer_range": 0.2, **overrides}
    return ASTForAudioClassification(ASTConfig(**settings)).eval()


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint with fixed weights, written by transformers' own classes."""
    folder = tmp_path_factory.mktemp("native")
    generator = torch.Generator().manual_seed(1)
    # Named in full: once `modeling_ast` is imported the Auto classes give ours.
    from transformers.models.audio_spectrogram_transformer import (
        feature_extraction_audio_spectrogram_transformer as native_features,
    )
    from transformers.models.audio_spectrogram_transformer import (
        modeling_audio_spectrogram_transformer as native,
    )

    torch.manual_seed(1)
    model = native.ASTForAudioClassification(tiny_native_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    native_features.ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory) -> Path:
    """A tiny model as a waveform-in ONNX file: exporting takes seconds, so processes share it."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "onnx.lock"):
        if not (folder / "onnx").exists():
            torch.manual_seed(0)
            model = tiny_model(id2label={0: "a_dog", 1: "b", 2: "c", 3: "d", 4: "e"})
            settings = {"num_mel_bins": 64, "max_length": 128, "return_attention_mask": True}
            export_onnx(model, ASTFeatureExtractor(**settings), folder / "onnx", ["fp32"])
    return folder / "onnx" / VARIANTS["fp32"]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes by forking one that has imported what they need, which takes seconds."""
    os.environ.setdefault("PYTHONPATH", str(REPOSITORY))
    context = multiprocessing.get_context("forkserver")
    # There is one server for all tests: the first one to ask starts it.
    modules = ["tests.training_runs", "scripts.inference.run", "scripts.inference.classifier"]
    context.set_forkserver_preload(modules)
    return context


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command's main() in this process: -> exit status, stdout, stderr."""

    def run(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code, *capsys.readouterr()

    return run
