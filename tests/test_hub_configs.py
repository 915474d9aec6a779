"""Ready-made repositories: every folder of hub_configs with a config.json, and `--variant`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from feature_extraction import ASTFeatureExtractor, load_audio
from modeling_ast import ASTConfig, ASTForAudioClassification
from scripts.common.bundled import hub_configs_folder, read_label_names
from scripts.common.checkpoints import checkpoint_folder
from scripts.common.descendants import published_descendants
from scripts.convert import main
from scripts.publishing.cards import check_card, published_checkpoints
from scripts.publishing.descendants import descendant_files
from scripts.publishing.published import published_files

from .conftest import GOLDEN, REPOSITORY, shared

HUB_CONFIGS = REPOSITORY / "hub_configs"
FOLDERS = sorted(file.parent for file in HUB_CONFIGS.rglob("config.json"))
BUNDLED = sorted(file.parent for file in HUB_CONFIGS.rglob("model.safetensors"))
# Tokens of each published position table, and the first three logits for sample_audio.flac that
# the port in transformers was checked with.
PUBLISHED = {
    "ast-audioset-10-10-0.4593": (1214, (-0.8760, -7.0042, -8.6602)),
    "ast-audioset-10-10-0.450": (1214, (-1.1986, -7.0903, -8.2718)),
    "ast-audioset-10-10-0.448": (1214, (-2.6128, -8.0080, -9.4344)),
    "ast-audioset-10-10-0.448-v2": (1214, (-1.5080, -7.4534, -8.8917)),
    "ast-audioset-12-12-0.447": (852, (-0.5050, -6.5833, -8.0843)),
    "ast-audioset-14-14-0.443": (659, (-0.3826, -7.0336, -8.2413)),
    "ast-audioset-16-16-0.442": (514, (-1.2113, -6.9101, -8.3470)),
    "ast-speech-commands-v2-10-10-0.9812": (146, None),
}
names = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
DESCENDANTS = {
    folder
    for folder in FOLDERS
    if json.loads((folder / "config.json").read_text()).get("model_type") == "ast-family"
}


def test_every_published_checkpoint_has_its_folder():
    assert {folder.name for folder in FOLDERS} >= set(PUBLISHED) == set(published_checkpoints())
    assert {folder.name for folder in DESCENDANTS} == set(published_descendants())


@pytest.mark.parametrize("folder", sorted(set(FOLDERS) - DESCENDANTS), ids=lambda f: f.name)
def test_native_reads_the_same(folder):
    text = json.loads((folder / "config.json").read_text())
    ours = ASTConfig.from_pretrained(folder)
    native = transformers.ASTConfig.from_pretrained(folder)
    assert type(native) is not type(ours)
    for key in text.keys() - {"auto_map", "transformers_version"}:
        assert getattr(ours, key) == getattr(native, key), key
    from transformers.models.audio_spectrogram_transformer import (
        feature_extraction_audio_spectrogram_transformer as native_features,
    )

    extractor = ASTFeatureExtractor.from_pretrained(folder)
    theirs = native_features.ASTFeatureExtractor.from_pretrained(folder)
    for key in ("mean", "std", "max_length", "num_mel_bins", "sampling_rate", "do_normalize"):
        assert getattr(extractor, key) == getattr(theirs, key), key
    assert extractor.max_length == ours.max_length
    assert extractor.num_mel_bins == ours.num_mel_bins


@names
def test_card_follows_the_hubs_rules(folder):
    check_card((folder / "README.md").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_labels_statistics_and_table(name):
    config = ASTConfig.from_pretrained(HUB_CONFIGS / name)
    extractor = ASTFeatureExtractor.from_pretrained(HUB_CONFIGS / name)
    speech = "speech" in name
    labels = read_label_names("speech_commands_v2" if speech else "audioset")
    assert list(config.id2label.values()) == labels
    assert config.label2id == {label: index for index, label in enumerate(labels)}
    assert config.num_labels == (35 if speech else 527)
    expected = (-6.845978, 5.5654526) if speech else (-4.2677393, 4.5689974)
    assert (extractor.mean, extractor.std) == expected
    assert config.problem_type == f"{'single' if speech else 'multi'}_label_classification"
    assert np.prod(config.trained_grid) + 2 == PUBLISHED[name][0]


@names
def test_forward_pass(folder):
    """At full length and with every label; one layer, as the others are like it."""
    config = ASTConfig.from_pretrained(folder, num_hidden_layers=1)
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    model = ASTForAudioClassification(config).eval()
    rate = extractor.sampling_rate
    inputs = extractor(np.zeros(rate, np.float32), sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert inputs["input_values"].shape == (1, config.max_length, config.num_mel_bins)
    assert logits.shape == (1, config.num_labels)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [*PUBLISHED, *sorted(folder.name for folder in DESCENDANTS)])
def test_folders_are_what_the_command_writes(name):
    """`python -m scripts.publishing.published`"""
    files = published_files if name in PUBLISHED else descendant_files
    for file, text in files(name).items():
        assert (HUB_CONFIGS / name / file).read_text() == text, file


def convert(*arguments, status: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ast-audioset-16-16-0.442", "ast-speech-commands-v2-10-10-0.9812"]
)
def test_a_variant_of_full_size_becomes_a_complete_repository(name, tmp_path):
    model = ASTForAudioClassification(ASTConfig.from_pretrained(HUB_CONFIGS / name))
    torch.save(model.to_original_state_dict(), tmp_path / "original.pth")
    convert(tmp_path / "original.pth", "--variant", name, "--output", tmp_path / "out")
    (tmp_path / "original.pth").unlink()
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert out >= {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert out >= {"modeling_ast.py", "patch_grid_ast.py", "feature_extraction_ast.py"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in json.loads((HUB_CONFIGS / name / "config.json").read_text()).items():
        assert written[key] == value, key
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.mean == ASTFeatureExtractor.from_pretrained(HUB_CONFIGS / name).mean
    again = ASTForAudioClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(again.classifier.dense.weight, model.classifier.dense.weight)


def test_variant_says_what_is_wrong(tmp_path, capsys):
    golden = GOLDEN / "audioset_like_t1024.pth"
    variant = "--variant=ast-audioset-10-10-0.4593"
    for arguments, message in [
        ((golden, tmp_path, "--variant=ast-audioset"), "Unknown variant 'ast-audioset'. Did you"),
        ((golden, tmp_path, "--variant=../labels"), "Unknown variant '../labels'"),
        ((golden, tmp_path, variant, "--labels=esc50"), "omit --labels"),
        ((golden, tmp_path, variant, "--max-length=128"), "omit --max_length"),
        ((golden, variant), "Name the target once"),
        ((golden, tmp_path, variant, "--output", tmp_path), "Name the target once"),
        ((golden, tmp_path, "--variant=ast-audioset-12-12-0.447"), "positions for 1212 patches"),
        ((golden, tmp_path, variant), "is not ast-audioset-10-10-0.4593: its hidden_size is 48"),
    ]:
        convert(*arguments, status=2)
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name][1]])
def test_logits_are_those_published(name, tmp_path):
    sound = load_audio(shared("published/sample_audio.flac"))
    weights = shared(f"published/{published_checkpoints()[name]['file']}")
    convert(weights, "--variant", name, "--output", tmp_path / "out")
    model = ASTForAudioClassification.from_pretrained(tmp_path / "out")
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path / "out")
    inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, :3]
    torch.testing.assert_close(logits, torch.tensor(PUBLISHED[name][1]), atol=1e-4, rtol=0)


def test_bundled_checkpoints_are_small_and_loadable():
    for folder in BUNDLED:
        assert (folder / "model.safetensors").stat().st_size <= 12_000_000
        model, report = ASTForAudioClassification.from_pretrained(
            checkpoint_folder(folder.name), output_loading_info=True
        )
        assert not report["missing_keys"]
        # Half precision is for the file's size only: CPUs compute in float32.
        assert model.dtype == torch.float32
        assert model.config.id2label.keys() == set(range(model.config.num_labels))


@pytest.mark.parametrize("installed", [True, False])
def test_a_bundled_checkpoint_is_found_by_name(tmp_path, monkeypatch, installed):
    """Next to the commands, as in a wheel, and next to `scripts`, as in a checkout."""
    package = tmp_path / "place" / ("ast_scripts" if installed else "scripts")
    configs = (package if installed else package.parent) / "hub_configs"
    (configs / "ast-tiny").mkdir(parents=True)
    (configs / "ast-tiny" / "model.safetensors").touch()
    (configs / "ast-without-weights").mkdir()
    (configs / "published_descendants.yaml").write_text("{}")
    package.mkdir(exist_ok=True)
    monkeypatch.setattr("scripts.common.bundled.__file__", str(package / "common" / "bundled.py"))
    assert hub_configs_folder() == configs
    assert checkpoint_folder("ast-tiny") == str(configs / "ast-tiny")
    for name in ("MIT/ast", "ast-without-weights", "../hub_configs/ast-tiny", "", str(tmp_path)):
        assert checkpoint_folder(name) == name
    monkeypatch.chdir(tmp_path)
    Path("ast-tiny").mkdir()
    assert checkpoint_folder("ast-tiny") == "ast-tiny"  # the user's own comes first
