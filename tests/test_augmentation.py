"""Laws of the augmentations: sizes as promised, nothing lost, the generator decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_extraction import (
    add_noise,
    augmentation_generator,
    filter_augment,
    mixup,
    random_gain,
    roll,
    spec_augment,
    time_shift,
)

seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_of(sizes: list[int]) -> list[torch.Tensor]:
    return [torch.randn(size, generator=seeded(size)) + 0.1 for size in sizes]


SPECTROGRAMS = torch.randn(5, 40, 16, generator=seeded(0))
WAVEFORMS = clips_of([300, 200, 250])
LABELS = torch.eye(3)
AUGMENTATIONS = {
    "mixup": lambda g: torch.cat(mixup(WAVEFORMS, LABELS, 1.0, generator=g)[0]),
    "random_gain": lambda g: torch.cat(random_gain(WAVEFORMS, generator=g)),
    "time_shift": lambda g: torch.cat(time_shift(WAVEFORMS, 100, g)),
    "spec_augment": lambda g: spec_augment(SPECTROGRAMS, 30, 12, generator=g),
    "filter_augment": lambda g: filter_augment(SPECTROGRAMS, 1.4, generator=g),
    "add_noise": lambda g: add_noise(SPECTROGRAMS, generator=g),
    "roll": lambda g: roll(SPECTROGRAMS, 20, g),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides(name):
    before = [SPECTROGRAMS.clone(), *(waveform.clone() for waveform in WAVEFORMS)]
    first, again, other = (AUGMENTATIONS[name](seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for now, then in zip([SPECTROGRAMS, *WAVEFORMS], before, strict=True):
        assert torch.equal(now, then)  # nothing is changed in place


class _Draws(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.rand(4, generator=augmentation_generator(7)).tolist()


def test_epochs_ranks_and_workers_differ():
    draws = [
        tuple(torch.rand(4, generator=augmentation_generator(seed, epoch, rank)).tolist())
        for seed in range(3)
        for epoch in range(3)
        for rank in range(3)
    ]
    loader = torch.utils.data.DataLoader(_Draws(), batch_size=None, num_workers=2)
    draws += [tuple(draw) for draw in loader]
    assert len(draws) == 29
    assert len(set(draws)) == 29
    assert torch.equal(
        torch.rand(4, generator=augmentation_generator(7)),
        torch.rand(4, generator=augmentation_generator(7)),
    )


# Mixup


@settings(deadline=None)
@given(lengths, st.floats(0, 1), seeds)
def test_mixup_keeps_lengths_label_sums_and_a_mean_of_zero(sizes, rate, seed):
    labels = torch.eye(7)[torch.arange(len(sizes)) % 7]
    mixed, mixed_labels = mixup(clips_of(sizes), labels, rate, generator=seeded(seed))
    assert [len(clip) for clip in mixed] == sizes
    torch.testing.assert_close(mixed_labels.sum(dim=1), torch.ones(len(sizes)))
    assert (mixed_labels >= 0).all()
    for clip in mixed:
        assert clip.mean().abs() < 1e-5


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=5, unique=True), seeds)
def test_mixup_is_the_originals_formula(sizes, seed):
    """λ and the partner follow from the labels; the sum is computed by hand, clip by clip."""
    clips = clips_of(sizes)
    mixed, labels = mixup(clips, torch.eye(len(sizes)), 1.0, generator=seeded(seed))
    for index, row in enumerate(labels):
        partner = next((int(i) for i in row.nonzero() if i != index), index)
        weight = row[index] if partner != index else torch.tensor(1.0)
        first, second = (clips[i].numpy() - clips[i].numpy().mean() for i in (index, partner))
        second = np.pad(second, (0, max(0, len(first) - len(second))))[: len(first)]
        expected = weight.numpy() * first + (1 - weight.numpy()) * second
        np.testing.assert_allclose(mixed[index], expected - expected.mean(), atol=1e-5)


def test_mixups_weights_follow_beta_10_10():
    classes = 4000
    labels = torch.eye(classes)
    _, mixed = mixup(torch.zeros(classes, 1), labels, 1.0, generator=seeded(0))
    weights = mixed.diagonal()
    weights = weights[weights < 1]  # a clip that is its own partner keeps its label
    assert len(weights) > classes - 10
    assert abs(float(weights.mean()) - 0.5) < 0.01
    assert abs(float(weights.var()) - 1 / 84) < 0.001  # the variance of Beta(10, 10)


def test_mixup_rate():
    labels = torch.eye(2000)
    _, mixed = mixup(torch.zeros(2000, 1), labels, 0.3, generator=seeded(0))
    assert 0.26 < (mixed.diagonal() < 1).float().mean() < 0.34
    _, untouched = mixup(torch.zeros(2000, 1), labels, 0.0, generator=seeded(0))
    assert torch.equal(untouched, labels)


@pytest.mark.parametrize(
    ("labels", "rate", "message"),
    [
        (
            torch.tensor([0, 1, 2]),
            0.5,
            r"per clip, \(3, classes\); got \(3,\) of torch.int64.*one_",
        ),
        (torch.eye(3).long(), 0.5, r"got \(3, 3\) of torch\.int64"),
        (torch.eye(2), 0.5, r"got \(2, 2\)"),
        (torch.eye(3), 1.5, "rate must be from 0 to 1, got 1.5"),
    ],
)
def test_mixups_bad_input(labels, rate, message):
    with pytest.raises(ValueError, match=message):
        mixup(WAVEFORMS, labels, rate)


# Other waveform augmentations


@settings(deadline=None)
@given(lengths, st.floats(0.1, 30), seeds)
def test_gain_stays_in_its_range(sizes, max_gain_db, seed):
    clips = clips_of(sizes)
    for clip, louder in zip(clips, random_gain(clips, max_gain_db, seeded(seed)), strict=True):
        gain = louder / clip
        torch.testing.assert_close(gain, gain[0].expand_as(gain))
        assert abs(20 * np.log10(float(gain[0]))) <= max_gain_db * 1.001


@settings(deadline=None)
@given(lengths, st.integers(0, 400), seeds)
def test_time_shift_moves_and_fills_with_silence(sizes, max_shift, seed):
    clips = clips_of(sizes)
    for clip, shifted in zip(clips, time_shift(clips, max_shift, seeded(seed)), strict=True):
        size = len(clip)
        candidates = [
            torch.cat([torch.zeros(min(shift, size)), clip[: max(0, size - shift)]])
            if shift >= 0
            else torch.cat([clip[-shift:], torch.zeros(min(-shift, size))])
            for shift in range(-max_shift, max_shift + 1)
        ]
        assert any(torch.equal(shifted, candidate) for candidate in candidates)


# Spectrograms


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 70), st.integers(0, 50), seeds)
def test_masks_have_the_promised_sizes(frames, mel_bins, time_mask, frequency_mask, seed):
    masked = spec_augment(
        torch.ones(8, frames, mel_bins), time_mask, frequency_mask, 0.0, seeded(seed)
    )
    for spectrogram in masked:
        hidden_frames = (spectrogram == 0).all(dim=1)
        hidden_bins = (spectrogram == 0).all(dim=0)
        everything = hidden_frames.all()
        for hidden, limit in ((hidden_frames, time_mask), (hidden_bins, frequency_mask)):
            if not everything:
                assert hidden.sum() <= max(0, limit - 1)
                assert hidden.int().diff().abs().sum() <= 2  # one run
        outer = hidden_frames[:, None] | hidden_bins
        assert torch.equal(outer, spectrogram == 0)


def test_masks_cover_all_sizes_and_places():
    masked = spec_augment(torch.ones(4000, 20, 6), 5, 0, -1.0, seeded(0))
    hidden = masked[:, :, 0] == -1
    assert set(hidden.sum(dim=1).tolist()) == {0, 1, 2, 3, 4}
    assert hidden.any(dim=0).all()
    assert not (spec_augment(torch.ones(9, 20, 6), 0, 0, -1.0, seeded(0)) == -1).any()


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 60), seeds)
def test_roll_loses_nothing(frames, max_shift, seed):
    spectrograms = torch.randn(3, frames, 4, generator=seeded(frames))
    rolled = roll(spectrograms, max_shift, seeded(seed))
    for before, after in zip(spectrograms, rolled, strict=True):
        shifts = range(-max_shift, max_shift + 1)
        assert any(torch.equal(after, before.roll(shift, dims=0)) for shift in shifts)


@settings(deadline=None)
@given(st.floats(0, 2), seeds)
def test_noise_stays_below_its_level(max_level, seed):
    noise = add_noise(torch.zeros(6, 30, 8), max_level, seeded(seed))
    assert (noise >= 0).all()
    assert (noise <= max_level).all()
    loudest = noise.amax(dim=(1, 2))
    assert max_level < 1e-6 or len(set(loudest.tolist())) == 6  # each clip has its own level


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu():
    generator = augmentation_generator(0, device="cuda")
    waveforms, labels = mixup([x.cuda() for x in WAVEFORMS], LABELS.cuda(), 1.0, 10, generator)
    waveforms = time_shift(random_gain(waveforms, 6.0, generator), 100, generator)
    spectrograms = roll(add_noise(SPECTROGRAMS.cuda(), 0.1, generator), 9, generator)
    assert {x.device.type for x in (*waveforms, labels, spectrograms)} == {"cuda"}


@given(max_gain=st.floats(0, 10), bands=st.integers(1, 6), seed=seeds)
@settings(deadline=None)
def test_filter_augment_is_one_smooth_curve_for_all_frames(max_gain, bands, seed):
    changed = filter_augment(torch.zeros(4, 7, 61), max_gain, bands, seeded(seed))
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert changed.abs().max() <= max_gain
    # From one edge of a band to the next, over 60 / bands bins, at most from -max to +max.
    assert changed.diff(dim=2).abs().max() <= 2 * max_gain * bands / 60 + 1e-5


def test_filter_augment_draws_gains_from_the_whole_range():
    gains = filter_augment(torch.zeros(4000, 1, 16), 6.0, 3, seeded(0))[:, 0, [0, -1]]
    assert gains.mean().abs() < 0.1
    assert abs(gains.std() - 6 / 3**0.5) < 0.05  # of uniform numbers in ±6
    assert not torch.equal(gains[:, 0], gains[:, 1])
