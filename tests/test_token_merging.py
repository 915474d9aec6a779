"""Token merging: its laws, against the definition, and independence of padding."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from modeling_ast.token_merging_ast import merge_tokens, start_merging

from .conftest import tiny_model


def merge_by_the_book(tokens, keys, sizes, merged):
    """One clip without padding, in plain Python: (S, D), (S, d), (S,) -> the same, shorter."""
    patches = list(range(2, len(tokens)))
    proposers, others = patches[::2], patches[1::2]
    proposals = []
    for i in proposers if others else []:
        similarity = [cosine_similarity(keys[i], keys[j], dim=0).item() for j in others]
        best = max(range(len(others)), key=similarity.__getitem__)
        proposals.append((similarity[best], i, others[best]))
    groups = {i: [i] for i in range(len(tokens))}
    for _, i, j in sorted(proposals, reverse=True)[: min(merged, len(patches) // 3)]:
        groups[j] += groups.pop(i)
    new_tokens = [
        sum(tokens[i] * sizes[i] for i in group) / sum(sizes[i] for i in group)
        for _, group in sorted(groups.items())
    ]
    new_sizes = [sum(sizes[i] for i in group) for _, group in sorted(groups.items())]
    return torch.stack(new_tokens), torch.stack(new_sizes)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    merged=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_a_padded_batch_merges_each_clip_by_the_book(lengths, padding, merged, seed):
    torch.manual_seed(seed)
    width = 2 + max(lengths) + padding
    tokens, keys = torch.randn(len(lengths), width, 4), torch.randn(len(lengths), 2, width, 3)
    sizes = torch.zeros(len(lengths), width)
    for clip, length in enumerate(lengths):
        sizes[clip, 2 : 2 + length] = torch.randint(1, 5, (length,)).float()
    sizes[:, :2] = 1
    new_tokens, new_sizes = merge_tokens(tokens, keys, sizes, merged)
    assert new_tokens.shape[1] == width - min(merged, (width - 2) // 3)
    torch.testing.assert_close(new_sizes.sum(1), sizes.sum(1))  # no patch is lost
    assert torch.equal(new_tokens[:, :2], tokens[:, :2])
    for clip, length in enumerate(lengths):
        expected = merge_by_the_book(
            tokens[clip, : 2 + length],
            keys[clip].mean(0)[: 2 + length],
            sizes[clip, : 2 + length],
            merged,
        )
        count = len(expected[1])
        torch.testing.assert_close(new_tokens[clip, :count], expected[0])
        torch.testing.assert_close(new_sizes[clip, :count], expected[1])
        assert (new_sizes[clip, count:] == 0).all()


def test_sound_comes_first():
    tokens = torch.arange(6.0)[None, :, None]
    valid = torch.tensor([[True, True, False, True, False, True]])
    moved, sizes = start_merging(tokens, valid)
    assert moved.flatten().tolist() == [0, 1, 3, 5, 2, 4]
    assert sizes.tolist() == [[1, 1, 1, 1, 0, 0]]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def merging_model(request):
    torch.manual_seed(0)
    model = tiny_model(num_hidden_layers=3, merged_tokens_per_layer=12)
    model.set_attn_implementation(request.param)
    return model


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 300),
    padding=st.integers(0, 150),
    other=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_padding_and_company_do_not_matter(merging_model, frames, padding, other, seed):
    generator = torch.Generator().manual_seed(seed)
    alone = torch.zeros(1, max(frames, 16), 64)
    alone[0, :frames] = torch.randn(frames, 64, generator=generator)
    batch = torch.randn(2, max(frames + padding, other, 16), 64, generator=generator)
    batch[0, :frames] = alone[0, :frames]
    mask = torch.zeros(batch.shape[:2])
    mask[0, :frames] = 1
    mask[1, :other] = 1
    with torch.no_grad():
        expected = merging_model(alone, mask[:1, : alone.shape[1]]).logits[0]
        logits = merging_model(batch, mask).logits[0]
    assert (logits - expected).abs().max() <= 1e-5


def test_every_layer_has_fewer_tokens_and_logits_move_a_little(merging_model):
    spectrogram = torch.randn(2, 128, 64)
    plain = copy.deepcopy(merging_model)
    plain.config.merged_tokens_per_layer = 0
    with torch.no_grad():
        output = merging_model(spectrogram, output_hidden_states=True)
        assert [state.shape[1] for state in output.hidden_states] == [62, 50, 38, 26]
        difference = (output.logits - plain(spectrogram).logits).abs().max()
        assert difference > 0
        trained = merging_model.train()(spectrogram, output_hidden_states=True)
    merging_model.eval()
    assert {state.shape[1] for state in trained.hidden_states} == {62}


def test_each_layer_may_merge_its_own_number():
    model = tiny_model(num_hidden_layers=3, merged_tokens_per_layer=[0, 99, 5])
    with torch.no_grad():
        states = model(torch.randn(1, 128, 64), output_hidden_states=True).hidden_states
    # At most a third of the 60 patches.
    assert [state.shape[1] for state in states] == [62, 62, 42, 37]


def test_merging_equal_patches_changes_nothing():
    """Size-weighted attention: n equal tokens and one of size n are the same thing."""
    model = tiny_model()
    embeddings = model.audio_spectrogram_transformer.embeddings
    with torch.no_grad():
        embeddings.position_embeddings[:, 2:] = embeddings.position_embeddings[:, 2:3]
        spectrogram = torch.full((1, 128, 64), 0.3)
        expected = model(spectrogram).logits
        model.config.merged_tokens_per_layer = 20
        torch.testing.assert_close(model(spectrogram).logits, expected, atol=1e-5, rtol=0)


def test_zero_is_exactly_off_and_native_reads_the_config(tmp_path):
    model = tiny_model(merged_tokens_per_layer=12, time_patchout=2, label_smoothing=0.1)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["merged_tokens_per_layer"] == 12
    theirs = native.ASTForAudioClassification.from_pretrained(tmp_path)
    off = type(model).from_pretrained(tmp_path, merged_tokens_per_layer=0)
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            off(spectrogram).logits, theirs(spectrogram).logits, atol=1e-5, rtol=0
        )


def test_an_attention_without_a_bias_is_refused():
    model = tiny_model(merged_tokens_per_layer=12)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"merged_tokens_per_layer=12 adds .*flash_attention_2"):
        model(torch.zeros(1, 128, 64))
