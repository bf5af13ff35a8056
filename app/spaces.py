"""White space and composed letters as the models have read them."""

from __future__ import annotations

import re
import unicodedata

# No-break, thin, ideographic spaces; tabs and other control characters, but not what breaks lines.
_SPACES = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\r"]
_TABLE = dict.fromkeys([*_SPACES, *_CONTROLS], " ")


# Spaces without width, soft hyphens, marks of direction.
UNSEEN = "\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
_UNSEEN = re.compile(f"[{UNSEEN}]")


# Hangul as some file systems have it, and Latin letters with their marks apart.
_IN_PARTS = re.compile("(?:[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?)+|[^\\W\\d_][\u0300-\u036f]+")


def composing(text: str) -> list[tuple[int, int, str]]:
    """Letters that came in parts, as runs (start, stop, in one): they say the same."""
    return [(*m.span(), unicodedata.normalize("NFC", m.group())) for m in _IN_PARTS.finditer(text)]


def composed(text: str) -> str:
    """A text whose letters all are in one."""
    return _IN_PARTS.sub(lambda match: unicodedata.normalize("NFC", match.group()), text)


def plain(text: str) -> str:
    """A text whose places do not matter: composed, with plain spaces, without what nobody sees."""
    return plain_spaces(_UNSEEN.sub("", composed(text)))


def plain_spaces(text: str) -> str:
    """Every other kind of space, and every control character, as an ordinary space; places stay the same."""
    return text.translate(_TABLE)
