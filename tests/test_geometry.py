"""Any geometry when a checkpoint is loaded, any length at run time."""

import json
import logging
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForAudioClassification
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from modeling_ast import ASTConfig, ASTForAudioClassification, ASTModel
from modeling_ast.patch_grid_ast import run_time_positions

from .conftest import GOLDEN, SHARED, shared, tiny_model, tiny_native_config

GOLDEN_TARGETS = sorted(
    {path.stem for folder in (GOLDEN, SHARED / "golden") for path in folder.glob("audioset_like_*")}
    - {"audioset_like_t1024"}
)


@pytest.fixture(scope="module")
def audioset_like(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audioset_like")
    ASTForAudioClassification.from_original_checkpoint(
        GOLDEN / "audioset_like_t1024.pth", num_attention_heads=3
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", GOLDEN_TARGETS)
@pytest.mark.parametrize("by_auto_class", [False, True])
def test_golden_geometries(audioset_like, name, by_auto_class):
    path = GOLDEN / f"{name}.npz"
    golden = np.load(path if path.exists() else shared(f"golden/{name}.npz"))
    _, frames, mel_bins = golden["input_values"].shape
    loader = AutoModelForAudioClassification if by_auto_class else ASTForAudioClassification
    model = loader.from_pretrained(
        audioset_like,
        max_length=frames,
        num_mel_bins=mel_bins,
        num_labels=4,
        ignore_mismatched_sizes=True,
    )
    assert (model.config.max_length, model.config.num_mel_bins) == (frames, mel_bins)
    table = model.audio_spectrogram_transformer.embeddings.position_embeddings
    difference = table[..., :8].detach().numpy() - golden["position_embeddings"]
    assert np.abs(difference).max() <= 1e-6

    with torch.no_grad():
        model.classifier.layernorm.weight.fill_(1)
        model.classifier.layernorm.bias.fill_(0)
        model.classifier.dense.weight.copy_(torch.from_numpy(golden["head_weight"]))
        model.classifier.dense.bias.copy_(torch.from_numpy(golden["head_bias"]))
        logits = model(torch.from_numpy(golden["input_values"])).logits
    assert np.abs(logits.numpy() - golden["logits"]).max() <= 5e-5


def test_a_native_checkpoint_takes_any_geometry_and_goes_back_to_native(native_folder, tmp_path):
    model = ASTForAudioClassification.from_pretrained(
        native_folder, max_length=96, num_mel_bins=80, frequency_stride=8, time_stride=12
    )
    grid = ((80 - 16) // 8 + 1, (96 - 16) // 12 + 1)
    assert model.config.trained_grid == grid
    embeddings = model.audio_spectrogram_transformer.embeddings
    assert embeddings.position_embeddings.shape == (1, 2 + grid[0] * grid[1], 48)
    assert embeddings.position_embeddings.requires_grad
    assert embeddings.patch_embeddings.projection.stride == (8, 12)

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["time_stride"] == 12
    native_model = native.ASTForAudioClassification.from_pretrained(tmp_path).eval()
    spectrogram = torch.randn(2, 96, 80)
    with torch.no_grad():
        torch.testing.assert_close(
            model(spectrogram).logits, native_model(spectrogram).logits, atol=1e-5, rtol=0
        )


def test_geometry_comes_in_a_config_too_and_the_config_is_left_alone(native_folder):
    config = AutoConfig.from_pretrained(native_folder, max_length=64)
    by_config, info = ASTModel.from_pretrained(
        native_folder, config=config, time_stride=16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert by_config.config.trained_grid == (5, 4)
    assert (config.max_length, config.time_stride) == (64, 10)
    by_auto = AutoModel.from_pretrained(native_folder, max_length=64, time_stride=16)
    spectrogram = torch.randn(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(by_config(spectrogram).pooler_output, by_auto(spectrogram).pooler_output)


def test_transformers_own_config_will_do(native_folder):
    config = tiny_native_config(max_length=64)
    assert not hasattr(config, "time_patchout")
    spectrogram = torch.randn(1, 64, 64)
    built = ASTForAudioClassification(config)
    assert built(spectrogram).logits.shape == (1, 5)
    assert built.config is built.audio_spectrogram_transformer.config
    loaded = ASTForAudioClassification.from_pretrained(
        native_folder, config=config, attn_implementation="eager"
    )
    expected = ASTForAudioClassification.from_pretrained(native_folder, max_length=64)
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(spectrogram).logits, expected(spectrogram).logits, atol=1e-5, rtol=0
        )


def test_a_geometry_below_one_patch_is_refused(native_folder):
    with pytest.raises(ValueError, match="max_length=15 frames and num_mel_bins=64 is smaller"):
        ASTModel.from_pretrained(native_folder, max_length=15)
    with pytest.raises(ValueError, match="time_stride must be at least 1, got 0"):
        ASTModel.from_pretrained(native_folder, time_stride=0)


def test_a_new_head_is_reported_once(native_folder, caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        model = ASTForAudioClassification.from_pretrained(
            native_folder, max_length=64, num_labels=3, ignore_mismatched_sizes=True
        )
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert model.classifier.dense.out_features == 3
    # A record comes twice where transformers' logger propagates.
    reports = [record.getMessage() for record in {id(r): r for r in caplog.records}.values()]
    assert sum("classifier.dense.weight" in report for report in reports) == 1
    assert not any("position_embeddings" in report for report in reports)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equal_to_native_without_a_mask(native_folder, attention):
    ours = ASTForAudioClassification.from_pretrained(native_folder, attn_implementation=attention)
    theirs = native.ASTForAudioClassification.from_pretrained(
        native_folder, attn_implementation=attention
    )
    spectrogram = torch.randn(3, 128, 64)
    with torch.no_grad():
        a = ours(spectrogram, output_hidden_states=True)
        b = theirs(spectrogram, output_hidden_states=True)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)
    for ours_state, their_state in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(ours_state, their_state, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model_by_attention(request):
    torch.manual_seed(0)
    model = tiny_model()
    model.set_attn_implementation(request.param)
    return model


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 400),
    padding=st.integers(0, 200),
    other=st.integers(1, 400),
    seed=st.integers(0, 2**16),
)
def test_padding_and_company_do_not_matter(model_by_attention, frames, padding, other, seed):
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(frames, 64, generator=generator)
    alone = torch.zeros(1, max(frames, 16), 64)
    alone[0, :frames] = clip
    batch = torch.randn(2, max(frames + padding, other, 16), 64, generator=generator)
    batch[0, frames:] = torch.nan if seed % 2 else 7.0
    batch[0, :frames] = clip
    mask = torch.zeros(batch.shape[:2], dtype=torch.long)
    mask[0, :frames] = 1
    mask[1, :other] = 1
    with torch.no_grad():
        expected = model_by_attention(alone, mask[:1, : alone.shape[1]]).logits[0]
        logits = model_by_attention(batch, mask).logits[0]
    assert (logits - expected).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(frames=st.integers(16, 400), mel_bins=st.integers(16, 200))
def test_every_size_from_one_patch_up(model_by_attention, frames, mel_bins):
    with torch.no_grad():
        logits = model_by_attention(torch.randn(1, frames, mel_bins)).logits
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


def test_a_full_mask_is_no_mask(model_by_attention):
    spectrogram = torch.randn(2, 300, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model_by_attention(spectrogram, torch.ones(2, 300)).logits,
            model_by_attention(spectrogram).logits,
            atol=1e-5,
            rtol=0,
        )


def test_what_is_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="15 frames x 64 mel bins, smaller than one patch"):
        tiny_model()(torch.zeros(1, 15, 64))
    with pytest.raises(
        ValueError, match="one value per frame, shape \\(1, 128\\), got \\(1, 12\\)"
    ):
        tiny_model()(torch.zeros(1, 128, 64), torch.ones(1, 12))
    with pytest.raises(ValueError, match="must be \\(batch, frames, mel bins\\)"):
        tiny_model()(torch.zeros(128, 64))


def test_half_precision_numbers_its_columns_exactly():
    model = tiny_model(max_length=4000, num_mel_bins=16)
    positions = torch.linspace(0, 1, model.config.trained_grid[1])
    table = torch.cat([torch.zeros(2), positions])[None, :, None]
    grid = (1, 1000)
    full = run_time_positions(table, model.config.trained_grid, grid, None)
    half = run_time_positions(table.bfloat16(), model.config.trained_grid, grid, None)
    assert (full - half.float()).abs().max() < 0.005


@pytest.mark.slow
def test_cost_follows_length():
    """The base model's width, fewer layers; in CPU time, which other work does not affect."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = ASTForAudioClassification(ASTConfig(num_hidden_layers=3)).eval()
    seconds = {}
    with torch.no_grad():
        for frames in (98, 1024):
            spectrogram = torch.randn(1, frames, 128)
            model(spectrogram)
            seconds[frames] = min(_seconds(lambda x=spectrogram: model(x)) for _ in range(7))
    torch.set_num_threads(threads)
    assert seconds[98] <= seconds[1024] / 7, seconds


def _seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
