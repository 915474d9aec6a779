"""The frame model: shapes, masks, loss of strong and weak labels, saving, and its grid of time."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_ast import (
    ASTConfig,
    ASTForAudioClassification,
    ASTForAudioFrameClassification,
    ASTFrameConfig,
)
from modeling_ast.detection_ast import detection_loss
from modeling_ast.frames_ast import (
    column_spans,
    count_columns,
    frame_targets,
    median_filter,
    stitch,
)
from modeling_ast.pooling_ast import pool_scores

from .conftest import TINY_MODEL, tiny_model


def frame_model(**overrides) -> ASTForAudioFrameClassification:
    settings = {**TINY_MODEL, "initializer_range": 0.2, **overrides}
    return ASTForAudioFrameClassification(ASTFrameConfig(**settings)).eval()


def test_answers_for_every_column():
    model = frame_model()
    logits = model(torch.randn(2, 128, 64)).logits
    assert logits.shape == (2, (128 - 16) // 10 + 1, 5)
    assert model(torch.randn(1, 300, 64)).logits.shape == (1, 29, 5)


def test_a_column_is_the_mean_over_its_patches():
    model = frame_model()
    spectrogram = torch.randn(1, 96, 64)
    tokens = model.base_model(spectrogram).last_hidden_state[0, 2:]  # row by row
    rows, columns = model.config.grid_shape(96, 64)
    third = torch.stack([tokens[row * columns + 3] for row in range(rows)]).mean(dim=0)
    expected = model.frame_classifier(third)
    torch.testing.assert_close(model(spectrogram).logits[0, 3], expected)


def test_answers_do_not_depend_on_padding():
    model = frame_model()
    clip = torch.randn(1, 90, 64)
    padded = torch.full((2, 128, 64), 7.0)
    padded[0, :90] = clip
    mask = torch.ones(2, 128)
    mask[0, 90:] = 0
    alone, batched = model(clip).logits[0], model(padded, mask).logits[0]
    torch.testing.assert_close(batched[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    assert model.column_mask(padded, mask).sum(dim=1).tolist() == [len(alone), 12]

    labels = torch.randint(0, 2, (2, 12, 5)).float()
    losses = []
    for beyond in (0.0, 1.0):  # what is written over padding
        labels[0, len(alone) :] = beyond
        losses.append(model(padded, mask, labels=labels).loss)
    assert losses[0] == losses[1]


def test_loss_of_strong_weak_and_mixed_labels():
    model = frame_model()
    spectrograms = torch.randn(4, 128, 64)
    strong = torch.randint(0, 2, (4, 12, 5)).float()
    weak = torch.randint(0, 2, (4, 5)).float()
    logits = model(spectrograms).logits
    bce = torch.nn.functional.binary_cross_entropy
    expected_strong = bce(logits.sigmoid(), strong, reduction="none").mean(dim=(1, 2))
    scores = logits.sigmoid()
    pooled = (scores**2).sum(dim=1) / scores.sum(dim=1)
    expected_weak = bce(pooled, weak, reduction="none").mean(dim=1)

    close = torch.testing.assert_close
    close(model(spectrograms, labels=strong).loss, expected_strong.mean())
    close(model(spectrograms, clip_labels=weak).loss, expected_weak.mean())
    strong[2:] = -1  # nothing is known of when
    mixed = torch.cat([expected_strong[:2], expected_weak[2:]]).mean()
    close(model(spectrograms, labels=strong, clip_labels=weak).loss, mixed)
    # Parts of a batch add up to its mean.
    items = strong.numel()
    parts = [
        model(
            spectrograms[part], labels=strong[part], clip_labels=weak[part],
            num_items_in_batch=items,
        ).loss
        for part in (slice(0, 3), slice(3, 4))
    ]  # fmt: skip
    close(sum(parts), mixed)


def test_unknown_columns_have_no_gradient():
    model = frame_model()
    labels = torch.zeros(1, 12, 5)
    labels[0, 6:] = -1
    logits = model(torch.randn(1, 128, 64)).logits.detach().requires_grad_()
    detection_loss(logits, labels, None, torch.ones(1, 12, dtype=torch.bool), None).backward()
    assert logits.grad[0, :6].all()
    assert not logits.grad[0, 6:].any()


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must have the shape \(2, 12, 5\)"):
        frame_model()(torch.randn(2, 128, 64), labels=torch.zeros(2, 5))


def test_learns_when():
    """A tone in one half of the clip: the columns of that half, not the clip, must carry it."""
    torch.manual_seed(0)
    model = frame_model(num_labels=2, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        spectrograms, labels = 0.3 * torch.randn(8, 128, 64), torch.zeros(8, 12, 2)
        for clip in range(8):
            label, begin = clip % 2, int(torch.randint(0, 7, ()))
            spectrograms[clip, 10 * begin : 10 * begin + 56, 20 + 30 * label :] += 2.0
            labels[clip, begin : begin + 5, label] = 1
        loss = model(spectrograms, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    heard = model.eval()(spectrograms).logits > 0
    assert (heard == labels.bool()).float().mean() > 0.9


def test_rows_may_be_dropped_in_training_columns_not():
    model = frame_model(frequency_patchout=2).train()
    assert model(torch.randn(2, 128, 64)).logits.shape == (2, 12, 5)
    for field in ("time_patchout", "unstructured_patchout", "merged_tokens_per_layer"):
        with pytest.raises(ValueError, match=f"{field}=1 leaves columns without a token"):
            ASTFrameConfig(**TINY_MODEL, **{field: 1})


def test_saves_and_loads(tmp_path):
    model = frame_model(window_pooling="max")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "ast-frame-classification"
    spectrogram = torch.randn(1, 128, 64)
    for auto_class in (
        transformers.AutoModelForAudioFrameClassification,
        transformers.AutoModelForAudioClassification,
        ASTForAudioFrameClassification,
    ):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is ASTForAudioFrameClassification
        assert loaded.config.window_pooling == "max"
        torch.testing.assert_close(loaded(spectrogram).logits, model(spectrogram).logits)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is ASTFrameConfig
    copied = {file.name for file in tmp_path.glob("*.py")}
    assert {"detection_ast.py", "modeling_ast.py", "pooling_ast.py"} <= copied
    for auto_class, where in stored["auto_map"].items():
        module, name = where.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text(), auto_class


def test_loads_in_another_geometry(tmp_path):
    frame_model().save_pretrained(tmp_path)
    longer = ASTForAudioFrameClassification.from_pretrained(tmp_path, max_length=256)
    assert longer(torch.randn(1, 256, 64)).logits.shape == (1, 25, 5)


def test_starts_from_any_classifier(tmp_path, native_folder, caplog):
    classifier = tiny_model(time_patchout=2, problem_type="single_label_classification")
    classifier.save_pretrained(tmp_path)
    for folder in (tmp_path, native_folder):
        model = transformers.AutoModelForAudioFrameClassification.from_pretrained(folder)
        assert type(model) is ASTForAudioFrameClassification
        assert model.config.problem_type == "multi_label_classification"
        assert model.config.time_patchout == 0
        direct = ASTForAudioFrameClassification.from_pretrained(folder)
        assert direct.config.to_dict() == model.config.to_dict()
        encoder = ASTForAudioClassification.from_pretrained(folder).base_model.state_dict()
        for name, weight in model.base_model.state_dict().items():
            assert torch.equal(weight, encoder[name]), name
    shared = ASTForAudioFrameClassification.from_classifier(classifier)
    assert shared.base_model is classifier.base_model
    assert shared(torch.randn(1, 128, 64)).logits.shape == (1, 12, 5)


def test_a_new_head_expects_rare_events(tmp_path):
    """Else it spends the first hundreds of steps learning that columns are mostly silent."""
    classifier = tiny_model()
    classifier.save_pretrained(tmp_path)
    model = ASTForAudioFrameClassification.from_pretrained(tmp_path)
    for new in (model, ASTForAudioFrameClassification.from_classifier(classifier)):
        scores = new.eval()(torch.randn(2, 128, 64)).logits.sigmoid()
        assert 0.02 < scores.median() < 0.1
    model.frame_classifier.dense.bias.data.fill_(1.5)
    model.save_pretrained(tmp_path)
    loaded = ASTForAudioFrameClassification.from_pretrained(tmp_path)
    assert (loaded.frame_classifier.dense.bias == 1.5).all()


def test_plain_transformers_does_not_know_a_frame_checkpoint(tmp_path):
    frame_model().save_pretrained(tmp_path)
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] not in known


def test_labels_do_not_exclude_each_other():
    for asked in (None, "single_label_classification"):
        assert ASTFrameConfig(problem_type=asked).problem_type == "multi_label_classification"


def test_window_pooling_is_a_field_of_every_config():
    assert ASTConfig().window_pooling is None
    assert ASTConfig(window_pooling="max").window_pooling == "max"
    for config_class in (ASTConfig, ASTFrameConfig):
        with pytest.raises(ValueError, match="window_pooling must be one of mean, max"):
            config_class(window_pooling="median")
    with pytest.raises(ValueError, match="needs window_pooling"):
        ASTFrameConfig(window_pooling=None)


# Pooling


def test_pooling_values():
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.1], [0.2, 0.2]])
    close = torch.testing.assert_close
    close(pool_scores(scores, "mean"), torch.tensor([0.2, 0.4]))
    close(pool_scores(scores, "max"), torch.tensor([0.3, 0.9]))
    close(pool_scores(scores, "linear_softmax"), torch.tensor([0.14 / 0.6, 0.86 / 1.2]))
    weights = torch.tensor([1.0, 0.0, 3.0])
    close(pool_scores(scores, "mean", weights), torch.tensor([0.175, 0.375]))
    close(pool_scores(scores, "max", weights), torch.tensor([0.2, 0.9]))
    close(pool_scores(scores, "linear_softmax", weights), torch.tensor([0.13 / 0.7, 0.93 / 1.5]))
    assert pool_scores(torch.zeros(3, 2), "linear_softmax").tolist() == [0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(parts=st.integers(1, 6), seed=st.integers(0, 999), pooling=st.sampled_from(
    ["mean", "max", "linear_softmax"]
))  # fmt: skip
def test_pooling_laws(parts, seed, pooling):
    """Between the lowest and the highest part; order does not matter; equal parts stay the same."""
    scores = torch.rand(parts, 3, generator=torch.Generator().manual_seed(seed))
    pooled = pool_scores(scores, pooling)
    assert (pooled <= scores.amax(dim=0) + 1e-6).all()
    assert (pooled >= scores.amin(dim=0) - 1e-6).all()
    torch.testing.assert_close(pool_scores(scores.flip(0), pooling), pooled)
    torch.testing.assert_close(pool_scores(scores[:1].expand(4, 3), pooling), scores[0])
    padded = torch.cat([scores, torch.ones(2, 3)])
    weights = torch.cat([torch.ones(parts), torch.zeros(2)])
    torch.testing.assert_close(pool_scores(padded, pooling, weights), pooled)


# Time


def test_columns_cover_the_sound_without_gaps():
    spans = column_spans(12, time_stride=10, duration=1.3)
    assert spans[0].tolist() == pytest.approx([0.0, 0.1375])
    assert spans[1].tolist() == pytest.approx([0.1375, 0.2375])
    assert spans[-1, 1] == 1.3
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    # In the middle of what a column sees: frames 10 to 25, of 25 ms each, one every 10 ms.
    assert spans[1].mean() == pytest.approx((0.10 + 0.25 + 0.025) / 2)
    later = column_spans(5, time_stride=10, first=7, duration=1.3)
    np.testing.assert_allclose(later, spans[7:])
    assert count_columns(16, 10) == count_columns(3, 10) == 1
    assert count_columns(128, 10) == 12


def test_frame_targets():
    spans = column_spans(10, time_stride=10, duration=1.1)
    targets = frame_targets([(0.28, 0.55, 1), (0.7, 0.71, 0)], spans, num_labels=3)
    assert np.flatnonzero(targets[:, 1]).tolist() == [2, 3, 4]  # 0.2375 … 0.5375 s
    assert np.flatnonzero(targets[:, 0]).tolist() == [6]  # 10 ms are not lost
    assert not targets[:, 2].any()


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(2, 12), total=st.integers(1, 40), data=st.data())
def test_stitching_laws(columns, total, data):
    """Windows that agree keep their value; every column of the sound occurs once."""
    hop = data.draw(st.integers(1, columns))
    truth = np.random.default_rng(0).random((total, 2)).astype(np.float32)
    windows, start = [], 0
    while start + columns < total:
        windows.append(truth[start : start + columns])
        start += hop
    windows.append(truth[start:total])
    np.testing.assert_allclose(stitch(windows, hop), truth, atol=1e-6)


def test_stitching_leaves_no_seams():
    """Windows that disagree, each at its own level: steps are no larger than blending allows."""
    columns, hop = 100, 50
    levels = np.random.default_rng(0).random(20)
    windows = [np.full((columns, 1), level, np.float32) for level in levels]
    stitched = stitch(windows, hop)
    largest = np.abs(np.diff(levels)).max()
    assert np.abs(np.diff(stitched[:, 0])).max() <= 1.1 * largest / hop
    assert len(stitched) == 19 * hop + columns


def test_median_filter():
    scores = np.array([[0, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]], np.float32).T
    assert median_filter(scores, 3)[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert median_filter(scores, 1) is scores
    for length in (0, 2, -1):
        with pytest.raises(ValueError, match="odd number of columns"):
            median_filter(scores, length)
