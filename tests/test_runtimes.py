"""One checkpoint, two runtimes: native folder -> ours, ours -> native, ours without our package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoProcessor,
    pipeline,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor
from modeling_ast import (
    ASTAudioClassificationPipeline,
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
)

from .conftest import REPOSITORY
from .strangers import Strangers


@pytest.fixture(scope="session")
def input_values():
    return torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def our_folder(native_folder, tmp_path_factory) -> Path:
    """The same weights, written by our classes."""
    folder = tmp_path_factory.mktemp("ours")
    ASTForAudioClassification.from_pretrained(native_folder).save_pretrained(folder)
    ASTFeatureExtractor.from_pretrained(native_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def native_logits(native_folder, input_values):
    model = native.ASTForAudioClassification.from_pretrained(native_folder)
    with torch.no_grad():
        return model(input_values).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_native_folder_to_ours(native_folder, native_logits, input_values, attention):
    model = ASTForAudioClassification.from_pretrained(native_folder, attn_implementation=attention)
    with torch.no_grad():
        logits = model(input_values).logits
    assert (logits - native_logits).abs().max() <= 1e-5


def test_hidden_states_attentions_and_pooler_equal_native(native_folder, input_values):
    theirs = native.ASTModel.from_pretrained(native_folder, attn_implementation="eager")
    ours = ASTModel.from_pretrained(native_folder, attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, found = theirs(input_values, **options), ours(input_values, **options)
    assert (expected.pooler_output - found.pooler_output).abs().max() <= 1e-5
    assert (expected.last_hidden_state - found.last_hidden_state).abs().max() <= 1e-5
    for name in ("hidden_states", "attentions"):
        assert len(expected[name]) == len(found[name])
        for a, b in zip(expected[name], found[name], strict=True):
            assert (a - b).abs().max() <= 1e-5


def test_attentions_need_eager(native_folder, input_values):
    model = ASTModel.from_pretrained(native_folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match='load the model with attn_implementation="eager"'):
        model(input_values, output_attentions=True)


@pytest.fixture(scope="module")
def strangers():
    with Strangers({"HF_HUB_OFFLINE": "1"}) as strangers:
        yield strangers


def run_without_our_code(strangers, script: str, folder: Path, inputs, tmp_path: Path):
    """Run a script in a process that cannot import our packages; returns its logits."""
    torch.save(inputs, tmp_path / "inputs.pt")
    start = "import torch, transformers\ninputs = torch.load('inputs.pt')\n"
    ending = "\ntorch.save(logits, 'logits.pt')\n"
    strangers.run(start + script.format(folder=str(folder)) + ending, tmp_path)
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def test_our_folder_in_plain_transformers(
    strangers, our_folder, native_logits, input_values, tmp_path
):
    script = """
model = transformers.AutoModelForAudioClassification.from_pretrained({folder!r})
assert type(model).__module__.startswith("transformers."), type(model)
extractor = transformers.AutoFeatureExtractor.from_pretrained({folder!r})
assert type(extractor).__module__.startswith("transformers."), type(extractor)
with torch.no_grad():
    logits = model(inputs).logits
"""
    logits = run_without_our_code(strangers, script, our_folder, input_values, tmp_path)
    assert (logits - native_logits).abs().max() <= 1e-5


def test_our_folder_with_remote_code(strangers, our_folder, native_logits, input_values, tmp_path):
    script = """
options = dict(trust_remote_code=True)
model = transformers.AutoModelForAudioClassification.from_pretrained({folder!r}, **options)
encoder = transformers.AutoModel.from_pretrained({folder!r}, **options)
extractor = transformers.AutoFeatureExtractor.from_pretrained({folder!r}, **options)
config = transformers.AutoConfig.from_pretrained({folder!r}, **options)
for thing in (model, encoder, extractor, config):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
with torch.no_grad():
    # A length that native AST rejects: it is our code that runs.
    assert model(inputs[:, :40]).logits.shape == (3, 5)
    assert encoder(inputs).pooler_output.shape == (3, 48)
    assert extractor(torch.randn(8000), 16000, "longest").input_values[0].shape == (48, 64)
    logits = model(inputs).logits
"""
    logits = run_without_our_code(strangers, script, our_folder, input_values, tmp_path)
    assert (logits - native_logits).abs().max() <= 1e-5


def test_another_geometry_with_remote_code(strangers, our_folder, tmp_path):
    script = f"""
import torch
from transformers import AutoModelForAudioClassification
model = AutoModelForAudioClassification.from_pretrained(
    {str(our_folder)!r}, max_length=512, trust_remote_code=True
)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert model.config.trained_grid == (5, 50)
print(tuple(model(torch.zeros(1, 512, 64)).logits.shape))
"""
    assert strangers.run(script, tmp_path) == ["(1, 5)"]


def test_an_older_transformers_is_named(our_folder, tmp_path):
    """With a stand-in for it: travelling code is imported where pip never checked anything."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '4.57.3'")
    shutil.copytree(our_folder, tmp_path / "checkpoint")
    result = subprocess.run(
        [sys.executable, "-c", "import checkpoint.configuration_ast"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    oldest = re.search(r"transformers>=([\d.]+)", (REPOSITORY / "setup.cfg").read_text())[1]
    assert f"needs transformers {oldest} or newer; found 4.57.3. Run: pip" in result.stderr
    template = (REPOSITORY / "hub_configs/model_card_template.md").read_text()
    assert f"needs transformers {oldest} or newer" in template


@pytest.mark.parametrize("writer", ["native_folder", "our_folder"])
def test_auto_classes_give_ours(writer, request, native_logits, input_values):
    folder = request.getfixturevalue(writer)
    assert type(AutoConfig.from_pretrained(folder)) is ASTConfig
    assert type(AutoModel.from_pretrained(folder)) is ASTModel
    model = AutoModelForAudioClassification.from_pretrained(folder)
    assert type(model) is ASTForAudioClassification
    with torch.no_grad():
        assert (model(input_values).logits - native_logits).abs().max() <= 1e-5
    for auto_class in (AutoFeatureExtractor, AutoProcessor):
        extractor = auto_class.from_pretrained(folder)
        assert type(extractor) is ASTFeatureExtractor
        assert extractor(torch.randn(8000), 16000, "longest").input_values[0].shape == (48, 64)
    classifier = pipeline("audio-classification", model=str(folder))
    assert type(classifier) is ASTAudioClassificationPipeline
    assert type(classifier.model) is ASTForAudioClassification
    assert type(classifier.feature_extractor) is ASTFeatureExtractor


def test_a_saved_pipeline_is_loaded_again(our_folder, tmp_path):
    classifier = pipeline("audio-classification", model=str(our_folder), top_k=2)
    sound = torch.randn(16000, generator=torch.Generator().manual_seed(0)).numpy() / 10
    classifier.save_pretrained(tmp_path / "plain")
    assert "custom_pipelines" not in json.loads((tmp_path / "plain/config.json").read_text())
    again = pipeline("audio-classification", model=str(tmp_path / "plain"), top_k=2)
    assert again(sound) == classifier(sound)
    # On request with its code, which nobody has to trust by default.
    classifier.save_pretrained(tmp_path / "with_code", with_code=True)
    named = json.loads((tmp_path / "with_code/config.json").read_text())["custom_pipelines"]
    assert named["audio-classification"]["impl"] == "pipeline_ast.ASTAudioClassificationPipeline"
    assert (tmp_path / "with_code/pipeline_ast.py").is_file()


def test_saved_again_stays_complete(native_folder, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    ASTForAudioClassification.from_pretrained(native_folder).save_pretrained(once)
    AutoModelForAudioClassification.from_pretrained(once).save_pretrained(twice)
    assert "patch_grid_ast.py" in {path.name for path in twice.iterdir()}
    for path in once.iterdir():
        assert (twice / path.name).read_bytes() == path.read_bytes()
    auto_map = json.loads((twice / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}


def test_gradient_checkpointing_changes_nothing(native_folder, input_values):
    gradients = []
    for checkpointing in (False, True):
        model = ASTForAudioClassification.from_pretrained(native_folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_values, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_return_dict_false(native_folder, input_values):
    model = ASTForAudioClassification.from_pretrained(native_folder)
    (logits,) = model(input_values, return_dict=False)
    assert logits.shape == (3, 5)


def test_saved_weights_can_be_read_by_whoever_may_read_the_config(native_folder, tmp_path):
    ASTForAudioClassification.from_pretrained(native_folder).save_pretrained(tmp_path / "saved")
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
