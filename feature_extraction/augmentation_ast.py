"""Training-time augmentations: batched, on any device, driven by an explicit generator.

    waveforms       B x (samples,)  mixup, random_gain, time_shift
    log-mel         (B, T, F)       spec_augment (the original: before the normalisation),
                                    filter_augment
    input_values    (B, T, F)       add_noise, roll (the original: after the normalisation)

Nothing is changed in place. Each function draws from `generator`, which lives on the data's device:
the same seed gives the same result; `augmentation_generator` makes one that differs between epochs,
ranks and workers. "The original" is `dataloader.py` of github.com/YuanGongND/ast.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def augmentation_generator(
    seed: int, epoch: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that is different for each epoch, rank and `DataLoader` worker.

    Args:
        seed: of the whole training run.
        epoch: counted from 0.
        rank: of this process among those training together.
        device: of the data. Called in a `DataLoader` worker, the worker's number also counts.
    """
    worker = torch.utils.data.get_worker_info()
    key = [seed, epoch, rank, 0 if worker is None else 1 + worker.id]
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    return generator


def mixup(
    waveforms: Sequence[Tensor] | Tensor,
    labels: Tensor,
    rate: float = 0.5,
    alpha: int = 10,
    generator: torch.Generator | None = None,
    partners: tuple[Sequence[Tensor] | Tensor, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Mix clips and their labels with partners: given ones, or drawn uniformly from the batch.

    A clip becomes λ · clip + (1 - λ) · partner, with λ from Beta(alpha, alpha) and the partner
    padded with silence or cut to the clip's length. The mean is removed from each clip before
    mixing and from the result, even if nothing is mixed. The original does the same, with alpha 10
    and partners from the whole dataset; rates: 0.5 on AudioSet, 0.6 on Speech Commands.

    Args:
        waveforms: B clips (samples,) of any lengths, or (B, samples).
        labels: (B, classes), floating point: one-hot or multi-hot.
        rate: share of the clips to mix.
        alpha: of the Beta distribution, an integer: the higher, the closer to equal halves.
        generator: source of randomness, on the waveforms' device.
        partners: B clips of any lengths and their labels (B, classes), one per clip.

    Returns:
        the clips, each as long as before, and their labels (B, classes).

    Raises:
        ValueError: if the labels do not fit, or `rate` is not in 0..1.
    """
    if labels.ndim != 2 or len(labels) != len(waveforms) or not labels.is_floating_point():
        raise ValueError(
            f"Mixup needs one row of floating-point labels per clip, ({len(waveforms)}, classes); "
            f"got {tuple(labels.shape)} of {labels.dtype}. Class indices: use one_hot(…).float()."
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {rate}.")
    clips, inside = _padded(waveforms)  # (B, samples)
    clips = _without_mean(clips, inside)
    batch_size, device = len(clips), clips.device
    if partners is None:
        drawn = torch.randint(batch_size, (batch_size,), device=device, generator=generator)
        partner_clips, partner_labels = clips[drawn], labels[drawn.to(labels.device)]
    else:
        if len(partners[0]) != batch_size or partners[1].shape != labels.shape:
            raise ValueError(
                f"Mixup needs one partner per clip with its labels, {batch_size} and "
                f"{tuple(labels.shape)}; got {len(partners[0])} and {tuple(partners[1].shape)}."
            )
        partner_clips, partner_labels = _without_mean(*_padded(partners[0])), partners[1]
        longer = clips.shape[1] - partner_clips.shape[1]  # below 0: cut the partners
        partner_clips = torch.nn.functional.pad(partner_clips, (0, longer))
    # The middle one of 2 · alpha - 1 uniform numbers follows Beta(alpha, alpha).
    uniform = torch.rand(batch_size, 2 * alpha - 1, device=device, generator=generator)
    weight = uniform.median(dim=1, keepdim=True).values
    mixed = torch.rand(batch_size, 1, device=device, generator=generator) < rate
    weight = torch.where(mixed, weight, 1.0)
    clips = _without_mean(weight * clips + (1 - weight) * partner_clips, inside)
    weight = weight.to(labels.device)
    return _unpadded(clips, waveforms), weight * labels + (1 - weight) * partner_labels


def random_gain(
    waveforms: Sequence[Tensor] | Tensor,
    max_gain_db: float = 6.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Make each clip louder or quieter by up to `max_gain_db` decibels, uniformly; no clipping.

    Args:
        waveforms: B clips (samples,) of any lengths, or (B, samples).
        max_gain_db: 6 is twice or half the amplitude.
        generator: source of randomness, on the waveforms' device.
    """
    clips, _ = _padded(waveforms)
    share = torch.rand(len(clips), 1, device=clips.device, generator=generator)
    gain = 10 ** (max_gain_db * (2 * share - 1) / 20)
    return _unpadded(gain * clips, waveforms)


def time_shift(
    waveforms: Sequence[Tensor] | Tensor,
    max_shift: int,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Move each clip by up to `max_shift` samples either way; silence fills the gap.

    Args:
        waveforms: B clips (samples,) of any lengths, or (B, samples).
        max_shift: samples.
        generator: source of randomness, on the waveforms' device.
    """
    clips, inside = _padded(waveforms)
    samples, device = clips.shape[1], clips.device
    shift = torch.randint(
        -max_shift, max_shift + 1, (len(clips), 1), device=device, generator=generator
    )
    source = torch.arange(samples, device=device) - shift  # (B, samples)
    kept = clips.gather(1, source.clamp(0, samples - 1))
    return _unpadded(kept * ((source >= 0) & (source < samples) & inside), waveforms)


def _padded(waveforms: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Clips as (B, samples) with silence at the end, and a mask of where they are sound."""
    clips = pad_sequence(list(waveforms), batch_first=True)
    lengths = torch.tensor([len(waveform) for waveform in waveforms], device=clips.device)
    return clips, torch.arange(clips.shape[1], device=clips.device) < lengths[:, None]


def _unpadded(clips: Tensor, waveforms: Sequence[Tensor] | Tensor) -> list[Tensor]:
    return [clip[: len(waveform)] for clip, waveform in zip(clips, waveforms, strict=True)]


def _without_mean(clips: Tensor, inside: Tensor) -> Tensor:
    mean = (clips * inside).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True)
    return (clips - mean) * inside


def spec_augment(
    spectrograms: Tensor,
    time_mask: int,
    frequency_mask: int,
    fill: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SpecAugment (arXiv 1904.08779): mask one run of frames and one of mel bins per clip.

    Widths are uniform in 0..`time_mask` - 1 and 0..`frequency_mask` - 1, positions uniform over
    where the run fits: torchaudio's TimeMasking and FrequencyMasking, which the original used.

    Args:
        spectrograms: (B, T, F).
        time_mask: frames, the width's exclusive upper bound; 0 masks nothing.
        frequency_mask: mel bins, likewise.
        fill: value of the masked parts. The original masks raw log-mel with 0 before normalising,
            which is loud, like padding.
        generator: source of randomness, on the spectrograms' device.
    """
    batch_size, frames, mel_bins = spectrograms.shape
    device = spectrograms.device
    hidden_frames = _random_run(batch_size, frames, time_mask, device, generator)
    hidden_bins = _random_run(batch_size, mel_bins, frequency_mask, device, generator)
    hidden = hidden_frames[:, :, None] | hidden_bins[:, None]  # (B, T, F)
    return spectrograms.masked_fill(hidden, fill)


def _random_run(
    batch_size: int,
    length: int,
    limit: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """(B, length), True inside one random run shorter than `limit`."""
    width, start = torch.rand(2, batch_size, 1, device=device, generator=generator)
    width = (width * min(limit, length)).floor()
    start = (start * (length - width + 1)).floor()
    position = torch.arange(length, device=device)
    return (position >= start) & (position < start + width)


def filter_augment(
    spectrograms: Tensor,
    max_gain: float,
    bands: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """FilterAugment (arXiv 2110.03282): a random equaliser, like every recorder and room.

    Gains are uniform in ±`max_gain` at the edges of the bands and linear between them. (The paper's
    linear kind, but there the edges are random too, with 3 to 6 bands.)

    Args:
        spectrograms: (B, T, F), F at least 2.
        max_gain: in the spectrograms' units: one decibel is ln(10) / 10 = 0.23 in log-mel; divide
            by 2 · std after normalisation.
        bands: number of bands, equally wide in mel bins.
        generator: source of randomness, on the spectrograms' device.
    """
    batch_size, _, mel_bins = spectrograms.shape
    device = spectrograms.device
    gains = torch.rand(batch_size, 1, bands + 1, device=device, generator=generator)
    gains = nn.functional.interpolate(
        max_gain * (2 * gains - 1), size=mel_bins, mode="linear", align_corners=True
    )
    return spectrograms + gains  # (B, 1, F): equal in all frames


def add_noise(
    spectrograms: Tensor, max_level: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Add uniform noise between 0 and a level drawn per clip from 0 to `max_level`.

    The original does this on Speech Commands, with 0.1, after normalising and before rolling.

    Args:
        spectrograms: (B, T, F).
        max_level: in the spectrograms' units.
        generator: source of randomness, on the spectrograms' device.
    """
    device = spectrograms.device
    level = max_level * torch.rand(len(spectrograms), 1, 1, device=device, generator=generator)
    return spectrograms + level * torch.rand(spectrograms.shape, device=device, generator=generator)


def roll(spectrograms: Tensor, max_shift: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift each clip in time by up to `max_shift` frames either way, wrapping around.

    The original does this on Speech Commands, with 10, after the noise (-10 to +9, numpy's range).

    Args:
        spectrograms: (B, T, F).
        max_shift: frames.
        generator: source of randomness, on the spectrograms' device.
    """
    batch_size, frames, _ = spectrograms.shape
    device = spectrograms.device
    shift = torch.randint(
        -max_shift, max_shift + 1, (batch_size, 1), device=device, generator=generator
    )
    source = (torch.arange(frames, device=device) - shift) % frames  # (B, T)
    return spectrograms.gather(1, source[:, :, None].expand_as(spectrograms))
