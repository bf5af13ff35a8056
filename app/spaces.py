"""White space as the models have read it."""

from __future__ import annotations

# No-break, thin, ideographic spaces; tabs and other control characters, but not what breaks lines.
_SPACES = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\r"]
_TABLE = dict.fromkeys([*_SPACES, *_CONTROLS], " ")


def plain_spaces(text: str) -> str:
    """Every other kind of space, and every control character, as an ordinary space; places stay the same."""
    return text.translate(_TABLE)
