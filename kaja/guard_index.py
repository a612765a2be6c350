"""The contamination guard's index: evaluation sets as hashes of their n-grams, without any of their text.

An item is a question, or a reference answer of at least MIN_ANSWER characters (shorter ones are what anybody would
say). Lengths are in letters and digits, folded (kaja/text_hashes.py). Of each item the index keeps the hash of the
whole and samples of four kinds of n-grams; a sample is the SAMPLE smallest hashes of the different n-grams, so that
the share of it that a text holds estimates the share of all (containment).

N-grams of stock phrases (「方法を教えてください」) say nothing of where a text comes from. They are those of
guards/stock_phrases.txt, and the 6- and 13-grams of more than COMMON items of the index, as of a task's instruction.

What an index gives away: who guesses a text can test the guess, and who knows the beginning of an item of less than
about SAMPLE characters can try its continuations; of longer ones only the samples are kept. Hashes of trigrams and
bigrams are cut to 16 bits, so that hundreds of them look the same.

The file is JSONL: a header, then a line for each item. `python -m kaja.contamination build` makes it.
"""

import base64
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kaja.data import Example
from kaja.errors import UserError
from kaja.files import read_jsonl, read_text, write_jsonl
from kaja.text_hashes import Hashes, Hashes16, HashedTexts, InvertedIndex, in_chunks, letters

GUARDS = Path(__file__).parent / "guards"
BUILT_IN = GUARDS / "demo.jsonl"  # of the demo's evaluation files; always checked
STOCK_PHRASES = GUARDS / "stock_phrases.txt"
FORMAT, VERSION = "kaja guard", 1  # VERSION rises when a change of constants or fields makes old files useless
ARRAYS = {"long": 8, "anchors": 8, "trigrams": 2, "stock_trigrams": 2, "pairs": 2}  # of an Item: bytes of a number

MIN_WHOLE, MIN_ANSWER = 8, 60  # characters of a question, of a reference answer, that is compared at all
LONG, ANCHOR = 13, 6  # characters of an n-gram: 13 as in GPT-3's and most later reports; 6 to find candidates
LONG_LEAST = 48  # 13-grams that an item must have to be looked for in part: 60 characters
PAIR_LEAST = 2  # content bigrams that an item must have to be looked for with changes
COMMON = 8  # n-grams of more items than this are of a stock phrase
SAMPLE = 64
# A text is a candidate if it holds so many of an item's anchors, and this share of them. Any long text in Latin letters
# holds most trigrams of any other, so that more is asked there.
ANCHOR_LEAST, ANCHOR_SHARE, LATIN_ANCHOR_SHARE = 2, 0.15, 0.5
NO_HASHES: Hashes = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Item:
    """One text of an evaluation set; each array is a sample of at most SAMPLE hashes."""

    set: str
    id: str
    part: str  # "question" or "answer"
    whole: int
    num_long: int  # 13-grams in the sample, with those of stock phrases
    long: Hashes  # 13-grams of no stock phrase; none of an item with less than LONG_LEAST
    anchors: Hashes  # 6-grams of no stock phrase; none of an item with less than PAIR_LEAST pairs
    anchor_share: float  # of the anchors that a text must hold to be a candidate
    trigrams: Hashes16  # of no stock phrase
    stock_trigrams: Hashes16  # the others of the sample
    pairs: Hashes16  # content bigrams (no hiragana) of no stock phrase


@dataclass(frozen=True)
class GuardIndex:
    """Evaluation sets as hashes: what `build_index` makes and kaja.contamination's `check` compares with."""

    items: list[Item]
    sets: dict[str, int]  # examples of each set

    def save(self, path: Path | str) -> None:
        header = {"format": FORMAT, "version": VERSION, "sets": self.sets, "items": len(self.items)}
        write_jsonl(path, [header, *map(to_row, self.items)])

    @classmethod
    def load(cls, path: Path | str) -> "GuardIndex":
        """Raises UserError for a file that is no index, of another version, or not whole."""
        rows = read_jsonl(path)
        header = next(rows, (0, {}))[1]
        check_header(header, path)
        try:
            items = [from_row(row) for _, row in rows]
            sets = {str(name): int(count) for name, count in header["sets"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: an index of the guard with a broken line ({type(error).__name__}: {error}); build it again"
            ) from None
        if len(items) != header.get("items"):
            raise UserError(
                f"{path}: {len(items)} items where its header says {header.get('items')}; copy or build it again"
            )
        return cls(items, sets)

    @cached_property
    def wholes(self) -> InvertedIndex:
        return InvertedIndex([np.array([item.whole], dtype=np.uint64) for item in self.items])

    @cached_property
    def long(self) -> InvertedIndex:
        return InvertedIndex([item.long for item in self.items])

    @cached_property
    def anchors(self) -> InvertedIndex:
        return InvertedIndex([item.anchors for item in self.items])

    @cached_property
    def anchors_needed(self) -> NDArray[np.float64]:
        """(number of items,): anchors that make a text a candidate."""
        return np.array([max(ANCHOR_LEAST, item.anchor_share * len(item.anchors)) for item in self.items])


def is_index(path: Path) -> bool:
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"format": "{FORMAT}"' in file.readline()


def check_header(header: dict[str, Any], path: Path | str) -> None:
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path}: no index of the guard (its first line has no \"format\": \"{FORMAT}\"); "
            "build one with `python -m kaja.contamination build`"
        )
    if header.get("version") != VERSION:
        raise UserError(
            f"{path}: an index of version {header.get('version')}; this kaja reads version {VERSION}; "
            "build it again with this kaja, or update kaja"
        )


def to_row(item: Item) -> dict[str, Any]:
    """A line of the file: the fields, arrays as base64 of their little-endian bytes."""
    row = dataclasses.asdict(item)
    for name, size in ARRAYS.items():
        row[name] = base64.b64encode(row[name].astype(f"<u{size}").tobytes()).decode("ascii")
    return {**row, "whole": f"{item.whole:016x}"}


def from_row(row: dict[str, Any]) -> Item:
    arrays: dict[str, Any] = {
        name: np.frombuffer(base64.b64decode(row[name], validate=True), dtype=f"<u{size}").astype(f"u{size}")
        for name, size in ARRAYS.items()
    }
    return Item(**{**row, **arrays, "whole": int(row["whole"], 16)})


# ---------------------------------------------------------------------------------------------------------------------
# Building


class Grams(NamedTuple):
    """The different n-grams of a text, each array sorted."""

    long: Hashes
    anchors: Hashes
    trigrams: Hashes16
    pairs: Hashes16


def build_index(sets: Mapping[str, Sequence[Example]]) -> GuardIndex:
    """The index of evaluation sets, each under its name."""
    compared = list(texts_to_compare(sets))
    hashed = list(hash_texts([text for *_, text in compared]))
    stock = stock_grams([grams for _, grams in dict(hashed).items()])  # equal texts in two sets are one text
    items = [
        make_item(name, identifier, part, text, whole, grams, stock)
        for (name, identifier, part, text), (whole, grams) in zip(compared, hashed)
    ]
    return GuardIndex(items, {name: len(examples) for name, examples in sets.items()})


def texts_to_compare(sets: Mapping[str, Sequence[Example]]) -> Iterator[tuple[str, str, str, str]]:
    """(set, example's id, part, text) of the texts that are long enough, and more than a part of a stock phrase."""
    for name, examples in sets.items():
        for example in examples:
            parts = ("question", example.question, MIN_WHOLE), ("answer", example.reference, MIN_ANSWER)
            for part, text, least in parts:
                own = letters(text)
                if len(own) >= least and not any(own in phrase for phrase in stock_phrases()):
                    yield name, example.id, part, text


def hash_texts(texts: Iterable[str]) -> Iterator[tuple[int, Grams]]:
    """The hash of each text and its n-grams."""
    for chunk in in_chunks(texts, len):
        hashed = HashedTexts(chunk)
        kinds = hashed.grams(LONG), hashed.grams(ANCHOR), hashed.trigrams(), hashed.content_bigrams()
        by_text = zip(*(map(np.unique, hashed.by_text(*kind)) for kind in kinds))
        yield from zip(hashed.wholes().tolist(), map(Grams._make, by_text))


@cache
def stock_phrases() -> tuple[str, ...]:
    return tuple(map(letters, read_text(STOCK_PHRASES).split("\n")))


@cache
def grams_of_stock_phrases() -> Grams:
    phrases = [grams for _, grams in hash_texts(stock_phrases())]
    return Grams(*(np.unique(np.concatenate(kind)) for kind in zip(*phrases)))


def stock_grams(texts: Sequence[Grams]) -> Grams:
    """Those of the stock phrases, and the 6- and 13-grams that many of these different texts hold."""
    known = grams_of_stock_phrases()
    return known._replace(
        long=np.union1d(known.long, common([grams.long for grams in texts])),
        anchors=np.union1d(known.anchors, common([grams.anchors for grams in texts])),
    )


def common(grams: Sequence[Hashes]) -> Hashes:
    """What more than COMMON of the texts hold."""
    different, counts = np.unique(np.concatenate([NO_HASHES, *grams]), return_counts=True)
    return different[counts > COMMON]


def make_item(name: str, identifier: str, part: str, text: str, whole: int, grams: Grams, stock: Grams) -> Item:
    long, anchors, trigrams = grams.long[:SAMPLE], grams.anchors[:SAMPLE], grams.trigrams[:SAMPLE]
    is_stock = is_in(trigrams, stock.trigrams)
    pairs = grams.pairs[~is_in(grams.pairs, stock.pairs)][:SAMPLE]
    return Item(
        set=name, id=identifier, part=part, whole=whole,
        num_long=len(long), long=long[~is_in(long, stock.long)] if len(long) >= LONG_LEAST else NO_HASHES,
        anchors=anchors[~is_in(anchors, stock.anchors)] if len(pairs) >= PAIR_LEAST else NO_HASHES,
        anchor_share=LATIN_ANCHOR_SHARE if is_latin(text) else ANCHOR_SHARE,
        trigrams=trigrams[~is_stock], stock_trigrams=trigrams[is_stock], pairs=pairs,
    )  # fmt: skip


def is_latin(text: str) -> bool:
    own = letters(text)
    return sum(map(str.isascii, own)) > len(own) / 2


def is_in(hashes: NDArray[Any], known: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the hashes are among the known: sorted, not empty (np.isin would sort them for each item)."""
    return np.asarray(known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes)
