"""How a text ends: what stands behind a sentence and is no part of it (faces, laughing, tags of a post, marks
said again), and a translation's full stop."""

from __future__ import annotations

import re

_MOST = 20  # of tags and faces; what is before them is read
_REACH = 40  # characters in which a face is looked for, so that no long run is looked through again and again

_TAG = re.compile(r"#[^\W\d_]\w*")
_FACE = re.compile(
    r"(?:(?<![:\w])[:;]-?[DP]|(?<!:)(?:[:;]-?[)(]|:'\()|(?<!\^)\^_?\^{1,38}|(?<!\w)T[_.]T|[ㅋㅎㅠㅜ]{2,38}[.!?~]{0,9})$"
)
_MORE_MARKS = re.compile(r"(?<![!?])[!?]{2,}$")
_ENDED = re.compile("[.!?…~)\u2600-\u27bf\U0001f000-\U0001faff\ufe0f]$")
_FULL_STOP = re.compile(r"(?<=[^\W_])\.$")
_SHORT = re.compile(
    r"\b(?:[a-z]{1,3}(?:\.[a-z]{1,3}){1,9}|mr|mrs|ms|dr|prof|capt|sgt|lt|gov|jr|sr|inc|ltd|co|corp|bros|dept|univ"
    r"|st|ave|rd|blvd|etc|vs|al|approx|oz|lbs?|ft|pp|vol)\.$"
    r"|^(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thur?s?|fri|sat|sun|min|max|no)\.$",
    re.IGNORECASE,
)
_FEELINGS = re.compile("(?<![가-힣A-Za-z0-9_])(?:[ㅠㅜ]{2,}|(?P<laughing>[ㅋㅎ]{2,}))")


def set_apart(text: str) -> tuple[str, str]:
    """A sentence as the model is to read it, and what comes behind its translation.

    A single tag belongs to its sentence, unless that has ended before: it may be a word of it.
    """
    end, n_tags, has_face = len(text), 0, False
    for _ in range(_MOST):
        words = text[:end].rstrip()
        start = words.rfind(" ") + 1
        if _TAG.fullmatch(words, start):
            n_tags += 1
        elif (face := _FACE.search(words, max(0, len(words) - _REACH))) and not _closes_bracket(words):
            start, has_face = face.start(), True
        else:
            break
        end = len(words[:start].rstrip())
    if n_tags == 1 and not has_face and end and not _ENDED.search(text[:end]):
        end = len(text)
    words, behind = text[:end], text[end:]
    if marks := _MORE_MARKS.search(words):
        run = marks.group()
        mark = "?" if "?" in run else run[0]
        words, behind = words[: marks.start()] + mark, run.replace(mark, "", 1) + behind
    return words, behind


def _closes_bracket(words: str) -> bool:
    return words.endswith(")") and words.count("(") >= words.count(")")


def in_words(signs: str, *, attached: bool) -> str:
    """Signs for readers who know no Hangul, to whom ㅋㅋ says nothing; `attached` are those behind a word."""

    def say(match: re.Match[str]) -> str:
        before = signs[match.start() - 1] if match.start() else ("." if attached else " ")
        return ("" if before.isspace() else " ") + ("haha" if match["laughing"] else ":(")

    return _FEELINGS.sub(say, signs)


def is_unmarked(source: str) -> bool:
    """Does a sentence end in a word, with no mark behind it: a greeting, a label, a headline?"""
    source = source.rstrip("`")
    while source.endswith(">") and (tag := source.rfind("<")) >= 0:  # from the end: a source may be long
        source = source[:tag].rstrip("`")
    return source[-1:].isalnum()


def without_full_stop(translated: str) -> str:
    """A translation without its full stop, for a source that has none: the model has learned from sentences.

    What is short for something keeps its own: U.S., Ph.D., etc.
    """
    return translated if _SHORT.search(translated) else _FULL_STOP.sub("", translated)
