"""Sources of live sound: a microphone, a WAV stream on standard input, ffmpeg.

Each source yields blocks (samples,) float32, mono, at the model's rate, about 50 ms each, and ends,
or raises `SourceLostError` if it may come back.
"""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

_BLOCK_S = 0.05
_HIGHEST_RATE = 768_000  # Hz; as for `load_audio`
# Programs that do not know the length in advance write sizes from here up, or 0.
_UNKNOWN_BYTES = 0x7FF00000


class SourceLostError(Exception):
    """The sound stopped, but may come back."""


class Source(Protocol):
    """Yields sound at the rate it was created for."""

    name: str  # as shown in messages
    waits: bool  # it can wait for the listener, like a file
    comes_back: bool  # reconnecting after `SourceLostError` makes sense
    overflows: int  # how often the device lost sound before it got here

    def blocks(self) -> Iterator[np.ndarray]:
        """(samples,) each."""

    def interrupt(self) -> None:
        """Give up a silent source: `blocks` raises `SourceLostError`."""


class Microphone:
    """A sound card's input, through PortAudio (package sounddevice).

    Args:
        rate: wanted, in Hz.
        device: its number, or a part of its name; None: the system's default.

    Raises:
        ValueError: if sounddevice or PortAudio is missing, or there is no such device.
    """

    waits, comes_back = False, True

    def __init__(self, rate: int, device: str | None = None):
        self._sounddevice: Any = _import_sounddevice()
        self._rate, self.overflows = rate, 0
        self._device = int(device) if device is not None and device.isdigit() else device
        try:
            about = self._sounddevice.query_devices(self._device, "input")
        except (ValueError, self._sounddevice.PortAudioError) as error:
            raise ValueError(
                f"No microphone {'' if device is None else repr(device)}: {error}. "
                "`python -m sounddevice` lists the devices; --device chooses one."
            ) from error
        self.name = f"microphone {about['name']!r}"

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises SourceLostError if the device fails."""
        try:
            about = self._sounddevice.query_devices(self._device, "input")
            device_rate = int(about["default_samplerate"])
            with self._sounddevice.InputStream(
                samplerate=device_rate, channels=1, dtype="float32", device=self._device
            ) as stream:

                def read() -> Iterator[np.ndarray]:
                    while True:
                        samples, overflowed = stream.read(round(_BLOCK_S * device_rate))
                        self.overflows += bool(overflowed)
                        yield np.array(samples[:, 0])

                yield from _resampled(read(), device_rate, self._rate)
        except (ValueError, self._sounddevice.PortAudioError) as error:
            raise SourceLostError(str(error)) from error

    def interrupt(self) -> None:
        """Does nothing: a hanging device cannot be interrupted; unplugging ends it."""


class WavStream:
    """A WAV file or stream of integer PCM, as written by `arecord -t wav`, from a pipe or file.

    Args:
        file: binary; read from its current position.
        rate: wanted, in Hz.
        waits: the other side waits, so nothing is lost; default: true if `file` is a file.

    Raises:
        ValueError: if it is not such a WAV.
    """

    comes_back, overflows, name = False, 0, "standard input"

    def __init__(self, file: BinaryIO, rate: int, waits: bool | None = None):
        self._file, self._rate = file, rate
        is_file = False
        with contextlib.suppress(OSError, ValueError):
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self.waits = is_file if waits is None else waits
        try:
            header = wave.open(file, "rb")  # noqa: SIM115  (the file goes on)
            self._source_rate, self._channels = header.getframerate(), header.getnchannels()
            self._width, frames = header.getsampwidth(), header.getnframes()
        except (wave.Error, EOFError) as error:
            raise ValueError(
                f"Standard input is not an integer PCM WAV: {error or 'it is empty'}. Expected a "
                "stream as written by arecord -t wav -f S16_LE -r 16000."
            ) from error
        if not 1 <= self._source_rate <= _HIGHEST_RATE:
            raise ValueError(
                f"Standard input's header says {self._source_rate} Hz; expected {_HIGHEST_RATE} at "
                "most."
            )
        size = frames * self._channels * self._width
        self._bytes = size if 0 < size < _UNKNOWN_BYTES else None
        self._wave = header  # keeps the file open

    def blocks(self) -> Iterator[np.ndarray]:
        """To the end of the stream, whatever its header promises; for a file, of its sound."""
        return _resampled(self._read(), self._source_rate, self._rate)

    def interrupt(self) -> None:
        """Does nothing: another program writes."""

    def _read(self) -> Iterator[np.ndarray]:
        frame = self._width * self._channels
        size = max(1, round(_BLOCK_S * self._source_rate)) * frame
        left = self._bytes
        while content := self._file.read(size if left is None else min(size, left)):
            left = None if left is None else left - len(content)
            yield _pcm(content[: len(content) // frame * frame], self._width, self._channels)


class Ffmpeg:
    """Anything the ffmpeg program reads: rtsp://, http(s)://, …

    Args:
        address: of the stream.
        rate: wanted, in Hz.

    Raises:
        ValueError: if there is no ffmpeg.
    """

    waits, comes_back, overflows = False, True, 0

    def __init__(self, address: str, rate: int):
        self.name = re.sub(r"//[^/@]*@", "//…@", address)  # without its password
        self._address, self._rate = address, rate
        self._process: subprocess.Popen | None = None
        if shutil.which("ffmpeg") is None:
            raise ValueError(
                f"{self.name} needs the ffmpeg program: apt install ffmpeg, brew install ffmpeg, "
                "winget install ffmpeg."
            )

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises SourceLostError when the stream ends, with ffmpeg's message."""
        command = ["ffmpeg", "-nostdin", "-loglevel", "error"]
        if self._address.startswith("rtsp"):
            command += ["-rtsp_transport", "tcp"]
        command += ["-i", self._address, "-vn", "-ac", "1", "-ar", str(self._rate)]
        command += ["-f", "f32le", "pipe:1"]
        size = round(_BLOCK_S * self._rate) * 4
        with (
            tempfile.TemporaryFile() as messages,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
            ) as process,
        ):
            self._process = process
            try:
                assert process.stdout is not None
                while content := process.stdout.read(size):
                    yield np.frombuffer(content[: len(content) // 4 * 4], "<f4")
                process.wait()
                messages.seek(0)
                said = messages.read().decode(errors="replace").strip().splitlines()
            finally:
                process.kill()
        reason = said[-1].replace(self._address, self.name) if said else "the stream ended"
        raise SourceLostError(reason)

    def interrupt(self) -> None:
        """Ends ffmpeg."""
        if self._process is not None:
            self._process.kill()


def _import_sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise ValueError(
            "The microphone needs the package sounddevice, which is not installed. In this "
            "project's folder: pip install '.[listen]'. Or: arecord -t wav -f S16_LE -r 16000 | "
            "ast-listen -"
        ) from error
    except OSError as error:
        raise ValueError(
            f"The microphone needs the library PortAudio ({error}): apt install libportaudio2, or "
            "arecord -t wav -f S16_LE -r 16000 | ast-listen -"
        ) from error
    return sounddevice


def _pcm(content: bytes, width: int, channels: int) -> np.ndarray:
    """WAV's integers -> (samples,) float32, full scale is -1..1, channels averaged."""
    if width == 1:
        samples: np.ndarray = np.frombuffer(content, np.uint8).astype(np.float32) - 128
    else:
        # In the upper bytes of 32 bits, also for 24.
        raw = np.frombuffer(content, np.uint8).reshape(-1, width)
        whole = np.zeros((len(raw), 4), np.uint8)
        whole[:, 4 - width :] = raw
        samples = whole.view("<i4")[:, 0].astype(np.float32) / (1 << (32 - 8 * width))
    return samples.reshape(-1, channels).mean(axis=1) / (1 << (8 * width - 1))


class Resampler:
    """Resamples sound block by block, without clicks between blocks.

    Args:
        rate: of the input, in Hz.
        wanted: of the output, in Hz.
    """

    def __init__(self, rate: int, wanted: int):
        self._stream: Any = None
        if rate != wanted:
            import soxr

            self._stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32")

    def __call__(self, samples: np.ndarray, is_last: bool = False) -> np.ndarray:
        """(samples,) float32 -> (samples,), as far as it is known by now."""
        if self._stream is None:
            return samples
        resampled: np.ndarray = self._stream.resample_chunk(samples, last=is_last)
        return resampled


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    resampler = Resampler(rate, wanted)
    for block in blocks:
        yield resampler(block)
    yield resampler(np.empty(0, np.float32), is_last=True)
