"""Texts as hashes: of every window of n characters (n-gram), every run of sentences and every whole text, in numpy.

A text of characters c_0 ... c_(L-1) has the hash splitmix64(L xor sum_i splitmix64(c_i + KEY) BASE^i mod 2^64). With
the prefix sums of many texts laid end to end, any part's hash is a difference, shifted back to i = 0: equal parts have
equal hashes wherever they stand, at the same cost for every n. Nothing depends on the machine or on Python's hash().

The constants are part of the format of the guard's index files (kaja/guard_index.py). The hashes are no cryptography:
who guesses a text can test the guess.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ThingT = TypeVar("ThingT")
Hashes = NDArray[np.uint64]
Hashes16 = NDArray[np.uint16]  # the upper 16 bits: hundreds of the n-grams of a language share each value
Integers = NDArray[np.int64]

BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio; odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
KEY = 0xB7E151628AED2A6B  # fractional digits of e; keeps small code points from small hashes
DROPPED, KEPT, BOUNDARY = 0, 1, 2
BOUNDARIES = "\n。.!?:;|「」『』()【】[]<>♪…"  # as NFKC leaves them; a label like 「質問:」 ends with one
HIRAGANA = 0x3041, 0x309F  # first and last code point
CHUNK = 1_000_000  # characters hashed at a time: about 100 MB
# Japanese text is full of these. Where they are the only characters that NFKC changes, replacing them first spares the
# text the full normalisation, which takes 15 times as long as the check that nothing is to be done.
WIDE = [(mark, unicodedata.normalize("NFKC", mark)) for mark in "！？，．：；（）～％…　０１２３４５６７８９"]


def splitmix64(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection in which every bit of the result depends on all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fold(text: str) -> str:
    """Without differences of width and case: NFKC, case folded.

    >>> fold("ＧＰＵ は？")
    'gpu は?'
    """
    for mark, normal in WIDE:
        text = text.replace(mark, normal)
    return unicodedata.normalize("NFKC", text).casefold()


def letters(text: str) -> str:
    """What texts are compared by: letters and digits, folded; no spaces, punctuation or symbols."""
    return "".join(filter(str.isalnum, fold(text)))


def code_points(text: str) -> NDArray[np.uint32]:
    """(number of characters,); lone surrogates, which JSON can hold, count as characters."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@cache
def character_classes() -> NDArray[np.uint8]:
    """(0x110000,): DROPPED, KEPT (letters and digits) or BOUNDARY (ends a sentence) for each code point."""
    characters = np.arange(0x110000, dtype="<u4").view("<U1")
    classes = np.char.isalnum(characters).astype(np.uint8)
    classes[[ord(character) for character in BOUNDARIES]] = BOUNDARY
    return classes


def in_chunks(things: Iterable[ThingT], size: Callable[[ThingT], int]) -> Iterator[list[ThingT]]:
    """The things in lists of about CHUNK characters; `size` gives the characters of one."""
    chunk: list[ThingT] = []
    held = 0
    for thing in things:
        chunk.append(thing)
        held += size(thing)
        if held >= CHUNK:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


class HashedTexts:
    """The letters and digits of some texts, laid end to end (N characters), with the prefix sums of their hashes.

    n-grams are returned as (hashes, owner): `owner` tells which text each is of, and rises.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        folded = [fold(text) for text in texts]
        codes = code_points("".join(folded))
        classes = character_classes()[codes]
        kept = classes == KEPT
        self._codes = codes[kept]  # (N,)
        self._owner = np.repeat(np.arange(len(texts)), [len(text) for text in folded])[kept]  # (N,)
        self._bounds = np.searchsorted(self._owner, np.arange(len(texts) + 1))  # text i: [bounds[i], bounds[i + 1])
        self._sentence_starts = self._starts_of_sentences(np.cumsum(classes == BOUNDARY)[kept])
        self._sums, self._inverses = self._prefix_sums()  # (N + 1,) each

    def _starts_of_sentences(self, boundaries_before: Integers) -> Integers:
        new = (np.diff(boundaries_before) > 0) | (np.diff(self._owner) > 0)
        return np.concatenate([[0], np.flatnonzero(new) + 1])[: len(self._owner)]

    def _prefix_sums(self) -> tuple[Hashes, Hashes]:
        """Of splitmix64(c_i + KEY) BASE^i over all N characters, and BASE^-i, both modulo 2^64."""
        count = len(self._codes)
        powers, inverses = np.full(count + 1, BASE, dtype=np.uint64), np.full(count + 1, INVERSE, dtype=np.uint64)
        powers[0] = inverses[0] = 1
        np.cumprod(powers, out=powers)
        np.cumprod(inverses, out=inverses)
        sums = np.zeros(count + 1, dtype=np.uint64)
        np.cumsum(splitmix64(self._codes.astype(np.uint64) + np.uint64(KEY)) * powers[:count], out=sums[1:])
        return sums, inverses

    def _spans(self, starts: Integers, ends: Integers) -> Hashes:
        """Hashes of the characters [start, end)."""
        value = (self._sums[ends] - self._sums[starts]) * self._inverses[starts]
        return splitmix64(value ^ (ends - starts).astype(np.uint64))

    def _windows(self, size: int) -> Integers:
        """Where the windows of `size` characters begin that lie in one text."""
        count = max(len(self._owner) - size + 1, 0)
        return np.flatnonzero(self._owner[:count] == self._owner[len(self._owner) - count :])

    def wholes(self) -> Hashes:
        """(number of texts,): of all letters and digits of each."""
        return self._spans(self._bounds[:-1], self._bounds[1:])

    def grams(self, size: int) -> tuple[Hashes, Integers]:
        """Of every window of `size` characters that lies in one text."""
        starts = self._windows(size)
        return self._spans(starts, starts + size), self._owner[starts]

    def trigrams(self) -> tuple[Hashes16, Integers]:
        hashes, owner = self.grams(3)
        return upper_16_bits(hashes), owner

    def content_bigrams(self) -> tuple[Hashes16, Integers]:
        """Of every window of 2 characters without hiragana, which Japanese writes endings and particles with."""
        first, last = HIRAGANA
        content = (self._codes < first) | (self._codes > last)
        starts = self._windows(2)
        starts = starts[content[starts] & content[starts + 1]]
        return upper_16_bits(self._spans(starts, starts + 2)), self._owner[starts]

    def sentence_runs(self, max_sentences: int, min_characters: int) -> tuple[Hashes, Integers]:
        """Of every text, and of 1 to `max_sentences` sentences in a row; their owners do not rise."""
        sentence_ends = np.append(self._sentence_starts[1:], len(self._owner))
        starts, ends = [self._bounds[:-1]], [self._bounds[1:]]
        for length in range(1, min(max_sentences, len(self._sentence_starts)) + 1):
            first = self._sentence_starts[: len(self._sentence_starts) - length + 1]
            last = sentence_ends[length - 1 : len(self._sentence_starts)]
            inside = self._owner[first] == self._owner[last - 1]
            starts.append(first[inside])
            ends.append(last[inside])
        start, end = np.concatenate(starts), np.concatenate(ends)
        long_enough = end - start >= min_characters
        start, end = start[long_enough], end[long_enough]
        return self._spans(start, end), self._owner[start]

    def by_text(self, hashes: NDArray[np.unsignedinteger], owner: Integers) -> list[NDArray[np.unsignedinteger]]:
        """The n-grams of each text, in their order, with repetitions."""
        bounds = np.searchsorted(owner, np.arange(len(self._bounds)))
        return [hashes[start:end] for start, end in pairwise(bounds)]


def upper_16_bits(hashes: Hashes) -> Hashes16:
    return (hashes >> np.uint64(48)).astype(np.uint16)


class InvertedIndex:
    """From a hash to the items that hold it."""

    def __init__(self, items: Sequence[Hashes]) -> None:
        """`items`: the hashes of each, none of them twice."""
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *items])
        order = np.argsort(hashes, kind="stable")
        self._items = np.repeat(np.arange(len(items)), [len(item) for item in items])[order]  # the postings
        self._num_items = len(items)
        self._keys, self._starts, self._counts = np.unique(hashes[order], return_index=True, return_counts=True)
        # A table of the keys' upper bits tells at once of most hashes that they are no key (8 slots or more for each).
        bits = len(self._keys).bit_length() + 3
        self._shift = np.uint64(64 - bits)
        self._slots = np.zeros(1 << bits, dtype=bool)
        self._slots[self._keys >> self._shift] = True

    def find(self, hashes: Hashes, owner: Integers) -> tuple[Integers, Integers, Integers]:
        """(text, item, how many different hashes they share) of each text and item that share any; sorted."""
        likely = np.flatnonzero(self._slots[hashes >> self._shift])
        key = np.searchsorted(self._keys, hashes[likely])
        known = np.flatnonzero(key < len(self._keys))
        known = known[self._keys[key[known]] == hashes[likely[known]]]
        # A gram that a text holds several times counts once.
        text, key = unique_pairs(owner[likely[known]], key[known], len(self._keys))[:2]
        counts = self._counts[key]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        item = self._items[np.repeat(self._starts[key], counts) + offsets]
        return unique_pairs(np.repeat(text, counts), item, self._num_items)


def unique_pairs(left: Integers, right: Integers, right_end: int) -> tuple[Integers, Integers, Integers]:
    """The different (left, right) with right < right_end, sorted, and how often each stands there."""
    pairs, counts = np.unique(left * right_end + right, return_counts=True)
    return pairs // max(right_end, 1), pairs % max(right_end, 1), counts
