"""Sounds from anywhere to mono float32 at one sampling rate, without ffmpeg or torchaudio.

    path, bytes, file, address, array      any rate, any number of channels, any sample format
    decoded         (samples, channels)    float32, full scale is -1..1, block by block
    mixed down      (samples,)             mean of the channels
    resampled       (samples,)             at `sampling_rate`, by soxr

libsndfile decodes WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF and more, from 8 to 64 bits. Only what it
cannot read, such as m4a and webm, goes through the `ffmpeg` program where there is one.
`load_audio` returns a sound or a part of it, `stream_audio` yields it in blocks.
"""

import http.client
import io
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_BLOCK_VALUES = 1 << 18  # decoded at a time, over all channels: 1 MB, whatever the file's length
# After a seek, lossy decoders are wrong for up to a few thousand samples: decode and drop these.
_PREROLL = 8192
_RESAMPLING_MARGIN_S = 0.1  # soxr's filter reaches less far
_UNKNOWN_FRAMES = 1 << 62  # what a header of no length reads as, or more
_RATES = (1000, 768_000)  # Hz; a header beyond them is damaged
_DOWNLOAD_TIMEOUT_S = 30

# How the formats begin that libsndfile cannot read and ffmpeg can: (position, bytes, name).
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
            the `bytes` of an audio file, or a binary file object, read from where it stands;
            {"bytes": …, "path": …}, an undecoded `datasets` audio column: bytes if there are any;
            {"array": …, "sampling_rate": …} (or "raw", as pipelines have it), numpy, list or
            tensor: (samples,), or (channels, samples) as torch code has it;
            a torchcodec `AudioDecoder`, what `datasets` decodes to;
            a bare numpy array or tensor, which must be at `sampling_rate` already.
        sampling_rate: wanted, in Hz.
        offset: start of the part, in seconds; files are not decoded before it.
        duration: length of the part, in seconds, or to the end; files are not decoded after it,
            and a part that reaches beyond the end is shorter.

    Returns:
        (samples,), float32; full scale is -1..1 for files, arrays keep their scale (those of an
        integer type are divided by its range; whole numbers in a list are values as they are).
        A file that is cut off, or whose header promises more than there is, gives what there is,
        and a warning is logged.

    Raises:
        AudioDecodingError: when there is no such file, it is no audio, damaged in the middle, holds
            no samples or NaN, or when the arguments are not as above.
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
        # Read more on both sides for the resampling filter, and start where the samples of both
        # rates coincide: then the part is what the whole file has at this place.
        margin = 0 if rate == sampling_rate else round(_RESAMPLING_MARGIN_S * rate)
        period = rate // math.gcd(rate, sampling_rate)
        start = max(0, first * rate // sampling_rate - margin) // period * period
        stop = None if last is None else math.ceil(last * rate / sampling_rate) + margin
        if offset and first * rate // sampling_rate >= file.frames:
            raise AudioDecodingError(
                f"{name} is {file.frames / rate:g} s long: nothing at offset {offset:g} s."
            )
        samples = np.concatenate([*_mono_blocks(file, name, start, stop)])
        skipped = start * sampling_rate // rate
        samples = _resample(samples, rate, sampling_rate)
        return samples[first - skipped : None if last is None else last - skipped]


def stream_audio(
    source: Any, sampling_rate: int = 16000, block_length_s: float = 30.0
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a sound of any length block by block, with bounded memory.

    The blocks put together are `load_audio(source, sampling_rate)`: the resampler keeps its state
    from block to block, so nothing clicks at their borders and nothing drifts.

    Args:
        source: as in `load_audio`.
        sampling_rate: wanted, in Hz.
        block_length_s: length of the blocks; the last one is shorter.

    Yields:
        start of the block in the whole sound, in samples at `sampling_rate`, and its waveform
        (samples,), float32.

    Raises:
        AudioDecodingError: as in `load_audio`, at the block where it shows.
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
    """Length of a sound in seconds, as its header says; nothing is decoded.

    Args:
        source: as in `load_audio`.
        sampling_rate: of a bare array, in Hz.

    Returns:
        None when the header does not say, as for what ffmpeg must decode.

    Raises:
        AudioDecodingError: as in `load_audio`, as far as it shows in the header.
    """
    array, rate = _as_array(source, _check_rate(sampling_rate, "sampling_rate"))
    if array is not None:
        return len(array) / rate
    with _open(source) as (file, _):
        return file.frames / file.samplerate if file.frames < _UNKNOWN_FRAMES else None


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
    """A sound that is decoded already, as (samples,) with its rate; None for all others."""
    if isinstance(source, dict) and source.get("bytes") is None:
        samples = source.get("array", source.get("raw"))
        if samples is not None:
            if source.get("sampling_rate") is None:
                raise AudioDecodingError(
                    'A sound given as {"array": …} needs its "sampling_rate" too.'
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
            "A sound given as an array must be (samples,) or (channels, samples) numbers, not "
            f"empty; got shape {array.shape} of {array.dtype}."
        )
    if array.dtype.kind in "iu" and hasattr(samples, "dtype"):
        array = _scale_integers(array)
    if array.ndim == 2:
        if array.shape[0] > array.shape[1]:
            raise AudioDecodingError(
                f"Got an array of shape {array.shape}: channels come first here, (channels, "
                "samples). Transpose it."
            )
        array = array.mean(axis=0)
    array = array.astype(np.float32, copy=False)
    _check_finite(array, "The array")
    return array


def _scale_integers(array: np.ndarray) -> np.ndarray:
    """PCM of any integer type to -1..1; unsigned types have their zero in the middle, as in WAV."""
    half = float(1 << (8 * array.dtype.itemsize - 1))
    return array / half - 1.0 if array.dtype.kind == "u" else array / half


def _check_finite(samples: np.ndarray, name: str, start: int = 0) -> None:
    if not np.isfinite(samples).all():
        index = start + int(np.flatnonzero(~np.isfinite(samples))[0])
        raise AudioDecodingError(
            f"{name} holds NaN or infinite values, the first at sample {index}. "
            "Repair it, for example with numpy.nan_to_num."
        )


@contextmanager
def _open(source: Any) -> Iterator[tuple[Any, str]]:
    """A sound that is to be decoded, as an open `soundfile.SoundFile`, and its name."""
    name = ""
    if isinstance(source, dict):
        encoded = source.get("bytes")
        if encoded is None and source.get("path") is None:
            raise AudioDecodingError(
                'A sound given as a dict needs "bytes", "path", or "array" and "sampling_rate"; '
                f"got the keys {sorted(map(str, source))}."
            )
        name = str(source.get("path") or "")
        source = source["path"] if encoded is None else encoded
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or f"sound of {len(source)} bytes"
        with _open_file(io.BytesIO(source), name) as file:
            yield file, name
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        with _download(source) as path, _open_path(path, source) as file:
            yield file, source
    elif isinstance(source, (str, os.PathLike)):
        if not os.path.exists(source):
            name = os.fspath(source)
            raise AudioDecodingError(
                f"No such file: {name[:200]!r}" + ("…" if len(name) > 200 else "")
            )
        if os.path.isdir(source):
            raise AudioDecodingError(f"{source} is a folder, expected an audio file.")
        if not os.path.isfile(source):  # it would wait for somebody to write, or never end
            raise AudioDecodingError(
                f"{source} is a pipe or a device, expected a file: write the sound to a file first."
            )
        with _open_path(source, str(source)) as file:
            yield file, str(source)
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "file object"))
        with _open_file(_binary_file(source, name), name) as file:
            yield file, name
    else:
        raise AudioDecodingError(
            "Expected a path, an http(s) address, bytes, a binary file object, an array or a dict "
            f"with one of them, got {type(source).__name__}."
        )


def _binary_file(source: Any, name: str) -> Any:
    """The file object itself when libsndfile can seek in it, its content otherwise."""
    try:
        seekable = source.seekable()
        empty = source.read(0) if seekable else source.read()
    except (AttributeError, OSError, ValueError) as error:
        raise AudioDecodingError(f"Cannot read {name}: {error}") from error
    if not isinstance(empty, bytes):
        raise AudioDecodingError(
            f"{name} gives {type(empty).__name__}, expected bytes: open it in mode 'rb'."
        )
    return source if seekable else io.BytesIO(empty)


@contextmanager
def _download(address: str) -> Iterator[Path]:
    """The sound at an http(s) address as a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "load_audio"})
            with (
                urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_S) as response,
                path.open("wb") as file,
            ):
                shutil.copyfileobj(response, file)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AudioDecodingError(f"Cannot download {address}: {error}") from error
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
    """Open a binary file object with libsndfile, through ffmpeg where that must be."""
    import soundfile

    try:
        begin = file.read(16)
        file.seek(-len(begin), os.SEEK_CUR)
    except OSError as error:
        raise AudioDecodingError(f"Cannot read {name}: {error.strerror or error}.") from error
    if not begin:
        raise AudioDecodingError(
            f"{name} is empty: it holds no bytes, expected an audio file. (A file object is read "
            "from where it stands: seek(0) to read it again.)"
        )
    with ExitStack() as stack:
        for position, pattern, format_name in _FFMPEG_FORMATS:
            if begin[position:].startswith(pattern):
                # Only here: to make and remove a folder can take longer than to decode a clip.
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                file = _decode_with_ffmpeg(file, name, format_name, Path(folder))
        try:
            sound = soundfile.SoundFile(file)
        except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
            raise AudioDecodingError(
                f"Cannot read {name} as audio: {_reason(error)}. Readable are WAV, FLAC, Ogg, "
                f"Opus, MP3, AIFF and more; this begins with {begin[:12]!r}."
            ) from error
        with sound:
            _check_rate(sound.samplerate, f"The sampling rate in the header of {name}")
            yield sound


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the file's name before them."""
    return str(getattr(error, "error_string", error)).removesuffix(".")


def _decode_with_ffmpeg(file: Any, name: str, format_name: str, folder: Path) -> Path:
    """Decode what libsndfile cannot read into a temporary WAV file."""
    if shutil.which("ffmpeg") is None:
        raise AudioDecodingError(
            f"{name} is {format_name}, which libsndfile cannot read. Install the ffmpeg program "
            "(apt install ffmpeg, brew install ffmpeg, winget install ffmpeg) or convert the file "
            "to WAV or FLAC."
        )
    # A copy: ffmpeg seeks in it, which a pipe would not allow.
    encoded = folder / "encoded"
    with encoded.open("wb") as copy:
        shutil.copyfileobj(file, copy)
    decoded = folder / "decoded.wav"
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-protocol_whitelist", "file"]
    command += ["-i", f"file:{encoded}", "-vn", "-c:a", "pcm_f32le", "-rf64", "auto", str(decoded)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode or not decoded.exists():
        reason = result.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise AudioDecodingError(f"ffmpeg cannot decode {name} ({format_name}): {reason[0]}")
    return decoded


def _mono_blocks(
    file: Any, name: str, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Samples `start` up to `stop` of an open file, in blocks (samples,) of bounded size."""
    import soundfile

    length = max(1, _BLOCK_VALUES // file.channels)
    position = max(0, start - _PREROLL)
    wanted = math.inf if stop is None else stop
    yielded = False
    try:
        if position:
            file.seek(position)
        while position < wanted:
            block = file.read(int(min(length, wanted - position)), "float32", always_2d=True)
            if not len(block):
                break
            mono = block.mean(axis=1)[max(0, start - position) :]
            position += len(block)
            if len(mono):
                _check_finite(mono, name, position - len(mono))
                yielded = True
                yield mono
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioDecodingError(
            f"{name} is damaged after {position / file.samplerate:g} s: {_reason(error)}."
        ) from error
    if not yielded:
        raise AudioDecodingError(f"{name} holds no samples.")
    if position < wanted:
        _check_end(file, name, position)


def _check_end(file: Any, name: str, samples: int) -> None:
    """Say so when a file ended before its header says, or reading ended before the file."""
    if file.format == "MP3":
        # libsndfile guesses the length of an MP3 without a header and stops there.
        read = file.name.tell()
        size = file.name.seek(0, os.SEEK_END)
        if size - read > 0.05 * size + 8192:
            raise AudioDecodingError(
                f"Reading {name} stopped after {samples / file.samplerate:g} s, at "
                f"{read / size:.0%} of its bytes: it is damaged, or an MP3 of variable bit rate "
                "that does not say how long it is. Convert it: ffmpeg -i sound.mp3 sound.flac"
            )
    promised = file.frames
    # libsndfile corrects `frames` of a cut WAV, AIFF or AU file and says so in its log only. A size
    # of 2^32 - 1 stands for an unknown length, as programs write that stream.
    sizes = re.search(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info)
    if sizes and int(sizes[1]) > int(sizes[2]) > 0 and int(sizes[1]) < 0xFFFFFF00:
        promised = samples * int(sizes[1]) // int(sizes[2])
    if 1.01 * samples < promised < 1 << 62:
        logger.warning(
            "%s is cut off: its header promises %.2f s, it holds %.2f s.",
            name,
            promised / file.samplerate,
            samples / file.samplerate,
        )


def _resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return samples
    import librosa

    return librosa.resample(samples, orig_sr=rate, target_sr=wanted, res_type="soxr_hq")


def _resample_blocks(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """What `_resample` gives for all the blocks together, block by block."""
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
    """Pieces of any length to blocks of `length`, the last one shorter, each with its start."""
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
