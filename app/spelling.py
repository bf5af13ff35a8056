"""Texts as the translator has learned to read them: plain spaces, apostrophes, digits and punctuation."""

from __future__ import annotations

import re

from app.signs import in_full
from app.spaces import UNSEEN, plain_spaces
from app.typos import corrected, in_case

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
# Spaces without width, soft hyphens, marks of direction; and the second space of several.
_UNSEEN = re.compile(f"(?<= )[{UNSEEN} ]+|[{UNSEEN}]+")
_UNITS = {"min": "minute", "hr": "hour", "sec": "second"}
# No. 7, but not: he said no. 3 people left; and a time, whose unit no other noun follows.
_BEHIND_NUMBER = r"\W*$|[,;:)]| (?:is|was|has|and|or|on|in|of|at|to|for|bus|train)\b"
_BEHIND_TIME = r"and|or|to|from|by|later|ago|away|walk|drive|ride|before|after|long|left|each"
_IN_FULL = re.compile(
    rf"(?<![\w.,])(?:(?P<number>[Nn]o)\. ?(?=\d+(?:{_BEHIND_NUMBER}))"
    r"|(?P<short>A\.I\.|e\.g\.|i\.e\.)(?!\w)"
    r"|(?P<count>[0-9]{1,4})(?P<unit> ?(?:min|hr|sec)s?)\b"
    rf"(?:(?=\.?\W*$|[,;)])|\.?(?= (?:{_BEHIND_TIME})\b)))"
)
# 20yrs, but not 20 yrs of age, which is read well; Mar 5, Tue, May 7; 3월 5일(화).
# fmt: off
_GLUED = {"yr": "year", "hr": "hour", "min": "minute", "sec": "second", "wk": "week"}
_MONTHS = {
    "Jan": "January", "Feb": "February", "Mar": "March", "Apr": "April", "Jun": "June", "Jul": "July",
    "Aug": "August", "Sep": "September", "Sept": "September", "Oct": "October", "Nov": "November",
    "Dec": "December",
}
_DAYS = {
    "Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday",
    "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday",
}
# fmt: on
_MONTH = "|".join(_MONTHS)
_CALENDAR = re.compile(
    rf"(?<![\w.,-])(?P<count>\d{{1,4}})(?P<unit>{'|'.join(_GLUED)})s?\b(?!\.\w)"
    rf"|\b(?P<month>{_MONTH})\b\.?(?= \d{{1,2}}(?:st|nd|rd|th)?\b(?!:| (?:times|more)\b))"
    rf"|(?<=\d )(?P<last>{_MONTH})\b(?:\.?(?=,? \d{{4}}\b)|(?=[,;.]?(?:\s|$)))"
    r"|(?<![\d.,:])(?P<hour>(?:1[0-2]|0?[1-9])(?::[0-5]\d)?) ?(?P<half>[AP])\.?M(?:\.|\b)(?!\w| radio)"
    r"|(?:^|(?<=[(/])|(?<=, )|(?<=on )|(?<=is )|(?<=or )|(?<=by )|(?<=and )|(?<=next )|(?<=this )|(?<=til ))"
    rf"(?P<day>{'|'.join(_DAYS)})\b\.?"
    rf"(?=,? (?:(?:{_MONTH}|May)[a-z]*\b\.? \d|\d{{1,2}}(?::\d\d)? ?[ap]\.?m\b))"
)
_DAY_IN_BRACKETS = re.compile(r"(?<=\d일) ?\((?P<day>[월화수목금토일])(?:요일)?\)")
_SHORT_FORMS = {"A.I.": "AI", "e.g.": "for example", "i.e.": "that is"}

# Words of which chats write the first consonants alone.
# fmt: off
_CONSONANTS = {
    "ㅇㅇ": "응", "ㄴㄴ": "아니", "ㄱㅅ": "고마워", "ㅇㅋ": "알았어", "ㅈㅅ": "미안", "ㅊㅋ": "축하해",
    "ㄹㅇ": "진짜", "ㄱㄱ": "가자", "ㅎㅇ": "안녕", "ㅂㅂ": "잘 가", "ㅅㄱ": "수고했어", "ㅇㄷ": "어디야",
    "ㅁㅎ": "뭐 해",
}
# fmt: on
_IN_CONSONANTS = re.compile(rf"(?<![가-힣ㄱ-ㅣ])(?:{'|'.join(_CONSONANTS)})(?![가-힣ㄱ-ㅣ])")


def narrow(text: str) -> str:
    """Full-width letters, digits and punctuation as ordinary ones; places stay the same."""
    return text.translate(_NARROW)


def plain_signs(text: str, language: str) -> str:
    """A sentence in ordinary width, with ordinary spaces and, in English, apostrophes, place by place."""
    text = narrow(plain_spaces(text))
    return _APOSTROPHE.sub("'", text) if language == "en" else text


def respelt(text: str, language: str) -> list[tuple[int, int, str]]:
    """What else is spelt otherwise and means the same, as runs (start, stop, usual form), in order.

    `language` is a code of ISO 639-1; in English "dont" is don't, and "No. 7" number 7. Signs stand in words.
    """
    found = [(*match.span(), "") for match in _UNSEEN.finditer(text)]
    found += in_full(text, language)
    found += corrected(text, language)
    for match in _KEY_OR_COMMA.finditer(text):
        gap = " " if match[1] is None or text[match.end() : match.end() + 1].isalpha() else ""
        found.append((*match.span(), (match[1] or ",") + gap))
    if language == "en":
        found += [(*m.span(), usual) for m in _SHORT.finditer(text) if (usual := _with_apostrophe(m))]
        found += [(*m.span(), _in_full(m)) for m in _IN_FULL.finditer(text)]
        taken = {start for start, *_ in found}
        found += [
            run for m in _CALENDAR.finditer(text) if (run := (*m.span(), _of_calendar(m)))[0] not in taken
        ]
    if language == "ko":
        found += [(*m.span(), _CONSONANTS[m.group()]) for m in _IN_CONSONANTS.finditer(text)]
        found += [(*m.span(), f" {m['day']}요일") for m in _DAY_IN_BRACKETS.finditer(text)]
    return sorted(found)


def _in_full(match: re.Match[str]) -> str:
    if match["number"]:
        return "Number " if match["number"][0] == "N" and match.start() == 0 else "number "
    if match["short"]:
        return _SHORT_FORMS[match["short"]]
    unit = _UNITS[match["unit"].strip().removesuffix("s")]
    is_one = int(match["count"]) == 1 or match.string.startswith((" walk", " drive", " ride"), match.end())
    return f"{match['count']} {unit}" + ("" if is_one else "s")


def _of_calendar(match: re.Match[str]) -> str:
    if match["unit"]:
        return f"{match['count']} {_GLUED[match['unit']]}" + ("" if int(match["count"]) == 1 else "s")
    if match["half"]:
        return f"{match['hour']} {match['half'].lower()}.m."
    return _DAYS[match["day"]] if match["day"] else _MONTHS[match["month"] or match["last"]]


def _with_apostrophe(match: re.Match[str]) -> str | None:
    word = match.group()
    if word.title() in _NAMES and word != word.lower():
        is_name = word != word.title() or not _AFTER_NO_NAME.match(match.string, match.end())
        if is_name:
            return None
    return in_case(word, _WITHOUT[word.lower()])
