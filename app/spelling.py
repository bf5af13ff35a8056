"""Texts as the translator has learned to read them: plain spaces, apostrophes, digits and punctuation."""

from __future__ import annotations

import re

from app.spaces import plain_spaces

# Full-width letters, digits and punctuation, and the full stop and comma that go with them.
_NARROW = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3002: ".", 0x3001: ","}
APOSTROPHES = "\u2018\u2019\u02bc\u2032"  # but the plain one
_APOSTROPHE = re.compile(f"(?<=[A-Za-z])[{APOSTROPHES}](?=[A-Za-z])")

# fmt: off
_WITHOUT = {  # an apostrophe; none that is an everyday word of its own, as "ill", "its", "lets", "wont"
    **{f"{verb}nt": f"{verb}n't" for verb in (
        "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "should", "was", "were",
        "would",
    )},
    "im": "I'm", "ive": "I've", "hes": "he's", "shes": "she's", "thats": "that's", "theres": "there's",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "weve": "we've", "whats": "what's",
    "youll": "you'll", "youre": "you're", "youve": "you've",
}
_NAMES = frozenset(("Im", "Ive", "Hes"))  # with a capital, but before words that follow no name
_AFTER_NO_NAME = re.compile(
    r" (?:a|about|afraid|already|always|an|at|back|been|busy|coming|done|fine|from|glad|going|good|got|happy|"
    r"heard|here|home|hungry|in|just|late|looking|lost|my|never|not|okay?|on|ready|really|seen|sick|so|sorry|"
    r"still|sure|the|tired|too|trying|very|your)\b"
)
# fmt: on
_SHORT = re.compile(rf"(?<![\w'’.@/-])(?:{'|'.join(_WITHOUT)})(?![\w'’@/-]|\.\w)", re.IGNORECASE)
# A key (1️⃣) says no more than its sign; a comma has a space behind it.
_KEY_OR_COMMA = re.compile("([0-9#*])\ufe0f?\u20e3|,(?=[^\\W\\d_])")


def narrow(text: str) -> str:
    """Full-width letters, digits and punctuation as ordinary ones; places stay the same."""
    return text.translate(_NARROW)


def plain_signs(text: str, language: str) -> str:
    """A sentence in ordinary width, with ordinary spaces and, in English, apostrophes, place by place."""
    text = narrow(plain_spaces(text))
    return _APOSTROPHE.sub("'", text) if language == "en" else text


def respelt(text: str, language: str) -> list[tuple[int, int, str]]:
    """What else is spelt otherwise and means the same, as runs (start, stop, usual form), in order.

    `language` is a code of ISO 639-1; in English "dont" is don't.
    """
    found = []
    for match in _KEY_OR_COMMA.finditer(text):
        gap = " " if match[1] is None or text[match.end() : match.end() + 1].isalpha() else ""
        found.append((*match.span(), (match[1] or ",") + gap))
    if language == "en":
        found += [(*m.span(), usual) for m in _SHORT.finditer(text) if (usual := _with_apostrophe(m))]
    return sorted(found)


def _with_apostrophe(match: re.Match[str]) -> str | None:
    word = match.group()
    if word.title() in _NAMES and word != word.lower():
        is_name = word != word.title() or not _AFTER_NO_NAME.match(match.string, match.end())
        if is_name:
            return None
    full = _WITHOUT[word.lower()]
    if word.isupper():
        return full.upper()
    return full[0].upper() + full[1:] if word[0].isupper() else full
