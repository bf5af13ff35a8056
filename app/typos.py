"""Words that are misspelt often, as they are meant: a translator that spells by pieces makes names of them.

No word stands here that is one of its language's own, and no correction that hangs on what is meant.
"""

from __future__ import annotations

import re

# fmt: off
_ENGLISH = {
    "accomodation": "accommodation", "adn": "and", "adress": "address", "agian": "again", "allways": "always",
    "alot": "a lot", "arguement": "argument", "beacuse": "because", "becasue": "because",
    "becouse": "because", "becuase": "because", "begining": "beginning", "beleive": "believe",
    "belive": "believe", "buisness": "business", "collegue": "colleague", "collegues": "colleagues",
    "comming": "coming", "congradulations": "congratulations", "definately": "definitely",
    "definatly": "definitely", "definitly": "definitely", "embarassed": "embarrassed",
    "embarassing": "embarrassing", "enviroment": "environment", "excelent": "excellent",
    "familar": "familiar", "febuary": "February", "finaly": "finally", "foriegn": "foreign",
    "fourty": "forty", "freind": "friend", "freinds": "friends", "goverment": "government",
    "happend": "happened", "immediatly": "immediately", "intresting": "interesting",
    "knowlege": "knowledge", "libary": "library", "neccessary": "necessary", "necesary": "necessary",
    "occured": "occurred", "peice": "piece", "probaly": "probably", "reccomend": "recommend",
    "recieve": "receive", "recieved": "received", "recomend": "recommend", "realy": "really",
    "remeber": "remember", "restaraunt": "restaurant", "restaurent": "restaurant", "saterday": "Saturday",
    "scedule": "schedule", "shedule": "schedule", "seperate": "separate", "similiar": "similar",
    "sincerly": "sincerely", "somthing": "something", "succesful": "successful", "suprise": "surprise",
    "suprised": "surprised", "taht": "that", "teh": "the", "thansk": "thanks", "thier": "their",
    "thrusday": "Thursday", "tommorow": "tomorrow", "tommorrow": "tomorrow", "tomorow": "tomorrow",
    "tonite": "tonight", "tounge": "tongue", "truely": "truly", "unfortunatly": "unfortunately",
    "untill": "until", "usefull": "useful", "waht": "what", "wendesday": "Wednesday",
    "wensday": "Wednesday", "wich": "which", "wierd": "weird", "writting": "writing",
    "yestarday": "yesterday", "yesturday": "yesterday",
}
_KOREAN = {
    "왠만": "웬만", "왠일": "웬일", "몇일": "며칠", "오랫만": "오랜만",
    "설겆이": "설거지", "희안하": "희한하", "희안한": "희한한", "어의없": "어이없", "어떻해": "어떡해",
    "되요": "돼요", "됬": "됐", "되서": "돼서", "뵈요": "봬요", "않하": "안 하", "않해": "안 해",
    "어짜피": "어차피", "통채로": "통째로", "쓰래기": "쓰레기",
    "떡볶기": "떡볶이", "떡뽁이": "떡볶이", "베게를": "베개를", "곰곰히": "곰곰이",
    "깨끗히": "깨끗이", "틈틈히": "틈틈이", "일일히": "일일이", "귀뜸": "귀띔",
}
# fmt: on
_NAMES_TOO = frozenset(("adn", "taht", "teh", "thier", "wich", "wierd"))  # which a capital may make
_ENGLISH_WORD = re.compile(rf"(?<![\w'’.@/-])(?:{'|'.join(_ENGLISH)})(?![\w'’@/-]|\.\w)", re.IGNORECASE)
# What promises ends in ㄹ게요; honours have 께, too (선생님께요). The future's 거 stands apart.
_KOREAN_WORD = re.compile(
    rf"(?P<word>{'|'.join(_KOREAN)})"
    r"|(?<=[할갈볼줄올될쓸살낼릴])(?P<promise>께)(?=요)|(?<=[있없먹잡]을)(?P<so>께)(?=요|[\s.!?~^ㅋㅎㅠㅜ,]|$)"
    r"|(?<=[할갈볼줄올될])(?P<alone>께)(?=[\s.!?~^ㅋㅎㅠㅜ,]|$)"
    r"|(?<=[할갈볼줄올될쓸살낼릴질])(?P<future>꺼)(?=야|예요|에요|임|니|같|고)"
    r"|(?<![가-힣])(?:(?P<still>구지)|(?P<soon>금새))(?![가-힣])|(?<![가-힣])(?P<part>역활)(?![동용성약자력기])"
    r"|(?:(?<=김치)|(?<=된장)|(?<=부대)|(?<=순두부)|(?<=동태))(?P<stew> ?찌게)"
)
_BY_KIND = {
    "promise": "게",
    "so": "게",
    "alone": "게",
    "future": " 거",
    "still": "굳이",
    "soon": "금세",
    "part": "역할",
}


def corrected(text: str, language: str) -> list[tuple[int, int, str]]:
    """The misspelt words of a text as runs (start, stop, how they are spelt), in order.

    `language` is a code of ISO 639-1.
    """
    if language == "en":
        words = _ENGLISH_WORD.finditer(text)
        return [
            (*match.span(), in_case(match.group(), _ENGLISH[match.group().lower()]))
            for match in words
            if _is_meant(match.group())
        ]
    if language == "ko":
        return [(*match.span(), _in_korean(match)) for match in _KOREAN_WORD.finditer(text)]
    return []


def _is_meant(word: str) -> bool:
    return word.islower() or word.lower() not in _NAMES_TOO


def in_case(word: str, right: str) -> str:
    """How a word is spelt, with the capitals that it was typed with."""
    if word.isupper():
        return right.upper()
    return right[0].upper() + right[1:] if word[0].isupper() else right


def _in_korean(match: re.Match[str]) -> str:
    if match["word"]:
        return _KOREAN[match["word"]]
    if match["stew"]:
        return match["stew"].replace("게", "개")
    return _BY_KIND[str(match.lastgroup)]
