"""English in capitals, as one writes it."""

import re

_WORD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]+(?:['’][A-Za-z]+)*(?![A-Za-z0-9])")  # nor what has digits in it
_LONG = 5  # letters: two shorter words may be abbreviations
_KEPT = re.compile(r"I|[B-DF-HJ-NP-TV-XZ]+")  # without a vowel most are: TV, DVD, KTX
# fmt: off
_ABBREVIATIONS = frozenset((
    "AI", "AIDS", "API", "ASAP", "ATM", "BIOS", "CEO", "CFO", "CIA", "CIO", "COO", "COVID", "CPU",
    "CTO", "DIY", "DNA", "ETA", "ETF", "EU", "FAQ", "FBI", "FIFA", "GDP", "GPS", "GPU", "HIV", "IBM",
    "ICBM", "IMF", "IOC", "IOS", "IPO", "ISS", "KAIST", "KAL", "KBO", "KIA", "KOSDAQ", "KOSPI", "KOTRA",
    "LA", "LED", "MIT", "MP", "MVP", "NASA", "NATO", "NBA", "NGO", "NHK", "OECD", "OPEC", "PDF", "PIN",
    "POSCO", "RAM", "ROM", "SAT", "SIM", "SNS", "SUV", "UAE", "UCLA", "UFO", "UK", "UN", "UNESCO",
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
        word = match.group()
        if word in _ABBREVIATIONS:
            return word
        if match.start() == first or word.startswith(("I'", "I’")):
            return word[0] + word[1:].lower()
        if word in _TITLES:
            return _TITLES[word]
        return word if _KEPT.fullmatch(word) else word.lower()

    beginning = _WORD.search(text)
    first = beginning.start() if beginning else -1
    return _WORD.sub(lower, text)
