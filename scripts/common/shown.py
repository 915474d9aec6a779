"""How names, labels and times are shown in terminals, tables and pictures."""

import unicodedata

# Control and format characters, lone surrogates (bytes that are not UTF-8), line separators.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def shown(text: object) -> str:
    """Text with everything unprintable escaped: `\\x1b`, `\\u202e`.

    File names can hold bytes that are not text, and sequences that move a terminal's cursor or set
    its title.
    """
    return "".join(
        _escaped(letter) if unicodedata.category(letter) in _ESCAPED else letter
        for letter in str(text)
    )


def readable(label: str) -> str:
    """A class's name for pictures and pages: `dog_bark` is a dog bark."""
    return shown(label).replace("_", " ").strip() or shown(label)


def clock(seconds: float, decimals: int = 0) -> str:
    """`1:05`, `1:01:05`, and with a decimal `1:05.2`."""
    units = round(seconds * 10**decimals)
    whole, fraction = divmod(units, 10**decimals)
    hours, minutes = divmod(whole // 60, 60)
    text = (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{whole % 60:02d}"
    return f"{text}.{fraction:0{decimals}d}" if decimals else text


def how_long(seconds: float) -> str:
    """`45 s`, `12 min`, `1.5 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def valid_text(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 become `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escaped(letter: str) -> str:
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # how Python represents an undecodable byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")
