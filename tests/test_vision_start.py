"""from_vision_checkpoint against the original code's own initialisation from DeiT."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.conversion_ast import vision_config

from .conftest import GOLDEN, SHARED, shared

DEIT_WEIGHTS = "weights/deit_tiny_imagenet"


def golden_config(input_values, **overrides) -> ASTConfig:
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "max_length": input_values.shape[1],
        "num_mel_bins": input_values.shape[2],
        "layer_norm_eps": 1e-6,
        "num_labels": 4,
    }
    return ASTConfig(**{**settings, **overrides})


def golden_cases():
    names = ["deit224_to_t128", "deit224_to_t1024", "deit384_to_t100"]
    return [*names, "deit384_to_t512", "deit384_to_t1024"]


@pytest.mark.parametrize("case", golden_cases())
def test_equals_original(case):
    folder = GOLDEN if (GOLDEN / f"{case}.npz").exists() else shared("golden")
    golden = np.load(folder / f"{case}.npz")
    weights = GOLDEN / f"{case.split('_')[0]}_3ch.pth"
    input_values = torch.from_numpy(golden["input_values"])

    model = ASTForAudioClassification.from_vision_checkpoint(weights, golden_config(input_values))
    model.eval()
    # The golden files replace the random head: its LayerNorm is the identity.
    model.classifier.dense.weight.data = torch.from_numpy(golden["head_weight"])
    model.classifier.dense.bias.data = torch.from_numpy(golden["head_bias"])

    embeddings = model.audio_spectrogram_transformer.embeddings
    patch_weight = embeddings.patch_embeddings.projection.weight.detach().numpy()
    np.testing.assert_array_equal(patch_weight, golden["patch_weight"])
    positions = embeddings.position_embeddings[..., :8].detach().numpy()
    np.testing.assert_allclose(positions, golden["position_embeddings"], rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = model(input_values).logits.numpy()
    assert np.abs(logits - golden["logits"]).max() <= 5e-5


def test_deit_tiny_file_and_folder():
    folder = shared(DEIT_WEIGHTS)
    config = vision_config(folder, max_length=128, num_labels=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        192,
        12,
        3,
    )
    from_folder = ASTForAudioClassification.from_vision_checkpoint(folder, config)
    from_file = ASTForAudioClassification.from_vision_checkpoint(
        SHARED / DEIT_WEIGHTS / "model.safetensors", config
    )
    embeddings = from_folder.audio_spectrogram_transformer.embeddings
    # One class token in the file: both special tokens start from it.
    torch.testing.assert_close(embeddings.cls_token, embeddings.distillation_token)
    expected = load_file(folder / "model.safetensors")["blocks.3.attn.qkv.weight"][192:384]
    for model in (from_folder, from_file):
        layer = model.audio_spectrogram_transformer.encoder.layer[3]
        torch.testing.assert_close(layer.attention.attention.key.weight.data, expected)


@pytest.mark.parametrize("architecture", ["deit", "vit"])
def test_transformers_folder(tmp_path, architecture):
    size = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 64,
    }
    source = {
        "deit": lambda: transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(**size)
        ),
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**size)),
    }[architecture]()
    source.save_pretrained(tmp_path)
    config = vision_config(tmp_path, num_attention_heads=3, max_length=64, num_labels=2)
    model = ASTForAudioClassification.from_vision_checkpoint(tmp_path, config)
    ours = model.audio_spectrogram_transformer
    theirs = getattr(source, architecture)
    torch.testing.assert_close(ours.layernorm.weight, theirs.layernorm.weight)
    saved = load_file(tmp_path / "model.safetensors")
    key = f"{architecture}.encoder.layer.1.attention.attention.value.weight"
    value = ours.encoder.layer[1].attention.attention.value.weight.data
    torch.testing.assert_close(value, saved[key])


def test_misfits_are_named(tmp_path):
    input_values = torch.zeros(1, 128, 128)
    config = golden_config(input_values, num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"num_hidden_layers is 3, the config's 2.*intermediate_size is 192"
    ):
        ASTForAudioClassification.from_vision_checkpoint(GOLDEN / "deit224_3ch.pth", config)
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no DeiT or ViT weights.*found conv\.weight"):
        ASTForAudioClassification.from_vision_checkpoint(tmp_path / "other.safetensors", config)
    with pytest.raises(ValueError, match="No such checkpoint"):
        ASTForAudioClassification.from_vision_checkpoint(tmp_path / "missing.pth", config)
    with pytest.raises(ValueError, match=r"No weights in .*: expected model\.safetensors"):
        ASTForAudioClassification.from_vision_checkpoint(tmp_path, config)
