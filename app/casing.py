"""English in capitals, or with a capital for every word, as one writes it."""

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


# fmt: off
_IN_HEADLINES = frozenset((  # in small letters; "is" and "they" begin with a capital there
    "a", "an", "the", "of", "to", "in", "on", "at", "and", "or", "but", "with", "for", "from", "by",
    "as", "over",
))
_SMALL = frozenset((  # begun with a capital by nobody but who begins every word so; not The Hague, May, Will
    "a", "an", "of", "to", "in", "on", "at", "and", "or", "but", "is", "are", "was", "were", "be",
    "been", "am", "not", "with", "for", "from", "by", "as", "that", "this", "these", "those", "it",
    "he", "she", "we", "they", "you", "me", "him", "them", "my", "your", "his", "her", "its", "our",
    "their", "do", "does", "did", "have", "has", "had", "would", "can", "could", "should", "must",
    "there", "here", "what", "when", "where", "who", "why", "how", "if", "so", "very",
))
# fmt: on
_FEWEST_TITLED = 4  # words: three may be a name
_FEWEST_HEADLINE = 4  # words behind the first that a headline alone begins so, of five in all; three of six


def reads_badly(text: str) -> bool:
    """Has an English sentence capitals that say nothing? The model knows its words by other pieces."""
    return is_shouted(text) or is_titled(text)


def is_titled(text: str) -> bool:
    """Does every word begin with a capital, or every one but the small words, as in a headline?

    Names are lost among them, and read in small letters; else most of the other words are. A list of names,
    with nothing but "and" between them, is none.
    """
    words = _WORD.findall(text)
    if not all(word[0].isupper() or word in _IN_HEADLINES for word in words):
        return False
    capital = [word.lower() for word in words[1:] if word.istitle()]
    if any(word in _SMALL for word in capital):
        return len(words) >= _FEWEST_TITLED
    between = {word for word in words[1:] if word in _IN_HEADLINES} - {"and", "or"}
    return (
        bool(between)
        and len(words) > _FEWEST_HEADLINE
        and len(capital) >= _FEWEST_HEADLINE - (len(words) > 5)
    )


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
    shouted = is_shouted(text)

    def lower(match: re.Match[str]) -> str:
        word, (stem, *rest) = match.group(), re.split("(?=['’])", match.group(), maxsplit=1)
        ending = "".join(rest).lower()
        if stem.upper() in _TITLES:
            return _TITLES[stem.upper()] + ending
        if "." in word or stem in _ABBREVIATIONS or _KEPT.fullmatch(stem):
            return stem + ending
        if not shouted and not stem.istitle():  # NASA, McDonald, among words that only begin so
            return stem + ending
        begins = not text[: match.start()].strip(" \"'“‘(¿¡")
        return (stem[0] + stem[1:].lower() if begins else stem.lower()) + ending

    return _WORD.sub(lower, text)
