"""Synthetic sounds for demonstrations, without data or network."""

from collections.abc import Callable

import numpy as np

RATE = 16000
SECONDS = 2.0

Random = np.random.Generator


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * RATE)) / RATE


def _tick(random: Random) -> np.ndarray:
    """A clock: short clicks at a steady pace."""
    sound = np.zeros(int(SECONDS * RATE))
    period, pitch = random.uniform(0.15, 0.35), random.uniform(2000, 5000)
    t = _time(0.01)
    click = np.exp(-t * 600) * np.sin(2 * np.pi * pitch * t)
    for start in np.arange(random.uniform(0, period), SECONDS - 0.01, period):
        begin = int(start * RATE)
        sound[begin : begin + len(click)] += click
    return sound


def _chirp(random: Random) -> np.ndarray:
    """A bird: a few notes that glide upwards."""
    sound = np.zeros(int(SECONDS * RATE))
    low = random.uniform(2000, 3500)
    for _ in range(random.integers(3, 7)):
        t = _time(random.uniform(0.06, 0.15))
        rise = random.uniform(800, 2500) / t[-1]
        note = np.sin(2 * np.pi * (low * t + rise * t**2 / 2)) * np.hanning(len(t))
        begin = random.integers(0, len(sound) - len(t))
        sound[begin : begin + len(t)] += note
    return sound


def _hum(random: Random) -> np.ndarray:
    """A transformer: a low tone with harmonics, all the time."""
    t, pitch = _time(SECONDS), random.uniform(80, 160)
    parts = [np.sin(2 * np.pi * pitch * k * t + random.uniform(0, 6)) / k for k in (1, 2, 3, 5)]
    return np.sum(parts, axis=0)


def _noise_burst(random: Random) -> np.ndarray:
    """A spray: one or two blocks of white noise."""
    sound = np.zeros(int(SECONDS * RATE))
    for _ in range(random.integers(1, 3)):
        length = int(random.uniform(0.25, 0.6) * RATE)
        begin = random.integers(0, len(sound) - length)
        sound[begin : begin + length] += random.standard_normal(length) * 0.5
    return sound


def _siren(random: Random) -> np.ndarray:
    """A siren: a tone that swings up and down."""
    t, centre = _time(SECONDS), random.uniform(700, 1200)
    swing, pace = random.uniform(0.2, 0.4) * centre, random.uniform(0.8, 2.5)
    phase = random.uniform(0, 2 * np.pi)
    pitch = centre + swing * np.sin(2 * np.pi * pace * t + phase)
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def _drip(random: Random) -> np.ndarray:
    """A tap: rare drops, each a falling blip."""
    sound = np.zeros(int(SECONDS * RATE))
    for _ in range(random.integers(2, 5)):
        t, pitch = _time(0.12), random.uniform(900, 1800)
        drop = np.sin(2 * np.pi * (pitch * t - pitch * 2 * t**2)) * np.exp(-t * 35)
        begin = random.integers(0, len(sound) - len(t))
        sound[begin : begin + len(t)] += drop
    return sound


def _beep(random: Random) -> np.ndarray:
    """An alarm clock: a steady high tone, on and off."""
    t, pitch = _time(SECONDS), random.uniform(1500, 3500)
    pace, phase = random.uniform(2, 5), random.uniform(0, 1)
    return np.sin(2 * np.pi * pitch * t) * ((t * pace + phase) % 1 < 0.5)


def _engine(random: Random) -> np.ndarray:
    """A motor: low-passed noise in fast, regular puffs."""
    t, pace = _time(SECONDS), random.uniform(15, 35)
    noise = np.convolve(random.standard_normal(len(t)), np.ones(24) / 24, mode="same")
    return 4 * noise * (0.5 + 0.5 * np.sin(2 * np.pi * pace * t)) ** 4


SOUNDS: dict[str, Callable[[Random], np.ndarray]] = {
    "beep": _beep,
    "chirp": _chirp,
    "drip": _drip,
    "engine": _engine,
    "hum": _hum,
    "noise burst": _noise_burst,
    "siren": _siren,
    "tick": _tick,
}


def synthesise(name: str, random: Random) -> np.ndarray:
    """One clip (samples,) at 16 kHz: the event at a random level over background noise."""
    event = SOUNDS[name](random)
    event = event / np.abs(event).max() * 10 ** random.uniform(-1.2, -0.2)
    smooth = np.convolve(random.standard_normal(len(event)), np.ones(4) / 4, mode="same")
    noise = smooth * 10 ** random.uniform(-2.6, -1.7)
    return np.clip(event + noise, -1, 1).astype(np.float32)
