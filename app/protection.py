"""What a translation must keep as it is, or say as a glossary wants.

Such a span is hidden behind a word that translation models copy, the search is made to say that word once,
and the span is put in its place. A number stays in the text, where its unit and its counter need it, and the
search is made to say it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, count
from os.path import commonprefix

from app.spaces import composed, composing
from app.spelling import APOSTROPHES, narrow
from model.constraints import Phrase
from model.tokenizer import Tokenizer

# A word that the text has itself is passed over. The first ones are those that the shipped model copies best,
# as the name of something (an address) or as a noun (a term); see docs/notes.md.
_NAMES = ("Firefox", "CPU", "DNA", "GPS", "PDF", "BBC", "FIFA", "EU")
_NOUNS = ("CPU", "DNA", "GPS", "PDF", "Firefox", "FIFA", "BBC", "EU")
MAX_HIDDEN = 4  # in one sentence: with more of them a beam of usual width loses the sentence
_MAX_NUMBERS = 6
_MAX_NESTING = 100  # of groups in a pattern; much more and it cannot be compiled

_PARTICLES = (
    "들?(?:이라고|라고|입니다|이에요|예요|이었다|였다|이다|에게서|에게|에서|에는|에도|에|으로|로|까지|부터|처럼|보다|이나|"
    "한테|께서|께|은|는|이|가|을|를|의|와|과|도|만|나|들){0,2}(?![가-힣])"
)
_ONLY_PARTICLES = re.compile(_PARTICLES)
_ADDRESS_CHARS = r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]"
_HOUR = r"(?:[01]?\d|2[0-4]):[0-5]\d"
_SUFFIXES = (
    "pdf|docx?|xlsx?|pptx?|hwpx?|txt|md|csv|tsv|json|ya?ml|toml|xml|html?|css|jsx?|tsx?|py|ipynb|java|kt|cpp|rs|rb|"
    "php|sh|bat|exe|dll|zip|tar|gz|rar|png|jpe?g|gif|svg|webp|bmp|mp[34]|wav|avi|mov|apk|iso|ini|cfg|conf|sql"
)
_KEPT = re.compile(
    # A path may go on in other letters, unless that is but a particle after the address.
    rf"(?P<address>(?i:https?|ftp)://(?:{_ADDRESS_CHARS}|(?<=[/=_\-%.])(?!{_PARTICLES})[^\W\d_a-zA-Z]+)+"
    rf"|(?i:www)\.[A-Za-z0-9\-]+\.{_ADDRESS_CHARS}+"
    r"|(?<![\w.@/\-])(?:[a-z0-9][a-z0-9\-]{2,}\.(?:[a-z]{2,3}\.)?(?:com|org|kr|io|edu|gov|uk)"
    r"|[A-Z0-9][A-Z0-9\-]{2,}\.(?:[A-Z]{2,3}\.)?(?:COM|ORG|KR|IO|EDU|GOV|UK))(?![A-Za-z0-9\-@])"
    rf"(?:[:/?]{_ADDRESS_CHARS}*)?"
    r"|(?<![\w.+%\-])[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)+)"
    # What programs fill in, options, paths, files, names with a low line, people's handles.
    r"|(?P<code>`[^`\n]+`|\$?\{{1,2} ?[^{}\s]{1,60} ?\}{1,2}|%\([A-Za-z_]\w{0,60}\)[sd]"
    r"|(?<![\d%])%(?:\d\$)?(?:[sdif@]|\.\df)(?![A-Za-z%])"
    r"|(?<!\S)--[a-z][a-z\d]*(?:-[a-z\d\-]+|=[^\s,;)]*[^\s,;).!?]"
    r"|(?= ?(?:flag|option|switch|옵션|플래그)|[을를은는이가과와로]))"
    r"|(?:(?<=the )|(?<=use )|(?<=with )|(?<=add )|(?<=pass )|(?<=flag )|(?<=option ))--[a-z]+(?![\w\-])"
    r"|(?<!\S)-[A-Za-z](?= ?(?:flag|option|switch|옵션|플래그))"
    r"|(?<![\w<./])(?:~|\.{1,2})?(?:/[A-Za-z\d_.\-]+){2,}/?|(?<!\w)[A-Z]:(?:\\[\w.\-]+)+"
    rf"|(?<![\w.@/\-])(?:[A-Za-z\d_\-]+[./])*[\w\-]+\.(?:{_SUFFIXES})(?![A-Za-z\d_\-])"
    r"|(?<![\w.@/\-])(?=[a-z]\w*_)[A-Za-z]\w*(?:_[A-Za-z\d]+)+(?:\(\))?(?![A-Za-z\d])"
    rf"|(?<![\w@./])@(?:[A-Za-z_](?:[A-Za-z\d_.]{{0,60}}[A-Za-z\d_])?|[가-힣]{{2,20}}?(?={_PARTICLES})))"
    # Dates, telephone numbers, versions; margins and sections with their sign. Hours are read well: 2시 30분.
    rf"|(?P<figure>(?<![\w.:])(?!{_HOUR}(?![:\d]|[-/]\d))\+?\d+(?:(?:[\-/:]\d+)+|(?:\.\d+){{2,}})(?![\d])"
    r"|(?:±|§{1,2}|№) ?\d+(?:[.,]\d+)*%?)"
)
# For what a program fills in a number will stand: 37 new messages.
_FOR_NUMBER = re.compile(
    r"%(?:\d\$)?(?:[di]|\.\df)"
    r"|\$?\{+ ?(?:\w+\.)*"
    r"(?:n|(?:[a-z\d_]*_)?(?:num|count|total|quantity|amount)|[a-z]\w*(?:Count|Total)) ?\}+"
)
# 5~10 people, but no days of a month, no hours of a day. Around a hyphen only before what is counted: 3-2 is
# a score, 2-3 a figure's number, 12-34 a house.
_OF_A_CALENDAR = r"(?:[ap]\.?m\b|[시월일년천백십만억조])"
_MANY = (
    r"(?: ?%| (?:[a-z]+s|people|percent|men|women|children)\b"
    r"(?<! shows)(?<! was)(?<! is)(?<! has)(?<! attacks)"
    r"| ?(?:명|개(?!월|국)|살|세(?!기)|분(?!기)|시간|배|가지|장|권|마리|곳"
    r"|인분|잔|병|회|퍼센트|킬로|kg|km|cm))"
)
_RANGE = re.compile(
    rf"(?<![\w.,\-–~/:+])([1-9]\d{{0,2}})"
    rf"(?:[–~∼～]([1-9]\d{{0,2}})(?: ?%|(?= ?[A-Za-z가-힣]))(?! ?{_OF_A_CALENDAR})"
    rf"|-([1-9]\d{{0,2}})(?={_MANY}))"
)
_BEFORE_NO_RANGE = re.compile(
    r"(?:\b(?:fig(?:ure)?|table|section|room|chapter|pages?|no|won|lost|beat|by|us|them|the)\.?"
    r"|그림|표|절|장|호) ?$",
    re.IGNORECASE,
)
# Not the number of a month (12월), which is a name in other languages, and not the minutes of 6:05.
_NUMBER = re.compile(
    r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|(?!(?<=\d:)0)\d{2,}|\d(?=\.\d))(?:\.\d+)?(?![.,]?\d|월)"
)
_LETTER = re.compile(r"[^\W\d_]")
# A number with a word of magnitude. The languages count by other powers (만 is ten thousand): neither the
# digits nor the word may stay; what stands for it is a small number, which takes the right counter.
_FIGURE = r"\d+(?:,\d{3})*(?:\.\d+)?"
_SMALL_PARTS = r"(?:\d+ ?천 ?)?(?:\d+ ?백 ?)?(?:\d+ ?십 ?)?"
_GROUP = rf"(?=\d){_SMALL_PARTS}(?:{_FIGURE})? ?"
# 250조 1항 is a law's article, 3조 a group of people; money is what 조 counts, or more of the number follows.
_TRILLIONS = r"조(?=\s?(?:\d[\d,.]*\s?[천백십]?\s?[억만]|원(?![칙문래고인])|달러|엔|위안|유로))"
_NOT_ITS_END = r"%|시|분|초|주|개월|위|등|세|대|배|번|차|회|월|년|일"  # 10만 3개월: another number
_REST = (
    r"(?:\d+ ?천 ?(?:\d+ ?백 ?)?(?:\d+ ?십 ?)?(?:\d{1,3})?|\d+ ?백 ?(?:\d+ ?십 ?)?(?:\d{1,2})?"
    rf"|(?<=[만억조])\d{{1,4}}|(?:\d{{1,3}}(?:,\d{{3}})+|\d{{3,4}})(?! ?(?:{_NOT_ITS_END})))"
    r"(?!\d|[.,]\d| ?[천백십만억조])"
)
_AMOUNTS = {
    "ko": re.compile(
        rf"(?<![\w.,])({_FIGURE})[ \u00a0\u202f-](thousand|million|billion|trillion)s?"
        r"(?![A-Za-z]|[ -](?:million|billion|trillion))",
        re.IGNORECASE,
    ),
    "en": re.compile(
        rf"(?<![\w.,제])(?<!제 )(?<![천백십] )(?=[\d천백십,. ]{{1,40}}[만억조])"
        rf"(?:{_GROUP}{_TRILLIONS} ?)?(?:{_GROUP}억 ?)?(?:{_GROUP}만(?!큼) ?)?(?:{_REST})?"
    ),
}
_PART = re.compile(rf"(?=\d)(?:(\d+) ?천 ?)?(?:(\d+) ?백 ?)?(?:(\d+) ?십 ?)?({_FIGURE})? ?([만억조]?)")
# What stands before the end of a range: the word of magnitude counts for it as well (3~5만, 3 to 5 million).
_SIGNS = "₩¥£€$"
_BEGINNING = {
    "ko": re.compile(
        rf"(?P<lead>(?<![A-Za-z])(?:from|between) )?[{_SIGNS}]?(?<![\w.,])(?P<figure>{_FIGURE})"
        rf"(?: ?(?P<dash>[~∼～–-]) ?| (?P<word>to|and|or) )[{_SIGNS}]?$",
        re.IGNORECASE,
    ),
    "en": re.compile(
        rf"(?P<lead>(?!))?[{_SIGNS}]?(?<![\w.,제])(?<!제 )(?P<figure>{_FIGURE})"
        rf" ?(?P<dash>[~∼～–-]) ?(?P<word>(?!))?[{_SIGNS}]?$"
    ),
}
_ONE_WORD = re.compile(rf"{_FIGURE}( ?[천백십]?[만억조]|[^\d천백십]+)")
_MOST_BEFORE = 40  # characters of a beginning
_TO = {"ko": "~", "en": " to "}
# A sign of money before a number is read as the word behind it.
_MONEY = {
    "ko": {"₩": " won", "¥": " yen", "£": " pounds", "€": " euros"},  # $ is read well as it is
    "en": {"₩": "원", "¥": "엔", "£": "파운드", "€": "유로", "$": "달러"},
}
_PRICE = re.compile(
    r"(?<!\w)([₩¥£€]) ?(\d+(?:,\d{3})*(?:\.\d{1,2})?)(?![\w.,]?\d)(?![A-Za-z])(?! ?[~∼～–-] ?\d)"
)
_SHORT = re.compile(rf"(?<!\w)([{_SIGNS}])({_FIGURE})(K|M|m|bn|B|tn|T)(?![\w&])")
_SHORT_POWERS = {"K": 3, "M": 6, "m": 6, "bn": 9, "B": 9, "tn": 12, "T": 12}
_COUNTED = (
    r"(?= ?(?:명|원(?![칙문래고인리장])|달러|엔|위안|유로|개|톤|곳|대|권|건|마리|가구|주|표)(?![가-힣]*법))"
)
_AFTER_RANGE = re.compile(rf"{_COUNTED}|(?![가-힣])")
# 3,4만 and 2~3천: three or four ten thousands, two or three thousands. 300여만: somewhat more.
_ABOUT = re.compile(rf"(?<![\w.,])(?<!제 )([1-9])(?:, ?| ?[~∼～–-] ?)([1-9]) ?([천백십]?[만억]|천){_COUNTED}")
_MORE_THAN = re.compile(
    rf"(?<![\w.,])(?:({_FIGURE}) ?억 ?)?((?:\d{{1,3}} ?[천백십] ?){{0,2}})"
    rf"({_FIGURE}) ?([천백십]?) ?여 ?([천백십]?[만억]){_COUNTED}"
)
# 3만에서 5만 명, but not what rose from the one to the other (3만에서 5만으로).
_FROM_TO = re.compile(
    rf"(?<![\w.,])({_FIGURE} ?[천백십]?[만억])(?:에서|부터) ({_FIGURE} ?[천백십]?[만억]){_COUNTED}"
    r"(?! ?[가-힣]{0,2}로(?![가-힣]))"
)
_DIGITS = "일이삼사오육칠팔구"
_NUMERALS = f"{_DIGITS}십백천만억"
# In words, up to a word that counts and what may follow that; not 수만 명, 몇 만 명, 이 백만 명.
_IN_WORDS = re.compile(
    rf"(?<!\w)([{_NUMERALS}]{{1,16}}(?:(?<=[만억]) [{_NUMERALS}]{{1,16}}){{0,2}}) ?(?:원|명|달러)"
    r"(?=[^\w]|$|(?:은|는|이|가|을|를|의|과|와|도|에|으로|로|짜리|씩|정도|이상|이하|가량|어치)(?![가-힣]*하))"
)
_BEFORE_NO_NUMERAL = re.compile(rf"(?:[{_NUMERALS}조수몇\d]|여러|여)\s?$")
# 만 may mean "only" (그림 3만), and of a range that is written otherwise only the end would be counted anew.
_BEFORE_NO_AMOUNT = re.compile(r"\d\s?(?:[~∼～–-]|to)\s?$|(?:그림|표|버전|문제|번호|딱|겨우)\s?$")
_MAX_AMOUNT_DIGITS = 20  # more are no amount
_POWERS = {"": 0, "만": 4, "억": 8, "조": 12, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# fmt: off
_ENGLISH = dict(zip((
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
), (*range(1, 20), *range(20, 100, 10)), strict=True))
# fmt: on
_ENGLISH_UNIT = "|".join(word for word, value in _ENGLISH.items() if value < 20)
_ENGLISH_TENS = "|".join(word for word, value in _ENGLISH.items() if value >= 20)
_ENGLISH_DIGITS = rf"(?:(?:{_ENGLISH_TENS})(?:[ -](?:{_ENGLISH_UNIT}))?|{_ENGLISH_UNIT})"
# three hundred million, a hundred and fifty thousand, twenty-five billion; with nothing smaller behind it.
_ENGLISH_WORDS = re.compile(
    rf"(?<![\w-])(?:(?:a|{_ENGLISH_UNIT}) hundred(?: and)?(?: {_ENGLISH_DIGITS})?|{_ENGLISH_DIGITS})"
    rf"[ -](?:thousand|million|billion|trillion)"
    rf"(?![\w-]|\s+(?:and\s+)?(?:{'|'.join(_ENGLISH)}|hundred|thousand|million|billion)\b)",
    re.IGNORECASE,
)
# two or three million, two point five million: only the end of them would be counted.
_BEFORE_NO_ENGLISH = re.compile(
    rf"\b(?:{'|'.join(_ENGLISH)}|hundred|thousand|million|billion|half|point)[\s-]+(?:(?:to|or|and|point)[\s-]+)?$",
    re.IGNORECASE,
)
_SMALL = ("37", "48", "26", "59", "64", "73", "85", "92")  # what stands for amounts
# What ends a sentence or closes a bracket around an address is not part of it.
_AFTER_ADDRESS = ".,;:!?'\"*_~"


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a text, and what is to stand in their place, as it is.

    A noun is hidden behind a noun, an amount behind a number, and `unit`, and markup is not escaped where the
    text becomes HTML.
    """

    start: int
    stop: int
    source: str
    output: str
    is_noun: bool = False
    is_markup: bool = False
    is_amount: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Glossary:
    """Terms with their translations; one without a translation stays as it is."""

    outputs: Mapping[str, str]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, terms: Mapping[str, str], kept: Iterable[str] = ()) -> "Glossary | None":
        """None for no terms. `kept` are those that stay as they are written in the text.

        The case of letters does not matter; the longest term that fits wins.
        """
        outputs = {_as_found(term): output for term, output in terms.items()}
        every = {_in_small_letters(_plain(term)) for term in (*terms, *kept)}
        if not every:
            return None
        words = [(term, _after(term)) for term in sorted(every) if term[0].isalnum()]
        others = [(term, _after(term)) for term in sorted(every) if not term[0].isalnum()]
        parts = [rf"(?<![^\W_])(?:{_branches(words)})"] if words else []
        pattern = "|".join([*parts, *([_branches(others)] if others else [])])
        return cls(outputs, re.compile(pattern.replace("'", f"['{APOSTROPHES}]"), re.IGNORECASE))

    def spans(self, text: str) -> Iterable[Span]:
        for match in self.pattern.finditer(text):
            term = match.group()
            yield Span(*match.span(), term, self.outputs.get(_as_found(term), term), is_noun=True)


def _plain(term: str) -> str:
    """As terms are looked for: composed, in ordinary width, with the apostrophe that stands for any other."""
    return re.sub(f"[{APOSTROPHES}]", "'", narrow(composed(term)))


def _as_found(term: str) -> str:
    return _plain(term).casefold()


def _in_small_letters(term: str) -> str:
    lower = term.lower()
    return lower if len(lower) == len(term) else term


def _after(term: str) -> str:
    """What must follow a term, as a pattern: whole words, but a Korean noun with its particles."""
    if not term[-1].isalnum():
        return ""
    return rf"(?={_PARTICLES})" if "가" <= term[-1] <= "힣" else r"(?![a-zA-Z0-9_])"


def _branches(rests: Sequence[tuple[str, str]], depth: int = 0) -> str:
    """What is left of terms, with what must follow them, as a pattern that finds the longest first.

    What terms begin with in common stands in it once: tried one after the other, a hundred long terms would
    hold up everything else, because a search does not let other threads run.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for rest, after in rests:
        groups.setdefault(rest[:1], []).append((rest, after))
    ends = [after for _, after in groups.pop("", [])]
    branches = []
    for group in groups.values():
        if len(group) == 1 or depth == _MAX_NESTING:
            longest_first = sorted(group, key=lambda pair: -len(pair[0]))
            branches += [re.escape(rest) + after for rest, after in longest_first]
            continue
        shared = commonprefix([rest for rest, _ in group])  # noqa: RUF071 (of letters, not of paths)
        inner = _branches([(rest[len(shared) :], after) for rest, after in group], depth + 1)
        branches.append(f"{re.escape(shared)}(?:{inner})")
    return "|".join([*branches, *ends])


def without_parts(text: str) -> "Edited":
    """A text whose letters are in one, but for addresses and code, which stay as they are."""
    kept = [match.span() for match in _KEPT.finditer(text)]
    runs = [run for run in composing(text) if not any(start <= run[0] <= stop for start, stop in kept)]
    return replace_runs(text, runs)


def find_spans(text: str, glossary: Glossary | None, target: str = "") -> list[Span]:
    """Addresses, code, figures and terms, in order, none within another; amounts where `target` is known."""
    found = [*_ranges(text, target), *map(_trim, _KEPT.finditer(text))]
    if glossary is not None:
        found += glossary.spans(text)
    found += _amounts(text, target)
    found += _other_amounts(text, target)
    found += _own_amounts(text, target)
    spans: list[Span] = []
    # Where two begin together, the longer one; an address before a term within it.
    for span in sorted(found, key=lambda s: (s.start, -s.stop)):
        if not spans or span.start >= spans[-1].stop:
            spans.append(span)
    return spans


def _ranges(text: str, target: str) -> Iterator[Span]:
    """Ranges of small numbers, each as the target language writes them."""
    for match in _RANGE.finditer(text) if target in _TO else ():
        first, last = match[1], match[2] or match[3]
        if int(first) < int(last) and not _BEFORE_NO_RANGE.search(
            text[max(0, match.start() - 9) : match.start()]
        ):
            stop = match.start() + len(first) + 1 + len(last)
            source, output = text[match.start() : stop], f"{first}{_TO[target]}{last}"
            yield Span(match.start(), stop, source, output, is_amount=True)


def _amounts(text: str, target: str) -> Iterator[Span]:
    """Amounts of the other language, each with what it is in the target language."""
    if target not in _AMOUNTS:
        return
    count, show = (_korean_value, in_english) if target == "en" else (_english_value, in_korean)
    for match in _AMOUNTS[target].finditer(text):
        source, start = match.group().rstrip(), match.start()
        value = count(source) if len(re.sub(r"\D", "", source)) <= _MAX_AMOUNT_DIGITS else None
        if value is None or value != int(value):
            continue
        begun = _BEGINNING[target].search(text[max(0, start - _MOST_BEFORE) : start])
        one_word = _ONE_WORD.fullmatch(source)  # not 3~5만 2천
        if begun and (begun["word"] or "").lower() == "and" and (begun["lead"] or "").lower() != "between ":
            begun = None
        if not begun:
            if not _BEFORE_NO_AMOUNT.search(text[max(0, start - 6) : start]):
                yield _amount(text, start, start + len(source), show(int(value)), target)
            continue
        # The word counts for both ends, unless the first were greater then: 500,000 to 1 million. No years.
        own, shared = _value(begun["figure"], ""), count(begun["figure"] + one_word[1]) if one_word else None
        first = own if own >= 1000 and own % 100 == 0 and (shared is None or shared >= value) else shared
        if first is None or first != int(first) or first >= value:
            continue
        lead = max(0, start - _MOST_BEFORE) + begun.start()
        ends_well = _AFTER_RANGE.match(text, start + len(source))
        if not ends_well or _BEFORE_NO_AMOUNT.search(text[max(0, lead - 6) : lead]):
            continue
        place = max(0, start - _MOST_BEFORE) + begun.start("figure")
        if begun["dash"] or (begun["word"].lower() == "to" and not begun["lead"]):
            shown = show(int(first)) + _TO[target] + show(int(value))
            yield _amount(text, place, start + len(source), shown, target)
        else:
            yield _amount(text, place, place + len(begun["figure"]), show(int(first)), target)
            yield _amount(text, start, start + len(source), show(int(value)), target)


def _own_amounts(text: str, target: str) -> Iterator[Span]:
    """What counts by the words of the target already, in a text of the other language: it stays as it is."""
    other = {"ko": "en", "en": "ko"}.get(target, "")
    for match in _matches(_AMOUNTS[other], text) if other else ():
        source = match.group().rstrip()
        if other == "ko" or _korean_value(source) is not None:
            yield _amount(text, match.start(), match.start() + len(source), source, target)


def _other_amounts(text: str, target: str) -> Iterator[Span]:
    """Prices with their sign before them, and what has its magnitude in other forms."""
    if target not in _AMOUNTS:
        return
    for match in _matches(_PRICE, text):
        yield _amount(text, match.start(2), match.end(), match[2], target)
    if target == "ko":
        for match in _matches(_SHORT, text):
            value = _value(match[2], "").scaleb(_SHORT_POWERS[match[3]])
            if value == int(value):
                yield _amount(text, match.start(2), match.end(), in_korean(int(value)), target)
        for match in _matches(_ENGLISH_WORDS, text):
            number = _english_numeral(match.group())
            before = text[max(0, match.start() - _MOST_BEFORE) : match.start()]
            if number >= 10_000 and not _BEFORE_NO_ENGLISH.search(before):
                yield _amount(text, *match.span(), in_korean(number), target)
        return
    for match in _matches(_ABOUT, text):
        low, high, unit = int(match[1]), int(match[2]), _unit(match[3])
        if low < high and ("," not in match.group() or high == low + 1):
            yield _amount(
                text, *match.span(), f"{in_english(low * unit)} to {in_english(high * unit)}", target
            )
    for match in _matches(_FROM_TO, text):
        ends = [_korean_value(match[i]) for i in (1, 2)]
        values = [int(end) for end in ends if end is not None and end == int(end)]
        if len(values) == 2 and values[0] < values[1]:
            yield _amount(text, *match.span(), " to ".join(map(in_english, values)), target)
    for match in _matches(_MORE_THAN, text):
        parts = sum(int(n) * _unit(word) for n, word in re.findall(r"(\d+) ?([천백십])", match[2]))
        value = _value(match[1], "억") + (parts + _value(match[3], "") * _unit(match[4])) * _unit(match[5])
        if value == int(value):
            yield _amount(text, *match.span(), f"more than {in_english(int(value))}", target)
    for match in _matches(_IN_WORDS, text):
        number = _numeral(match[1].replace(" ", ""))
        if number >= 10_000 and not _BEFORE_NO_NUMERAL.search(
            text[max(0, match.start() - 6) : match.start()]
        ):
            yield _amount(text, *match.span(1), in_english(number), target)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Where a text has no more digits than an amount, and no word before it that makes it none."""
    for match in pattern.finditer(text):
        few = len(re.sub(r"\D", "", match.group())) <= _MAX_AMOUNT_DIGITS
        if few and not _BEFORE_NO_AMOUNT.search(text[max(0, match.start() - 6) : match.start()]):
            yield match


def _amount(text: str, start: int, stop: int, output: str, target: str) -> Span:
    """With the sign of money before it, which becomes a word behind it."""
    unit = ""
    for gap in range(min(start, 2)):
        sign = text[start - gap - 1 : start - gap]
        letter = text[max(0, start - gap - 2) : max(0, start - gap - 1)].isalnum()  # US$ is one word
        if sign and sign in _MONEY[target] and not letter and not text[start - gap : start].strip():
            start, unit = start - gap - 1, _MONEY[target][sign]
            break
    return Span(start, stop, text[start:stop], output, is_amount=True, unit=unit)


def _unit(word: str) -> int:
    """천만 -> 10,000,000."""
    value = 1
    for character in word:
        value *= 10 ** ({"십": 1, "백": 2, "천": 3} | _POWERS)[character]
    return value


def _numeral(text: str) -> int:
    """이십오만 -> 250,000; 0 where the order of its parts makes no number."""
    total = section = digit = 0
    least, least_group = 10_000, 10**12
    for character in text:
        if character in _DIGITS:
            if digit:
                return 0
            digit = _DIGITS.index(character) + 1
        elif character in "십백천":
            power = 10 ** ("십백천".index(character) + 1)
            if power >= least:
                return 0
            section, digit, least = section + (digit or 1) * power, 0, power
        else:
            group = 10 ** _POWERS[character]
            if group >= least_group:
                return 0
            if not section + digit and total:
                return 0
            total += (section + digit or 1) * group
            section, digit, least, least_group = 0, 0, 10_000, group
    return total + section + digit


def _english_numeral(text: str) -> int:
    """three hundred million -> 300,000,000, of what `_ENGLISH_WORDS` finds."""
    *words, power = re.split("[ -]", text.lower())
    small: int = 0
    for word in words:
        if word == "hundred":
            small = (small or 1) * 100
        elif word in _ENGLISH:
            small += _ENGLISH[word]
    return (small or 1) * int(10 ** _POWERS[power])


def _value(figure: str | None, word: str) -> Decimal:
    return Decimal((figure or "0").replace(",", "")).scaleb(_POWERS[word])


def _english_value(text: str) -> Decimal | None:
    """3.5 million -> 3,500,000."""
    figure, word = re.split(r"[ \u00a0\u202f-]", text)
    return _value(figure, word.lower().removesuffix("s"))


def _korean_value(text: str) -> Decimal | None:
    """1조 2,500억 -> 1,250,000,000,000; None where no word of magnitude is."""
    total = Decimal(0)
    for thousands, hundreds, tens, figure, word in _PART.findall(text):
        small = 1000 * int(thousands or 0) + 100 * int(hundreds or 0) + 10 * int(tens or 0)
        total += (small + _value(figure, "")).scaleb(_POWERS[word])
    return total if any(word in text for word in "만억조") else None


def in_english(value: int) -> str:
    """9,400,000 -> 9.4 million: from a million on, where two decimals are enough."""
    for word in ("trillion", "billion", "million"):
        unit = 10 ** _POWERS[word]
        if value >= unit and value % (unit // 100) == 0:
            return f"{Decimal(value) / unit:,f} {word}"
    return f"{value:,}"


def in_korean(value: int) -> str:
    """1,250,000,000,000 -> 1조 2,500억."""
    parts = []
    for word in ("조", "억", "만"):
        n, value = divmod(value, 10 ** _POWERS[word])
        parts += [f"{n:,}{word}"] if n else []
    return " ".join([*parts, *([f"{value:,}"] if value or not parts else [])])


def _trim(match: re.Match[str]) -> Span:
    text = match.group()
    if match.lastgroup == "address":
        text = _without_end(text)
    if match.lastgroup == "code" and text[0] in "/.~ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        text = text.rstrip(".")
    is_amount = _FOR_NUMBER.fullmatch(text) is not None
    return Span(match.start(), match.start() + len(text), text, text, is_amount=is_amount)


def _without_end(address: str) -> str:
    """Without the signs at its end that are not its own, brackets that it did not open among them."""
    surplus = {close: address.count(close) - address.count(open_) for open_, close in ("()", "[]")}
    stop = len(address)
    while stop and (address[stop - 1] in _AFTER_ADDRESS or surplus.get(address[stop - 1], 0) > 0):
        stop -= 1
        if address[stop] in surplus:
            surplus[address[stop]] -= 1
    return address[:stop]


@dataclass(frozen=True)
class Edited:
    """A text in which some runs were replaced."""

    text: str
    edits: tuple[tuple[int, int, int], ...]  # (start, stop, length of the replacement), in order

    def place(self, position: int, *, end: bool = False) -> int:
        """Where a position of the old text is in the new one; within a replaced run, its begin or its end."""
        shift = 0
        for start, stop, length in self.edits:
            if position <= start:
                break
            if position < stop:
                return start + shift + (length if end else 0)
            shift += length - (stop - start)
        return position + shift


def replace_runs(text: str, runs: Iterable[tuple[int, int, str]]) -> Edited:
    """Replace runs (start, stop, replacement), which are in order and do not overlap."""
    pieces, edits, at = [], [], 0
    for start, stop, replacement in runs:
        pieces += [text[at:start], replacement]
        edits.append((start, stop, len(replacement)))
        at = stop
    return Edited("".join([*pieces, text[at:]]), tuple(edits))


def unused_mark(text: str) -> str:
    """A character of the private planes that the text does not have."""
    used = set(text)
    return next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)


def is_particle(text: str, start: int) -> bool:
    """Does a Korean word end at `start` with its particles behind it?"""
    return "가" <= text[start : start + 1] <= "힣" and _ONLY_PARTICLES.match(text, start) is not None


def is_translatable(text: str) -> bool:
    """Has it a letter? What has none says the same in every language."""
    return _LETTER.search(text) is not None


# A term that brings its article along replaces the one before it.
_ARTICLE = re.compile(r"(?:the|an?)\s", re.IGNORECASE)
_LAST_ARTICLE = re.compile(r"(?<!\w)(?:the|an?)\s$", re.IGNORECASE)


def _output(span: Span) -> str:
    return span.output


@dataclass(frozen=True)
class Shield:
    """A sentence for the model, and what to do with its translation."""

    text: str
    hidden: Mapping[str, Span]  # by the word that stands for it
    numbers: tuple[str, ...]
    phrases: tuple[Phrase, ...]

    def restore(self, translated: str) -> str:
        """The translation with what was hidden in its place, in agreement with what stands beside it."""
        restored = ""
        for run in self.runs(translated):
            shown = self.show(run, translated, _output)
            if translated[run[0] : run[1]] in self.hidden and _ARTICLE.match(shown):
                restored = _LAST_ARTICLE.sub("", restored)
            restored += shown
        return restored

    def runs(self, translated: str) -> list[tuple[int, int]]:
        """The translation's parts (start, stop): words that stand for something, and what is between them."""
        runs, at = [], 0
        for match in self._words().finditer(translated) if self.hidden else ():
            runs += [(at, match.start()), match.span()]
            at = match.end()
        return [run for run in (*runs, (at, len(translated))) if run[0] < run[1]]

    def show(self, run: tuple[int, int], translated: str, output: Callable[[Span], str]) -> str:
        """One of the `runs`, or a part of one, as it is to be read."""
        start, stop = run
        text = translated[start:stop]
        before = next((word for word in self.hidden if translated.endswith(word, 0, start)), None)
        if text not in self.hidden:
            return text if before is None else _behind(self.hidden[before], text)
        shown = output(self.hidden[text])
        # Two figures in a row would make another one.
        is_figure = before is not None and self.hidden[before].output[-1].isdigit() and shown[0].isdigit()
        return f" {shown}" if is_figure else shown

    def unmet(self, translated: str) -> list[str]:
        """What the translation lacks, as it stood in the source."""
        found = set(self._words().findall(translated)) if self.hidden else set()
        lacking = [span.source for word, span in self.hidden.items() if word not in found]
        return lacking + [number for number in self.numbers if not _has_number(number, translated)]

    def _words(self) -> re.Pattern[str]:
        """Whole words; but one may follow another, or small letters, at once, and a noun may be several."""
        words = "|".join(self.hidden)
        before = "|".join(rf"(?<={word})" for word in self.hidden)
        named = "|".join(word for word in self.hidden if not word.isdigit())
        numbers = "|".join(word for word in self.hidden if word.isdigit())
        whole = [rf"(?:(?<![A-Z0-9])|{before})(?:{named})(?=(?:{words}|s?(?![A-Za-z0-9])))"] if named else []
        whole += [_as_number(rf"(?:{numbers})")] if numbers else []
        return re.compile("|".join(whole))


def shield(text: str, mark: str, spans: list[Span], tokenizer: Tokenizer) -> tuple[Shield, Edited]:
    """Hide spans, which stand in the text as marks, in this order; `MAX_HIDDEN` of them at most."""
    hidden: dict[str, Span] = {}
    lower = text.lower()  # what stands for something must not be in it
    runs: list[tuple[int, int, str]] = []
    at = -1
    for span in spans:
        if span.is_amount:
            words = chain(_SMALL, map(str, count(101)))
        else:
            words = chain(_NOUNS if span.is_noun else _NAMES, (f"QX{i}" for i in count(1)))
        word = next(word for word in words if word not in hidden and word.lower() not in lower)
        at = text.index(mark, at + 1)
        hidden[word] = span
        runs.append((at, at + 1, word + span.unit))
    edited = replace_runs(text, runs)
    found = dict.fromkeys(match.group() for match in _NUMBER.finditer(edited.text))
    numbers = tuple(number for number in found if number not in hidden)[:_MAX_NUMBERS]
    phrases = [_phrase(tokenizer, word, once=True, is_number=span.is_amount) for word, span in hidden.items()]
    phrases += [_phrase(tokenizer, number, once=False, is_number=True) for number in numbers]
    return Shield(edited.text, hidden, numbers, tuple(phrases)), edited


def _behind(span: Span, text: str) -> str:
    """What follows a hidden span: its particle in agreement, a counter apart from a word of magnitude."""
    agreed = agree(span.output, text)
    if span.is_amount and span.output[-1] in "만억조" and "가" <= text[0] <= "힣":
        return agreed if _ONLY_PARTICLES.match(text) or text.startswith("여 ") else f" {agreed}"
    return agreed


def _phrase(tokenizer: Tokenizer, text: str, *, once: bool, is_number: bool) -> Phrase:
    spellings = dict.fromkeys((tuple(tokenizer.encode(f" {text}")), tuple(tokenizer.encode(text))))
    # Another digit makes another number; and a model may stutter, "NASAASA".
    apart = tokenizer.digit_ids if is_number else frozenset(token for ids in spellings for token in ids)
    return Phrase(tuple(spellings), once=once, apart=apart)


def _has_number(number: str, text: str) -> bool:
    """Does it stand in the text, and not as a part of another number (12 in 12,000 or 3.12)?"""
    return re.search(_as_number(re.escape(number)), text) is not None


def _as_number(pattern: str) -> str:
    return rf"(?<!\d)(?<!\d[.,]){pattern}(?![.,]?\d)"


# After a vowel, after a consonant.
_AGREEING = (
    *(("는", "은"), ("가", "이"), ("를", "을"), ("와", "과"), ("랑", "이랑"), ("나", "이나")),
    *(("로", "으로"), ("라고", "이라고"), ("라는", "이라는"), ("였", "이었"), ("예요", "이에요")),
)
_GOING_ON = {"로": "는|도|만|부터|써|서", "랑": "은|도"}
_PARTICLE = re.compile(
    "|".join(
        rf"(?P<p{i}>{consonant}|{vowel})(?=(?:{_GOING_ON.get(vowel, '(?!)')})?"
        rf"(?![가-힣]){'|' if vowel == '였' else ''})"
        for i, (vowel, consonant) in enumerate(_AGREEING)
    )
)
# Whether the Korean name of a digit ends in a consonant, and which in ㄹ: 영 일 이 삼 사 오 육 칠 팔 구.
_DIGIT_ENDS = dict(zip("0123456789", "ㅇㄹ ㅁ  ㄱㄹㄹ ", strict=True))


def agree(word: str, after: str) -> str:
    """The text after a word, its particle in the form that the word's last sound asks for.

    Only for words that end in Hangul or a digit: how other letters are read nobody can know.
    """
    match, end = _PARTICLE.match(after), _final_sound(word)
    if match is None or end is None:
        return after
    vowel, consonant = _AGREEING[int(str(match.lastgroup)[1:])]
    takes_vowel_form = not end or (end == "ㄹ" and vowel == "로")
    return (vowel if takes_vowel_form else consonant) + after[match.end() :]


def _final_sound(word: str) -> str | None:
    """The consonant a word ends in (ㄹ told from others), "" for a vowel, None where that is not known."""
    last = word[-1:]
    if "가" <= last <= "힣":
        final = (ord(last) - ord("가")) % 28
        return "" if final == 0 else "ㄹ" if final == 8 else "ㅇ"
    return _DIGIT_ENDS[last].strip() if last in _DIGIT_ENDS else None
