"""ASTFeatureExtractor: equal to transformers' own, its options, and bad input."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TensorType
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor, levels_ast, load_audio
from feature_extraction.fbank_ast import num_frames

from .conftest import REPOSITORY, shared

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")
RATE = 16000


def clip(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


@pytest.fixture(scope="module")
def extractor():
    return ASTFeatureExtractor(max_length=100, num_mel_bins=64)


# Equal to native


NATIVE_INPUTS = {
    "clip": clip(9000),
    "double precision": clip(9000).astype(np.float64),
    "list of numbers": clip(2000).tolist(),
    "array of clips": np.stack([clip(9000), clip(9000, 1)]),
    "list of arrays": [clip(9000), clip(500), clip(30_000)],
    "tuple of arrays": (clip(9000), clip(500)),
    "list of lists": [clip(2000).tolist(), clip(500).tolist()],
    "whole numbers": np.random.default_rng(0).integers(-9, 9, 900).tolist(),
    "one channel": [clip(9000)[None]],
}


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}], ids=str)
@pytest.mark.parametrize("name", NATIVE_INPUTS)
def test_equals_native(name, settings):
    settings = {"max_length": 100, "num_mel_bins": 64, **settings}
    ours, theirs = ASTFeatureExtractor(**settings), native.ASTFeatureExtractor(**settings)
    raw_speech = NATIVE_INPUTS[name]
    expected = theirs(raw_speech, RATE, return_tensors="pt")
    got = ours(raw_speech, RATE, return_tensors="pt")
    assert list(got) == list(expected)
    assert got["input_values"].dtype == torch.float32
    difference = (got["input_values"] - expected["input_values"]).abs().max()
    assert difference <= 1e-4 * (1 if ours.do_normalize else 2 * ours.std)


def test_containers_equal_native(extractor):
    theirs = native.ASTFeatureExtractor(max_length=100, num_mel_bins=64)
    for return_tensors in (None, "np", "pt"):
        got = extractor([clip(9000), clip(500)], RATE, return_tensors=return_tensors)
        expected = theirs([clip(9000), clip(500)], RATE, return_tensors=return_tensors)
        assert type(got["input_values"]) is type(expected["input_values"])
        assert type(got["input_values"][0]) is type(expected["input_values"][0])


def test_equals_native_on_real_sounds():
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(shared("data/esc10/data/fold1.parquet")).column("audio")
    sounds = [load_audio(column[index].as_py()) for index in (0, 30, 60)]
    expected = native.ASTFeatureExtractor()(sounds, RATE, return_tensors="pt")["input_values"]
    got = ASTFeatureExtractor()(sounds, RATE, return_tensors="pt")["input_values"]
    assert (got - expected).abs().max() <= 1e-4


def test_files_are_exchanged_with_native(tmp_path):
    ours = ASTFeatureExtractor(max_length=64, mean=-5.0, return_attention_mask=True)
    ours.save_pretrained(tmp_path / "ours")
    theirs = native.ASTFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert (theirs.max_length, theirs.mean, theirs.return_attention_mask) == (64, -5.0, True)
    theirs.save_pretrained(tmp_path / "theirs")
    back = ASTFeatureExtractor.from_pretrained(tmp_path / "theirs")
    assert torch.equal(
        back(clip(9000), RATE, return_tensors="pt")["input_values"],
        ours(clip(9000), RATE, return_tensors="pt")["input_values"],
    )


# Beyond native


def test_tensors_stay_tensors(extractor):
    arrays = [clip(9000), clip(500)]
    expected = extractor(arrays, RATE, return_tensors="pt")["input_values"]
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    got = extractor(tensors, RATE, return_tensors="pt")["input_values"]
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert all(isinstance(x, torch.Tensor) for x in extractor(tensors, RATE)["input_values"])
    batch = extractor(torch.from_numpy(np.stack([arrays[0]] * 2)), RATE, return_tensors="np")
    np.testing.assert_array_equal(batch["input_values"][1], expected[0].numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("padding", ["max_length", "longest", False])
def test_gpu_equals_cpu(extractor, padding):
    clips = [torch.from_numpy(clip(samples)) for samples in (9000, 500, 30_000)]
    on_cpu = extractor(clips, RATE, padding=padding, return_attention_mask=True)
    on_gpu = extractor([x.cuda() for x in clips], RATE, padding=padding, return_attention_mask=True)
    for name in on_cpu:
        for x, y in zip(on_cpu[name], on_gpu[name], strict=True):
            assert y.device.type == "cuda"
            assert (x - y.cpu()).abs().max() <= 1e-3


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_the_one_call_of_a_gpu_equals_the_loop_of_a_cpu(extractor, padding, monkeypatch):
    """Both run here, on the CPU."""
    clips = [clip(samples) for samples in (9000, 500, 12_000, 400)]
    options = {"padding": padding, "return_tensors": "pt"}
    looped = extractor(clips, RATE, **options)["input_values"]
    monkeypatch.setattr(
        ASTFeatureExtractor, "_fill_clip_by_clip", ASTFeatureExtractor._fill_together
    )
    together = extractor(clips, RATE, **options)["input_values"]
    torch.testing.assert_close(together, looped, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [
        (np.int8, 2**7, 0),
        (np.int16, 2**15, 0),
        (np.dtype(">i2"), 2**15, 0),
        (np.int32, 2**31, 0),
        (np.uint8, 2**7, 2**7),
        (np.uint16, 2**15, 2**15),
    ],
    ids=str,
)
def test_integer_arrays_are_pcm(extractor, dtype, scale, shift):
    pcm = (clip(5000) * scale + shift).astype(dtype)
    values = ((pcm.astype(np.float64) - shift) / scale).astype(np.float32)
    expected = extractor(values, RATE, return_tensors="pt")["input_values"]
    for given_as in (pcm, [pcm], pcm[None]):
        got = extractor(given_as, RATE, return_tensors="pt")["input_values"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    if np.dtype(dtype).isnative:
        got = extractor(torch.from_numpy(pcm), RATE, return_tensors="pt")["input_values"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=4),
    st.sampled_from(["max_length", "longest", False]),
    st.sampled_from([None, 1, 50, 300]),
    st.booleans(),
)
def test_shapes_and_masks(extractor, sizes, padding, max_length, truncation):
    clips = [clip(size, seed) for seed, size in enumerate(sizes)]
    features = extractor(
        clips,
        RATE,
        padding=padding,
        max_length=max_length,
        truncation=truncation,
        return_attention_mask=True,
    )
    limit = max_length or extractor.max_length
    frames = [max(1, num_frames(size)) for size in sizes]
    frames = [min(count, limit) for count in frames] if truncation else frames
    longest = max(frames)
    total = {"max_length": max(limit, longest), "longest": longest}.get(padding)
    padding_level = (extractor.padding_value - extractor.mean) / (2 * extractor.std)
    for values, mask, waveform, count in zip(
        features["input_values"], features["attention_mask"], clips, frames, strict=True
    ):
        assert values.shape == (total or count, 64)
        np.testing.assert_array_equal(mask, np.arange(total or count) < count)
        np.testing.assert_allclose(values[count:], padding_level, rtol=1e-6)
        alone = extractor(waveform, RATE, padding=False, truncation=False)["input_values"][0]
        np.testing.assert_allclose(values[:count], alone[:count], atol=1e-5)


def test_when_the_mask_is_returned(extractor):
    assert "attention_mask" not in extractor(clip(900), RATE)
    assert "attention_mask" in extractor(clip(900), RATE, padding="longest")
    assert "attention_mask" not in extractor(
        clip(900), RATE, padding="longest", return_attention_mask=False
    )
    masked = ASTFeatureExtractor(return_attention_mask=True)
    mask = masked(clip(900), RATE, return_tensors="pt")["attention_mask"]
    assert mask.shape == (1, 1024)
    assert mask.dtype == torch.long


def test_short_clips_are_extended_with_silence(extractor):
    short = clip(10)
    extended = np.pad(short, (0, 390))
    got = extractor(short, RATE, padding="longest", return_tensors="pt")
    assert got["input_values"].shape == (1, 1, 64)
    assert got["attention_mask"].tolist() == [[1]]
    expected = extractor(extended, RATE, padding="longest", return_tensors="pt")
    assert torch.equal(got["input_values"], expected["input_values"])


def test_the_clips_are_left_alone(extractor):
    waveform = clip(900)
    waveform.flags.writeable = False
    before = waveform.copy()
    extractor([waveform, waveform[::-1]], RATE)
    np.testing.assert_array_equal(waveform, before)


# Called as other extractors are


def test_padding_true_is_longest(extractor):
    clips = [clip(9000), clip(500)]
    got = extractor(clips, RATE, padding=True, return_tensors="pt")
    expected = extractor(clips, RATE, padding="longest", return_tensors="pt")
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("kind", ["pt", "np", TensorType.PYTORCH])
def test_return_tensors_third_in_place(extractor, kind):
    theirs = native.ASTFeatureExtractor(max_length=100, num_mel_bins=64)
    got, expected = extractor(clip(9000), RATE, kind), theirs(clip(9000), RATE, kind)
    assert list(got) == list(expected)
    assert type(got["input_values"]) is type(expected["input_values"])
    np.testing.assert_allclose(got["input_values"], expected["input_values"], atol=1e-4)


def test_a_long_max_length_that_clips_need_is_taken(extractor):
    long = extractor(clip(RATE * 21), RATE, max_length=16000, return_tensors="pt")
    assert long["input_values"].shape == (1, 16000, 64)
    longest = extractor(clip(900), RATE, padding="longest", max_length=16000)
    assert longest["input_values"][0].shape == (4, 64)
    assert extractor(clip(900), RATE, max_length=2048)["input_values"][0].shape == (2048, 64)


def test_loudness_is_looked_at(extractor, caplog, monkeypatch):
    monkeypatch.setattr(levels_ast, "_warned", set())
    with pytest.raises(ValueError, match=r"Clip 1 holds values up to 1e\+19; full scale is 1"):
        extractor([clip(900), clip(900) / clip(900).max() * np.float32(1e19)], RATE)
    for integers in (np.arange(900), torch.arange(900), [np.arange(900)]):
        with pytest.raises(ValueError, match=r"holds integers of 64 bits.*astype\(numpy\.int16\)"):
            extractor(integers, RATE)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            extractor(clip(900) * 32768, RATE)
            extractor((clip(900) * 32768).tolist(), RATE)
            extractor((clip(900) * 32768).astype(np.int32), RATE)
            extractor(torch.from_numpy(clip(900) * 32768).int(), RATE)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "integers stored as floats" in said[0]
    assert "looks like 16-bit sound stored in 32-bit integers" in said[1]


# Bad input


@pytest.mark.parametrize(
    ("raw_speech", "message"),
    [
        (np.zeros(0, np.float32), r"Clip 0 has shape \(0,\); expected .* not empty"),
        ([clip(900), np.zeros(0)], r"Clip 1 has shape \(0,\); expected .* not empty"),
        ([], "Got an empty batch, expected at least one clip"),
        ([[]], r"Clip 0 has shape \(0,\)"),
        (np.zeros((0, 900)), "Got an empty batch, expected at least one clip"),
        (
            np.zeros((16000, 2)),
            r"\(16000, 2\), which looks like stereo.*average the channels, array\.mean\(axis=1\)\. "
            r"A batch is \(clips, samples\)",
        ),
        (torch.zeros(16000, 2), r"\(16000, 2\), which looks like stereo"),
        ([np.zeros((2, 16000))], r"Clip 0 has shape \(2, 16000\).*Average the channels.*axis=0"),
        (np.zeros((2, 2, 900)), r"shape \(2, 2, 900\); expected one mono clip \(samples,\)"),
        (np.float32(1), r"shape \(\)|got float32"),
        (
            np.array([clip(900), clip(800)], dtype=object),
            "The array holds object; expected numbers.*Pass clips of unequal length as a list",
        ),
        (np.array(["sound"]), "The array holds <U5; expected numbers"),
        ([["sound"]], "Clip 0 holds <U5; expected numbers"),
        ([[[1.0], [1.0, 2.0]]], "Clip 0 holds object; expected numbers"),
        (np.zeros(900, complex), "The array holds complex128; expected numbers"),
        (torch.zeros(900, dtype=torch.complex64), r"holds torch\.complex64; expected real num"),
        (torch.zeros(900, dtype=torch.bool), r"holds torch\.bool; expected real numbers"),
        ("sound.wav", "array, tensor or list, got str. Read files with load_audio"),
        (None, "array, tensor or list, got NoneType"),
        (
            [torch.zeros(900), torch.zeros(900, device="meta")],
            r"clips are on \['cpu', 'meta'\]; move them to one device",
        ),
    ],
)
def test_bad_clips(extractor, raw_speech, message):
    with pytest.raises(ValueError, match=message):
        extractor(raw_speech, RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(extractor, value):
    clips = [clip(900), clip(500), clip(900)]
    clips[1][100] = value
    with pytest.raises(ValueError, match=r"Clip 1 holds NaN or infinite values\. Repair it"):
        extractor(clips, RATE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"sampling_rate": 44100},
            ValueError,
            r"rate of 44100 Hz; this extractor needs 16000 Hz\. Resample it: load_audio\(",
        ),
        ({"padding": "left"}, ValueError, "padding must be .*, True or False, got 'left'"),
        ({"padding": "pt", "return_tensors": "np"}, ValueError, "padding must be .* got 'pt'"),
        (
            {"max_length": 16000},
            ValueError,
            r"max_length=16000 frames of 10 ms are 160 s, but the longest clip has only 4 frames\. "
            r"If you meant samples, pass max_length=98; or omit it to use the model's, 100",
        ),
        ({"max_length": 0}, ValueError, "max_length must be a number of frames above 0, got 0"),
        ({"max_length": 9.5}, ValueError, "max_length must be a number of frames above 0, got 9.5"),
        ({"return_tensors": "tf"}, ValueError, "must be 'pt', 'np' or None, got 'tf'"),
        ({"do_lower_case": True}, TypeError, "unexpected keyword argument 'do_lower_case'"),
    ],
)
def test_bad_arguments(extractor, arguments, error, message):
    with pytest.raises(error, match=message):
        extractor(clip(900), **{"sampling_rate": RATE, **arguments})


def test_unequal_clips_are_no_tensor(extractor):
    with pytest.raises(
        ValueError, match=r"have \[1, 4\] frames and do not fit one tensor; use padding='longest'"
    ):
        extractor([clip(400), clip(900)], RATE, padding=False, return_tensors="pt")


# Memory

FEATURISE = """
import re, numpy as np
from feature_extraction import ASTFeatureExtractor

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

extractor = ASTFeatureExtractor()
clips = [np.random.default_rng(0).uniform(-0.5, 0.5, 160_000).astype(np.float32)] * 64
extractor(clips[:2], 16000, return_tensors="pt")
before = megabytes("VmRSS")
size = extractor(clips, 16000, return_tensors="pt")["input_values"].nbytes / 2**20
print((megabytes("VmHWM") - before - size) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_extra_memory():
    result = subprocess.run(
        [sys.executable, "-c", FEATURISE],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert float(re.findall(r"\S+", result.stdout)[-1]) <= 4
