"""Texts as the translator has learned to read them: plain spaces, apostrophes and punctuation."""

from __future__ import annotations

import re

from app.spaces import plain_spaces

# Full-width letters, digits and punctuation, and the full stop and comma that go with them.
_NARROW = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3002: ".", 0x3001: ","}
_COMMA = re.compile("[\uff0c\u3001](?=[^\\s\\d])")  # wide enough to have no space behind it
_APOSTROPHE = re.compile("(?<=[A-Za-z])[\u2018\u2019\u02bc\u2032\uff07](?=[A-Za-z])")

# fmt: off
_WITHOUT = {  # an apostrophe; none that is a word of its own, as "ill", "its", "lets", "well", "were"
    **{f"{verb}nt": f"{verb}n't" for verb in (
        "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "should", "was", "were", "wo",
        "would",
    )},
    "im": "I'm", "ive": "I've", "hes": "he's", "shes": "she's", "thats": "that's", "theres": "there's",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "weve": "we've", "whats": "what's",
    "youll": "you'll", "youre": "you're", "youve": "you've",
}
# fmt: on
_SHORT = re.compile(rf"(?<![\w'’.@/-])(?:{'|'.join(_WITHOUT)})(?![\w'’@/-]|\.\w)", re.IGNORECASE)


def plain_spelling(text: str, language: str) -> str:
    """A source as it goes to the model: what is typed otherwise but means the same, in its usual form.

    `language` is a code of ISO 639-1; in English "dont" is don't.
    """
    text = _COMMA.sub(", ", plain_spaces(text)).translate(_NARROW)
    if language != "en":
        return text
    return _SHORT.sub(_with_apostrophe, _APOSTROPHE.sub("'", text))


def _with_apostrophe(match: re.Match[str]) -> str:
    word = match.group()
    if word.isupper():  # IM is a name as well
        return word
    full = _WITHOUT[word.lower()]
    return full[0].upper() + full[1:] if word[0].isupper() else full
