"""Log-mel filterbanks in torch, batched, on any device: Kaldi's, which AST uses, and others.

    waveform                (..., samples)          at `sampling_rate`, full scale is -1..1
    frames                  (..., frames, 400)      25 ms every 10 ms, whole ones only (snip edges)
    power spectrum          (..., frames, 257)      512-point FFT of DC-free, pre-emphasised frames
    log-mel                 (..., frames, mel)      natural logarithm, float32

The shapes are for `LogMel`'s defaults, on which AST was trained:
`torchaudio.compliance.kaldi.fbank(..., htk_compat=True, window_type="hanning", dither=0.0,
frame_shift=10)` in the original's `dataloader.py`, which in turn follows Kaldi's
`feat/feature-fbank.cc`. With `center`, frames are those of `torch.stft(center=True)`, as in AST's
descendants: pre-emphasis runs along the waveform, whose ends are reflected, and frames keep their
DC.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

FRAME_LENGTH_MS = 25
FRAME_SHIFT_MS = 10
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0  # Hz, lower edge of the first mel filter; the last one ends at Nyquist
LOG_FLOOR = torch.finfo(torch.float32).eps  # 1.1920929e-07, Kaldi's; log-mel of silence: -15.94
# Frames per pass. On a CPU, their spectra (2 MB) stay in the cache; on a GPU, this bounds the extra
# memory (7 kB per frame) and still fills the device.
_CPU_BLOCK = 1024
_GPU_BLOCK = 32768
_MEL_BANDS = 4
_MEL_SCALES = ("kaldi", "torchaudio", "htk")
_COMPRESSIONS = ("log", "log_offset", "decibels")


def frame_length(sampling_rate: int) -> int:
    """Samples in one of Kaldi's frames (25 ms)."""
    return sampling_rate * FRAME_LENGTH_MS // 1000


def frame_shift(sampling_rate: int) -> int:
    """Samples between the starts of Kaldi's neighbouring frames (10 ms)."""
    return sampling_rate * FRAME_SHIFT_MS // 1000


def num_frames(samples: int, sampling_rate: int = 16000) -> int:
    """Whole frames in a waveform; any rest is dropped (Kaldi's snip edges)."""
    return LogMel(sampling_rate).num_frames(samples)


def num_samples(frames: int, sampling_rate: int = 16000) -> int:
    """Samples of the shortest waveform that has this many frames, as Kaldi cuts them."""
    return LogMel(sampling_rate).num_samples(frames)


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
        out: (..., frames, num_mel_bins), contiguous float32 to write to instead of a new tensor.

    Returns:
        (..., frames, num_mel_bins), float32, on the waveform's device; frames =
        1 + (samples - 400) // 160 at 16 kHz.

    Raises:
        ValueError: if the waveform is shorter than one frame or not floating point.
    """
    return LogMel(sampling_rate, num_mel_bins)(waveform, out=out)


@dataclass(frozen=True)
class LogMel:
    """A log-mel filterbank and its parameters; the defaults are Kaldi's.

    Raises:
        ValueError: if the numbers do not describe a filterbank.
    """

    sampling_rate: int = 16000  # Hz
    num_mel_bins: int = 128  # triangular filters
    win_length: int | None = None  # samples in a frame; None: 25 ms
    hop_length: int | None = None  # samples from one frame to the next; None: 10 ms
    n_fft: int | None = None  # points of the FFT; None: win_length or the next power of two
    frequency_min: float = LOWEST_FREQUENCY  # Hz, lower edge of the first filter
    frequency_max: float | None = None  # Hz, upper edge of the last one; None: Nyquist
    mel_scale: str = "kaldi"  # "torchaudio": rounded as its port; "htk": triangles in Hz
    preemphasis: float = PREEMPHASIS
    center: bool = False  # frames centred on multiples of hop_length, with reflected ends
    periodic_window: bool = False  # Hann window: periodic (for an FFT) instead of symmetric
    compression: str = "log"  # log(max(x, floor)), or "log_offset": log(x + floor), or "decibels"
    mel_floor: float = LOG_FLOOR  # of the power in a mel bin
    dynamic_range: float | None = None  # with "decibels": floor, relative to the clip's loudest bin

    def __post_init__(self) -> None:
        for name, choices in (("mel_scale", _MEL_SCALES), ("compression", _COMPRESSIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )
        if not 0 < self.frame_shift <= self.frame_length <= self.fft_size <= 2**16:
            raise ValueError(
                "hop_length <= win_length <= n_fft <= 65536 must hold, got "
                f"{self.frame_shift}, {self.frame_length} and {self.fft_size} samples."
            )
        if not 0 <= self.frequency_min < self.highest_frequency <= self.sampling_rate / 2:
            raise ValueError(
                f"Mel filters must lie between 0 Hz and half the sampling rate of "
                f"{self.sampling_rate} Hz, got frequency_min={self.frequency_min} and "
                f"frequency_max={self.frequency_max}."
            )
        if not (math.isfinite(self.mel_floor) and self.mel_floor > 0):
            raise ValueError(f"mel_floor must be a number above 0, got {self.mel_floor!r}.")
        if not 0 <= self.preemphasis <= 1:
            raise ValueError(f"preemphasis must be from 0 to 1, got {self.preemphasis!r}.")
        if self.dynamic_range is not None and not self.dynamic_range > 0:
            raise ValueError(f"dynamic_range must be above 0, got {self.dynamic_range!r}.")

    @property
    def frame_length(self) -> int:
        """Samples in one frame."""
        return frame_length(self.sampling_rate) if self.win_length is None else self.win_length

    @property
    def frame_shift(self) -> int:
        """Samples between the starts of neighbouring frames."""
        return frame_shift(self.sampling_rate) if self.hop_length is None else self.hop_length

    @property
    def fft_size(self) -> int:
        """Samples in a zero-padded frame: Kaldi rounds up to a power of two."""
        return 1 << (self.frame_length - 1).bit_length() if self.n_fft is None else self.n_fft

    @property
    def highest_frequency(self) -> float:
        """Upper edge of the last mel filter, in Hz."""
        return self.sampling_rate / 2 if self.frequency_max is None else self.frequency_max

    @property
    def floor(self) -> float:
        """The log-mel value of silence."""
        if self.compression == "decibels":
            return 10 * math.log10(self.mel_floor)
        return math.log(self.mel_floor)

    @property
    def _lost(self) -> int:
        """Samples lost to pre-emphasis along the waveform: the first has no predecessor."""
        return int(self.center and self.preemphasis > 0)

    @property
    def reflected(self) -> tuple[int, int]:
        """Samples reflected at a waveform's start and end: frames extend that far."""
        if not self.center:
            return 0, 0
        before = self.fft_size // 2 - (self.fft_size - self.frame_length) // 2
        return before, self.frame_length - before

    @property
    def shortest(self) -> int:
        """Length in samples of the shortest waveform that yields a frame."""
        return self.fft_size // 2 + 1 + self._lost if self.center else self.frame_length

    def mel_bin(self, hz: float) -> float:
        """The mel bin centred on a frequency, fractional between bins; for the ticks of an axis."""
        edges = torch.tensor([self.frequency_min, self.highest_frequency, hz], dtype=torch.float64)
        lowest, highest, wanted = _hz_to_mel(edges).tolist()
        return (wanted - lowest) / (highest - lowest) * (self.num_mel_bins + 1) - 1

    def num_frames(self, samples: int) -> int:
        """Number of frames in a waveform."""
        if samples < self.shortest:
            return 0
        whole = samples - self._lost if self.center else samples - self.frame_length
        return 1 + whole // self.frame_shift

    def num_samples(self, frames: int) -> int:
        """Length in samples of the shortest waveform with this many frames."""
        start_of_last = (frames - 1) * self.frame_shift
        if self.center:
            return max(start_of_last + self._lost, self.shortest)
        return start_of_last + self.frame_length

    def samples_used(self, frames: int) -> int:
        """Samples at the start of a waveform that its first frames depend on."""
        return (frames - 1) * self.frame_shift + self._lost + self.frame_length

    def __call__(self, waveform: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(..., samples), floating point -> (..., frames, num_mel_bins), float32, same device.

        Args:
            waveform: any leading axes.
            out: (..., frames, num_mel_bins), contiguous float32 to write to.

        Raises:
            ValueError: when the waveform is shorter than one frame or not floating point.
        """
        if not waveform.is_floating_point():
            raise ValueError(
                f"A filterbank needs a floating-point waveform in -1..1, got {waveform.dtype}; "
                "divide integer PCM by its type's range (32768 for int16)."
            )
        if waveform.shape[-1] < self.shortest:
            raise ValueError(
                f"The waveform has {waveform.shape[-1]} samples, fewer than one frame of "
                f"{self.shortest} ({1000 * self.shortest / self.sampling_rate:g} ms at "
                f"{self.sampling_rate} Hz). Pad it with silence."
            )
        clips = waveform.detach().float().reshape(-1, waveform.shape[-1])  # (clips, samples)
        log_mel = self.of_extended(self.extend(clips), out=out, shape=waveform.shape[:-1])
        return self.limit(log_mel)

    def extend(self, clips: Tensor) -> Tensor:
        """(clips, samples) -> pre-emphasised and reflected, ready for cutting frames."""
        if not self.center:
            return clips
        if self.preemphasis:
            clips = clips[:, 1:] - self.preemphasis * clips[:, :-1]
        return pad(clips[:, None], self.reflected, mode="reflect")[:, 0]

    def of_extended(
        self, clips: Tensor, *, out: Tensor | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """(clips, samples) of `extend` -> log-mel (*shape, frames, mel) without `limit`."""
        frames = clips.unfold(-1, self.frame_length, self.frame_shift)  # a view
        window, mel_bands = _constants(self, frames.device)
        whole = (*(frames.shape[:1] if shape is None else shape), frames.shape[1])
        if out is None:
            out = frames.new_empty(*whole, self.num_mel_bins)
        elif (
            out.shape != (*whole, self.num_mel_bins)
            or out.dtype != frames.dtype
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"out must be contiguous float32 {(*whole, self.num_mel_bins)}, got "
                f"{tuple(out.shape)}."
            )
        log_mel = out.view(*frames.shape[:2], self.num_mel_bins)
        block = _CPU_BLOCK if frames.device.type == "cpu" else _GPU_BLOCK
        clips_per_block = max(1, block // frames.shape[1])
        for some_frames, some_log_mel in zip(
            frames.split(clips_per_block), log_mel.split(clips_per_block), strict=True
        ):
            for part, target in zip(
                some_frames.split(block, dim=1), some_log_mel.split(block, dim=1), strict=True
            ):
                self._write_log_mel(target, part, window, mel_bands)
        return out

    def limit(self, log_mel: Tensor, is_valid: Tensor | None = None) -> Tensor:
        """Clamp values, in place, to at most `dynamic_range` below the clip's loudest bin.

        Args:
            log_mel: (..., frames, mel).
            is_valid: (..., frames), False for padding; None: all are sound.
        """
        if self.dynamic_range is None:
            return log_mel
        heard = log_mel
        if is_valid is not None:
            heard = log_mel.masked_fill(~is_valid[..., None], -math.inf)
        loudest = heard.amax(dim=(-2, -1), keepdim=True)
        return torch.maximum(log_mel, loudest - self.dynamic_range, out=log_mel)

    def compress(self, mel: Tensor) -> Tensor:
        """Powers in mel bins -> logarithms, in place."""
        if self.compression == "log_offset":
            return mel.add_(self.mel_floor).log_()
        mel.clamp_(min=self.mel_floor)
        return mel.log_() if self.compression == "log" else mel.log10_().mul_(10)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The computation from frames to mel powers as two matrices, for graphs without an FFT.

        All steps up to the spectrum are linear, so their response to unit impulses defines them.
        Computed in float64 by the same code that featurises sound.

        Returns:
            spectrum (frame length, 2 * FFT bins): a frame times this is the real and the imaginary
            part of its spectrum; mel filters (FFT bins, mel): the power spectrum times this is the
            mel spectrum, before `compress` and `limit`. Both float32.
        """
        window = torch.hann_window(self.frame_length, periodic=self.periodic_window)
        impulses = torch.eye(self.frame_length, dtype=torch.float64)
        spectrum = self._spectrum(impulses, window)
        return torch.cat([spectrum.real, spectrum.imag], dim=-1).float(), self._mel_filters()

    def _write_log_mel(
        self, log_mel: Tensor, frames: Tensor, window: Tensor, mel_bands: list
    ) -> None:
        """(..., frames, length) -> (..., frames, mel), into `log_mel`."""
        squares = torch.view_as_real(self._spectrum(frames, window)).square_()  # of both parts
        power = squares[..., 0] + squares[..., 1]
        first = 0
        for bins, filters in mel_bands:
            last = first + filters.shape[1]
            torch.matmul(power[..., bins], filters, out=log_mel[..., first:last])
            first = last
        self.compress(log_mel)

    def _spectrum(self, frames: Tensor, window: Tensor) -> Tensor:
        """(..., frames, length) -> (..., frames, FFT bins), complex.

        Every step rounds as in torchaudio, whether its port of Kaldi or `torch.stft`: filters that
        contain only the rounding noise of a loud frame would reveal any other order of operations.
        """
        size, length = self.fft_size, self.frame_length
        padded = frames.new_zeros(*frames.shape[:-1], size)
        if self.center:
            before = (size - length) // 2
            torch.mul(frames, window, out=padded[..., before : before + length])
            return torch.fft.rfft(padded)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        scaled = frames * self.preemphasis
        windowed = padded[..., :length]
        torch.sub(frames[..., 1:], scaled[..., :-1], out=windowed[..., 1:])
        torch.sub(frames[..., :1], scaled[..., :1], out=windowed[..., :1])  # against itself
        windowed.mul_(window)
        return torch.fft.rfft(padded)

    def _mel_filters(self) -> Tensor:
        """Triangles equally spaced in mel, peak 1: (FFT bins, mel).

        At 16 kHz and 128 bins, the lowest triangles are narrower than an FFT bin, and one of them
        contains none: its output is the floor for every sound, in Kaldi too. Where only the edge of
        a triangle touches a bin, rounding shows: log-mel differs by up to 4e-4 between "kaldi", the
        filters used here for AST, and "torchaudio", which AST's descendants were trained with.
        """
        if self.mel_scale == "htk":
            return self._htk_filters()
        fft_bins = torch.arange(self.fft_size // 2 + 1)
        bins = _hz_to_mel(fft_bins * (self.sampling_rate / self.fft_size))[:, None]
        number = torch.arange(self.num_mel_bins)
        if self.mel_scale == "torchaudio":
            lowest, highest = (
                1127.0 * math.log(1.0 + hz / 700.0)
                for hz in (self.frequency_min, self.highest_frequency)
            )
            step = (highest - lowest) / (self.num_mel_bins + 1)
            left, peak, right = (lowest + (number + corner) * step for corner in (0.0, 1.0, 2.0))
            rising, falling = (bins - left) / (peak - left), (right - bins) / (right - peak)
        else:
            edges = torch.tensor([self.frequency_min, self.highest_frequency])
            lowest_mel, highest_mel = _hz_to_mel(edges)
            width = (highest_mel - lowest_mel) / (self.num_mel_bins + 1)
            left = lowest_mel + width * number
            rising, falling = (bins - left) / width, (left + 2 * width - bins) / width
        filters = torch.minimum(rising, falling).clamp_(min=0)
        filters[-1] = 0  # Kaldi omits the Nyquist bin
        return filters

    def _htk_filters(self) -> Tensor:
        """torchaudio's and librosa's HTK scale: triangles with straight sides in Hz, not in mel."""
        lowest, highest = (
            2595.0 * math.log10(1.0 + hz / 700.0)
            for hz in (self.frequency_min, self.highest_frequency)
        )
        corners = torch.linspace(lowest, highest, self.num_mel_bins + 2)
        corners = 700.0 * (10.0 ** (corners / 2595.0) - 1.0)  # Hz
        left, peak, right = corners[:-2], corners[1:-1], corners[2:]
        bins = torch.linspace(0, self.sampling_rate // 2, self.fft_size // 2 + 1)[:, None]
        rising = (bins - left) / (peak - left)
        falling = (right - bins) / (right - peak)
        return torch.minimum(rising, falling).clamp_(min=0)


def _hz_to_mel(hz: Tensor) -> Tensor:
    return 1127.0 * torch.log(1.0 + hz / 700.0)


@lru_cache(maxsize=8)
def _constants(log_mel: LogMel, device: torch.device) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The Hann window (length,) and the mel filters, grouped into bands of neighbouring filters.

    A filter covers few FFT bins, and a band not many more: multiplying band by band is 2.7 times as
    fast as with the whole matrix (FFT bins, mel). A band is a slice of the FFT bins and its filters
    (bins in the slice, mel in the band).
    """
    filters = log_mel._mel_filters()
    bands = []
    for band in filters.split(-(-log_mel.num_mel_bins // _MEL_BANDS), dim=1):
        covered = band.any(dim=1).nonzero().flatten().tolist() or [0]
        bins = slice(covered[0], covered[-1] + 1)
        bands.append((bins, band[bins].contiguous().to(device)))
    window = torch.hann_window(log_mel.frame_length, periodic=log_mel.periodic_window)
    return window.to(device), bands


def mel_bin(hz: float, sampling_rate: int = 16000, num_mel_bins: int = 128) -> float:
    """The mel bin of Kaldi's filterbank centred on a frequency: `LogMel.mel_bin`."""
    return LogMel(sampling_rate, num_mel_bins).mel_bin(hz)
