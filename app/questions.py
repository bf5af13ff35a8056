"""Questions that somebody typed without their mark, which tells them from statements."""

from __future__ import annotations

import re

_LONGEST = 200  # characters

# A verb before its subject, or a question word with a verb. What may be anything else is left alone: do the
# dishes, should you need me, which is why, how much I love you.
_WHO = r"(?:you|u|we|they|i|he|she|it|there|any(?:one|body)|some(?:one|body)|(?:your|my|his|her|the) \w+)"
_ENGLISH = re.compile(
    r"(?:(?:hey|ok(?:ay)?|oh|well|hi|hello),? )?(?:"
    r"(?:do|have|am|don't|haven't|should|shouldn't|can|will|shall) (?:you|u|we|they|i) \w"
    rf"|(?:does|did|are|is|was|has|could|doesn't|didn't|aren't|isn't|wasn't|can't|couldn't) {_WHO} \w"
    rf"|(?:can|will|won't) {_WHO} \w|(?:would|were|wouldn't|weren't|won't) (?:you|u) \w)"
    r"|(?:(?:hey|so|and|but|ok(?:ay)?|oh|well|hi|hello),? )?(?:"
    r"(?:what|where|when|why|how|who)(?:'s| (?:is|are|r|was|were|do|does|did|can|could|will|would|should)) \w"
    r"|which (?:one|of|\w+) (?:do|does|did|is|are|should|would) \w"
    r"|how (?:much|long|far|often|old|big|tall|late)"
    r" (?:is|are|r|was|were|do|does|did|will|can|should|have|has) \w"
    r"|how (?:many|much) \w+ (?:do|does|did|are|is|were|can|will|should|have) \w|how about \w"
    r"|what (?:time|day|kind of \w+) (?:is|are|do|does|did|will|can|should) \w)",
    re.IGNORECASE,
)
# You like it, don't you. Without its comma only what nothing else can be: my keys weren't there.
_ENGLISH_TAG = re.compile(
    r"(?:[\w']+,? ){1,29}[\w']+, "
    r"(?:(?:is|are|was|were|do|does|did|have|has|could|would|should)n't|won't|can't) "
    r"(?:it|he|she|they|we|you|i|there)"
    r"|(?:it's|this is|that's|that is|nice|good|great|lovely|beautiful|cold|hot) (?:[\w']+ ){1,20}isn't it",
    re.IGNORECASE,
)
_ENGLISH_STATEMENT = re.compile(
    r"(?:should you (?:have|need|wish|want|require|be|find)|what's new in)\b"
    # What is done is done: the question word stands for a thing.
    r"|(?:what|who|where|when|how)\b.* (?:is|was|will|does|depends?|makes?) "
    r".*\b(?:is|was|will|makes?|depends?)\b",
    re.IGNORECASE,
)
# fmt: off
_DO = (
    "해|하니|하세요|했어|하고 있어|하고 싶어|할래|할까|먹어|먹니|먹었어|먹을래|먹고 싶어|드세요|드셨어|"
    "드실래|마셔|마실래|사|샀어|봐|봤어|보고 있어|원해|입어|시켰어|필요해|있어"
)
# fmt: on
_KOREAN = re.compile(
    r"(?:^|.*\s)(?:"
    r"(?:뭐|어디|언제|누구|얼마)(?:야|예요|에요|지|죠)$"
    rf"|(?:뭐|뭘|뭐를|무얼) (?:\S+ ){{0,2}}(?:{_DO})요?$"
    r"|(?:어디|어디서|어디에|어디에서|어디로|어디까지) (?:\S+ ){0,2}(?:가|\S*[어아해와니래])요?$"
    r"|(?:언제|누구|누구랑|누구하고|왜|몇 ?시에?|몇 ?명이?) (?:\S+ ){0,3}\S*[어아해와래니돼야가나]요?$"
    r"|왜요?$|누구세요$"
    r"|얼마나 (?:\S+ )?(?:걸려|돼|해|남았어|있어|자주 \S+)요?$"
    r"|어떻게 (?:\S+ )?(?:지내|지냈어|생각해|가|해|됐어|돼|알았어|하면 돼|써|먹어)요?$"
    r"|무슨 \S+(?:이야|야|이에요|예요)$|무슨 (?:일|뜻|말) \S*[어해야]요?$"
    r"|(?:있|없|되|시|[았었였했갔왔됐])나요$)"
)
_KOREAN_ENDING = re.compile(
    r"(?<!니)까요$|\S(?:하|시|되|있|없|[았었였했갔왔됐])나요$|(?:은|는|인|던|건|한)가요$"
)
_KOREAN_STATEMENT = re.compile(
    r"(?:냐|라|다|자)고(?:\s|$)|나 봐요?$|게요?$|겠지요?$|같아요?$|한 ?번"
    r"|도 \S+$|\S[아어여해봐와]도(?:\s|$)|\S면(?:\s|$)"
)
_KOREAN_WITH_IF = re.compile(r"(?:어떻게|뭘|어디로) (?:\S+ )?(?:하|가)면 돼요?$")


def asks(text: str, language: str) -> bool:
    """Is a sentence a question by its words, and has no mark at its end? Where in doubt it is none.

    `language` is a code of ISO 639-1.
    """
    if not text[-1:].isalnum() or len(text) > _LONGEST:
        return False
    if language == "en":
        by_order = _ENGLISH.match(text) is not None and _ENGLISH_STATEMENT.match(text) is None
        return by_order or _ENGLISH_TAG.fullmatch(text) is not None
    if language != "ko":
        return False
    ends = {"니까": "ㅂ", "까": "ㄹ"}  # 갑니까, 갈까; but 가니까
    if any(text.endswith(end) and _final(text[: -len(end)]) == sound for end, sound in ends.items()):
        return True
    if any(_is_whether(word) for word in text.split()):  # 어떻게 하는지 알아요
        return False
    if _KOREAN_STATEMENT.search(text) and not _KOREAN_WITH_IF.search(text):
        return False
    return _KOREAN_ENDING.search(text) is not None or _KOREAN.match(text) is not None


def _is_whether(word: str) -> bool:
    """하는지, 할지, 예쁜지: what is not known is no question to somebody."""
    return len(word) > 1 and word.endswith("지") and _final(word[:-1]) in ("ㄴ", "ㄹ")


def _final(text: str) -> str:
    """The last consonant of a text's last syllable where it is ㄴ, ㄹ or ㅂ."""
    last = text[-1:]
    return {4: "ㄴ", 8: "ㄹ", 17: "ㅂ"}.get((ord(last) - 0xAC00) % 28, "") if "가" <= last <= "힣" else ""
