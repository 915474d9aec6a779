"""load_audio and stream_audio: every source and format, parts, blocks, and bad input."""

import errno
import functools
import http.server
import io
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_extraction import AudioDecodingError, audio_ast, levels_ast, load_audio, stream_audio
from feature_extraction.audio_ast import _PREROLL


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(samples, channels), float32, as soundfile takes it."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)


def tone(samples: int, rate: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


def encode(samples, rate=16000, format="WAV", subtype=None, **options) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype, **options)
    return buffer.getvalue()


# Formats

FORMATS = [
    ("WAV", "PCM_U8", 2**-7),
    ("WAV", "PCM_16", 2**-15),
    ("WAV", "PCM_24", 2**-23),
    ("WAV", "PCM_32", 1e-7),
    ("WAV", "FLOAT", 0),
    ("WAV", "DOUBLE", 0),
    ("AIFF", "PCM_S8", 2**-7),
    ("AIFF", "PCM_24", 2**-23),
    ("FLAC", "PCM_S8", 2**-7),
    ("FLAC", "PCM_24", 2**-23),
    ("CAF", "PCM_16", 2**-15),
    ("RF64", "PCM_16", 2**-15),
    ("OGG", "VORBIS", 0.05),
    ("OGG", "OPUS", 0.05),
    ("MP3", "MPEG_LAYER_III", 0.05),
]


@pytest.mark.parametrize(("container", "subtype", "tolerance"), FORMATS)
def test_formats(container, subtype, tolerance):
    waveform = tone(16000, 16000)
    loaded = load_audio(encode(waveform, 16000, container, subtype))
    assert loaded.dtype == np.float32
    assert loaded.ndim == 1
    assert len(loaded) >= len(waveform)
    assert np.abs(loaded[2000:14000] - waveform[2000:14000]).max() <= tolerance * 1.001


# Sources


@pytest.fixture
def wav_file(tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, noise(8000, 2), 16000, subtype="FLOAT")
    return path


def test_sources_agree(wav_file):
    stereo = noise(8000, 2)
    expected = stereo.mean(axis=1)
    encoded = wav_file.read_bytes()

    class NotSeekable(io.RawIOBase):
        def __init__(self):
            self.buffer = io.BytesIO(encoded)

        def readable(self):
            return True

        def read(self, size=-1):
            return self.buffer.read(size)

    skipped = io.BytesIO(b"before" + encoded)
    skipped.seek(6)
    torchcodec_decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(stereo.T), sample_rate=16000)
    )
    with wav_file.open("rb") as opened:
        sources = [
            wav_file,
            str(wav_file),
            np.str_(wav_file),
            encoded,
            bytearray(encoded),
            memoryview(encoded),
            opened,
            io.BytesIO(encoded),
            skipped,
            NotSeekable(),
            {"bytes": encoded, "path": "elsewhere.wav"},
            {"bytes": None, "path": str(wav_file)},
            {"array": stereo.T, "sampling_rate": 16000},
            {"array": stereo.T.tolist(), "sampling_rate": 16000.0},
            {"array": torch.from_numpy(expected), "sampling_rate": 16000, "path": None},
            {"raw": expected.astype(np.float64), "sampling_rate": 16000},
            torchcodec_decoder,
            expected,
            torch.from_numpy(expected).requires_grad_(),
        ]
        for source in sources:
            loaded = load_audio(source)
            assert loaded.dtype == np.float32
            np.testing.assert_allclose(loaded, expected, atol=1e-7)


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_address(server, wav_file):
    np.testing.assert_array_equal(load_audio(f"{server}/noise.wav"), load_audio(wav_file))
    with pytest.raises(AudioDecodingError, match=r"Cannot download http.*missing\.wav.*404"):
        load_audio(f"{server}/missing.wav")
    for address in (f"{server}/with space.wav", "http://[nowhere", "http://127.0.0.1:1/a.wav"):
        with pytest.raises(AudioDecodingError, match="Cannot download http"):
            load_audio(address)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.int8, [-128, 0, 64]),
        (np.int16, [-32768, 0, 16384]),
        (np.int32, [-(2**31), 0, 2**30]),
        (np.uint8, [0, 128, 192]),
        (np.uint16, [0, 2**15, 3 * 2**14]),
    ],
)
def test_integer_arrays_are_pcm(dtype, values):
    np.testing.assert_array_equal(load_audio(np.array(values, dtype)), [-1.0, 0.0, 0.5])


def test_whole_numbers_in_a_list_are_values():
    np.testing.assert_array_equal(
        load_audio({"array": [0, 1, -1], "sampling_rate": 16000}), [0.0, 1.0, -1.0]
    )


def test_half_precision_tensors():
    assert load_audio(torch.ones(10, dtype=torch.bfloat16)).dtype == np.float32


# Rates, parts and blocks


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([8000, 11025, 22050, 44100, 48000, 96000]), st.integers(500, 60000))
def test_resampling_keeps_length_and_tone(rate, samples):
    loaded = load_audio({"array": tone(samples, rate), "sampling_rate": rate})
    assert len(loaded) == int(np.ceil(samples * 16000 / rate))
    middle = slice(len(loaded) // 4, 3 * len(loaded) // 4)
    np.testing.assert_allclose(loaded[middle], tone(len(loaded), 16000)[middle], atol=2e-2)


LONG_FILES = [
    ("WAV", "PCM_16", 16000),
    ("WAV", "FLOAT", 44100),
    ("FLAC", "PCM_16", 22050),
    ("OGG", "VORBIS", 44100),
    ("OGG", "VORBIS", 16000),
    ("OGG", "OPUS", 48000),
    ("MP3", "MPEG_LAYER_III", 16000),
    ("MP3", "MPEG_LAYER_III", 44100),
]


@pytest.fixture(scope="module", params=LONG_FILES, ids=lambda file: "-".join(map(str, file)))
def long_file(request):
    container, subtype, rate = request.param
    encoded = encode(noise(rate * 8 + 123, 2), rate, container, subtype)
    return encoded, load_audio(encoded)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_is_librosas(rate):
    import librosa

    for samples in (1, 7, rate // 3 + 1):
        clip = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
        expected = librosa.resample(clip, orig_sr=rate, target_sr=16000, res_type="soxr_hq")
        heard = load_audio({"array": clip, "sampling_rate": rate})
        assert heard.dtype == np.float32
        assert np.array_equal(heard, expected)


def test_blocks_equal_the_whole(long_file, monkeypatch):
    encoded, whole = long_file
    monkeypatch.setattr("feature_extraction.audio_ast._BLOCK_VALUES", 10_007)
    for block_length_s in (0.05, 1.0, 2.7182, 100.0):
        blocks = list(stream_audio(encoded, block_length_s=block_length_s))
        size = round(block_length_s * 16000)
        assert [start for start, _ in blocks] == list(range(0, len(whole), size))
        assert all(len(block) == size for _, block in blocks[:-1])
        joined = np.concatenate([block for _, block in blocks])
        assert joined.shape == whole.shape
        assert np.abs(joined - whole).max() <= 1e-4


def test_parts_equal_the_whole(long_file):
    encoded, whole = long_file
    generator = np.random.default_rng(3)
    offsets = [0, 0.0131, 0.05, 0.2, 0.5, 7.9, *generator.uniform(0, 7.5, 20)]
    for offset in offsets:
        for duration in (0.3, None) if offset > 7 else (0.3,):
            part = load_audio(encoded, offset=offset, duration=duration)
            start = round(offset * 16000)
            stop = None if duration is None else start + round(duration * 16000)
            assert part.shape == whole[start:stop].shape
            assert np.abs(part - whole[start:stop]).max() <= 1e-4, offset


def test_a_part_does_not_decode_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(16000 * 600, np.int16), 44100)
    frames_read = []
    read = soundfile.SoundFile.read

    def counting_read(self, frames, *arguments, **options):
        frames_read.append(frames)
        return read(self, frames, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    assert len(load_audio(path, offset=100, duration=1)) == 16000
    assert sum(frames_read) < 44100 * 1.3 + _PREROLL


def test_parts_and_blocks_of_arrays():
    waveform = noise(16000)[:, 0]
    np.testing.assert_array_equal(
        load_audio(waveform, offset=0.25, duration=0.5), waveform[4000:12000]
    )
    blocks = dict(stream_audio(waveform, block_length_s=0.4))
    assert list(blocks) == [0, 6400, 12800]
    np.testing.assert_array_equal(np.concatenate(list(blocks.values())), waveform)


STREAM_A_FILE = """
import re, sys
from feature_extraction import stream_audio
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
before = peak()
print(sum(len(block) for _, block in stream_audio(sys.argv[1])), peak() - before)
"""


def sparse_wav(path, rate: int, seconds: int):
    """A sparse file of silence: a header and a hole."""
    size = rate * seconds * 2
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2, 2, 16)
    path.write_bytes(header + b"data" + struct.pack("<I", size))
    os.truncate(path, 44 + size)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "seconds", [600, pytest.param(36000, marks=pytest.mark.slow, id="ten hours")]
)
def test_streaming_memory(tmp_path, seconds):
    """Under 300 MB in all where the imports take 240, most of it pages of torch's libraries.

    How many of those are resident depends on the machine, so what reading adds is looked at.
    """
    sparse_wav(tmp_path / "long.wav", 44100, seconds)
    result = subprocess.run(
        [sys.executable, "-c", STREAM_A_FILE, str(tmp_path / "long.wav")],
        capture_output=True,
        text=True,
        check=True,
    )
    samples, megabytes = map(int, result.stdout.split())
    assert samples == seconds * 16000
    assert megabytes < 50


# ffmpeg, for what libsndfile cannot read

M4A = b"\0\0\0\x20ftypM4A " + bytes(40)


def test_without_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for encoded, name in ((M4A, "MP4/M4A"), (b"\x1aE\xdf\xa3" + bytes(40), "WebM/Matroska")):
        with pytest.raises(
            AudioDecodingError, match=rf"is {name}, which libsndfile cannot read\. Install the ffm"
        ):
            load_audio(encoded)


STAND_IN = pytest.mark.skipif(os.name == "nt", reason="the stand-in for ffmpeg is a shell script")


def stand_in_for_ffmpeg(folder, monkeypatch, script: str) -> None:
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(folder))


@STAND_IN
def test_through_a_stand_in_for_ffmpeg(monkeypatch, tmp_path):
    """The stand-in shows that the program is called, with which arguments, and its output read."""
    sound = noise(4800, 2)
    soundfile.write(tmp_path / "answer.au", sound, 48000, subtype="FLOAT")
    stand_in_for_ffmpeg(
        tmp_path, monkeypatch, f'echo "$@" >{tmp_path}/arguments; /bin/cat {tmp_path}/answer.au'
    )
    (tmp_path / "sound.m4a").write_bytes(M4A)
    expected = load_audio({"array": sound.T, "sampling_rate": 48000})
    np.testing.assert_allclose(load_audio(io.BytesIO(M4A)), expected, atol=1e-6)
    for source in (M4A, tmp_path / "sound.m4a"):
        np.testing.assert_allclose(load_audio(source), expected, atol=1e-6)
        np.testing.assert_allclose(load_audio(source, offset=0.05), expected[800:], atol=1e-6)
        part = load_audio(source, offset=0.02, duration=0.03)
        np.testing.assert_allclose(part, expected[320:800], atol=1e-3)
    with pytest.raises(AudioDecodingError, match=r"is 0\.1 s long: nothing at offset 0\.[23]"):
        load_audio(M4A, offset=0.3)
    arguments = (tmp_path / "arguments").read_text()
    assert "-protocol_whitelist file -i file:" in arguments
    assert arguments.endswith("-f au pipe:1\n")

    stand_in_for_ffmpeg(tmp_path, monkeypatch, "echo moov atom not found >&2; exit 1")
    with pytest.raises(AudioDecodingError, match=r"ffmpeg cannot decode .*MP4/M4A.*moov atom not"):
        load_audio(M4A)
    stand_in_for_ffmpeg(
        tmp_path, monkeypatch, f"/bin/cat {tmp_path}/answer.au; echo broken >&2; exit 1"
    )
    with pytest.raises(AudioDecodingError, match=r"is damaged after .* s: broken"):
        load_audio(M4A)


@STAND_IN
def test_what_ffmpeg_decodes_is_bounded(monkeypatch, tmp_path):
    """A stand-in that never ends, like a small file with days of silence."""
    soundfile.write(tmp_path / "answer.au", noise(16000), 16000, subtype="FLOAT")
    script = f"/bin/cat {tmp_path}/answer.au; exec /bin/cat /dev/zero"
    stand_in_for_ffmpeg(tmp_path, monkeypatch, script)
    assert len(load_audio(M4A, duration=2)) == 32000
    blocks = stream_audio(M4A, block_length_s=1)
    assert [next(blocks)[0] for _ in range(5)] == [0, 16000, 32000, 48000, 64000]
    blocks.close()
    monkeypatch.setattr(audio_ast, "_MAX_LOADED", 1 << 20)
    with pytest.raises(
        AudioDecodingError,
        match=r"longer than 65\.536 s, the most that load_audio reads.*\(stream_audio\)",
    ):
        load_audio(M4A)


def test_the_limit_is_for_any_format_and_both_rates(monkeypatch):
    monkeypatch.setattr(audio_ast, "_MAX_LOADED", 4000)
    sound = encode(noise(3000), 8000)
    assert len(load_audio(sound, 8000)) == 3000
    for source, rate in ((sound, 16000), (encode(noise(5000), format="FLAC"), 8000)):
        with pytest.raises(AudioDecodingError, match="the most that load_audio reads at once"):
            load_audio(source, rate)
        assert load_audio(source, rate, duration=0.1).shape == (0.1 * rate,)
        assert sum(len(block) for _, block in stream_audio(source, rate)) > 4000 / 2


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg program is not installed")
@pytest.mark.parametrize(("name", "codec"), [("sound.m4a", "aac"), ("sound.webm", "libopus")])
def test_through_ffmpeg(tmp_path, name, codec):
    soundfile.write(tmp_path / "tone.wav", tone(96000, 48000), 48000)
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-i", "tone.wav", "-c:a", codec, name],
        cwd=tmp_path,
        check=True,
    )
    loaded = load_audio((tmp_path / name).read_bytes())
    assert abs(len(loaded) - 32000) < 2500  # encoders add their delay
    spectrum = np.abs(np.fft.rfft(loaded[8000:24000]))
    assert spectrum.argmax() == 440


# Bad input


def test_no_such_file(tmp_path):
    with pytest.raises(AudioDecodingError, match=r"No such file: .*nothing\.wav"):
        load_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioDecodingError, match="No such file"):
        load_audio("a" * 10_000)
    with pytest.raises(AudioDecodingError, match="No such file"):
        load_audio("with\0zero.wav")


def test_folder(tmp_path):
    with pytest.raises(AudioDecodingError, match="is a folder; expected an audio file"):
        load_audio(tmp_path)


def test_no_permission(tmp_path):
    path = tmp_path / "locked.wav"
    path.write_bytes(encode(noise(100)))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(AudioDecodingError, match=r"Cannot read .*Permission denied"):
        load_audio(path)


def test_zero_bytes(tmp_path):
    (tmp_path / "empty.wav").touch()
    for source in (tmp_path / "empty.wav", b"", io.BytesIO()):
        with pytest.raises(AudioDecodingError, match="is empty: it holds no bytes; expected an"):
            load_audio(source)


def test_no_samples():
    with pytest.raises(AudioDecodingError, match="holds no samples"):
        load_audio(encode(np.zeros((0, 1), np.float32)))


def test_text_named_wav(tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("Dear diary, no sound today.")
    with pytest.raises(
        AudioDecodingError,
        match=r"Cannot read .*notes\.wav as audio: .*begins with b'Dear diary, '",
    ):
        load_audio(path)
    with pytest.raises(AudioDecodingError, match=r"Cannot read row\.wav as audio"):
        load_audio({"bytes": path.read_bytes(), "path": "row.wav"})


def test_headerless_pcm(tmp_path):
    path = tmp_path / "sound.raw"
    path.write_bytes(bytes(1000))
    with pytest.raises(AudioDecodingError, match=r"Cannot read .*sound\.raw as audio"):
        load_audio(path)


def test_cut_wav_gives_what_there_is(caplog):
    waveform = noise(16000)
    cut = encode(waveform, subtype="FLOAT")[: 44 + 40_002]
    with caplog.at_level(logging.WARNING):
        loaded = load_audio(cut)
    np.testing.assert_allclose(loaded, waveform[: len(loaded), 0])
    assert 9_900 <= len(loaded) <= 10_000
    assert "is truncated: its header promises 1.00 s, it holds 0.6" in caplog.text


def test_header_that_promises_more(caplog):
    encoded = encode(noise(16000), subtype="PCM_16")
    promising = encoded[:40] + struct.pack("<I", 640_000) + encoded[44:]
    with caplog.at_level(logging.WARNING):
        assert len(load_audio(promising)) == 16000
    assert "its header promises 20.00 s, it holds 1.00 s" in caplog.text

    caplog.clear()
    unknown_length = encoded[:40] + b"\xff\xff\xff\xff" + encoded[44:]
    assert len(load_audio(unknown_length)) == 16000
    assert not caplog.text


def test_damage_in_the_middle():
    encoded = encode(noise(64000), format="FLAC")
    with pytest.raises(AudioDecodingError, match=r"is damaged after [\d.]+ s"):
        load_audio(encoded[: len(encoded) // 2])


def test_mp3_that_does_not_say_how_long_it_is():
    """A variable-bit-rate MP3 without its first frame, which has the length."""
    buffer = io.BytesIO()
    sound = np.concatenate([noise(32000), np.zeros((320_000, 1), np.float32)])
    mp3 = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE"}
    soundfile.write(buffer, sound, 16000, compression_level=0.5, **mp3)
    encoded = buffer.getvalue()
    assert len(load_audio(encoded)) == len(sound)
    headless = encoded[encoded.index(b"\xff\xf3", 4) :]
    with pytest.raises(AudioDecodingError, match=r"stopped after .* does not state its length"):
        load_audio(headless)


def test_absurd_rate_in_a_header():
    encoded = encode(noise(1000))
    with pytest.raises(AudioDecodingError, match=r"rate in the header of .* got 3"):
        load_audio(encoded[:24] + struct.pack("<I", 3) + encoded[28:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_file_or_an_array(value):
    waveform = noise(1000)[:, 0]
    waveform[300] = value
    for source in (encode(waveform, subtype="FLOAT"), waveform):
        with pytest.raises(AudioDecodingError, match=r"NaN or infinite.*first at sample 300"):
            load_audio(source)


@pytest.mark.parametrize("value", [1e19, -3e38, 2.0**33])
def test_absurd_values_are_the_file_s_error(value, tmp_path):
    waveform = noise(30_000)[:, 0]
    waveform[[3, 20_000]] = 0, value
    for rate in (16000, 44100):  # also before it is resampled
        path = tmp_path / f"{rate}.wav"
        path.write_bytes(encode(waveform, rate, subtype="FLOAT"))
        message = rf"{rate}\.wav holds values up to .*; full scale is 1, the first at sample 20000"
        with pytest.raises(AudioDecodingError, match=message):
            load_audio(path)
        with pytest.raises(AudioDecodingError, match=message):
            list(stream_audio(path, block_length_s=0.1))
        assert len(load_audio(path, duration=0.1)) == 1600  # what comes before it is sound
    stereo = np.stack([waveform, -waveform])  # whose mean would be none the wiser
    for array in (waveform, waveform.astype(np.float64), stereo, torch.from_numpy(stereo)):
        with pytest.raises(
            AudioDecodingError, match=r"The array holds values up to .* sample 20000"
        ):
            load_audio({"array": array, "sampling_rate": 44100})
    path.write_bytes(encode(stereo.T, subtype="FLOAT"))
    with pytest.raises(AudioDecodingError, match="the first at sample 20000"):
        load_audio(path)
    path.write_bytes(encode(np.full(100, 1e300), subtype="DOUBLE"))
    with pytest.raises(AudioDecodingError, match="NaN or infinite values, the first at sample 0"):
        load_audio(path)


def test_integers_as_floats_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(levels_ast, "_warned", set())
    loud = noise(1000)[:, 0] * 40_000
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load_audio(encode(loud, subtype="FLOAT")), loud)
    (record,) = caplog.records
    assert "sound of " in record.getMessage()
    assert "look like integers stored as floats: divide them by" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            load_audio(loud)
            load_audio((loud).astype(np.int32))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # each once
    assert "looks like 16-bit sound stored in 32-bit integers, 96 dB too quiet" in said[1]
    caplog.clear()
    monkeypatch.setattr(levels_ast, "_warned", set())
    for quiet in (noise(1000)[:, 0] * 30, np.zeros(9, np.int32), np.full(9, 256, np.int32)):
        load_audio(quiet)
    load_audio((noise(1000)[:, 0] * 2**31).astype(np.int32))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_of_64_bits_are_no_sound(dtype):
    with pytest.raises(AudioDecodingError, match=r"integers of 64 bits.*astype\(numpy\.int16\)"):
        load_audio(np.arange(900, dtype=dtype))


class BadDisk(io.BytesIO):
    """Reads up to a position, then fails like a broken disk."""

    def __init__(self, content: bytes, good: int):
        super().__init__(content)
        self.good = good

    def read(self, size=-1):
        if self.tell() + max(size, 0) > self.good:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)

    def readinto(self, buffer):
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@pytest.mark.parametrize("good", [0, 20, 60_000])
@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_read_error_names_the_file(monkeypatch, tmp_path, capfd, container, good):
    path = tmp_path / "sound"
    path.write_bytes(encode(noise(64_000), format=container) + bytes(60_000))
    original = open

    def opens(file, *arguments, **options):
        content = original(file, *arguments, **options)
        return BadDisk(content.read(), good) if file == path else content

    monkeypatch.setattr("builtins.open", opens)
    for read in (load_audio, lambda path: list(stream_audio(path, block_length_s=1))):
        with pytest.raises(AudioDecodingError, match=r"Cannot read .*sound: Input/output error\."):
            read(path)
    assert "Traceback" not in capfd.readouterr().err  # of a callback, as cffi prints it


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(
            AudioDecodingError, match="is a pipe, a socket or a device; expected an"
        ):
            load_audio(path)
    # Who opens it knows what it is.
    sound = encode(noise(2000))
    read_end, write_end = os.pipe()
    os.write(write_end, sound)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert len(load_audio(pipe)) == 2000


@pytest.mark.skipif(sys.platform != "linux", reason="names here are Unicode")
def test_a_name_that_is_no_utf_8(tmp_path, caplog):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J.wav")
    sound = encode(noise(16000), subtype="FLOAT")
    with open(name, "wb") as file:
        file.write(sound)
    assert len(load_audio(name)) == 16000
    assert sum(len(block) for _, block in stream_audio(name)) == 16000
    with open(name, "wb") as file:
        file.write(sound[:40_000])
    with caplog.at_level(logging.WARNING):
        load_audio(name)
    with open(name, "wb") as file:
        file.write(b"no sound")
    with pytest.raises(AudioDecodingError) as raised:
        load_audio(name)
    for message in (str(raised.value), caplog.text):
        message.encode()  # can be printed
        assert r"caf\xe9\x1b[2J.wav" in message


def test_text_file_object(tmp_path):
    (tmp_path / "text").write_text("x")
    with (
        (tmp_path / "text").open() as opened,
        pytest.raises(AudioDecodingError, match="yields str; expected bytes: open it in mode 'rb'"),
    ):
        load_audio(opened)
    with pytest.raises(AudioDecodingError, match=r"Cannot read .*closed file"):
        load_audio(opened)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "Expected a path, an http.* got NoneType"),
        (42, "Expected a path, .* got int"),
        ({"file": "a.wav"}, r'needs "bytes", "path", or "array".*got the keys \[.file.\]'),
        ({"array": [0.1]}, 'also needs its "sampling_rate"'),
        ({"array": [0.1], "sampling_rate": 0}, '"sampling_rate" must be a whole number.*got 0'),
        ({"array": [0.1], "sampling_rate": "x"}, r"must be a whole number of Hz .* got 'x'"),
        ({"array": [[0.1], [0.1, 0.2]], "sampling_rate": 16000}, r"got shape \(1,\) of object"),
        (np.zeros(0), r"not empty; got shape \(0,\)"),
        (np.zeros((2, 3, 4)), r"got shape \(2, 3, 4\)"),
        (np.array(["a"]), "got shape .* of <U1"),
        (np.array([None]), "got shape .* of object"),
        (np.zeros((16000, 2)), r"shape \(16000, 2\): channels come first here.*Transpose it"),
    ],
)
def test_wrong_sources(source, message):
    with pytest.raises(AudioDecodingError, match=message):
        load_audio(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_rate": 0}, "sampling_rate must be a whole number of Hz"),
        ({"sampling_rate": 16000.5}, "sampling_rate must be .* got 16000.5"),
        ({"offset": -1}, "offset must be 0 seconds or more, got -1"),
        ({"offset": float("nan")}, "offset must be 0 seconds or more, got nan"),
        ({"duration": 0}, "duration must be above 0 seconds, got 0"),
        ({"offset": 2}, "is 0.5 s long: nothing at offset 2 s"),
    ],
)
def test_wrong_arguments(arguments, message):
    waveform = noise(8000)[:, 0]
    for source in (waveform, encode(waveform)):
        with pytest.raises(AudioDecodingError, match=message):
            load_audio(source, **arguments)


def test_wrong_block_length():
    with pytest.raises(AudioDecodingError, match="block_length_s must be above 0, got 0"):
        next(stream_audio(noise(100)[:, 0], block_length_s=0))


def _load_or_fail_cleanly(encoded: bytes) -> None:
    try:
        loaded = load_audio(encoded)
    except AudioDecodingError:
        return
    assert loaded.dtype == np.float32
    assert loaded.size


def test_random_bytes():
    generator = np.random.default_rng(0)
    for _ in range(100):
        _load_or_fail_cleanly(generator.bytes(int(generator.integers(1, 5000))))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_random_corruptions(container, subtype):
    valid = encode(tone(8000, 16000), 16000, container, subtype)
    generator = np.random.default_rng(1)
    for case in range(100):
        corrupt = bytearray(valid)
        # Half of the cases damage the header, where most of the trouble comes from.
        end = 64 if case % 2 else len(corrupt)
        for position in generator.integers(0, end, int(generator.integers(1, 20))):
            corrupt[position] = generator.integers(0, 256)
        if case % 5 == 0:
            del corrupt[int(generator.integers(1, len(corrupt))) :]
        _load_or_fail_cleanly(bytes(corrupt))
