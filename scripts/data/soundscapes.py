"""Synthetic soundscapes: events at known times in soft noise, to train and evaluate detection.

clips       (samples,) with a label each: their loud stretch is an event
background  noise whose power falls with frequency, with a random slope
events      anywhere, possibly overlapping, each e.g. 3 to 15 dB above the background
-> waveform (samples,) and [Annotation(start, end, label), …], exact to the sample
"""

from collections.abc import Sequence

import numpy as np

from .annotations import Annotation, without_overlaps

_FRAME_S = 0.02
_ACTIVE = 0.01  # of a clip's 95th percentile of power: 20 dB below its loud parts
_BACKGROUND = 0.01  # root mean square; full scale is 1
_SLOPES = (0.4, 1.6)  # power falls as frequency to this exponent; 0: white, 1: pink


def active_part(clip: np.ndarray, sampling_rate: int) -> np.ndarray:
    """A clip without its silent ends; all of it if it is silent or too short to tell."""
    size = int(_FRAME_S * sampling_rate)
    frames = clip[: len(clip) // size * size].reshape(-1, size)
    if not len(frames):
        return clip
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    loud = np.flatnonzero(power > _ACTIVE * np.quantile(power, 0.95) + 1e-12)
    return clip[loud[0] * size : (loud[-1] + 1) * size] if len(loud) else clip


def noise(samples: int, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """Stationary noise of root mean square 1, (samples,)."""
    frequencies = np.fft.rfftfreq(samples, 1 / sampling_rate)
    spectrum = random.standard_normal(len(frequencies)) + 1j * random.standard_normal(
        len(frequencies)
    )
    spectrum[0] = 0
    spectrum[1:] /= frequencies[1:] ** (random.uniform(*_SLOPES) / 2)
    waveform = np.fft.irfft(spectrum, samples)
    return waveform / np.sqrt(np.square(waveform).mean())


def soundscape(
    clips: Sequence[tuple[str, np.ndarray]],
    seconds: float,
    snr_db: tuple[float, float],
    sampling_rate: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, list[Annotation]]:
    """One soundscape with one event per clip.

    Args:
        clips: label and waveform (samples,) of each.
        seconds: length of the soundscape; longer events are cut to half of it.
        snr_db: an event's power over the background's, between these, in decibels.
        sampling_rate: of clips and soundscape, in Hz.
        random: source of all randomness.

    Returns:
        waveform (samples,) in -1..1, float32, and its events by start. Events with the same label
        that overlap or touch are merged.
    """
    samples = round(seconds * sampling_rate)
    waveform = _BACKGROUND * noise(samples, sampling_rate, random)
    events: list[Annotation] = []
    for label, clip in clips:
        event = active_part(clip, sampling_rate)[: samples // 2].astype(np.float64)
        level = np.sqrt(np.square(event).mean())
        if not level > 0:
            continue
        gain = _BACKGROUND * 10 ** (random.uniform(*snr_db) / 20) / level
        start = int(random.integers(0, samples - len(event) + 1))
        waveform[start : start + len(event)] += gain * event
        span = (start / sampling_rate, (start + len(event)) / sampling_rate)
        events.append(Annotation(*span, label))
    peak = np.abs(waveform).max()
    return (waveform / max(1.0, peak)).astype(np.float32), without_overlaps(events)
