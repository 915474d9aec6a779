"""Kaldi's log-mel filterbank in torch: batched, on any device.

    waveform                (..., samples)          at `sampling_rate`, full scale is -1..1
    frames                  (..., frames, 400)      25 ms every 10 ms, only whole ones (snip edges)
    power spectrum          (..., frames, 257)      512-point FFT of DC-free, pre-emphasised frames
    log-mel                 (..., frames, mel)      natural logarithm, float32

This is what AST was trained on: `torchaudio.compliance.kaldi.fbank(..., htk_compat=True,
window_type="hanning", dither=0.0, frame_shift=10)` in the original's `dataloader.py`, whose
definition in turn is Kaldi's `feat/feature-fbank.cc`.
"""

from functools import lru_cache

import torch
from torch import Tensor

FRAME_LENGTH_MS = 25
FRAME_SHIFT_MS = 10
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0  # Hz, lower edge of the first mel filter; the last one ends at Nyquist
LOG_FLOOR = torch.finfo(torch.float32).eps  # 1.1920929e-07, Kaldi's; the log-mel of silence: -15.94
# Frames per pass. On a CPU their spectra (2 MB) stay in its cache; on a GPU this bounds the extra
# memory (7 kB per frame) and still fills the device.
_CPU_BLOCK = 1024
_GPU_BLOCK = 32768
_MEL_BANDS = 4


def frame_length(sampling_rate: int) -> int:
    """Samples in one frame (25 ms)."""
    return sampling_rate * FRAME_LENGTH_MS // 1000


def frame_shift(sampling_rate: int) -> int:
    """Samples between the starts of neighbouring frames (10 ms)."""
    return sampling_rate * FRAME_SHIFT_MS // 1000


def num_frames(samples: int, sampling_rate: int = 16000) -> int:
    """Whole frames in a waveform; what follows the last one is dropped (Kaldi's snip edges)."""
    if samples < frame_length(sampling_rate):
        return 0
    return 1 + (samples - frame_length(sampling_rate)) // frame_shift(sampling_rate)


def num_samples(frames: int, sampling_rate: int = 16000) -> int:
    """Samples of the shortest waveform that has this many frames."""
    return (frames - 1) * frame_shift(sampling_rate) + frame_length(sampling_rate)


def kaldi_fbank(
    waveform: Tensor,
    sampling_rate: int = 16000,
    num_mel_bins: int = 128,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Log-mel filterbank energies as Kaldi computes them, without dither.

    Args:
        waveform: (..., samples), floating point, any leading axes, any device.
        sampling_rate: of the waveform, in Hz.
        num_mel_bins: triangular filters between 20 Hz and half the sampling rate.
        out: (..., frames, num_mel_bins), contiguous float32 to write to, instead of a new tensor.

    Returns:
        (..., frames, num_mel_bins), float32, on the waveform's device; frames =
        1 + (samples - 400) // 160 at 16 kHz.

    Raises:
        ValueError: when the waveform is shorter than one frame or not floating point.
    """
    if not waveform.is_floating_point():
        raise ValueError(
            f"kaldi_fbank needs a floating-point waveform in -1..1, got {waveform.dtype}; "
            "divide integer PCM by its type's range (32768 for int16)."
        )
    length, shift = frame_length(sampling_rate), frame_shift(sampling_rate)
    if waveform.shape[-1] < length:
        raise ValueError(
            f"The waveform has {waveform.shape[-1]} samples, fewer than one frame of {length} "
            f"({FRAME_LENGTH_MS} ms at {sampling_rate} Hz). Pad it with silence."
        )
    clips = waveform.detach().float().reshape(-1, waveform.shape[-1])  # (clips, samples)
    frames = clips.unfold(-1, length, shift)  # (clips, frames, length), a view
    window, mel_bands = _constants(sampling_rate, num_mel_bins, frames.device)
    shape = (*waveform.shape[:-1], frames.shape[1], num_mel_bins)
    if out is None:
        out = frames.new_empty(shape)
    elif out.shape != shape or out.dtype != frames.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 {shape}, got {tuple(out.shape)}.")
    log_mel = out.view(*frames.shape[:2], num_mel_bins)
    block = _CPU_BLOCK if frames.device.type == "cpu" else _GPU_BLOCK
    clips_per_block = max(1, block // frames.shape[1])
    for some_frames, some_log_mel in zip(
        frames.split(clips_per_block), log_mel.split(clips_per_block), strict=True
    ):
        for part, target in zip(
            some_frames.split(block, dim=1), some_log_mel.split(block, dim=1), strict=True
        ):
            _write_log_mel(target, part, window, mel_bands)
    return out


def _write_log_mel(
    log_mel: Tensor, frames: Tensor, window: Tensor, mel_bands: list[tuple[slice, Tensor]]
) -> None:
    """(..., frames, length) -> (..., frames, mel), into `log_mel`."""
    squares = torch.view_as_real(_spectrum(frames, window)).square_()  # of both parts
    power = squares[..., 0] + squares[..., 1]
    first = 0
    for bins, filters in mel_bands:
        last = first + filters.shape[1]
        torch.matmul(power[..., bins], filters, out=log_mel[..., first:last])
        first = last
    log_mel.clamp_(min=LOG_FLOOR).log_()


def _spectrum(frames: Tensor, window: Tensor) -> Tensor:
    """(..., frames, length) -> (..., frames, FFT bins), complex.

    Every step rounds as Kaldi's port in torchaudio does: a filter that holds only the rounding
    noise of a loud frame would show any other order of operations.
    """
    frames = frames - frames.mean(dim=-1, keepdim=True)
    scaled = frames * PREEMPHASIS
    padded = frames.new_zeros(*frames.shape[:-1], _fft_size(frames.shape[-1]))
    windowed = padded[..., : frames.shape[-1]]
    torch.sub(frames[..., 1:], scaled[..., :-1], out=windowed[..., 1:])
    torch.sub(frames[..., :1], scaled[..., :1], out=windowed[..., :1])  # against itself
    windowed.mul_(window)
    return torch.fft.rfft(padded)


def _fft_size(length: int) -> int:
    """Samples of the frame with its zeros: Kaldi rounds up to a power of two."""
    return 1 << (length - 1).bit_length()


def filterbank_matrices(sampling_rate: int, num_mel_bins: int) -> tuple[Tensor, Tensor]:
    """`kaldi_fbank` as two matrices, for graphs that have no FFT.

    All steps up to the spectrum are linear, so what they make of unit impulses says all. Computed
    in float64 by the very code that featurises sound.

    Returns:
        spectrum (frame length, 2 * FFT bins): a frame times it is the real and the imaginary part
        of its spectrum; mel filters (FFT bins, mel): the power spectrum times it is the mel
        spectrum, `LOG_FLOOR` and the logarithm are left. Both float32.
    """
    length = frame_length(sampling_rate)
    window = torch.hann_window(length, periodic=False)
    spectrum = _spectrum(torch.eye(length, dtype=torch.float64), window)
    filters = _mel_filters(sampling_rate, num_mel_bins, _fft_size(length))
    return torch.cat([spectrum.real, spectrum.imag], dim=-1).float(), filters


@lru_cache(maxsize=8)
def _constants(
    sampling_rate: int, num_mel_bins: int, device: torch.device
) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The Hann window (length,) and the mel filters, in bands of neighbouring ones.

    A filter covers few FFT bins, those of a band not many more: multiplying band by band is 2.7
    times faster than with the whole matrix (FFT bins, mel). A band holds the slice of the FFT bins
    that its filters cover and the filters (bins in the slice, mel in the band).
    """
    length = frame_length(sampling_rate)
    filters = _mel_filters(sampling_rate, num_mel_bins, _fft_size(length))
    bands = []
    for band in filters.split(-(-num_mel_bins // _MEL_BANDS), dim=1):
        covered = band.any(dim=1).nonzero().flatten().tolist() or [0]
        bins = slice(covered[0], covered[-1] + 1)
        bands.append((bins, band[bins].contiguous().to(device)))
    return torch.hann_window(length, periodic=False).to(device), bands


def mel_bin(hz: float, sampling_rate: int = 16000, num_mel_bins: int = 128) -> float:
    """The mel bin in whose middle a frequency lies, for the ticks of an axis; between bins too."""
    lowest, highest, wanted = _hz_to_mel(
        torch.tensor([LOWEST_FREQUENCY, sampling_rate / 2, hz], dtype=torch.float64)
    ).tolist()
    return (wanted - lowest) / (highest - lowest) * (num_mel_bins + 1) - 1


def _hz_to_mel(hz: Tensor) -> Tensor:
    return 1127.0 * torch.log(1.0 + hz / 700.0)


def _mel_filters(sampling_rate: int, num_mel_bins: int, fft_size: int) -> Tensor:
    """Triangles equally spaced in mel and linear in mel (not in Hz), peak 1: (FFT bins, mel).

    At 16 kHz and 128 bins the lowest triangles are narrower than an FFT bin and one of them catches
    none: its output is the floor for every sound, in Kaldi as here.
    """
    lowest = _hz_to_mel(torch.tensor(LOWEST_FREQUENCY))
    highest = _hz_to_mel(torch.tensor(sampling_rate / 2))
    step = (highest - lowest) / (num_mel_bins + 1)
    left = lowest + step * torch.arange(num_mel_bins)
    bins = _hz_to_mel(torch.arange(fft_size // 2 + 1) * (sampling_rate / fft_size))[:, None]
    rising = (bins - left) / step
    falling = (left + 2 * step - bins) / step
    filters = torch.minimum(rising, falling).clamp_(min=0)
    filters[-1] = 0  # Kaldi leaves out the Nyquist bin
    return filters
