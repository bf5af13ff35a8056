"""Examples of translations, and which of them are most like a sentence that is to be translated.

What `model.nearest` reads for each sentence. The likeness is Dice's coefficient of the features that two
texts share: words and pairs of neighbouring words, or, in scripts that glue words together, pairs of
neighbouring syllables; each counts the more, the rarer it is among the examples. An inverted index finds
them: for each feature, the examples that have it.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.languages import iso_code
from model.weights import replace_file

log = logging.getLogger("model.examples")

MAX_CHARS = 400  # of a text; longer ones have no like
_NAME = re.compile(r"\.([a-z]{2,3})-([a-z]{2,3})\.tsv(?:\.xz)?$")
_NUMBER = re.compile(r"\d+")
_HANGUL = re.compile("[ㄱ-ㅣ가-힣]")
_FORM = "NAME.en-ko.tsv or NAME.en-ko.tsv.xz, by the languages of its last two columns"
_KEPT, _MOST_KEPT = "examples-", 3
_VERSION = "3"  # of the index; another form of it has another
_ROUNDING = 1e-3  # of sums in 32 bits
_MOST_ALIKE = 4  # translations of the very same text
# Of an answer in small letters where the text has none: how a noisy or an unfinished text was translated.
_CARELESS = 0.8
_OTHER_NUMBERS = 0.95
# Of a question where the text is none, or the other way round.
_NO_QUESTION = 0.7
# Of what is no sentence where the text is one, or the other way round.
_OTHER_KIND = 0.9
# What a word is made of when two texts are to be the same: signs of programs, units and money belong to it.
_WORD = re.compile(r"[\w+#%$€£₩°&/@-]+")
_MOST_FOUND = 64  # texts that are looked at one by one
# Of texts that hold a word: how many are looked at, how many hold one that says little, and which part of the
# word their likeness counts.
_MOST_WITH_WORD, _TOO_MANY, _PART = 32, 1 << 13, 0.05
_ENDS = (".", "!", "?", "…", "。", "！", "？", '"', "”")
_NEWLINE = 10
_UNKNOWN, _LETTER, _SYLLABLE = 0, 1, 2
# Hangul, its letters, kana, Han characters: no spaces, or none that part all words.
_SYLLABLES = (("가", "힣"), ("ㄱ", "ㅣ"), ("\u3040", "\u30ff"), ("\u4e00", "\u9fff"))
_PLACES = 64  # of a word, told apart
_U32 = np.uint64(32)

Numbers = NDArray[np.uint64]
Ids = NDArray[np.int64]
Shares = NDArray[np.float32]
Found = list[tuple[int, float]]  # places of texts, and how much each is like what was asked for


class ExamplesError(ValueError):
    """Examples that cannot be read; the message names the file."""


class Example(NamedTuple):
    """A text and its translation; how much the text is like the one that was asked for, 0 to 1.

    It `is_same` but for case, marks and how words are parted.
    """

    source: str
    target: str
    likeness: float
    is_same: bool = False


Languages = tuple[str, str]


class Examples:
    """Examples of some pairs of languages, to be found from either side."""

    def __init__(self, indices: Mapping[Languages, _Index]) -> None:
        self._indices = dict(indices)

    def __len__(self) -> int:
        return sum(len(index.ranks) for index in self._indices.values())

    @property
    def languages(self) -> list[Languages]:
        return list(self._indices)

    def knows(self, src: str, tgt: str) -> bool:
        """Are there translations between these?"""
        return _in_order(src, tgt) in self._indices

    def find(self, text: str, src: str, tgt: str, n_best: int, least: float) -> list[Example]:
        """At most n_best examples with a likeness of at least `least`, the likest first.

        Where there are translations of the very text, those alone of the last place that has some.
        """
        index = self._indices.get(_in_order(src, tgt))
        if index is None or not text.strip() or len(text) > MAX_CHARS:
            return []
        own, other = (index.left, index.right) if src <= tgt else (index.right, index.left)
        found = [
            (Example(own.text(i), other.text(i), likeness), int(index.ranks[i]))
            for i, likeness in own.find(text, least)
        ]
        return _chosen(text, found, n_best, least)

    def alike(
        self, text: str, n_best: int, least: float, words: Collection[str] = ()
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Texts of either side of all languages with their likeness, the likest first.

        At most n_best that are at least so much like it. And for each of some words of the text some that
        hold it, however little they are like the text.
        """
        likeness: dict[str, float] = {}
        holding: dict[str, dict[str, float]] = {word: {} for word in words}
        if not text.strip() or len(text) > MAX_CHARS:
            return likeness, holding
        for side in (side for index in self._indices.values() for side in (index.left, index.right)):
            found, with_words = side.find_with_words(text, least, words)
            for own, places in ((likeness, found), *((holding[word], each) for word, each in with_words)):
                for i, each in places:
                    known = side.text(i)
                    own[known] = max(each, own.get(known, 0.0))
        return dict(sorted(likeness.items(), key=lambda found: -found[1])[:n_best]), holding

    @classmethod
    def build(cls, *places: Mapping[Languages, Iterable[tuple[str, str]]]) -> Examples:
        """From pairs of texts by their languages, each pair once, as of the last place that has it.

        Texts that are empty or longer than MAX_CHARS are left out.
        """
        ranks: dict[Languages, dict[tuple[str, str], int]] = {}
        for rank, place in enumerate(places):
            for (src, tgt), given in place.items():
                own = ranks.setdefault(_in_order(src, tgt), {})
                pairs = given if src <= tgt else (pair[::-1] for pair in given)
                own |= dict.fromkeys(filter(_is_usable, pairs), rank)
        return cls({languages: _Index.build(own) for languages, own in ranks.items()})

    def save(self, path: Path, digest: str) -> None:
        """Write the index; `digest` says what it was made of. Raises OSError."""
        tensors = {
            f"{src}-{tgt}.{name}": torch.from_numpy(array)
            for (src, tgt), index in self._indices.items()
            for name, array in index.arrays().items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_file(path, lambda part: save_file(tensors, part, metadata={"digest": digest}))
        except SafetensorError as error:  # of what the system says, too
            raise OSError(str(error)) from None

    @classmethod
    def load(cls, path: Path, digest: str) -> Examples | None:
        """What `save` wrote, mapped into memory; None where there is nothing, or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("digest") != digest:
                    return None
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            arrays: dict[Languages, dict[str, NDArray[Any]]] = {}
            for name, tensor in tensors.items():
                code, _, part = name.partition(".")
                src, _, tgt = code.partition("-")
                arrays.setdefault((src, tgt), {})[part] = tensor.numpy()
            return cls({languages: _Index.read(own) for languages, own in arrays.items()})
        except (OSError, SafetensorError, KeyError):
            return None


def _in_order(src: str, tgt: str) -> Languages:
    """Two languages in the order of the alphabet: either way they have one index."""
    return min(src, tgt), max(src, tgt)


def _is_usable(pair: tuple[str, str]) -> bool:
    return all(0 < len(text) <= MAX_CHARS and "\n" not in text for text in pair)


def _chosen(text: str, found: Sequence[tuple[Example, int]], n_best: int, least: float) -> list[Example]:
    """The likest, of equal ones those of later places; of the very text all translations, and no others."""
    bare, plain, numbers = text.strip(), _plain(text), numbers_of(text)
    careful = [
        (example._replace(likeness=example.likeness * _share(bare, numbers, example)), rank)
        for example, rank in found
    ]
    ranked = sorted(careful, key=lambda each: (-each[0].likeness, -each[1]))
    for same in (
        [each for each in ranked if each[0].source == bare],
        [each for each in ranked if _plain(each[0].source) == plain],
    ):
        if same:
            last = max(rank for _, rank in same)
            of_last = [example for example, rank in same if rank == last]
            best = [each for each in of_last if each.likeness == of_last[0].likeness]
            return [each._replace(is_same=True) for each in best[:_MOST_ALIKE]]
    return [example for example, _ in ranked if example.likeness >= least][:n_best]


def _share(text: str, numbers: Sequence[str], example: Example) -> float:
    """What remains of an example's likeness where it is written in another manner, or of other numbers."""
    careless = example.target[:1].islower() and not text[:1].islower()
    asks = _asks(text) != _asks(example.source)
    ends = text.endswith(_ENDS) != example.source.endswith(_ENDS)
    return (
        (_CARELESS if careless else 1.0)
        * (_NO_QUESTION if asks else 1.0)
        * (_OTHER_KIND if ends else 1.0)
        * (_OTHER_NUMBERS if numbers_of(example.source) != numbers else 1.0)
    )


def _asks(text: str) -> bool:
    return text.rstrip("\"'”’) ").endswith(("?", "？"))


def numbers_of(text: str) -> list[str]:
    """The runs of digits in a text, in rising order."""
    return sorted(_NUMBER.findall(text))


def _plain(text: str) -> str:
    """A text without its case, its marks (but whether it asks) and how its words are parted."""
    return " ".join(_WORD.findall(text.casefold())) + "?" * _asks(text)


# --- one pair of languages ----------------------------------------------------------------------


class _Index:
    """The texts of two languages side by side; ranks (N,) are the places that they come from."""

    def __init__(self, left: _Side, right: _Side, ranks: NDArray[np.int32]) -> None:
        self.left, self.right, self.ranks = left, right, ranks

    @classmethod
    def build(cls, ranks: Mapping[tuple[str, str], int]) -> _Index:
        left, right = ([pair[side] for pair in ranks] for side in (0, 1))
        return cls(_Side.build(left), _Side.build(right), np.array([*ranks.values()], dtype=np.int32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything by name, to be kept."""
        sides = {"left": self.left, "right": self.right}
        parts = {f"{name}.{part}": a for name, side in sides.items() for part, a in side.arrays.items()}
        return parts | {"ranks": self.ranks}

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]]) -> _Index:
        """The inverse of `arrays`. Raises KeyError."""
        left, right = (
            _Side({part: arrays[f"{name}.{part}"] for part in _Side.PARTS}) for name in ("left", "right")
        )
        return cls(left, right, arrays["ranks"])


# --- one side -----------------------------------------------------------------------------------


class _Shared:
    """What the texts of a side share with some features; `places` are those that may share enough.

    The most frequent features, which the longest lists are of, are looked up for the texts alone that could
    come to what is needed with all of them; half of it must come from others, so that these are not many.
    """

    def __init__(self, side: _Side, features: Ids, needed: float) -> None:
        often = features[np.argsort(-side.counts(features), kind="stable")]
        n_late = int(np.searchsorted(np.cumsum(side.weights[often]), needed / 2, side="right"))
        self._side, self._late = side, often[:n_late]
        self._soon = np.zeros(len(side), dtype=np.float32)
        for feature in often[n_late:]:
            self._soon[side.texts_with(feature)] += side.weights[feature]
        from_late = float(side.weights[self._late].sum())
        (self.places,) = np.nonzero(self._soon > max(needed - from_late - _ROUNDING, 0.0))

    def by(self, places: Ids) -> Shares:
        """What each of some texts shares."""
        found: Shares = self._soon[places]
        for feature in self._late:
            having = self._side.texts_with(feature)
            at = np.minimum(np.searchsorted(having, places), len(having) - 1)
            found += self._side.weights[feature] * (having[at] == places)
        return found


class _Side:
    """The texts of one language with their inverted index.

    `blob` holds the texts in UTF-8, text i in blob[ends[i - 1] : ends[i]]. Feature f of F, in rising order of
    their numbers, has the texts postings[starts[f] : starts[f + 1]]; totals[i] is what all of text i's count.
    """

    PARTS = ("blob", "ends", "features", "starts", "postings", "totals")
    _MOST_READ = 4096  # texts of one size that are compared with one that is looked for

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = dict(arrays)
        self._blob, self._ends, self._features, self._starts, self._postings, self._totals = (
            arrays[part] for part in self.PARTS
        )
        # What each feature counts, (F,).
        self.weights = np.log1p(len(self) / np.diff(self._starts)).astype(np.float32)

    @classmethod
    def build(cls, texts: Sequence[str]) -> _Side:
        encoded = [text.encode() for text in texts]
        keys = _features(texts)
        features = keys >> _U32
        first = np.ones(len(features), dtype=bool)
        first[1:] = features[1:] != features[:-1]
        (begins,) = np.nonzero(first)
        starts = np.append(begins, len(keys)).astype(np.int64)
        postings = (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
        counts = np.diff(starts)
        each = np.repeat(np.log1p(len(texts) / counts), counts)
        return cls(
            {
                "blob": np.frombuffer(b"".join(encoded), dtype=np.uint8).copy(),
                "ends": np.cumsum([len(each) for each in encoded], dtype=np.int64),
                "features": features[begins].astype(np.int64),
                "starts": starts,
                "postings": postings,
                "totals": np.bincount(postings, each, minlength=len(texts)).astype(np.float32),
            }
        )

    def __len__(self) -> int:
        return len(self._ends)

    def text(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return bytes(self._blob[start : int(self._ends[i])]).decode()

    def find(self, text: str, least: float) -> Found:
        """The _MOST_FOUND likest texts with a likeness of at least `least`, the text itself among them."""
        return self.find_with_words(text, least, ())[0]

    def find_with_words(
        self, text: str, least: float, words: Collection[str]
    ) -> tuple[Found, list[tuple[str, Found]]]:
        """`find`, and for each of some words of the text some of the likest texts that hold it.

        Words that stand in very many texts say little, and have none.
        """
        known, total = self._weighed(text)
        if not len(known):
            return [], []
        # Of texts as like as `least` the shared part is at least so much: 2c >= least (total + c).
        needed = least * total / (2 - least)
        shared = _Shared(self, known, needed)

        def likeness(places: Ids) -> Shares:
            each = 2 * shared.by(places) / (total + self._totals[places])
            return each.astype(np.float32)

        places = shared.places
        found = self._likest(text, places, likeness(places), least)
        return found, [(word, self._holding(word, likeness)) for word in words]

    def _likest(self, text: str, places: Ids, likeness: Shares, least: float) -> Found:
        (enough,) = np.nonzero(likeness >= least - _ROUNDING)
        if len(enough) > _MOST_FOUND:
            likest = enough[np.argpartition(-likeness[enough], _MOST_FOUND)[:_MOST_FOUND]]
            # Among many that have the same words in the same order, up to their numbers, the text itself.
            bare = text.strip()
            alike = enough[likeness[enough] > 1 - _ROUNDING]
            sizes = self._ends[places[alike]] - self._begins(places[alike])
            of_its_size = alike[sizes == len(bare.encode("utf-8", "replace"))][: self._MOST_READ]
            same = [i for i in of_its_size if self.text(int(places[i])) == bare]
            enough = np.union1d(likest, np.array(same[:_MOST_FOUND], dtype=likest.dtype))
        return [(int(places[i]), float(likeness[i])) for i in enough]

    def _holding(self, word: str, likeness: Callable[[Ids], Shares]) -> Found:
        """Those of the texts that hold the most of a word which are most of what `likeness` says."""
        known, total = self._weighed(word)
        if not len(known) or self.counts(known).min() > _TOO_MANY:
            return []
        shared = _Shared(self, known, total / 2)
        places, held = shared.places, shared.by(shared.places)
        (enough,) = np.nonzero(held >= total / 2)
        if len(enough) > _TOO_MANY:
            return []
        places, held = places[enough], held[enough]
        each = likeness(places)
        # The whole word before a part of it, then the likest.
        order = held + total * _PART * each
        best = (
            np.argpartition(-order, _MOST_WITH_WORD)[:_MOST_WITH_WORD]
            if len(order) > _MOST_WITH_WORD
            else range(len(order))
        )
        return [(int(places[i]), float(each[i])) for i in best]

    def counts(self, features: Ids) -> Ids:
        """In how many texts each of some features is."""
        counts: Ids = self._starts[features + 1] - self._starts[features]
        return counts

    def _begins(self, places: Ids) -> Ids:
        begins: Ids = np.where(places > 0, self._ends[places - 1], 0)
        return begins

    def texts_with(self, feature: np.int64) -> NDArray[np.int32]:
        """In rising order."""
        texts: NDArray[np.int32] = self._postings[self._starts[feature] : self._starts[feature + 1]]
        return texts

    def _weighed(self, text: str) -> tuple[Ids, float]:
        """Which of a text's features there are, and what all of them count: unknown ones as the rarest."""
        features = (_features([text]) >> _U32).astype(np.int64)
        at = np.searchsorted(self._features, features)
        at = np.minimum(at, max(len(self._features) - 1, 0))
        known: Ids = at[self._features[at] == features] if len(self._features) else at[:0]
        rarest = float(np.log1p(len(self)))
        return known, float(self.weights[known].sum()) + rarest * (len(features) - len(known))


def _features(texts: Sequence[str]) -> Numbers:
    """Of all texts (N,) the features that each has, once: feature << 32 | the text's place, in rising order.

    Two features that have one number by chance do no harm: what is found is compared as a whole.
    """
    lowered = "".join(text.lower().replace("\n", " ") + "\n" for text in texts)
    lowered = _NUMBER.sub("0", lowered)  # what is said of a number is said of others
    # Pictures and rare scripts, beyond the first 65,536 characters, are no letters here.
    codes = np.minimum(np.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), dtype=np.uint32), 0xFFFF)
    kinds = _kinds(codes)
    rows = np.cumsum(codes == _NEWLINE).astype(np.uint64)  # right but for the line's end, which is no feature
    before = np.concatenate(([_UNKNOWN], kinds[:-1]))
    begins = (kinds == _LETTER) & (before != _LETTER)
    (starts,), (letters,) = np.nonzero(begins), np.nonzero(kinds == _LETTER)
    (syllables,) = np.nonzero(kinds == _SYLLABLE)
    parts, places = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
    if len(starts):
        in_word = letters - starts[np.cumsum(begins)[letters] - 1]
        spelt = codes[letters].astype(np.uint64) * _POWERS[in_word % _PLACES]
        words = np.add.reduceat(spelt, np.searchsorted(letters, starts))
        row = rows[starts]
        together = row[1:] == row[:-1]
        pairs = words[:-1] * np.uint64(31) + words[1:] * _POWERS[1]
        parts += [_mixed(words), _mixed(pairs[together])]
        places += [row, row[1:][together]]
    if len(syllables):
        # The first of a word with nothing, so that one of a single syllable has a feature, too.
        first = before[syllables] != _SYLLABLE
        earlier = np.where(first, 0, codes[np.maximum(syllables - 1, 0)]).astype(np.uint64)
        parts.append(_mixed((earlier << np.uint64(21) | codes[syllables]) * _POWERS[0]))
        places.append(rows[syllables])
    keys = np.sort(np.concatenate(parts) << _U32 | np.concatenate(places))
    # `np.unique` may hash, which takes twenty times as long.
    return keys[np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)]]


_POWERS = np.array([pow(0x9E3779B97F4A7C15, n + 1, 2**64) for n in range(_PLACES)], dtype=np.uint64)


def _mixed(numbers: Numbers) -> Numbers:
    """Numbers of 64 bits -> numbers of 32 in which every bit counts (the last steps of splitmix64)."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB) >> _U32


def _kinds(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """What each character is: a letter or digit, a syllable, or neither."""
    counts = np.bincount(codes)
    kinds = np.zeros(len(counts), dtype=np.uint8)
    for code in np.flatnonzero(counts):
        sign = chr(code)
        if any(first <= sign <= last for first, last in _SYLLABLES):
            kinds[code] = _SYLLABLE
        elif sign.isalnum():
            kinds[code] = _LETTER
    return kinds[codes]


# --- files --------------------------------------------------------------------------------------


def find_files(places: Iterable[Path]) -> list[list[Path]]:
    """Of each place the file that it is, or those of the right form in the folder. Raises ExamplesError."""
    files = []
    for place in places:
        try:
            found = sorted(p for p in place.iterdir() if _NAME.search(p.name)) if place.is_dir() else [place]
        except OSError as error:
            raise ExamplesError(f"{place}: {error.strerror}") from None
        if not found:
            raise ExamplesError(f"{place}: holds no file of examples, which is called {_FORM}")
        if not place.exists():
            raise ExamplesError(f"{place}: no such file or folder")
        if not _NAME.search(found[0].name):
            raise ExamplesError(f"{place}: a file of examples is called {_FORM}")
        files.append(found)
    return files


def load_examples(places: Iterable[Path], cache: Path | None) -> Examples:
    """The examples of files and folders; their index is made once and kept in the folder `cache`, if any.

    Raises ExamplesError.
    """
    files = find_files(places)
    digest = _digest(files)
    path = (cache or Path()) / f"{_KEPT}{digest[:16]}.safetensors"
    if cache and (kept := Examples.load(path, digest)) is not None:
        return kept
    log.info("making an index of the examples in %d files, once", sum(map(len, files)))
    pairs = read_files(files)
    n_given = sum(len(each) for place in pairs for each in place.values())
    examples = Examples.build(*pairs)
    log.info("%d pairs, of which %d differ and have a usable length", n_given, len(examples))
    try:
        if cache is None:
            raise FileNotFoundError("there is no folder for it")
        examples.save(path, digest)
        for old in sorted(cache.glob(f"{_KEPT}*.safetensors"), key=lambda p: p.stat().st_mtime)[:-_MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the index of examples is not kept, and is made at each start: %s", error)
    return examples


def read_files(files: Iterable[Iterable[Path]]) -> list[dict[Languages, list[tuple[str, str]]]]:
    """Of each place the pairs of its files by their languages, in ISO's code. Raises ExamplesError."""
    places = []
    for of_place in files:
        pairs: dict[Languages, list[tuple[str, str]]] = {}
        for file in of_place:
            named = _NAME.search(file.name)
            assert named is not None
            languages = iso_code(named[1]), iso_code(named[2])
            found = list(_read(file))
            _warn_of_others(file, languages, found)
            pairs.setdefault(languages, []).extend(found)
        places.append(pairs)
    return places


def _warn_of_others(file: Path, languages: Languages, pairs: Sequence[tuple[str, str]]) -> None:
    """Tell of lines that are not what the file's name says, as far as Hangul tells: nothing finds them."""
    if "ko" not in languages or languages[0] == languages[1]:
        return
    n_odd = sum(
        any((code == "ko") != bool(_HANGUL.search(text)) for code, text in zip(languages, pair, strict=True))
        for pair in pairs
    )
    if n_odd > len(pairs) / 2:
        log.warning(
            "%s: %d of %d lines do not look like %s and %s in their last two columns",
            *(file, n_odd, len(pairs), *languages),
        )


def _digest(files: Iterable[Iterable[Path]]) -> str:
    whole = hashlib.sha256(_VERSION.encode())
    for rank, file in ((rank, file) for rank, of_place in enumerate(files) for file in of_place):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ExamplesError(f"{file}: {error.strerror}") from None
        whole.update(f"\0{rank}\0{file.name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def _read(file: Path) -> Iterator[tuple[str, str]]:
    """The last two columns of each line that is not empty. Raises ExamplesError."""
    try:
        content = file.read_bytes()
        text = (lzma.decompress(content) if file.suffix == ".xz" else content).decode("utf-8-sig")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ExamplesError(f"{file}: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        if len(columns) not in (2, 3):
            raise ExamplesError(
                f"{file}:{number}: {len(columns)} columns, not 2 (two texts) or 3 (a label, two texts)"
            )
        pair = columns[-2].strip(), columns[-1].strip()
        if not all(pair):
            raise ExamplesError(f"{file}:{number}: a text is empty")
        yield pair
