"""Signs as words: units in one character, money behind its number, numbers in circles, halves.

A translator that has not met 85㎡ takes it for kilometers, and 20€ for a sign of set theory.
"""

from __future__ import annotations

import re

# fmt: off
_ONE = {
    "㎞": "km", "㎝": "cm", "㎜": "mm", "㎛": "μm", "㎏": "kg", "㎎": "mg", "㎖": "mL", "ℓ": "L", "㎗": "dL",
    "㏄": "cc", "㎐": "Hz", "㎑": "kHz", "㎒": "MHz", "㎓": "GHz", "㎾": "kW", "㏊": "ha",
    "℃": "°C", "℉": "°F",
    "Ⅰ": "I", "Ⅱ": "II", "Ⅲ": "III", "Ⅳ": "IV", "Ⅴ": "V", "Ⅵ": "VI", "Ⅶ": "VII", "Ⅷ": "VIII", "Ⅸ": "IX",
    "Ⅹ": "X", "Ⅺ": "XI", "Ⅻ": "XII",
    **{chr(ord("①") + i): f"({i + 1})" for i in range(20)},
}
_AREAS = {"㎡": "m²", "㎢": "km²", "㎠": "cm²", "㎥": "m³", "㎤": "cm³"}
_POWERS = {"en": {"²": "square ", "³": "cubic "}, "ko": {"²": "제곱", "³": "세제곱"}}
_LENGTHS = {
    "en": {"m": "meter", "km": "kilometer", "cm": "centimeter"},
    "ko": {"m": "미터", "km": "킬로미터", "cm": "센티미터"},
}
_MONEY = {
    "en": {"€": "euros", "£": "pounds", "₩": "won", "¥": "yen"},
    "ko": {"€": "유로", "£": "파운드", "₩": "원", "¥": "엔", "$": "달러"},
}
# fmt: on
_PARTS = {"½": "5", "¼": "25", "¾": "75"}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}

_SIGN = re.compile(
    # One and a half apples lost the one.
    rf"(?P<whole>(?<![\d./,])\d{{1,4}}) ?(?P<part>[{''.join(_PARTS)}])(?![\d/])"
    rf"|(?P<fraction>[{''.join(_FRACTIONS)}])"
    rf"|(?P<one>[{''.join(_ONE)}])"
    rf"|(?P<area>[{''.join(_AREAS)}]|(?:(?<=\d)|(?<=\d )|(?<=per )|(?<=/))[kc]?m[²³])"
    r"|(?<![€£₩¥$\d.,])(?<![€£₩¥$] )(?P<sum>\d{1,3}(?:,\d{3})+(?:\.\d{1,2})?|\d{1,12}(?:[.,]\d{1,2})?)"
    r" ?(?P<money>[€£₩¥$])(?! ?\d)"
)


def in_full(text: str, language: str) -> list[tuple[int, int, str]]:
    """The signs of a sentence as runs (start, stop, how they are written in words), in order.

    `language`, a code of ISO 639-1, is the text's own; in one other than English and Korean units of area and
    signs of money stay.
    """
    found = []
    for match in _SIGN.finditer(text):
        start, stop = match.span()
        if match["whole"]:
            found.append((match.end("whole"), stop, f".{_PARTS[match['part']]}"))
        elif match["fraction"]:
            gap = " " if text[start - 1 : start].isdigit() else ""
            found.append((start, stop, gap + _FRACTIONS[match["fraction"]]))
        elif match["one"]:
            gap = " " if match["one"] <= "⓿" and text[start - 1 : start].isalpha() else ""
            found.append((start, stop, gap + _ONE[match["one"]]))
        elif match["area"] and language in _LENGTHS:
            found.append((start, stop, _area(match, language)))
        elif match["money"] and match["money"] in _MONEY.get(language, ()):
            word = _MONEY[language][match["money"]]
            found.append((match.end("sum"), stop, f" {word}" if language == "en" else word))
    return found


def _area(match: re.Match[str], language: str) -> str:
    area = _AREAS.get(match["area"], match["area"])
    words = _POWERS[language][area[-1]] + _LENGTHS[language][area[:-1]]
    if language != "en":
        return words
    before = match.string[: match.start()].rstrip()
    is_one = re.search(r"(?<![\d.,])1$", before[-3:]) is not None
    gap = " " if before and before == match.string[: match.start()] else ""
    return f"{gap}{words}" + ("s" if before[-1:].isdigit() and not is_one else "")
