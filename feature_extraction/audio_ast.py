"""Reads sound from anywhere as mono float32 at one sampling rate, without ffmpeg or torchaudio.

    path, bytes, file, address, array      any rate, any number of channels, any sample format
    decoded         (samples, channels)    float32, full scale is -1..1, block by block
    mixed down      (samples,)             mean of the channels
    resampled       (samples,)             at `sampling_rate`, by soxr

libsndfile decodes WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF and more, from 8 to 64 bits. Only what it
cannot read, such as m4a and webm, is piped through the `ffmpeg` program.

`load_audio` returns a sound or a part of it, `stream_audio` yields it in blocks. A small file can
hold days of silence, so `load_audio` has a limit and `stream_audio` uses bounded memory.
`levels_ast.py` defines which sample values are valid.
"""

import errno
import http.client
import io
import logging
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .levels_ast import (
    LOUDEST,
    integer_error,
    integer_warning,
    level_error,
    level_warning,
    warn_once,
)

logger = logging.getLogger(__name__)

_BLOCK_VALUES = 1 << 18  # decoded at a time, over all channels: 1 MB, however long the file
# After a seek, lossy decoders are wrong for up to a few thousand samples: decode and drop those.
_PREROLL = 8192
_RESAMPLING_MARGIN_S = 0.1  # soxr's filter reaches less far
_UNKNOWN_FRAMES = 1 << 62  # a header without a length reads as this or more
_RATES = (1000, 768_000)  # Hz; a header beyond them is damaged
_DOWNLOAD_TIMEOUT_S = 30
_MAX_DOWNLOAD = 1 << 32  # bytes
_MAX_LOADED = 1 << 29  # samples of `load_audio`, 2 GB: 9.3 h at 16 kHz
# Characters in file names that would steer a terminal or cannot be printed: control characters,
# bytes that are not UTF-8, characters that change the direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Signatures of formats that ffmpeg can read and libsndfile cannot: (position, bytes, name).
_FFMPEG_FORMATS = (
    (4, b"ftyp", "MP4/M4A"),
    (0, b"\x1aE\xdf\xa3", "WebM/Matroska"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "Windows Media (WMA)"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"#!AMR", "AMR"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
)


class AudioDecodingError(ValueError):
    """A sound could not be read; the message names the source and says why."""


def load_audio(
    source: Any, sampling_rate: int = 16000, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Read a sound, or a part of it, as a mono waveform at the wanted rate.

    Args:
        source: one of
            a path, or an http(s) address;
            the `bytes` of an audio file, or a binary file object, read from its current position;
            {"bytes": …, "path": …}, an undecoded `datasets` audio column: bytes if there are any;
            {"array": …, "sampling_rate": …} (or "raw", as in pipelines), numpy, list or tensor:
            (samples,), or (channels, samples) as in torch code;
            a torchcodec `AudioDecoder`, which `datasets` decodes to;
            a bare numpy array or tensor, which must be at `sampling_rate` already.
        sampling_rate: wanted, in Hz.
        offset: start of the part, in seconds; files are not decoded before it.
        duration: length of the part, in seconds; default: to the end. Files are not decoded after
            it, and a part that extends past the end is shorter.

    Returns:
        (samples,), float32; full scale is -1..1 for files. Float arrays keep their scale, integer
        arrays are divided by their type's range, and numbers in a list are taken as they are. A
        truncated file, or one whose header promises more than there is, yields what there is and
        logs a warning.

    Raises:
        AudioDecodingError: if there is no such file, if it is not audio, is damaged in the middle,
            holds no samples or NaN or values beyond 2**32, is longer than 2**29 samples (9.3 h at
            16 kHz; read parts, or use `stream_audio`), or if an argument is invalid.
    """
    sampling_rate = _check_rate(sampling_rate, "sampling_rate")
    _check_part(offset, duration)
    first = round(offset * sampling_rate)
    last = None if duration is None else first + max(1, round(duration * sampling_rate))
    array, rate = _as_array(source, sampling_rate)
    if array is not None:
        samples = _resample(array, rate, sampling_rate)
        if first >= len(samples):
            raise AudioDecodingError(
                f"The array is {len(array) / rate:g} s long: nothing at offset {offset:g} s."
            )
        return samples[first:last]

    with _open(source) as (file, name):
        rate = file.samplerate
        # Read a margin on both sides for the resampling filter, and start where the samples of both
        # rates coincide: the part then equals the same stretch of the whole file.
        margin = 0 if rate == sampling_rate else round(_RESAMPLING_MARGIN_S * rate)
        period = rate // math.gcd(rate, sampling_rate)
        start = max(0, first * rate // sampling_rate - margin) // period * period
        stop = None if last is None else math.ceil(last * rate / sampling_rate) + margin
        if offset and first * rate // sampling_rate >= file.frames:
            raise AudioDecodingError(
                f"{name} is {file.frames / rate:g} s long: nothing at offset {offset:g} s."
            )
        blocks = _mono_blocks(file, name, start, stop)
        samples = _joined(blocks, name, rate, max(rate, sampling_rate))
        skipped = start * sampling_rate // rate
        samples = _resample(samples, rate, sampling_rate)
        return samples[first - skipped : None if last is None else last - skipped]


def stream_audio(
    source: Any, sampling_rate: int = 16000, block_length_s: float = 30.0
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a sound of any length block by block, with bounded memory.

    Joined, the blocks equal `load_audio(source, sampling_rate)`: the resampler keeps its state from
    block to block, so there are no clicks and no drift.

    Args:
        source: as in `load_audio`.
        sampling_rate: wanted, in Hz.
        block_length_s: length of the blocks; the last one is shorter.

    Yields:
        start of the block in the whole sound, in samples at `sampling_rate`, and its waveform
        (samples,), float32.

    Raises:
        AudioDecodingError: as in `load_audio`, at the block concerned.
    """
    sampling_rate = _check_rate(sampling_rate, "sampling_rate")
    block = round(block_length_s * sampling_rate)
    if block < 1:
        raise AudioDecodingError(f"block_length_s must be above 0, got {block_length_s}.")
    array, rate = _as_array(source, sampling_rate)
    if array is not None:
        pieces: Iterator[np.ndarray] = iter([_resample(array, rate, sampling_rate)])
        yield from _regroup(pieces, block)
        return
    with _open(source) as (file, name):
        pieces = _mono_blocks(file, name)
        if file.samplerate != sampling_rate:
            pieces = _resample_blocks(pieces, file.samplerate, sampling_rate)
        yield from _regroup(pieces, block)


def audio_duration(source: Any, sampling_rate: int = 16000) -> float | None:
    """Length of a sound in seconds, from its header; nothing is decoded.

    Args:
        source: as in `load_audio`.
        sampling_rate: of a bare array, in Hz.

    Returns:
        None if the header does not say, as with formats that need ffmpeg.

    Raises:
        AudioDecodingError: as in `load_audio`, for problems visible in the header.
    """
    array, rate = _as_array(source, _check_rate(sampling_rate, "sampling_rate"))
    if array is not None:
        return len(array) / rate
    with _open(source) as (file, _):
        return file.frames / file.samplerate if file.frames < _UNKNOWN_FRAMES else None


def _joined(blocks: Iterator[np.ndarray], name: str, rate: int, highest_rate: int) -> np.ndarray:
    """All blocks joined, if they fit the limit at both rates."""
    most = _MAX_LOADED * rate // highest_rate
    kept: list[np.ndarray] = []
    held = 0
    for block in blocks:
        held += len(block)
        if held > most:
            raise AudioDecodingError(
                f"{name} is longer than {most / rate:g} s, the most that load_audio reads at once. "
                "Read a part of it (offset, duration), or read it in blocks (stream_audio)."
            )
        kept.append(block)
    return np.concatenate(kept)


def _check_rate(rate: Any, name: str) -> int:
    try:
        hertz = float(rate)
    except (TypeError, ValueError):
        hertz = math.nan
    if not _RATES[0] <= hertz <= _RATES[1] or hertz != int(hertz):
        raise AudioDecodingError(
            f"{name} must be a whole number of Hz from {_RATES[0]} to {_RATES[1]}, got {rate!r}."
        )
    return int(hertz)


def _check_part(offset: float, duration: float | None) -> None:
    if not 0 <= offset < math.inf:
        raise AudioDecodingError(f"offset must be 0 seconds or more, got {offset}.")
    if duration is not None and not 0 < duration < math.inf:
        raise AudioDecodingError(f"duration must be above 0 seconds, got {duration}.")


def _as_array(source: Any, sampling_rate: int) -> tuple[np.ndarray | None, int]:
    """An already decoded sound as (samples,) with its rate; None for anything else."""
    if isinstance(source, dict) and source.get("bytes") is None:
        samples = source.get("array", source.get("raw"))
        if samples is not None:
            if source.get("sampling_rate") is None:
                raise AudioDecodingError(
                    'A sound given as {"array": …} also needs its "sampling_rate".'
                )
            return _as_mono(samples), _check_rate(source["sampling_rate"], '"sampling_rate"')
    if hasattr(source, "get_all_samples"):
        try:
            decoded = source.get_all_samples()
        except (RuntimeError, ValueError) as error:
            raise AudioDecodingError(f"torchcodec cannot decode this sound: {error}") from error
        return _as_mono(decoded.data), _check_rate(decoded.sample_rate, "torchcodec's sample_rate")
    if hasattr(source, "__array__") and not isinstance(source, (str, bytes)):  # numpy has its own
        return _as_mono(source), sampling_rate
    return None, 0


def _as_mono(samples: Any) -> np.ndarray:
    """Array-like of (samples,) or (channels, samples) -> (samples,) float32."""
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
    try:
        array = np.asarray(samples)
    except ValueError:  # rows of unequal length
        array = np.empty(1, dtype=object)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not array.size:
        raise AudioDecodingError(
            "A sound given as an array must be numbers of shape (samples,) or (channels, samples) "
            f"and not empty; got shape {array.shape} of {array.dtype}."
        )
    if array.dtype.kind in "iu" and hasattr(samples, "dtype"):
        array = _scale_integers(array)
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise AudioDecodingError(
            f"Got an array of shape {array.shape}: channels come first here, (channels, "
            "samples). Transpose it."
        )
    channels = np.atleast_2d(array).T  # (samples, channels)
    warn_once("The array", level_warning(_check_level(channels, "The array")))
    mono = array.mean(axis=0) if array.ndim == 2 else array
    return mono.astype(np.float32, copy=False)


def _scale_integers(array: np.ndarray) -> np.ndarray:
    """PCM of any integer type to -1..1; unsigned types are centred, as in WAV."""
    bits = 8 * array.dtype.itemsize
    if wrong := integer_error(bits):
        raise AudioDecodingError(f"The array {wrong}")
    half = float(1 << (bits - 1))
    scaled = array / half - 1.0 if array.dtype.kind == "u" else array / half
    warn_once("The array", integer_warning(bits, float(np.abs(scaled).max())))
    return scaled


def _check_level(samples: np.ndarray, name: str, start: int = 0) -> float:
    """The largest magnitude in (samples, channels); an error if no sound could have it."""
    peak = float(max(samples.max(), -samples.min()))  # NaN when any is
    if wrong := level_error(peak):
        is_bad = ~(np.abs(samples) <= LOUDEST).all(axis=1)
        raise AudioDecodingError(
            f"{name} {wrong}, the first at sample {start + int(np.argmax(is_bad))}. "
            "Repair it, for example with numpy.nan_to_num."
        )
    return peak


def _printable(name: str) -> str:
    """A file's name, made safe for a message."""

    def escaped(found: re.Match) -> str:
        code = ord(found[0])
        return f"\\u{code:04x}" if 0x2000 < code < 0xD800 else f"\\x{code & 0xFF:02x}"

    return _UNPRINTABLE.sub(escaped, name)


@contextmanager
def _open(source: Any) -> Iterator[tuple[Any, str]]:
    """A sound to be decoded, as an open `soundfile.SoundFile`, and its name."""
    name = ""
    if isinstance(source, dict):
        encoded = source.get("bytes")
        if encoded is None and source.get("path") is None:
            raise AudioDecodingError(
                'A sound given as a dict needs "bytes", "path", or "array" and "sampling_rate"; '
                f"got the keys {sorted(map(str, source))}."
            )
        name = _printable(str(source.get("path") or ""))
        source = source["path"] if encoded is None else encoded
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or f"sound of {len(source)} bytes"
        with _open_file(io.BytesIO(source), name) as file:
            yield file, name
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        name = _printable(source)
        with _download(source, name) as path, _open_path(path, name) as file:
            yield file, name
    elif isinstance(source, (str, os.PathLike)):
        name = _printable(os.fsdecode(source))
        _check_path(source, name)
        with _open_path(source, name) as file:
            yield file, name
    elif hasattr(source, "read"):
        name = _printable(str(getattr(source, "name", "file object")))
        with _open_file(_binary_file(source, name), name) as file:
            yield file, name
    else:
        raise AudioDecodingError(
            "Expected a path, an http(s) address, bytes, a binary file object, an array, or a dict "
            f"with one of these; got {type(source).__name__}."
        )


def _check_path(path: str | os.PathLike, name: str) -> None:
    """Refuse anything but a regular file: opening a pipe would block until someone writes to it."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero in the name
        mode = 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise AudioDecodingError(f"Cannot read {name}: {error.strerror}.") from error
        mode = 0
    if not mode:
        raise AudioDecodingError(f"No such file: '{name[:200]}'" + "…" * (len(name) > 200))
    if stat.S_ISDIR(mode):
        raise AudioDecodingError(f"{name} is a folder; expected an audio file.")
    if not stat.S_ISREG(mode):
        raise AudioDecodingError(
            f"{name} is a pipe, a socket or a device; expected an audio file. To read it to its "
            "end, open it yourself and pass the file object."
        )


def _binary_file(source: Any, name: str) -> Any:
    """The file object itself if libsndfile can seek in it, else its content."""
    try:
        seekable = source.seekable()
        empty = source.read(0) if seekable else source.read()
    except (AttributeError, OSError, ValueError) as error:
        raise AudioDecodingError(f"Cannot read {name}: {error}") from error
    if not isinstance(empty, bytes):
        raise AudioDecodingError(
            f"{name} yields {type(empty).__name__}; expected bytes: open it in mode 'rb'."
        )
    return source if seekable else io.BytesIO(empty)


@contextmanager
def _download(address: str, name: str) -> Iterator[Path]:
    """The sound at an http(s) address as a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "load_audio"})
            with (
                urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_S) as response,
                path.open("wb") as file,
            ):
                while block := response.read(1 << 20):
                    if file.tell() > _MAX_DOWNLOAD:
                        raise ValueError(f"it is larger than {_MAX_DOWNLOAD >> 20} MB")
                    file.write(block)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AudioDecodingError(f"Cannot download {name}: {error}") from error
        yield path


@contextmanager
def _open_path(path: str | os.PathLike, name: str) -> Iterator[Any]:
    try:
        opened = open(path, "rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise AudioDecodingError(f"Cannot read {name}: {error.strerror}.") from error
    with opened, _open_file(opened, name) as file:
        yield file


@contextmanager
def _open_file(file: Any, name: str) -> Iterator[Any]:
    """Open a binary file object with libsndfile, or through ffmpeg if necessary."""
    import soundfile

    reader = _Reader(file)
    begin = reader.begin(name, 16)
    if not begin:
        raise AudioDecodingError(
            f"{name} is empty: it holds no bytes; expected an audio file. (A file object is read "
            "from its current position: call seek(0) to read it again.)"
        )
    for position, pattern, format_name in _FFMPEG_FORMATS:
        if begin[position:].startswith(pattern):
            with _decode_with_ffmpeg(file, name, format_name) as sound:
                yield sound
            return
    try:
        sound = soundfile.SoundFile(reader)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        reader.check(name)
        raise AudioDecodingError(
            f"Cannot read {name} as audio: {_reason(error)}. Expected WAV, FLAC, Ogg, Opus, MP3, "
            f"AIFF or similar; this begins with {begin[:12]!r}."
        ) from error
    with sound:
        _check_rate(sound.samplerate, f"The sampling rate in the header of {name}")
        yield sound


class _Reader:
    """A binary file for libsndfile, which takes any error for the file's end: the error is kept."""

    def __init__(self, file: Any):
        self._file = file
        self._error: Exception | None = None

    def begin(self, name: str, size: int) -> bytes:
        """The first bytes, without moving the position."""
        try:
            begin = self._file.read(size)
            self._file.seek(-len(begin), os.SEEK_CUR)
        except OSError as error:
            raise AudioDecodingError(f"Cannot read {name}: {error.strerror or error}.") from error
        return begin

    def check(self, name: str) -> None:
        """Raise the error that was kept, if any."""
        if self._error is not None:
            reason = getattr(self._error, "strerror", None) or self._error
            raise AudioDecodingError(f"Cannot read {name}: {reason}.") from self._error

    def read(self, size: int) -> bytes:
        return self._kept(self._file.read, size) or b""

    def seek(self, *where: int) -> int:
        return self._kept(self._file.seek, *where) or 0

    def tell(self) -> int:
        return self._kept(self._file.tell) or 0

    def _kept(self, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        # A file object can raise anything, and libsndfile would swallow it.
        except Exception as error:
            self._error = self._error or error
            return None


class _FfmpegSound:
    """ffmpeg's output as it arrives; takes the place of a `soundfile.SoundFile`."""

    format = "FFMPEG"
    frames = 1 << 62  # unknown until the end
    extra_info = ""
    name = ""

    def __init__(self, process: subprocess.Popen, name: str, messages: Any):
        self._process, self._name, self._messages = process, name, messages
        assert process.stdout is not None
        self._pipe = process.stdout
        # Sun's AU: a header of big-endian numbers, then the samples.
        header = self._pipe.read(24)
        if len(header) < 24:
            raise AudioDecodingError(f"ffmpeg cannot decode {name}: {self._reason()}")
        _, begin, _, _, self.samplerate, self.channels = struct.unpack(">6I", header)
        self._pipe.read(begin - 24)

    def seek(self, frames: int) -> None:
        """Seek forward only, by decoding."""
        while frames > 0 and len(block := self.read(min(frames, _BLOCK_VALUES))):
            frames -= len(block)

    def read(self, frames: int, *_: Any, **__: Any) -> np.ndarray:
        """Up to `frames` samples, (samples, channels), float32; fewer at the end only."""
        content = self._pipe.read(frames * self.channels * 4)
        if len(content) < frames * self.channels * 4 and self._process.wait():
            raise OSError(self._reason())
        whole = len(content) // (4 * self.channels) * self.channels
        samples = np.frombuffer(content, ">f4", whole).astype(np.float32)
        return samples.reshape(-1, self.channels)

    def _reason(self) -> str:
        self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return _printable(lines[-1]) if lines else "it gave no reason"


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the file name in front."""
    return str(getattr(error, "error_string", error)).removesuffix(".")


@contextmanager
def _decode_with_ffmpeg(file: Any, name: str, format_name: str) -> Iterator[_FfmpegSound]:
    """Decode what libsndfile cannot read, through a pipe: decoded sound never touches a disk."""
    if shutil.which("ffmpeg") is None:
        raise AudioDecodingError(
            f"{name} is {format_name}, which libsndfile cannot read. Install the ffmpeg program "
            "(apt install ffmpeg, brew install ffmpeg, winget install ffmpeg) or convert the file "
            "to WAV or FLAC."
        )
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as messages:
        # A copy, alone in its folder: ffmpeg must seek, which a pipe does not allow.
        encoded = Path(folder) / "encoded"
        try:
            with encoded.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        except OSError as error:
            raise AudioDecodingError(f"Cannot read {name}: {error.strerror or error}.") from error
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-protocol_whitelist", "file"]
        command += ["-i", f"file:{encoded}", "-vn", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
        ) as process:
            try:
                sound = _FfmpegSound(process, f"{name} ({format_name})", messages)
                _check_rate(sound.samplerate, f"The sampling rate in the header of {name}")
                yield sound
            finally:
                process.kill()  # else it would continue to the end of the file


def _mono_blocks(
    file: Any, name: str, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Samples `start` to `stop` of an open file, in blocks (samples,) of bounded size."""
    import soundfile

    length = max(1, _BLOCK_VALUES // file.channels)
    position = max(0, start - _PREROLL)
    wanted = math.inf if stop is None else stop
    yielded = has_warned = False
    try:
        if position:
            file.seek(position)
        while position < wanted:
            block = file.read(int(min(length, wanted - position)), "float32", always_2d=True)
            _check_reading(file, name)
            if not len(block):
                break
            position += len(block)
            block = block[max(0, start - position + len(block)) :]
            if len(block):
                peak = _check_level(block, name, position - len(block))
                if not has_warned and (warning := level_warning(peak)):
                    has_warned = True
                    logger.warning("%s %s", name, warning)
                yielded = True
                # The mean of one channel is that channel, only slower.
                yield block.mean(axis=1) if file.channels > 1 else block[:, 0]
    except (soundfile.SoundFileError, OSError) as error:
        _check_reading(file, name)
        raise AudioDecodingError(
            f"{name} is damaged after {position / file.samplerate:g} s: {_reason(error)}."
        ) from error
    if not yielded and position > 0:
        raise AudioDecodingError(
            f"{name} is {position / file.samplerate:g} s long: nothing at offset "
            f"{start / file.samplerate:g} s."
        )
    if not yielded:
        raise AudioDecodingError(f"{name} holds no samples.")
    if position < wanted:
        _check_end(file, name, position)


def _check_reading(file: Any, name: str) -> None:
    """Raise what libsndfile never noticed, if anything."""
    if isinstance(file.name, _Reader):
        file.name.check(name)


def _check_end(file: Any, name: str, samples: int) -> None:
    """Warn if the file ended before its header says, or if reading ended before the file."""
    if file.format == "MP3":
        # libsndfile guesses the length of an MP3 without a header and stops there.
        read = file.name.tell()
        size = file.name.seek(0, os.SEEK_END)
        if size - read > 0.05 * size + 8192:
            raise AudioDecodingError(
                f"Reading {name} stopped after {samples / file.samplerate:g} s, at "
                f"{read / size:.0%} of its bytes: it is damaged, or an MP3 of variable bit rate "
                "that does not state its length. Convert it: ffmpeg -i sound.mp3 sound.flac"
            )
    promised = file.frames
    # libsndfile corrects `frames` of a truncated WAV, AIFF or AU file and only says so in its log.
    # A size of 2^32 - 1 means unknown length, as written by programs that stream.
    sizes = re.search(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info)
    if sizes and int(sizes[1]) > int(sizes[2]) > 0 and int(sizes[1]) < 0xFFFFFF00:
        promised = samples * int(sizes[1]) // int(sizes[2])
    if 1.01 * samples < promised < 1 << 62:
        logger.warning(
            "%s is truncated: its header promises %.2f s, it holds %.2f s.",
            name,
            promised / file.samplerate,
            samples / file.samplerate,
        )


def _resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """`librosa.resample(…, res_type="soxr_hq")`, bit for bit, by what that calls.

    Importing librosa's resampling compiles functions for seconds, in each decoding process anew.
    """
    if rate == wanted:
        return samples
    import soxr

    resampled = soxr.resample(samples, rate, wanted, quality="HQ")
    # librosa's length; soxr's own is up to one sample less.
    length = math.ceil(len(samples) * (wanted / rate))
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length]


def _resample_blocks(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """The result of `_resample` for all blocks joined, block by block."""
    import soxr

    resampler = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    read = given = 0
    for block in blocks:
        read += len(block)
        resampled = resampler.resample_chunk(block)
        given += len(resampled)
        yield resampled
    rest = resampler.resample_chunk(np.empty(0, np.float32), last=True)
    # librosa's length; soxr's own is up to one sample less.
    missing = math.ceil(read * (wanted / rate)) - given
    yield np.pad(rest, (0, max(0, missing - len(rest))))[:missing]


def _regroup(pieces: Iterator[np.ndarray], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of any length -> blocks of `length`, the last one shorter, each with its start."""
    start = held = 0
    kept: list[np.ndarray] = []
    for piece in pieces:
        kept.append(piece)
        held += len(piece)
        if held >= length:
            joined = np.concatenate(kept)
            whole = held // length * length
            for begin in range(0, whole, length):
                yield start + begin, joined[begin : begin + length].copy()
            start += whole
            held -= whole
            kept = [joined[whole:]]
    if held:
        yield start, np.concatenate(kept)
