"""Which language a text is in: Hangul tells Korean, a classifier of some hundred languages what is foreign.

Without a clear sign of another language a text in Latin letters is taken for English, because people type
"ok" and "i go home", of which nobody could tell.
"""

import re
from dataclasses import dataclass
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_LETTER = re.compile(r"[^\W\d_]")
# The beginning of a text says what it is in; the classifier's time grows with the length.
_MAX_CHARS = 1000
# To call a text in Latin letters foreign takes so many letters and words, and so much certainty: 1 of 2,936
# English sentences would have been.
_MIN_LETTERS, _MIN_WORDS, _MIN_PROBABILITY = 9, 3, 0.45
_ENGLISH = ("en", "pcm")  # Nigerian Pidgin is told from English only at length
NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian",
    "lv": "Latvian",
    "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Detected:
    """A language, and how probable it is: 0 to 1."""

    code: str
    probability: float

    @property
    def name(self) -> str:
        return NAMES.get(self.code, self.code)


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def load() -> None:
    """Read the classifier's tables now, which takes about a second, instead of at the first question."""
    _identifier()


def detect_language(text: str) -> Detected:
    """Korean where there is a letter of Hangul to two Latin ones or fewer; else English."""
    n_letters, n_hangul = len(_LETTER.findall(text)), len(_HANGUL.findall(text))
    n_latin = len(_LATIN.findall(text))
    if n_hangul and 2 * n_hangul >= n_latin:
        return Detected("ko", 2 * n_hangul / (n_hangul + n_letters))
    if not n_letters:
        return Detected("en", 0.0)
    ranked = _rank(_HANGUL.sub(" ", text)[:_MAX_CHARS])
    english = sum(ranked.get(code, 0.0) for code in _ENGLISH)
    foreign = next(code for code in ranked if code not in (*_ENGLISH, "ko"))
    if 2 * n_latin < n_letters - n_hangul or _is_foreign(text, ranked[foreign], n_latin):
        return Detected(foreign, ranked[foreign])
    return Detected("en", english)


def _is_foreign(text: str, probability: float, n_latin: int) -> bool:
    enough = n_latin >= _MIN_LETTERS and len(text.split()) >= _MIN_WORDS
    return enough and probability >= _MIN_PROBABILITY


def _rank(text: str) -> dict[str, float]:
    """Languages with their probabilities, the likeliest first."""
    return dict(_identifier().rank(text))
