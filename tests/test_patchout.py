"""Patchout: what is dropped, what never is, and that evaluation is unaffected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_ast.patch_grid_ast import patch_mask
from modeling_ast.patchout_ast import drop_patches

from .conftest import tiny_model


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_laws_of_dropping(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    valid_columns = torch.tensor(data.draw(st.lists(st.integers(1, columns), min_size=1)))
    frequency, time = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    left = (rows - frequency) * (columns - time)
    single = data.draw(st.integers(0, left - 1))
    torch.manual_seed(data.draw(st.integers(0, 1000)))

    count = rows * columns
    numbers = torch.arange(count).float()[None, :, None].expand(len(valid_columns), -1, 1)
    mask = patch_mask(valid_columns, rows, columns)
    patches, is_valid = drop_patches(numbers, mask, (rows, columns), frequency, time, single)
    assert patches.shape == (len(valid_columns), left - single, 1)
    for kept, kept_valid, valid, width in zip(
        patches[:, :, 0].long(), is_valid, mask, valid_columns, strict=True
    ):
        assert kept.unique().equal(kept)  # each once, in order
        assert kept_valid.equal(valid[kept])
        assert kept_valid.any()
        # Sound goes first: padding is dropped only where the sound has come down to one.
        if single == 0:
            kept_columns = (kept % columns).unique()
            assert (kept_columns < width).sum() == max(int(width) - time, 1)
            assert len((kept // columns).unique()) == rows - frequency
        elif time == 0:
            assert kept_valid.sum() == max((rows - frequency) * int(width) - single, 1)


def test_each_clip_has_its_own_draw_and_without_a_mask_there_is_none():
    numbers = torch.arange(60.0)[None, :, None].expand(8, -1, 1)
    patches, is_valid = drop_patches(numbers, None, (6, 10), 0, 4, 0)
    assert is_valid is None
    assert len({tuple(clip.tolist()) for clip in patches[:, :, 0]}) > 1


def test_the_encoder_sees_fewer_tokens_in_training_only():
    model = tiny_model(time_patchout=4, frequency_patchout=2, unstructured_patchout=3)
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    spectrogram = torch.randn(2, 128, 64)
    mask = torch.ones(2, 128)
    mask[1, 100:] = 0
    with torch.no_grad():
        assert torch.equal(model(spectrogram, mask).logits, plain(spectrogram, mask).logits)
    model.train()
    states = model(spectrogram, mask, output_hidden_states=True).hidden_states
    rows, columns = model.config.trained_grid
    kept = (rows - 2) * (columns - 4) - 3
    assert states[0].shape[1] == 2 + kept
    # Both special tokens are there, in front, with their positions.
    embeddings = model.audio_spectrogram_transformer.embeddings
    special = torch.cat([embeddings.cls_token, embeddings.distillation_token], dim=1)
    special = special + embeddings.position_embeddings[:, :2]
    torch.testing.assert_close(states[0][:, :2], special.expand(2, -1, -1))


def test_it_trains_and_a_short_clip_survives():
    model = tiny_model(time_patchout=10, frequency_patchout=4).train()
    loss = model(torch.randn(2, 20, 64), torch.ones(2, 20), labels=torch.tensor([0, 1])).loss
    loss.backward()
    table = model.audio_spectrogram_transformer.embeddings.position_embeddings
    assert table.grad.isfinite().all()
    assert table.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"time_patchout": 12}, r"time_patchout=12 .* grid of 5 rows x 12 columns"),
        ({"frequency_patchout": 5}, r"frequency_patchout=5, .* grid of 5 rows x 12 columns"),
        ({"unstructured_patchout": 60}, r"unstructured_patchout=60 drop every patch"),
        (
            {"time_patchout": 2, "frequency_patchout": 1, "unstructured_patchout": 40},
            r"frequency_patchout=1, time_patchout=2 and unstructured_patchout=40 drop every",
        ),
        ({"time_patchout": -1}, r"time_patchout must be 0 \(off\) or more, got -1"),
        ({"merged_tokens_per_layer": -5}, r"merged_tokens_per_layer must be .* got -5"),
        ({"merged_tokens_per_layer": [4, 4, 4]}, r"such numbers for 2 layers, got \[4, 4, 4\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"num_attention_heads": 5}, r"hidden_size \(48\) must be divisible .* \(5\)"),
        ({"max_length": 12}, r"max_length=12 frames and num_mel_bins=64 is smaller than one patch"),
        ({"patch_size": 70}, r"max_length=128 frames and num_mel_bins=64 .* 70 x 70"),
    ],
)
def test_impossible_configs_are_refused_with_the_numbers(settings_, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings_)
