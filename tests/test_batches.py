"""Streams to batches: every clip once, the same every time, balanced, mixed, bucketed, skipped."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_extraction import ASTFeatureExtractor, AudioDecodingError
from scripts.data.batches import Clip, Collator, SkippedSounds, batches, rank_share, repeated
from scripts.data.labelled import LabelledAudio

RATE = 16000
EXTRACTOR = ASTFeatureExtractor(num_mel_bins=8, max_length=64)
MASKING = ASTFeatureExtractor(num_mel_bins=8, max_length=64, return_attention_mask=True)


def sound_of(number: int, samples: int = 800) -> dict:
    """A sound whose level encodes its number."""
    array = np.zeros(samples, np.float32)
    array[::2] = 0.01 * (number + 1)
    return {"array": array, "sampling_rate": RATE}


def rows_of(sizes, first, read_log):
    for size, start in zip(sizes, first, strict=True):
        if read_log is not None:
            with open(read_log, "a") as file:
                file.write(f"{start}\n")
        for number in range(start, start + size):
            yield {"audio": sound_of(number), "label": number, "name": f"{number}.wav"}


def stream_of(sizes: list[int], read_log=None) -> IterableDataset:
    """One shard per size; the label of a row is its number."""
    first = [sum(sizes[:shard]) for shard in range(len(sizes))]
    arguments = {"sizes": sizes, "first": first, "read_log": read_log}
    return IterableDataset.from_generator(rows_of, gen_kwargs=arguments)


def collator_for(clips: int, key=(0, 1, 0), mixup_rate=0.0, extractor=EXTRACTOR) -> Collator:
    return Collator(extractor, clips, mixup_rate, key)


def labels_in(found) -> list[int]:
    return [label for batch in found for label in batch["labels"].tolist()]


# Every clip once


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 6),
    shuffle_buffer=st.sampled_from([0, 1, 5, 100]),
    bucket_batches=st.sampled_from([0, 1, 3]),
    epoch=st.integers(0, 3),
)
def test_all_ranks_together_have_every_clip_once(
    sizes, world_size, batch_size, shuffle_buffer, bucket_batches, epoch
):
    clips = sum(sizes)
    found: list[int] = []
    for rank in range(world_size):
        share = rank_share(stream_of(sizes), rank, world_size)
        one_pass = list(
            batches(
                share,
                batch_size,
                0,
                collator_for(clips, (3, epoch, rank)),
                shuffle_buffer=shuffle_buffer,
                bucket_batches=bucket_batches,
            )
        )
        labels = labels_in(one_pass)
        assert len(one_pass) == math.ceil(len(labels) / batch_size)
        found += labels
    assert sorted(found) == list(range(clips))


@pytest.mark.parametrize(
    ("shards", "world_size", "num_workers"), [(7, 2, 2), (5, 1, 3), (2, 3, 2), (9, 4, 1)]
)
def test_all_workers_together_have_every_clip_once(tmp_path, shards, world_size, num_workers):
    """Even if shards cannot be divided evenly; with enough shards nothing is read twice."""
    sizes = [3 + shard for shard in range(shards)]
    log = tmp_path / "read.txt"
    found: list[int] = []
    for rank in range(world_size):
        share = rank_share(stream_of(sizes, str(log)), rank, world_size, num_workers)
        collator = collator_for(sum(sizes), (0, 1, rank))
        one_pass = list(batches(share, 4, num_workers, collator, shuffle_buffer=6))
        labels = labels_in(one_pass)
        # What is left over in the workers makes common batches.
        assert len(one_pass) == math.ceil(len(labels) / 4)
        found += labels
    assert sorted(found) == list(range(sum(sizes)))
    read = log.read_text().split()
    if shards >= world_size:
        assert len(read) == shards
    assert len(set(read)) == shards


# The same every time


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_a_function_of_the_key(num_workers):
    """With shuffling, mixup, buckets and balanced draws: resuming relies on it."""
    sizes = [5, 4, 6, 5]

    def one_pass(seed, epoch, rank):
        collator = collator_for(20, (seed, epoch, rank), mixup_rate=0.5, extractor=MASKING)
        share = rank_share(stream_of(sizes), rank, 2, num_workers)
        return list(
            batches(
                share, 3, num_workers, collator, shuffle_buffer=4, draws=[1.3] * 20,
                bucket_batches=2,
            )
        )  # fmt: skip

    once = one_pass(7, 1, 0)
    torch.manual_seed(123)  # not that of the process
    before = torch.random.get_rng_state()
    again = one_pass(7, 1, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(once) == len(again)
    for batch, same in zip(once, again, strict=True):
        assert batch.keys() == same.keys()
        for name, values in batch.items():
            assert torch.equal(values, same[name]), name
    if not num_workers:
        for other in (one_pass(8, 1, 0), one_pass(7, 2, 0)):
            assert labels_in(other) != labels_in(once)


def test_order_changes_from_epoch_to_epoch_and_mixes_shards():
    sizes = [10] * 8
    epochs = [
        labels_in(
            batches(stream_of(sizes), 8, 0, collator_for(80, (0, epoch, 0)), shuffle_buffer=20)
        )
        for epoch in (1, 2)
    ]
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert len({label // 10 for label in order[:16]}) >= 4  # not shard after shard
    unshuffled = labels_in(batches(stream_of(sizes), 8, 0, collator_for(80)))
    assert unshuffled == list(range(80))


def test_a_share_that_is_too_short_is_repeated_and_an_empty_one_refused():
    def one_pass():
        return batches(stream_of([5]), 2, 0, collator_for(5))

    assert labels_in(islice(repeated(one_pass), 5)) == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="no clip to train on: use fewer processes or more files"):
        next(repeated(lambda: iter(())))


# Class-balanced draws


def labelled(labels: list, classes: int) -> LabelledAudio:
    counts = [0] * classes
    for row in labels:
        for label in row if isinstance(row, list) else [row]:
            counts[label] += 1
    rows = [
        {"audio": sound_of(i, 400), "label": label, "name": str(i)}
        for i, label in enumerate(labels)
    ]

    def generate(rows):
        yield from rows

    stream = IterableDataset.from_generator(generate, gen_kwargs={"rows": rows})
    names = [str(label) for label in range(classes)]
    kind = "single_label_classification"
    return LabelledAudio(stream, stream, names, counts, counts, kind, len(labels), len(labels))


@pytest.mark.parametrize(
    "labels",
    [
        [0] * 70 + [1] * 25 + [2] * 5,
        [[0]] * 50 + [[0, 1]] * 30 + [[1, 2]] * 3 + [[0, 2]] * 6 + [[3]] * 11,
    ],
    ids=["single", "multi"],
)
def test_draws_follow_the_original_weights(labels):
    """Each clip's share of the draws equals its weight's, the sum of 1000 / (count + 0.01)."""
    data = labelled(labels, 4)
    weights = np.zeros(len(labels))
    for clip, row in enumerate(labels):
        for label in row if isinstance(row, list) else [row]:
            weights[clip] += 1000 / (data.train_counts[label] + 0.01)
    target = weights / weights.sum()

    epochs = 40
    drawn = np.zeros(len(labels))
    draws = data.balanced_draws()
    lengths = []
    for epoch in range(epochs):
        # The rows in front of decoding: which are drawn is what is tested here.
        collator = NumberingCollator(EXTRACTOR, 4, 0.0, (1, epoch, 0))
        order = labels_in(batches(data.train, 10, 0, collator, shuffle_buffer=50, draws=draws))
        np.add.at(drawn, order, 1)
        lengths.append(len(order))
    expected = epochs * len(labels) * target
    # A clip is drawn floor or ceil of what is expected: a variance of at most 1/4 per epoch.
    assert np.abs(drawn - expected).max() < 4.5 * math.sqrt(epochs / 4)
    assert abs(np.mean(lengths) - len(labels)) < 4.5 * math.sqrt(len(labels) / 4 / epochs)
    # The classes' shares follow, within sampling error.
    for label in range(4):
        of_class = [label in (row if isinstance(row, list) else [row]) for row in labels]
        sigma = math.sqrt(sum(of_class) * epochs / 4)
        assert abs(drawn[of_class].sum() - expected[of_class].sum()) < 4.5 * max(sigma, 0.1)
    if not isinstance(labels[0], list):
        shares = [drawn[np.array(labels) == label].sum() / drawn.sum() for label in range(3)]
        assert np.allclose(shares, 1 / 3, atol=0.03)


class NumberingCollator(Collator):
    """Labels are replaced by the row's number."""

    def decode(self, row, generator):
        return Clip(torch.zeros(400), torch.tensor(int(row["name"])))


def test_copies_are_spread_over_the_buffer():
    data = labelled([0] * 60 + [1] * 2, 2)
    collator = NumberingCollator(EXTRACTOR, 2, 0.0, (1, 1, 0))
    order = labels_in(
        batches(data.train, 10, 0, collator, shuffle_buffer=100, draws=data.balanced_draws())
    )
    neighbours = sum(a == b for a, b in pairwise(order))
    rare = sum(number >= 60 for number in order)
    assert 26 <= rare <= 36  # half of the draws, from two clips
    assert neighbours < 0.8 * (rare - 2)


# Mixup with the stream


def test_partners_come_from_the_stream_not_the_batch():
    """Uniform over the buffer: partners are usually in other batches."""
    clips = 60
    own: list[set[int]] = []
    partners: list[int] = []
    outside = mixed = 0
    for epoch in range(10):
        collator = collator_for(clips, (0, epoch, 0), mixup_rate=1.0)
        for batch in batches(stream_of([clips]), 4, 0, collator, shuffle_buffer=100):
            rows = [row.nonzero().flatten().tolist() for row in batch["labels"]]
            own = [set(row) for row in rows]
            torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(len(rows)))
            for row in own:
                partners += row
                if len(row) == 2:
                    mixed += 1
                    others = set().union(*(other for other in own if other is not row))
                    outside += not row <= others
    assert mixed > 0.9 * 10 * clips  # a clip is its own partner once in `clips` times
    assert outside > 0.8 * mixed
    # Each clip once per epoch as itself and once on average as a partner.
    counts = np.bincount(partners, minlength=clips) - 10
    assert counts.min() > 0
    assert abs(counts.mean() - 10) < 0.5
    assert 5 < counts.var() < 18  # Poisson's, about 10


def test_sound_and_labels_are_mixed_with_the_same_weight():
    """A clip's level encodes its number, so the mixed sound reveals λ."""

    class Waveforms(Collator):
        def batch(self, clips):
            return {
                "input_values": torch.stack([clip.waveform for clip in clips]),
                "labels": torch.stack([clip.label for clip in clips]),
            }

    collator = Waveforms(EXTRACTOR, 30, 1.0, (2, 1, 0))
    levels = 0.01 * torch.arange(1, 31) / 2  # without the mean
    seen = 0
    for batch in batches(stream_of([30]), 5, 0, collator, shuffle_buffer=30):
        for waveform, label in zip(batch["input_values"], batch["labels"], strict=True):
            torch.testing.assert_close(waveform[::2], (label @ levels).expand(400))
            seen += int((label > 0).sum() == 2)
    assert seen > 20


def test_mixup_rate_is_kept():
    collator = collator_for(400, (5, 0, 0), mixup_rate=0.3)
    labels = torch.cat(
        [b["labels"] for b in batches(stream_of([400]), 50, 0, collator, shuffle_buffer=400)]
    )
    assert 0.22 < float((labels.max(dim=1).values < 1).float().mean()) < 0.38


# Lengths


def clips_of_lengths(lengths):
    for number, samples in enumerate(lengths):
        yield {"audio": sound_of(number, samples), "label": number, "name": f"{number}"}


def test_buckets_hold_clips_of_similar_length_and_pad_to_the_longest():
    frames = np.random.default_rng(0).integers(16, 64, 200)
    lengths = [400 + 160 * (int(f) - 1) for f in frames]  # as a tuple: a list would be shards
    stream = IterableDataset.from_generator(
        clips_of_lengths, gen_kwargs={"lengths": tuple(lengths)}
    )

    def one_pass(bucket_batches):
        collator = collator_for(200, extractor=MASKING)
        return list(
            batches(stream, 8, 0, collator, shuffle_buffer=50, bucket_batches=bucket_batches)
        )

    padding = {}
    for bucket_batches in (0, 12):
        found = one_pass(bucket_batches)
        assert sorted(labels_in(found)) == list(range(200))
        for batch in found:
            inside = batch["attention_mask"].sum(dim=1)
            assert inside.tolist() == [frames[label] for label in batch["labels"]]
            assert batch["input_values"].shape[1] == inside.max()
        padded = sum(int((batch["attention_mask"] == 0).sum()) for batch in found)
        padding[bucket_batches] = padded / sum(batch["attention_mask"].numel() for batch in found)
    assert padding[0] > 0.25
    assert padding[12] < 0.06
    # Short and long batches alternate by chance, they are not sorted over the epoch.
    longest = [batch["input_values"].shape[1] for batch in found]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 5 <= rises <= len(longest) - 6


def test_a_window_of_bounded_size_is_held():
    """Reading stops a buffer and a window ahead of what was delivered."""
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"audio": sound_of(number), "label": number, "name": str(number)}

    stream = IterableDataset.from_generator(rows)
    read.clear()
    one_pass = batches(
        stream, 5, 0, collator_for(1000, mixup_rate=0.5), shuffle_buffer=20, bucket_batches=4
    )
    next(one_pass)
    assert len(read) <= 20 + 5 * 4 + 3


def test_clips_shorter_than_a_patch_are_extended_when_unpadded():
    rows = [{"audio": sound_of(0, 100), "label": 0, "name": "short"}]
    batch = Collator(MASKING, 2)(rows)
    assert batch["input_values"].shape == (1, 16, 8)
    assert batch["attention_mask"].sum() == 16


@pytest.mark.parametrize("samples", [8000, 500_000])
def test_speed_perturbation_changes_length_and_pitch_alike(samples):
    """For a short sound; from a long one, as much as is used, at any speed."""
    pitch, tenth = 440.0, 0.1
    sound = np.sin(2 * np.pi * pitch / RATE * np.arange(samples)).astype(np.float32)
    row = {"audio": {"array": sound, "sampling_rate": RATE}, "label": 0}
    collator = Collator(EXTRACTOR, 2, speed_perturbation=tenth)
    generator = torch.Generator().manual_seed(0)
    clips = [collator.decode(row, generator)[0].numpy() for _ in range(20)]
    speeds = []
    for clip in clips:
        crossings = np.flatnonzero((clip[100:-101] < 0) & (clip[101:-100] >= 0))
        found = RATE * (len(crossings) - 1) / (crossings[-1] - crossings[0])
        speeds.append(found / pitch)
        wanted = samples / speeds[-1] if samples == 8000 else 400 + 63 * 160
        assert len(clip) == pytest.approx(wanted, abs=10 if samples == 8000 else 1)
    assert 1 / (1 + tenth) - 0.01 < min(speeds) < 0.94
    assert 1.06 < max(speeds) < 1 / (1 - tenth) + 0.01
    # The same seed, the same speeds; evaluation plays every clip as it is.
    again = [collator.decode(row, torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*again)
    plain = Collator(EXTRACTOR, 2).decode({**row, "offset": 0.0}, generator).waveform
    assert np.array_equal(plain.numpy(), sound[: len(plain)])


# Labels


def test_several_labels_become_multi_hot_targets():
    rows = [
        {"audio": sound_of(i), "label": label, "name": str(i)}
        for i, label in enumerate([[0, 2], [], [1]])
    ]
    batch = Collator(EXTRACTOR, 3)(rows)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert batch["labels"].dtype == torch.float32


# Sounds that cannot be read


def some_corrupt(numbers, corrupt):
    for number in numbers:
        audio = b"no sound" if number in corrupt else sound_of(number)
        yield {"audio": audio, "label": number, "name": f"{number}.wav"}


def corrupt_stream(corrupt: set[int]) -> IterableDataset:
    shards = {"numbers": list(range(24)), "corrupt": corrupt}
    return IterableDataset.from_generator(some_corrupt, gen_kwargs=shards)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_sounds_are_skipped_counted_and_named(num_workers):
    corrupt = {0, 5, 6, 7, 23}
    skipped = SkippedSounds(0.25, 24)
    for epoch in (1, 2):  # counted once
        one_pass = list(
            batches(
                corrupt_stream(corrupt),
                4,
                num_workers,
                collator_for(24, (0, epoch, 0), mixup_rate=0.5),
                shuffle_buffer=5,
                skipped=skipped,
            )
        )
        assert sum(len(batch["labels"]) for batch in one_pass) == 19
        assert len(one_pass) == 5
        assert sorted(skipped.reasons) == ["0.wav", "23.wav", "5.wav", "6.wav", "7.wav"]
        assert "as audio" in skipped.reasons["5.wav"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_corrupt_sounds_stop_with_the_list(num_workers):
    for limit in (2, 0.1):
        with pytest.raises(ValueError, match="--max_corrupt") as stop:
            list(
                batches(
                    corrupt_stream({3, 4, 5}),
                    4,
                    num_workers,
                    collator_for(24),
                    skipped=SkippedSounds(limit, 24),
                )
            )
        message = str(stop.value)
        assert message.startswith("Sounds that cannot be read: 3, more than")
        assert "allows (2)" in message
        for number in (3, 4, 5):
            assert f"{number}.wav: Cannot read" in message
    with pytest.raises(ValueError, match="cannot be read: 1, more"):
        list(batches(corrupt_stream({3}), 4, num_workers, collator_for(24)))


def test_the_list_of_corrupt_sounds_is_cut():
    skipped = SkippedSounds(1, 100)
    with pytest.raises(ValueError, match=r"cannot be read: 30, .*19: x \| and 10 more$"):
        skipped.add([(str(number), "x") for number in range(30)])
    with pytest.raises(ValueError, match="--max_corrupt must be 0 or more, got -1"):
        SkippedSounds(-1)


def test_only_unreadable_sounds():
    skipped = SkippedSounds(100, 24)
    stream = corrupt_stream(set(range(24)))
    assert list(batches(stream, 4, 0, collator_for(24), skipped=skipped)) == []
    assert len(skipped.reasons) == 24
    with pytest.raises(AudioDecodingError):
        Collator(EXTRACTOR, 2)([{"audio": b"no sound", "label": 0}])
