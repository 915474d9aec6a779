"""ast-listen: a sound that goes on, from its sources to a line per event."""

import csv
import io
import itertools
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_ast.events_ast import EventRules, EventStream, events_from_scores
from scripts import listen as command
from scripts.inference.live import Listener, Ring
from scripts.inference.live_sources import Ffmpeg, Microphone, SourceLostError, WavStream

from .conftest import REPOSITORY, shared
from .test_frame_pipeline import frame_folder  # noqa: F401

RATE = 16000


class Loudness:
    """Stands for a classifier: "loud" scores as far as the end of the window is loud."""

    sampling_rate = RATE
    chunk_length_s = None
    label_names = ("quiet", "loud")
    is_frame_model = False
    window_pooling = None

    def __init__(self, seconds: float = 0.0):
        self._seconds = seconds  # that a window takes

    def window_samples(self, hop_length_s):
        return 2 * RATE, round(hop_length_s * RATE)

    def windows(self, samples):
        return iter([samples])

    def score(self, windows):
        time.sleep(self._seconds)
        level = float(np.abs(windows[0][-RATE // 5 :]).max())
        scores = np.array([[1 - level, level]], np.float32)
        return scores, scores, np.empty((1, 0))


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2, size: int | None = None) -> bytes:
    """A PCM WAV; `size` instead of the true number of bytes in its header."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        writer.setnchannels(channels), writer.setsampwidth(width), writer.setframerate(rate)
        whole = np.round(samples.reshape(-1) * (2 ** (8 * width - 1) - 1)).astype("<i4")
        raw = whole.view(np.uint8).reshape(-1, 4)[:, :width]
        writer.writeframes((raw + 128).astype(np.uint8).tobytes() if width == 1 else raw.tobytes())
    content = bytearray(file.getvalue())
    if size is not None:
        content[40:44] = size.to_bytes(4, "little")
    return bytes(content)


@settings(deadline=None)  # a busy machine
@given(
    st.integers(5, 30),
    st.lists(st.integers(0, 40), max_size=8),
    st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_a_ring_keeps_the_end_of_what_was_written(capacity, lengths, part):
    ring, whole = Ring(capacity), np.arange(sum(lengths), dtype=np.float32)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        ring.write(whole[end - length : end])
    assert (ring.begin, ring.end) == (max(0, len(whole) - capacity), len(whole))
    start, end = sorted(part)
    expected = whole[max(start, ring.begin) : max(end, ring.begin)]
    np.testing.assert_array_equal(ring.read(start, end), expected)


def test_a_gap_is_silence_that_takes_its_time():
    ring = Ring(10)
    ring.write(np.ones(5, np.float32))
    ring.skip(1000)
    ring.write(np.ones(2, np.float32))
    assert ring.end == 1007
    np.testing.assert_array_equal(ring.read(997, 1007), [0] * 8 + [1] * 2)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=30), st.floats(0, 3))
def test_events_of_a_stream_are_those_of_the_whole(scores, minimum_length_s):
    """And each was told when it began, once, as far as it was known then."""
    rules = EventRules(0.5, 0.3, minimum_length_s)
    spans = [(float(i), i + 2.0) for i in range(len(scores))]
    stream, begun, ended = EventStream(["a"], rules), [], []
    for span, score in zip(spans, scores, strict=True):
        more_begun, more_ended = stream.add(span, np.array([score]))
        begun, ended = begun + more_begun, ended + more_ended
    ended += stream.close()
    whole = events_from_scores(spans, np.array(scores).reshape(-1, 1), ["a"], rules)
    assert ended == whole
    starts = [event.start for event in begun]
    assert [event.start for event in ended if event.start in starts] == starts


def test_a_file_that_waits_is_heard_hop_by_hop():
    """Windows end one hop apart, the first ones hold what there is, nothing is left out."""
    listener = Listener(Loudness(), EventRules(), hop_length_s=0.5, buffer_s=4, waits=True)
    sound = np.zeros(10 * RATE, np.float32)
    sound[3 * RATE : 4 * RATE] = 0.9

    def write():
        for block in np.split(sound, 200):
            listener.ring.write(block)
        listener.ring.close()

    thread = threading.Thread(target=write)
    thread.start()
    lines = []
    while listener.is_ready or not listener.ring.is_closed:
        if listener.is_ready:
            lines += listener.step()
        else:
            listener.ring.wait(listener.next_end, 0.1)
    thread.join()
    lines += listener.finish()
    figures = listener.figures
    assert (figures.windows, figures.heard_s, figures.drops) == (20, 10.0, 0)
    loud = [line for line in lines if line.event.label == "loud"]
    assert [line.is_over for line in loud] == [False, True]
    # Heard in the windows 1.5 to 3.5 s and 2 to 4 s; their scores stand for their middles.
    assert 2.0 < loud[1].event.start < 2.5 < 3.0 < loud[1].event.end < 3.5


def test_a_model_that_is_too_slow_leaves_out_hops_then_drops_and_counts():
    listener = Listener(Loudness(), EventRules(), hop_length_s=0.5, buffer_s=4)
    listener.ring.write(np.zeros(3 * RATE, np.float32))
    listener.step()
    assert listener.figures.hops_left_out == 3  # one window of 2 s hears four hops
    assert listener.next_end == 2.5 * RATE
    assert listener.figures.drops == 0
    listener.ring.write(np.zeros(6 * RATE, np.float32))
    listener.step()  # the ring holds 5 to 9 s, heard was up to 2 s
    assert listener.figures.drops == 1
    assert listener.figures.dropped_s == 3.0
    assert "1 drops (3.0 s)" in str(listener.figures)


def test_a_buffer_must_hold_a_window():
    with pytest.raises(ValueError, match=r"--buffer_s must hold .* 4 s here, got 3"):
        Listener(Loudness(), EventRules(), 1.0, buffer_s=3)


def test_columns_of_a_frame_model_are_told_once(frame_folder):  # noqa: F811
    from scripts.inference.classifier import Classifier

    classifier = Classifier(str(frame_folder))
    listener = Listener(classifier, EventRules(0.01), 0.5, 10, waits=True)
    listener.ring.write(np.random.default_rng(0).uniform(-0.3, 0.3, 5 * RATE).astype(np.float32))
    spans = []
    add = listener._events.add
    listener._events.add = lambda span, scores: (spans.append(span), add(span, scores))[1]
    while listener.is_ready:
        listener.step()
    assert spans[0][0] == 0.0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert spans[-1][1] > 4.7


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF, 0x7FFFFFFF - 36])
def test_wav_streams_of_all_widths(width, size):
    """arecord, sox and ffmpeg promise sizes that are none."""
    sound = np.stack([np.sin(np.arange(8000) / 20), np.zeros(8000)], axis=1) * 0.8
    source = WavStream(io.BytesIO(wav(sound, 16000, width, size)), RATE)
    assert not source.waits
    heard = np.concatenate(list(source.blocks()))
    np.testing.assert_allclose(heard, sound.mean(axis=1), atol=1.2 / 2 ** (8 * width - 1))


def test_a_wav_file_ends_where_its_sound_does_and_is_resampled(tmp_path):
    t = np.arange(48000) / 48000
    path = tmp_path / "tone.wav"
    path.write_bytes(wav(0.5 * np.sin(2 * np.pi * 440 * t), 48000) + b"LIST\x04\0\0\0abcd" * 99)
    with path.open("rb") as file:
        source = WavStream(file, RATE)
        assert source.waits
        heard = np.concatenate(list(source.blocks()))
    assert len(heard) == pytest.approx(RATE, abs=20)
    middle = heard[4000:12000] - 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000, 12000) / RATE)
    assert np.abs(middle).max() < 0.01


@pytest.mark.parametrize("content", [b"", b"no sound at all, only words", wav(np.zeros(9))[:20]])
def test_what_is_no_wav_is_refused(content):
    with pytest.raises(ValueError, match="not an integer PCM WAV"):
        WavStream(io.BytesIO(content), RATE)


def test_a_wav_of_an_absurd_rate_is_refused():
    """Its blocks, a tenth of a second each, would not fit into memory."""
    content = wav(np.zeros(9))
    with pytest.raises(ValueError, match="header says 4000000000 Hz"):
        WavStream(io.BytesIO(content[:24] + struct.pack("<I", 4_000_000_000) + content[28:]), RATE)


class LoopbackStream:
    """What sounddevice records is what was put into it."""

    sound = np.zeros(0, np.float32)

    def __init__(self, samplerate, channels, dtype, device):
        assert (samplerate, channels, dtype) == (48000, 1, "float32")
        self.position = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def read(self, frames):
        part = self.sound[self.position : self.position + frames]
        self.position += frames
        if not len(part):
            raise PortAudioError("Device unavailable")
        return part[:, None], self.position == 3 * frames


class PortAudioError(Exception):
    pass


@pytest.fixture
def loopback(monkeypatch):
    def query_devices(device, kind):
        if device not in (None, "loop", 3):
            raise ValueError(f"No input device matching {device!r}")
        return {"name": "loop", "default_samplerate": 48000.0}

    module = types.SimpleNamespace(
        query_devices=query_devices, InputStream=LoopbackStream, PortAudioError=PortAudioError
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)


def test_microphone(loopback, monkeypatch):
    monkeypatch.setattr(LoopbackStream, "sound", np.full(48000, 0.25, np.float32))
    microphone, heard = Microphone(RATE, "3"), []
    assert microphone.name == "microphone 'loop'"
    with pytest.raises(SourceLostError, match="Device unavailable"):
        heard.extend(microphone.blocks())
    samples = np.concatenate(heard)
    assert len(samples) == pytest.approx(RATE, abs=500)  # the resampler holds some back
    np.testing.assert_allclose(samples[1000:-1000], 0.25, atol=1e-3)
    assert microphone.overflows == 1
    with pytest.raises(ValueError, match=r"No microphone 'usb'.*--device chooses one"):
        Microphone(RATE, "usb")


def test_without_sounddevice_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[listen\]'"):
        Microphone(RATE)


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A shell script of that name; the files quiet and loud hold a second of sound each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "quiet").write_bytes(np.zeros(RATE, "<f4").tobytes())
    (folder / "loud").write_bytes(np.full(RATE, 0.9, "<f4").tobytes())

    def install(body: str) -> None:
        program = folder / "ffmpeg"
        program.write_text(f"#!/bin/sh\ncd '{folder}'\necho call >> calls\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


def test_an_address_is_read_by_ffmpeg(ffmpeg):
    ffmpeg(
        'test "$4 $5 $6 $7" = "-rtsp_transport tcp -i rtsp://me:secret@camera/1" || exit 2\n'
        "cat loud; printf xx\n"
        "echo rtsp://me:secret@camera/1: Connection timed out >&2; exit 1"
    )
    source, heard = Ffmpeg("rtsp://me:secret@camera/1", RATE), []
    assert source.name == "rtsp://…@camera/1"
    with pytest.raises(SourceLostError) as lost:
        heard.extend(source.blocks())
    assert str(lost.value) == "rtsp://…@camera/1: Connection timed out"
    np.testing.assert_array_equal(np.concatenate(heard), np.full(RATE, 0.9, np.float32))


def test_without_ffmpeg_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="rtsp://camera needs the ffmpeg program"):
        Ffmpeg("rtsp://camera", RATE)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ast-listen in this process with `Loudness`: -> exit status, stdout, stderr."""

    def run(*arguments: object, model=None) -> tuple[int, str, str]:
        from scripts.inference import listen

        monkeypatch.setattr(listen, "Classifier", lambda *_, **__: model or Loudness())
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ending:
            command.main([*map(str, arguments)])
        return ending.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def stdin(monkeypatch):
    """Put a binary file in the place of standard input."""

    def put(file) -> None:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=file, isatty=lambda: False))

    return put


def skip_on_a_busy_machine() -> None:
    if os.getloadavg()[0] > 2 * os.cpu_count():
        pytest.skip(f"with a load of {os.getloadavg()[0]:.0f} times say nothing")


def loud_from(start: float, end: float, seconds: float) -> np.ndarray:
    sound = np.zeros(round(seconds * RATE))
    sound[round(start * RATE) : round(end * RATE)] = 0.9
    return sound


def test_lines_and_cut_outs(run, stdin, tmp_path):
    stdin(io.BytesIO(wav(loud_from(4, 6, 10))))
    arguments = ["-", "--wait", "--hop_length_s", 0.5, "--clips", tmp_path / "clips"]
    status, out, err = run(*arguments, "--format", "json")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    states = [(line["label"], line["state"]) for line in lines]
    assert states == [
        ("quiet", "begins"),
        ("quiet", "over"),
        ("loud", "begins"),
        ("loud", "over"),
        ("quiet", "begins"),
        ("quiet", "over"),
    ]
    assert lines[2]["end"] is None
    assert lines[3]["end"] - lines[3]["start"] == pytest.approx(2, abs=0.6)
    assert lines[3]["time"] is None  # of a file nobody knows
    assert "heard 10.0 s, real-time factor" in err
    assert "0 drops (0.0 s)" in err
    (clip,) = (tmp_path / "clips" / "loud").iterdir()
    samples, rate = soundfile.read(clip)
    assert len(samples) / rate == pytest.approx(4, abs=0.6)  # a second before and after
    assert samples.max() == pytest.approx(0.9, abs=0.01)

    stdin(io.BytesIO(wav(loud_from(4, 6, 10))))
    rows = list(csv.DictReader(io.StringIO(run(*arguments[:4], "--format", "csv")[1])))
    assert [row["state"] for row in rows] == [state for _, state in states]
    assert float(rows[3]["end"]) == lines[3]["end"]
    stdin(io.BytesIO(wav(loud_from(4, 6, 10))))
    text = run(*arguments[:4])[1].splitlines()
    assert [line.split()[1] for line in text] == [label for label, _ in states]
    assert "over after 2." in text[3]


def test_in_real_time_a_line_comes_within_a_hop_and_half_a_second(run, stdin):
    """A sound of 3 s at its own speed; "loud" begins after 1.3 s."""
    skip_on_a_busy_machine()
    reading, writing = os.pipe()
    content, header = wav(loud_from(1.3, 3, 3), size=0), 44
    began = []

    def feed():
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            pipe.write(content[:header])
            began.append(time.monotonic())
            step = RATE // 20 * 2
            for number, position in enumerate(range(header, len(content), step), start=1):
                time.sleep(max(0.0, began[0] + number / 20 - time.monotonic()))
                pipe.write(content[position : position + step])

    told = {}
    model = Loudness()
    stdin(os.fdopen(reading, "rb"))
    thread = threading.Thread(target=feed)
    thread.start()
    from scripts.inference import listen

    printed = listen.Printer.print

    def note(self, lines):
        for line in lines:
            told.setdefault((line.event.label, line.is_over), time.monotonic() - began[0])
        printed(self, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listen.Printer, "print", note)
        status, out, err = run("-", "--hop_length_s", 0.5, "--format", "json", model=model)
    thread.join()
    assert status == 0
    assert told["loud", False] - 1.3 <= 0.5 + 0.5
    begins = [json.loads(line) for line in out.splitlines()][1:]
    assert all(line["latency_s"] <= 1.0 for line in begins)
    assert begins[0]["time"] is not None
    assert "0 drops" in err


def test_a_stream_that_breaks_off_is_asked_again(run, ffmpeg, monkeypatch):
    ffmpeg(
        "cat quiet\n"
        "test $(wc -l < calls) = 1 && { echo reset by peer >&2; exit 1; }\n"
        "cat loud; exec sleep 60"
    )
    from scripts.inference import listen

    monkeypatch.setattr(listen, "_SILENT_S", 1.0)
    interrupt = listen.Ffmpeg.interrupt

    def interrupt_and_leave(source):
        interrupt(source)
        raise KeyboardInterrupt  # as a user who has seen enough

    monkeypatch.setattr(listen.Ffmpeg, "interrupt", interrupt_and_leave)
    sleep = time.sleep
    monkeypatch.setattr(listen.time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))
    status, out, err = run("rtsp://camera/1", "--hop_length_s", 0.5)
    assert status == 0
    assert "rtsp://camera/1 is lost: reset by peer" in err
    assert "rtsp://camera/1 is back;" in err
    assert "has given no sound for 1 s" in err
    assert "1 reconnects." in err
    assert " loud " in out


def test_an_address_that_never_answers_is_an_error(run, ffmpeg):
    ffmpeg("echo Connection refused >&2; exit 1")
    status, _, err = run("http://nobody/")
    assert status == 2
    assert "ast-listen: error: http://nobody/: Connection refused" in err


def test_mistakes_are_said(run):
    status, _, err = run("recording.wav")
    assert status == 2
    assert "Files are for ast-classify" in err
    for words in (["--device", "3", "-"], ["--wait"]):
        assert run(*words)[0] == 2


@pytest.mark.slow
def test_an_hour_faster_than_real_time_in_flat_memory(native_folder, tmp_path):
    """Through the command, with a tiny model; memory is looked at from 10 minutes on."""
    sound = np.random.default_rng(0).uniform(-0.3, 0.3, 60 * RATE)
    block = wav(sound)[44:]
    arguments = ["-", "--wait", "--model", str(native_folder), "--format", "json"]
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.listen", *arguments, "--threshold", "0.9"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=False,
        cwd=REPOSITORY,
    ) as process:
        began, memory = time.monotonic(), []
        process.stdin.write(wav(sound[:1], size=0)[:44])
        for _ in range(60):
            process.stdin.write(block)
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
        process.stdin.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0, err
    assert "heard 3600.0 s" in err
    assert "0 drops" in err
    assert time.monotonic() - began < 3600
    print(f"memory in MiB after 10 minutes {memory[10]:.0f}, after an hour {memory[-1]:.0f}; {err}")
    assert max(memory[10:]) - memory[10] < 10


@pytest.mark.slow
def test_a_real_dog_in_real_time(tmp_path):
    """The bundled model, 10 s at their own speed: a bark of ESC-10 from second 4 on."""
    folder = shared("data/esc10/data")
    skip_on_a_busy_machine()
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "fold5.parquet").to_pylist()
    row = next(row for row in table if row["label"] == 0)
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
    sound = np.concatenate([np.zeros(4 * rate), samples, np.zeros(rate)])
    content = wav(sound, rate, size=0)
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.listen", "-", "--format", "json", "--hop_length_s", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    ) as process:
        process.stdin.write(content[:44])
        process.stdin.flush()
        process.stderr.readline()  # it has loaded the model
        began, step = time.monotonic(), rate // 20 * 2
        for number, position in enumerate(range(44, len(content), step), start=1):
            time.sleep(max(0.0, began + number / 20 - time.monotonic()))
            process.stdin.write(content[position : position + step])
            process.stdin.flush()
        process.stdin.close()
        lines = [json.loads(line) for line in process.stdout.read().splitlines()]
        err = process.stderr.read().decode()
    print(err)
    barks = [x for x in lines if x["label"] in ("Bark", "Dog") and x["state"] == "begins"]
    assert barks, (lines, err)
    assert all(bark["latency_s"] <= 1.5 for bark in barks), err
