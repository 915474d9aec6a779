"""Streams of labelled sound to featurised batches; all the work is done in workers.

    rows        {"audio": undecoded, "label": class index or list of them, "name": origin}
    clips       waveform (samples,) and label, () index or (classes,) target
    batches     input_values (B, T, F), labels (B,) or (B, classes), attention_mask (B, T) if padded
                to the longest clip

A clip longer than the extractor's `max_length` is read in windows, see `windows`. Several windows
are concatenated in its waveform, and a batch of such clips has one more axis:

    bags        input_values (B, N, T, F), window_weights (B, N), labels, attention_mask (B, N, T)

For annotated rows, {"events": [[start, end, class index], …]}, the labels are those of a frame
model's columns:

    frames      labels (B, columns, classes), clip_labels (B, classes); -1 where unknown;
                in bags all N windows' columns, one behind the other, (B, N * columns, classes)

If a teacher has answered, or is to answer online, a batch also has:

    answers     teacher_targets (B, its labels), teacher_embeddings (B, D)
    sounds      teacher_waveforms (B, samples), teacher_samples (B,), teacher_keys (B,): the same
                crop has the same key; -1 of what is mixed or played at another speed

    rank_share      -> the rows of one process: each shard is read by one worker of one process
    batches         -> one pass over them: drawn class by class, shuffled, decoded, mixed, grouped
                       by length, featurised
    SkippedSounds   -> the sounds that could not be read

For the same (seed, epoch, rank), number of processes and number of workers, the batches are always
the same, so a killed run resumes by skipping those it has already seen.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from feature_extraction import (
    ASTFeatureExtractor,
    AudioDecodingError,
    audio_duration,
    augmentation_generator,
    load_audio,
    mixup,
)
from modeling_ast.frames_ast import column_spans, count_columns, frame_targets

from .answers import Answers
from .fingerprint import checksum
from .windows import training_windows, whole_clips

_UNKNOWN = -1.0  # in a frame model's labels


class Clip(NamedTuple):
    """A sound, or a window of one, to train on or to evaluate."""

    waveform: Tensor  # (samples,); several windows are concatenated
    label: Tensor  # () index, (classes,) target or (columns + 1, classes), the clip's last
    number: int = -1  # in evaluation: of the clip this is a window of
    answer: Tensor | None = None  # a teacher's, (its labels + D,)
    key: int = -1  # of the crop, unless it was changed at random


@dataclass(frozen=True)
class FrameGrid:
    """The columns of a frame model."""

    time_stride: int  # frames of 10 ms
    patch_frames: int
    unmarked_is_unknown: bool = False  # for columns without any event; else they are background


_SHARDS_PER_WORKER = 4  # at least, if the dataset allows: even shares, good shuffling
_SHORTEST_FRAMES = 16  # one patch: the minimum the model takes
_CLIPS_PER_WORKER = 1 << 40  # more than any has: makes clip numbers unique across workers
_NAMED_SOUNDS = 20  # in an error message


def rank_share(
    stream: IterableDataset, rank: int, world_size: int, num_workers: int = 0
) -> IterableDataset:
    """The part of a stream that only process `rank` of `world_size` reads.

    Shards (files, or row groups if there are few Parquet files) are dealt out, differently for each
    shuffle, even if their number is not a multiple of the processes. Only with fewer shards than
    processes does every process read all and keep each `world_size`-th row.

    Args:
        stream: the same in each process.
        rank, world_size: of the processes that train or evaluate together.
        num_workers: of the `batches` made from it, which share the process's shards.
    """
    if stream.num_shards < _SHARDS_PER_WORKER * world_size * max(1, num_workers):
        stream = stream.reshard()
    if world_size == 1:
        return stream
    strategy = "shards" if stream.num_shards >= world_size else "examples"
    return split_dataset_by_node(stream, rank, world_size, strategy)


@dataclass
class SkippedSounds:
    """Sounds that could not be read and were skipped, and how many of them a run tolerates.

    Args:
        limit: below 1, a share of the clips; otherwise their number.
        clips: in the dataset.
        reasons: each sound's name and what is wrong with it.
    """

    limit: float = 0.0
    clips: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.limit >= 0:
            raise ValueError(f"--max_corrupt must be 0 or more, got {self.limit}.")

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Count (name, reason) pairs.

        Raises:
            ValueError: over the limit, with the list.
        """
        self.reasons.update(failures)
        allowed = int(self.limit * self.clips if self.limit < 1 else self.limit)
        if len(self.reasons) > allowed:
            named = [
                reason if name in reason else f"{name}: {reason}"
                for name, reason in self.reasons.items()
            ]
            more = len(named) - _NAMED_SOUNDS
            raise ValueError(
                f"Sounds that cannot be read: {len(named)}, more than --max_corrupt "
                f"{self.limit:g} allows ({allowed}). Repair or remove them, or allow more. "
                + " | ".join(named[:_NAMED_SOUNDS])
                + (f" | and {more} more" if more > 0 else "")
            )


@dataclass
class Collator:
    """Decodes, mixes and featurises rows: -> input_values (B, T, F), labels.

    Labels are class indices (B,), or targets (B, classes): of several labels per clip, or mixed.
    An extractor that returns attention masks pads to the longest clip, any other to `max_length`.

    Args:
        windows_per_clip: at most this many windows of `max_length` from a longer clip.
        frames: turns annotated rows into labels for a frame model's columns.
        answers: a teacher's answers to what is heard of a row.
        keeps_waveforms: pass the sounds on, for a teacher to hear.
    """

    feature_extractor: ASTFeatureExtractor
    num_labels: int
    mixup_rate: float = 0.0
    generator_key: tuple[int, int, int] = (0, 0, 0)  # seed, epoch, rank
    speed_perturbation: float = 0.0
    windows_per_clip: int = 1
    frames: FrameGrid | None = None
    answers: Answers | None = None
    keeps_waveforms: bool = False
    _generator: torch.Generator | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows to a batch, unmodified; those to be mixed carry their partners.

        Raises:
            AudioDecodingError: if one cannot be read.
        """
        generator = self._generator = self._generator or augmentation_generator(*self.generator_key)
        clips = []
        for row in rows:
            partner = self.partner(rows, generator)
            second = None if partner is None else self.decode(partner, generator)
            clips.append(self.mix(self.decode(row, generator), second, generator))
        return self.batch(clips)

    def partner(self, rows: Sequence[Any], generator: torch.Generator) -> Any | None:
        """A uniformly drawn row to mix a clip with, or None for clips that stay unmixed."""
        if self.mixup_rate and torch.rand((), generator=generator) < self.mixup_rate:
            return rows[int(torch.randint(len(rows), (), generator=generator))]
        return None

    @property
    def window_s(self) -> float:
        """Length of what the extractor uses at once, in seconds."""
        return self._window_samples / self.feature_extractor.sampling_rate

    def decode(self, row: dict[str, Any], generator: torch.Generator) -> Clip:
        """As much of a sound as the extractor uses, at a random speed, and its label.

        For a longer sound, this is one or up to `windows_per_clip` random windows, or the window at
        the row's "offset".

        Speed perturbation (Ko et al., Interspeech 2015) resamples, which also changes the pitch.

        Raises:
            AudioDecodingError: if it cannot be read.
        """
        rate = self.feature_extractor.sampling_rate
        slower = 1.0  # how long one second becomes
        if self.speed_perturbation:
            slower += self.speed_perturbation * (2 * float(torch.rand((), generator=generator)) - 1)
        window_s = self.window_s / slower
        if "offset" in row:
            starts = [row["offset"]]
        else:
            duration = audio_duration(row["audio"], rate)
            starts = [0.0]
            if duration is not None:
                starts = training_windows(duration, window_s, self.windows_per_clip, generator)
        windows, heard = [], []
        for start in starts:
            try:
                sound = load_audio(row["audio"], round(slower * rate), start, window_s)
            except AudioDecodingError:
                if start == 0:
                    raise
                continue  # a truncated file ends before its header says
            windows.append(torch.from_numpy(sound))
            heard.append((start, start + len(sound) / (slower * rate)))
        if not windows:
            sound = load_audio(row["audio"], round(slower * rate), duration=window_s)
            windows = [torch.from_numpy(sound)]
            heard = [(0.0, len(sound) / (slower * rate))]
        label = self._label(row, [start for start, _ in heard], [len(w) for w in windows])
        waveform = windows[0]
        if len(windows) > 1:
            size = self._window_samples
            waveform = torch.cat([pad(w, (0, size - len(w))) for w in windows])
        return Clip(
            waveform,
            label,
            row.get("clip", -1),
            None if self.answers is None else self.answers(row, heard),
            # 63 bits: a tensor holds it
            checksum(row["name"], *heard) >> 1 if slower == 1.0 and self.keeps_waveforms else -1,
        )

    @property
    def _window_samples(self) -> int:
        return self.feature_extractor.filterbank.samples_used(self.feature_extractor.max_length)

    def _label(self, row: dict[str, Any], starts: list[float], samples: list[int]) -> Tensor:
        """Of a clip whose windows begin at `starts`, in seconds, and hold so many samples."""
        label = torch.tensor(row["label"])
        if self.frames is None and not label.ndim and not self.mixup_rate:
            return label
        target = torch.zeros(self.num_labels)
        target[label.long()] = 1.0
        if self.frames is None:
            return target
        of_columns = [
            self._column_targets(row["events"], *window)
            for window in zip(starts, samples, strict=True)
        ]
        if len(of_columns) > 1:  # all but the last are full; in a bag that one is padded
            full = self._columns(self._window_samples)
            of_columns = [_fitted_columns(targets, full) for targets in of_columns]
        if row["events"] is not None:
            target.fill_(_UNKNOWN)  # known for the whole clip, not for these windows
        return torch.cat([*of_columns, target[None]])

    def _columns(self, samples: int) -> int:
        """Of a frame model, that hold nothing but sound."""
        assert self.frames is not None
        num_frames = self.feature_extractor.filterbank.num_frames(samples)
        return count_columns(num_frames, self.frames.time_stride, self.frames.patch_frames)

    def _column_targets(
        self, events: list[list[float]] | None, start: float, samples: int
    ) -> Tensor:
        """(columns, classes) of a window, from events in seconds of the clip."""
        assert self.frames is not None
        columns = self._columns(samples)
        if events is None:
            return torch.full((columns, self.num_labels), _UNKNOWN)
        spans = column_spans(
            columns,
            self.frames.time_stride,
            self.frames.patch_frames,
            duration=samples / self.feature_extractor.sampling_rate,
        )
        of_window = [(begin - start, end - start, int(label)) for begin, end, label in events]
        targets = frame_targets(of_window, spans, self.num_labels)
        if self.frames.unmarked_is_unknown:
            targets[~targets.any(axis=1)] = _UNKNOWN
        return torch.from_numpy(targets)

    def mix(self, clip: Clip, partner: Clip | None, generator: torch.Generator) -> Clip:
        """Waveform mixup with a partner; without one, the mean is still removed.

        A teacher's answers are mixed like the labels.
        """
        if not self.mixup_rate:
            return clip
        shape, size = clip.label.shape, clip.label.numel()
        target = _with_answer(clip.label, clip.answer)
        partners = None
        if partner is not None:
            fitted = _fitted(partner.label, shape)
            partners = ([partner.waveform], _with_answer(fitted, partner.answer))
        (waveform,), mixed = mixup(
            [clip.waveform],
            target,
            rate=0.0 if partner is None else 1.0,
            generator=generator,
            partners=partners,
        )
        # What is unknown for one of them is unknown for the mixture.
        is_unknown = target[:, :size] < 0
        if partners is not None:
            is_unknown = is_unknown | (partners[1][:, :size] < 0)
        label = mixed[:, :size].masked_fill(is_unknown, _UNKNOWN).reshape(shape)
        answer = None if clip.answer is None else mixed[0, size:]
        return Clip(waveform, label, answer=answer, key=clip.key if partner is None else -1)

    def batch(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        windows = waveforms = [clip.waveform for clip in clips]
        counts = [1] * len(clips)
        if self.windows_per_clip > 1:
            pieces = [waveform.split(self._window_samples) for waveform in windows]
            counts = [len(of_clip) for of_clip in pieces]
            windows = [window for of_clip in pieces for window in of_clip]
        samples = torch.tensor([float(len(window)) for window in windows])
        extractor = self.feature_extractor
        padding = "max_length"
        if extractor.return_attention_mask:
            padding = "longest"
            shortest = extractor.filterbank.num_samples(_SHORTEST_FRAMES)
            windows = [pad(w, (0, max(0, shortest - len(w)))) for w in windows]
        features = {
            **extractor(
                windows,
                sampling_rate=extractor.sampling_rate,
                padding=padding,
                return_tensors="pt",
            )
        }
        if self.windows_per_clip > 1:
            features["window_weights"] = samples
            features = {key: _bags(value, counts) for key, value in features.items()}
        if clips[0].number >= 0:
            features["clip"] = torch.tensor([clip.number for clip in clips])
            features["window_weights"] = samples
        if self.answers is not None:
            answers = torch.stack([clip.answer for clip in clips if clip.answer is not None])
            features["teacher_targets"] = answers[:, : self.answers.num_labels]
            features["teacher_embeddings"] = answers[:, self.answers.num_labels :]
        if self.keeps_waveforms:
            features["teacher_waveforms"] = pad_sequence(waveforms, batch_first=True)
            features["teacher_samples"] = torch.tensor([len(sound) for sound in waveforms])
            features["teacher_keys"] = torch.tensor([clip.key for clip in clips])
        labels = [clip.label for clip in clips]
        if self.frames is not None:
            features["clip_labels"] = torch.stack([label[-1] for label in labels])
            columns = count_columns(
                features["input_values"].shape[-2],
                self.frames.time_stride,
                self.frames.patch_frames,
            )
            labels = [_fitted_columns(label[:-1], max(counts) * columns) for label in labels]
        return {**features, "labels": torch.stack(labels)}


def _bags(windows: Tensor, counts: list[int]) -> Tensor:
    """All clips' windows (W, …) -> (B, N, …), zeros where a clip has fewer than N."""
    bags = windows.new_zeros(len(counts), max(counts), *windows.shape[1:])
    for bag, of_clip in zip(bags, windows.split(counts), strict=True):
        bag[: len(of_clip)] = of_clip
    return bags


def _with_answer(label: Tensor, answer: Tensor | None) -> Tensor:
    """What is mixed alike, as one row (1, n)."""
    parts = [label.reshape(-1)] if answer is None else [label.reshape(-1), answer]
    return torch.cat(parts)[None]


def _fitted(label: Tensor, shape: Sequence[int]) -> Tensor:
    """A frame model's labels with more or fewer columns, the clip's behind them as before."""
    if label.ndim < 2 or label.shape == tuple(shape):
        return label
    return torch.cat([_fitted_columns(label[:-1], shape[0] - 1), label[-1:]])


def _fitted_columns(targets: Tensor, columns: int) -> Tensor:
    """(some, classes) -> (columns, classes); added ones are padding, not known."""
    targets = targets[:columns]
    return pad(targets, (0, 0, 0, columns - len(targets)), value=_UNKNOWN)


def batches(
    stream: IterableDataset,
    batch_size: int,
    num_workers: int,
    collator: Collator,
    shuffle_buffer: int = 0,
    draws: Sequence[float] | None = None,
    bucket_batches: int = 0,
    skipped: SkippedSounds | None = None,
    read_in_turn: bool = False,
    whole: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """One pass over a stream in featurised batches.

    Args:
        stream: rows from `open_labelled_audio`, or a process's share of them.
        batch_size: clips per batch; the last one may have fewer.
        num_workers: processes; 0: everything in this one.
        collator: makes clips and batches; has the key that all randomness comes from.
        shuffle_buffer: rows per worker to draw the next one from, with the shards in random order;
            0 keeps the stream's order. Mixup draws its partners uniformly from the same number of
            most recent rows.
        draws: for class-balanced sampling, how often a clip is drawn on average, for each of its
            labels (`LabelledAudio.balanced_draws`); None: each clip once.
        bucket_batches: sort the clips of this many batches by length, so that batches need little
            padding; 0 keeps the order.
        skipped: counts sounds that cannot be read; None tolerates none.
        read_in_turn: read shuffled shards one after another, not ten at a time. That avoids a 5 s
            wait for `datasets`' threads at the end of a pass over Parquet, and loses nothing if the
            shuffle buffer holds all rows.
        whole: read all windows of clips longer than `max_length`. Each is then a row of a batch,
            with its clip's label, its clip's number, "clip" (B,), unique in this process, and its
            number of samples, "window_weights" (B,).

    Raises:
        ValueError: if more sounds cannot be read than `skipped` allows.
    """
    if shuffle_buffer:
        seed, epoch, _ = collator.generator_key
        # The same in all processes, which share the shards in this order. The buffer is our own
        # because a clip's copies and its partner come from it, too.
        shards_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        shards_at_once = {"max_buffer_input_shards": 1} if read_in_turn else {}
        stream = stream.shuffle(seed=shards_seed, buffer_size=1, **shards_at_once)
    loader = DataLoader(
        _Batches(stream, batch_size, collator, shuffle_buffer, draws, bucket_batches, whole),
        batch_size=None,
        num_workers=min(num_workers, stream.num_shards),
        collate_fn=_unchanged,
        generator=torch.Generator(),  # leaves torch's global one alone
    )
    skipped = SkippedSounds() if skipped is None else skipped
    left_over: list[Clip] = []
    for failures, batch, rest in loader:
        skipped.add(failures)
        left_over += rest
        if batch is not None:
            yield batch
    # Clips left over in workers, too few for a batch in any of them.
    for start in range(0, len(left_over), batch_size):
        yield collator.batch(left_over[start : start + batch_size])


def repeated(make_batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Repeats a stream forever: processes must take equally many steps, whatever their shares.

    Raises:
        ValueError: if it is empty.
    """
    while True:
        is_empty = True
        for batch in make_batches():
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError(
                "One of the processes has no clip to train on: use fewer processes or more files."
            )


def _unchanged(item: Any) -> Any:
    return item


@dataclass
class _Batches(torch.utils.data.IterableDataset):
    """Yields, repeatedly, a worker's unreadable sounds, a batch, and clips too few for one."""

    rows: IterableDataset
    batch_size: int
    collator: Collator
    shuffle_buffer: int
    draws: Sequence[float] | None
    bucket_batches: int
    whole: bool

    def __iter__(
        self,
    ) -> Iterator[tuple[list[tuple[str, str]], dict[str, Tensor] | None, list[Clip]]]:
        # Created in the worker, so that each worker has its own.
        generator = augmentation_generator(*self.collator.generator_key)
        failures: list[tuple[str, str]] = []
        rest: list[Clip] = []
        for clips in self._groups(self._clips(generator, failures), generator):
            if len(clips) < self.batch_size:
                rest = clips
                continue
            yield failures.copy(), self.collator.batch(clips), []
            failures.clear()
        yield failures, None, rest

    def _groups(self, clips: Iterator[Clip], generator: torch.Generator) -> Iterator[list[Clip]]:
        """Clips in batches, optionally of similar length and then in random order."""
        size = self.batch_size
        while window := list(islice(clips, size * max(1, self.bucket_batches))):
            starts = torch.arange(0, len(window), size)
            if self.bucket_batches:
                window.sort(key=lambda clip: len(clip.waveform))
                starts = starts[torch.randperm(len(starts), generator=generator)]
            for start in starts.tolist():
                yield window[start : start + size]

    def _clips(self, generator: torch.Generator, failures: list[tuple[str, str]]) -> Iterator[Clip]:
        """Decoded and mixed. A clip whose partner cannot be read stays unmixed."""
        for row, partner in self._pairs(generator):
            clip = self._decoded(row, generator, failures)
            second = None if partner is None else self._decoded(partner, generator, failures)
            if clip is not None:
                yield self.collator.mix(clip, second, generator)

    def _decoded(
        self, row: dict[str, Any], generator: torch.Generator, failures: list[tuple[str, str]]
    ) -> Clip | None:
        try:
            return self.collator.decode(row, generator)
        except AudioDecodingError as error:
            failures.append((row["name"], str(error)))
            return None

    def _pairs(self, generator: torch.Generator) -> Iterator[tuple[dict, dict | None]]:
        """Rows in random order, each with its partner for mixup, if any."""
        # Undecoded rows, shared with the buffer. Not the buffer itself: balanced sampling must not
        # affect the partners, which come from the whole dataset in the original.
        recent: deque[dict] = deque(maxlen=max(self.shuffle_buffer, 2 * self.batch_size))
        buffer: list[dict] = []
        rows: Iterable[dict] = self.rows
        if self.whole:
            worker = torch.utils.data.get_worker_info()
            first = 0 if worker is None else worker.id * _CLIPS_PER_WORKER
            rows = whole_clips(rows, self.collator.window_s, first)
        for row in rows:
            recent.append(row)
            for _ in range(self._copies(row, generator)):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(row)
                    continue
                drawn = row
                if buffer:
                    place = int(torch.randint(len(buffer), (), generator=generator))
                    drawn, buffer[place] = buffer[place], row
                yield drawn, self.collator.partner(recent, generator)
        for place in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[place], self.collator.partner(recent, generator)

    def _copies(self, row: dict[str, Any], generator: torch.Generator) -> int:
        """How often to draw a row: its expected count, randomly rounded up or down."""
        if self.draws is None:
            return 1
        labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
        expected = sum(self.draws[label] for label in labels)
        return int(expected + float(torch.rand((), generator=generator)))
