"""What people see of names, labels and times, in terminals, tables and pictures."""

import unicodedata

# Control and format characters, lone surrogates (bytes that are no UTF-8), line separators.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def shown(text: object) -> str:
    """Text in which whatever is not to be printed stands as its escape: `\\x1b`, `\\u202e`.

    The name of a file can hold bytes that are no text, and sequences that move a terminal's cursor
    or write its title.
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


def valid_text(name: str) -> str:
    """A file's name as text that any file can hold: bytes that are no UTF-8 as `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escaped(letter: str) -> str:
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # how Python carries an undecodable byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")
