"""What the numbers of a sound may be: one rule for files, arrays and tensors.

Full scale is -1..1. Floats may exceed it somewhat, as those of mixing desks do.

    integers of 8, 16, 32 bits      PCM: divided by their type's range, as soundfile does
    integers of 64 bits             refused: no sound is stored so, and the scale is anybody's guess
    int32 that never leaves 16 bits a warning: 16-bit sound, 96 dB too quiet, by the look of it
    floats beyond 32 (30 dB over)   a warning: 16-bit numbers as floats, by the look of it
    floats beyond 2**32             refused: beyond any PCM, and their powers overflow soon
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
    return f"holds values up to {peak:.3g}, and full scale is 1"


def level_warning(peak: float) -> str:
    """What is strange about it; empty if nothing is."""
    if peak <= _SUSPICIOUS:
        return ""
    return (
        f"holds values up to {peak:.6g}, and full scale is 1: integers as floats, by the look of "
        "it. Divide them by their type's range, 16-bit ones by 32768."
    )


def integer_error(bits: int) -> str:
    """What is wrong with a sound in integers of so many bits; empty if nothing is."""
    if bits <= 32:
        return ""
    return (
        f"holds integers of {bits} bits, as no sound is stored: what is full scale? Convert them "
        "to what they are, 16-bit ones with array.astype(numpy.int16)."
    )


def integer_warning(bits: int, peak: float) -> str:
    """What is strange about it, the largest magnitude, after the division, being `peak`."""
    # From 9 bits on: less may be the noise of 24-bit sound, which fills an int32's upper bits.
    if bits != 32 or not 2.0**-22 < peak <= 2.0**-16:
        return ""
    return (
        "holds 16-bit numbers in 32-bit integers, by the look of it: 96 dB below full scale. "
        "Convert them with array.astype(numpy.int16)."
    )


def warn_once(name: str, warning: str) -> None:
    """Log a warning of each kind once: what is true of one array is true of its whole data set."""
    kind = warning[-40:]
    if warning and kind not in _warned:
        _warned.add(kind)
        logger.warning("%s %s (This is said once.)", name, warning)
