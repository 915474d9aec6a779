"""Valid sample values: one rule for files, arrays and tensors.

Full scale is -1..1. Floats may exceed it somewhat, like those of mixing desks.

    integers of 8, 16, 32 bits      PCM: divided by their type's range, as soundfile does
    integers of 64 bits             refused: no sound is stored like this; the scale is unknown
    int32 that never leaves 16 bits a warning: it looks like 16-bit sound, 96 dB too quiet
    floats beyond 32 (30 dB over)   a warning: they look like 16-bit integers stored as floats
    floats beyond 2**32             refused: beyond any PCM, and their powers soon overflow
    NaN, infinity                   refused
"""

import logging
import math

logger = logging.getLogger(__name__)

LOUDEST = 2.0**32
_SUSPICIOUS = 32.0
_warned: set[str] = set()


def level_error(peak: float) -> str:
    """What is wrong with a sound of this largest magnitude; empty if nothing is."""
    if peak <= LOUDEST:
        return ""
    if not math.isfinite(peak):
        return "holds NaN or infinite values"
    return f"holds values up to {peak:.3g}; full scale is 1"


def level_warning(peak: float) -> str:
    """What looks suspicious about it; empty if nothing does."""
    if peak <= _SUSPICIOUS:
        return ""
    return (
        f"holds values up to {peak:.6g}; full scale is 1. These look like integers stored as "
        "floats: divide them by their type's range, 32768 for 16 bits."
    )


def integer_error(bits: int) -> str:
    """What is wrong with a sound stored as integers of this many bits; empty if nothing is."""
    if bits <= 32:
        return ""
    return (
        f"holds integers of {bits} bits. No sound is stored like this, so full scale is unknown. "
        "Convert them to their real type, for 16 bits with array.astype(numpy.int16)."
    )


def integer_warning(bits: int, peak: float) -> str:
    """What looks suspicious, given the largest magnitude after division, `peak`."""
    # From 9 bits up: less could be the noise of 24-bit sound, which fills an int32's upper bits.
    if bits != 32 or not 2.0**-22 < peak <= 2.0**-16:
        return ""
    return (
        "looks like 16-bit sound stored in 32-bit integers, 96 dB too quiet. Convert it with "
        "array.astype(numpy.int16)."
    )


def warn_once(name: str, warning: str) -> None:
    """Log each kind of warning once: what is true of one array is true of its whole dataset."""
    kind = warning[-40:]
    if warning and kind not in _warned:
        _warned.add(kind)
        logger.warning("%s %s (This warning is shown once.)", name, warning)
