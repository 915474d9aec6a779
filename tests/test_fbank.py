"""kaldi_fbank against torchaudio's outputs, and its laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_extraction import kaldi_fbank
from feature_extraction.fbank_ast import num_frames, num_samples

from .conftest import GOLDEN

KALDI = np.load(GOLDEN / "kaldi_fbank.npz")
CASES = sorted(name.split("/")[1] for name in KALDI.files if name.startswith("waveform/"))


@pytest.mark.parametrize("mel_bins", [128, 64])
@pytest.mark.parametrize("case", CASES)
def test_equals_torchaudio(case, mel_bins):
    expected = KALDI[f"fbank{mel_bins}/{case}"]
    waveform = torch.from_numpy(KALDI[f"waveform/{case}"])
    log_mel = kaldi_fbank(waveform, num_mel_bins=mel_bins)
    assert log_mel.dtype == torch.float32
    assert log_mel.shape == expected.shape
    # Far below a frame's loudest bin, both hold what float32 rounds in the FFT, and that differs
    # from processor to processor: 1e-6 of the amplitude of the loudest.
    depth = expected.max(axis=1, keepdims=True) - expected
    tolerance = 5e-4 + np.minimum(2e-6 * np.exp(depth / 2), 0.05)
    assert (np.abs(log_mel.numpy() - expected) <= tolerance).all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(400, 3000),
    st.sampled_from([40, 64, 128]),
    st.sampled_from([3, 17, 1024]),
)
def test_batches_and_blocks_change_nothing(leading, samples, mel_bins, block):
    waveform = torch.randn(*leading, samples, generator=torch.Generator().manual_seed(samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("feature_extraction.fbank_ast._CPU_BLOCK", block)
        log_mel = kaldi_fbank(waveform, num_mel_bins=mel_bins)
    assert log_mel.shape == (*leading, num_frames(samples), mel_bins)
    alone = [kaldi_fbank(clip, num_mel_bins=mel_bins) for clip in waveform.reshape(-1, samples)]
    torch.testing.assert_close(
        log_mel.reshape(-1, *log_mel.shape[-2:]), torch.stack(alone), atol=1e-4, rtol=0
    )


@given(st.integers(1, 100_000), st.sampled_from([8000, 16000, 44100]))
def test_frames_and_samples(frames, rate):
    samples = num_samples(frames, rate)
    assert num_frames(samples, rate) == frames
    assert num_frames(samples - 1, rate) == frames - 1


def test_silence_gives_the_floor():
    assert (kaldi_fbank(torch.zeros(1000)) == np.log(np.float32(1.1920929e-07))).all()


def test_louder_is_a_shift():
    waveform = torch.randn(4000)
    difference = kaldi_fbank(2 * waveform, num_mel_bins=64) - kaldi_fbank(waveform, num_mel_bins=64)
    torch.testing.assert_close(difference, torch.full_like(difference, np.log(4)))


def test_the_waveform_is_left_alone():
    waveform = torch.randn(1000)
    before = waveform.clone()
    kaldi_fbank(waveform)
    assert torch.equal(waveform, before)


def test_double_precision_comes_out_as_float32():
    waveform = torch.randn(1000, dtype=torch.float64)
    assert torch.equal(kaldi_fbank(waveform), kaldi_fbank(waveform.float()))


def test_bad_input():
    with pytest.raises(ValueError, match=r"needs a floating-point waveform .* got torch\.int16"):
        kaldi_fbank(torch.zeros(1000, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"has 399 samples, fewer than one frame of 400 \(25 ms"):
        kaldi_fbank(torch.zeros(399))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_equals_cpu():
    waveform = torch.randn(3, 20_000)
    on_gpu = kaldi_fbank(waveform.cuda())
    assert on_gpu.device.type == "cuda"
    assert (on_gpu.cpu() - kaldi_fbank(waveform)).abs().max() <= 1e-3


def test_written_into_a_tensor():
    waveform = torch.rand(2, 3, 4000) - 0.5
    expected = kaldi_fbank(waveform)
    out = torch.empty_like(expected)
    assert kaldi_fbank(waveform, out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"out must be contiguous float32 \(2, 3, 23, 128\)"):
        kaldi_fbank(waveform, out=out[..., :64])
