"""English in capitals, as one writes it."""

import re

# A word, or letters with full stops (U.S.); nothing that has digits in it.
_WORD = re.compile(r"(?<![^\W_])(?:(?:[A-Za-z]\.){2,}|[A-Za-z]+(?:['’][A-Za-z]+)*)(?![^\W_])")
_LONG = 5  # letters: two shorter words may be abbreviations
_KEPT = re.compile(r"I|[B-DF-HJ-NP-TV-XZ]+")  # without a vowel most are: TV, DVD, KTX
# fmt: off
_ABBREVIATIONS = frozenset((
    "AI", "API", "ASAP", "ATM", "BIOS", "CEO", "CFO", "CIA", "CIO", "COO", "COVID", "CPU",
    "CTO", "DIY", "DNA", "ETA", "ETF", "EU", "FAQ", "FBI", "FIFA", "GDP", "GPS", "GPU", "HIV", "IBM",
    "ICBM", "IMF", "IOC", "IOS", "IPO", "ISS", "KAIST", "KAL", "KBO", "KIA", "KOSDAQ", "KOSPI", "KOTRA",
    "MP", "MVP", "NASA", "NATO", "NBA", "NGO", "NHK", "OECD", "OPEC", "PDF",
    "POSCO", "SNS", "SUV", "UAE", "UCLA", "UFO", "UK", "UN", "UNESCO",
    "UNICEF", "URL", "USA", "USB", "VIP", "WIFI", "WTO",
))
# fmt: on
_TITLES = {"MR": "Mr", "MRS": "Mrs", "MS": "Ms", "DR": "Dr", "ST": "St"}


def is_shouted(text: str) -> bool:
    """Is an English sentence all in capitals, and more than a name or two?"""
    words = _WORD.findall(text)
    if text != text.upper() or len(words) < 2:
        return False
    return len(words) > 2 or any(len(word) >= _LONG for word in words)


def in_small_letters(text: str) -> str:
    """But for the beginning, "I" and abbreviations; of ASCII letters, so that places stay the same.

    In capitals a word falls into other and more pieces of the vocabulary than the model has learned it by.
    """

    def lower(match: re.Match[str]) -> str:
        word, (stem, *rest) = match.group(), re.split("(?=['’])", match.group(), maxsplit=1)
        ending = "".join(rest).lower()
        if stem in _TITLES:
            return _TITLES[stem] + ending
        if "." in word or stem in _ABBREVIATIONS or _KEPT.fullmatch(stem):
            return stem + ending
        begins = not text[: match.start()].strip(" \"'“‘(¿¡")
        return (stem[0] + stem[1:].lower() if begins else stem.lower()) + ending

    return _WORD.sub(lower, text)
