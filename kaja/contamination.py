"""The contamination guard: nothing of an evaluation set may be in the training data, told by content, not by name.

    python -m kaja.contamination build ac=answer_carefully=test.json elyza_tasks_100=test.csv --out guard.jsonl
    python -m kaja.contamination check data/sft/train.jsonl --guard guard.jsonl

An index of the evaluation sets holds hashes only, so that a gated test set is read once, where it may be read, and
never stored. Texts are compared as letters and digits: NFKC, case folded, without spaces, punctuation and symbols.
Every field of a record is compared with every question of the sets, and with every reference answer of at least
MIN_ANSWER characters (shorter ones are what anybody would say). A record is a hit when one of three things holds:

- whole: the item stands in it from one sentence boundary to another, or is all of it;
- 13-gram: it holds 35% of the item's 13-grams, set phrases not counted: items of 60 characters and more, in part;
- near-duplicate: it holds 70% of the item's trigrams, 60% of those that are in no set phrase, and 70% of its pairs
  of neighbouring kanji, katakana, letters and digits, which carry the content: items with a few characters changed.

Questions share set phrases (「方法を教えてください」) and are no copies for that: set phrases are those of
guards/stock_phrases.txt, and what more than COMMON items of an index hold. Measured (tests/test_contamination.py
holds the bounds; questions of 17 to 110 characters, edits are insertions, deletions and substitutions at random):

    must be found                                           found
    copied; other width, case, spaces, punctuation          100%
    inside a longer prompt or few shots; as an answer       100%
    1, 2, 3, 4 characters edited                            92%, 85%, 73%, 65%
    40%, 50%, 60% of a text of 250 characters               63%, 99.5%, 100%
    reference answer of 60 characters and more              100%
    must not be found                                       found
    a question with the same set phrases, other content     0 of 26 (answers: 0 of 4)
    the 3,600 questions and 7,560 answers that the demo's teacher writes, by the demo's index         0
    60,000 sentences and 3,000 texts of 2,700 characters of Tatoeba, by the 26 and the demo's index   0

What it does not find: a translation, other words for the same, a change in a question of a few words, reference
answers below MIN_ANSWER. What an index gives away: who guesses a text can test the guess, and who knows the beginning
of an item of less than about SAMPLE characters can try its continuations; of longer ones only a sample is kept.
Hashes of trigrams and pairs are cut to 16 bits, so that hundreds of them look the same.
"""

import base64
import dataclasses
import json
import os.path
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from numpy.typing import NDArray

from kaja import cli
from kaja.data import SOURCES, Example, load_all, load_examples
from kaja.errors import UserError
from kaja.files import read_json, read_jsonl, read_text, write_jsonl

ThingT = TypeVar("ThingT")
Record = tuple[str, Mapping[str, str]]  # (id, {field: text})
Hashes = NDArray[np.uint64]
Shorts = NDArray[np.uint16]  # hashes cut to 16 bits: hundreds of short grams have the same
Integers = NDArray[np.int64]

GUARDS = Path(__file__).parent / "guards"
BUILT_IN = GUARDS / "demo.jsonl"  # of the demo's evaluation files; always checked
STOCK_PHRASES = GUARDS / "stock_phrases.txt"
FORMAT, VERSION = "kaja guard", 1


KINDS = ("whole", "13-gram", "near-duplicate")  # from the clearest to the vaguest
MIN_WHOLE = 8  # letters and digits of a question that is compared at all
MIN_ANSWER = 60  # of a reference answer
MAX_SENTENCES = 8  # in a row that are compared whole with items; longer items are compared with whole fields, by grams
LONG, LONG_SHARE, LONG_LEAST = 13, 0.35, 48  # characters of a gram, share of an item's, number that an item must have
TRIGRAM_SHARE = 0.7  # of an item's trigrams, for a near-duplicate
OWN_SHARE = 0.6  # of its trigrams that are in no set phrase
PAIR_SHARE, PAIR_LEAST = 0.7, 2  # of its pairs of characters without hiragana; number that an item must have
ANCHOR, ANCHOR_LEAST = 6, 2  # the two texts are compared if they share so many 6-grams, and this share of the item's:
ANCHOR_SHARE, LATIN_ANCHOR_SHARE = 0.15, 0.5  # any long text in Latin letters holds most trigrams of any other
COMMON = 8  # a 6- or 13-gram of more items than this is of a set phrase
SAMPLE = 64  # grams of a kind that are kept of an item: those with the smallest hashes
CHUNK = 1_000_000  # characters that are hashed at a time
NOTHING: Hashes = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Item:
    """One text of an evaluation set, as hashes; each array is a sample of at most SAMPLE."""

    set: str
    id: str
    part: str  # "question" or "answer"
    whole: int
    num_long: int  # 13-grams in the sample
    long: Hashes  # those of them that are in no set phrase; none of an item that is too short
    anchors: Hashes  # 6-grams that are in no set phrase; none of an item with too few pairs
    anchor_share: float  # of them that a text must hold before it is looked at more closely
    trigrams: Shorts  # that are in no set phrase
    stock_trigrams: Shorts  # the others
    pairs: Shorts  # pairs of neighbours neither of which is hiragana: the words that carry the content


@dataclass(frozen=True)
class Hit:
    """A text of a training record that is in an evaluation set."""

    record: str
    field: str  # of the record
    set: str
    item: str  # the evaluation example's id
    part: str  # of the evaluation example: "question" or "answer"
    kind: str  # one of KINDS
    share: float  # of the item's grams that the field holds; of a whole item 1


@dataclass(frozen=True)
class GuardOptions:
    """Which evaluation sets must not be in the training data."""

    guard: tuple[str, ...] = ()
    """Evaluation sets that the data must not hold: indexes of `python -m kaja.contamination build`, or data files."""
    allow_contaminated: bool = False
    """Go on, with a warning, although the data holds examples of the evaluation sets."""


# ---------------------------------------------------------------------------------------------------------------------
# Hashing: a polynomial over the characters modulo 2^64. Its prefix sums give every gram, sentence and text by
# subtraction; the constants are part of the file format, and nothing depends on the machine or on Python's hash().

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
INVERSE = pow(BASE, -1, 1 << 64)
KEY = 0xB7E151628AED2A6B
DROPPED, KEPT, BOUNDARY = 0, 1, 2
BOUNDARIES = "\n。.!?:;|「」『』()【】[]<>♪…"  # as NFKC leaves them; a label like 「質問:」 ends with one


def scrambled(values: Hashes) -> Hashes:
    """splitmix64's finaliser: close values become unrelated ones, and all bits depend on all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def character_classes() -> NDArray[np.uint8]:
    """(0x110000,): DROPPED, KEPT (letters and digits) or BOUNDARY (ends a sentence) for each code point."""
    classes = np.array([chr(code).isalnum() for code in range(0x110000)], dtype=np.uint8)
    classes[[ord(character) for character in BOUNDARIES]] = BOUNDARY
    return classes


def fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


class Hashed:
    """The letters and digits of some texts, laid end to end (N characters), ready to be hashed by the window."""

    def __init__(self, texts: Sequence[str]) -> None:
        folded = [fold(text) for text in texts]
        encoded = "".join(folded).encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(encoded, dtype="<u4")
        classes = character_classes()[codes]
        kept = classes == KEPT
        owner = np.repeat(np.arange(len(texts)), [len(text) for text in folded])
        self._codes = codes[kept]  # (N,)
        self.owner = owner[kept]  # (N,) which text a character is of
        self.bounds = np.searchsorted(self.owner, np.arange(len(texts) + 1))  # text i is [bounds[i], bounds[i + 1])
        sentence = np.cumsum(classes == BOUNDARY)[kept]
        changes = (np.diff(sentence) > 0) | (np.diff(self.owner) > 0)
        self.starts = np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(self.owner)]  # of the sentences
        self.ends = np.append(self.starts[1:], len(self.owner))[: len(self.starts)]

        count = len(self.owner)
        powers = np.full(count + 1, BASE, dtype=np.uint64)
        self._inverses = np.full(count + 1, INVERSE, dtype=np.uint64)
        powers[0] = self._inverses[0] = 1
        np.cumprod(powers, out=powers)
        np.cumprod(self._inverses, out=self._inverses)
        values = scrambled(codes[kept].astype(np.uint64) + np.uint64(KEY))
        self._sums = np.zeros(count + 1, dtype=np.uint64)
        np.cumsum(values * powers[:count], out=self._sums[1:])

    def spans(self, starts: Integers, ends: Integers) -> Hashes:
        """Hashes of the characters [start, end); equal texts have equal hashes wherever they stand."""
        value = (self._sums[ends] - self._sums[starts]) * self._inverses[starts]
        return scrambled(value ^ (ends - starts).astype(np.uint64))

    def grams(self, size: int) -> tuple[Hashes, Integers]:
        """The hash of every window of `size` characters that lies in one text, and which text that is."""
        starts = self._windows(size)
        return self.spans(starts, starts + size), self.owner[starts]

    def _windows(self, size: int) -> Integers:
        """Where the windows of `size` characters begin that lie in one text."""
        count = max(len(self.owner) - size + 1, 0)
        return np.flatnonzero(self.owner[:count] == self.owner[len(self.owner) - count :])

    def trigrams(self, text: int) -> Shorts:
        """The different windows of 3 characters of one text, in 16 bits."""
        start, end = self.bounds[text], self.bounds[text + 1]
        return self._short(np.arange(start, end - 2), 3)

    def pairs(self, text: int) -> Shorts:
        """The different windows of 2 characters without hiragana, which is of endings and particles, in 16 bits."""
        start, end = self.bounds[text], self.bounds[text + 1]
        codes = self._codes[start:end]
        content = (codes < 0x3041) | (codes > 0x309F)
        return self._short(start + np.flatnonzero(content[:-1] & content[1:]), 2)

    def _short(self, starts: Integers, size: int) -> Shorts:
        return np.unique(self.spans(starts, starts + size) >> np.uint64(48)).astype(np.uint16)

    def wholes(self) -> tuple[Hashes, Integers]:
        """The hashes of every text, and of every one to MAX_SENTENCES sentences in a row, and which text each is of."""
        starts, ends = [self.bounds[:-1]], [self.bounds[1:]]
        for length in range(1, MAX_SENTENCES + 1):
            first, last = self.starts[: max(len(self.starts) - length + 1, 0)], self.ends[length - 1 :]
            inside = self.owner[first] == self.owner[last - 1]
            starts.append(first[inside])
            ends.append(last[inside])
        start, end = np.concatenate(starts), np.concatenate(ends)
        long_enough = end - start >= MIN_WHOLE
        start, end = start[long_enough], end[long_enough]
        return self.spans(start, end), self.owner[start]


class Lookup:
    """Many hashes -> the items that hold them."""

    def __init__(self, hashes: Hashes, items: Integers) -> None:
        order = np.argsort(hashes, kind="stable")
        self._items = items[order]
        self._keys, self._starts, self._counts = np.unique(hashes[order], return_index=True, return_counts=True)
        # A table of bits tells at once of most hashes that they are in no item: 16 bits for each that is in one.
        bits = int(np.clip(np.ceil(np.log2(len(self._keys) + 1)) + 4, 10, 32))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << (bits - 3), dtype=np.uint8)
        slots = self._keys >> self._shift
        np.bitwise_or.at(self._table, slots >> np.uint64(3), self._bit(slots))

    @staticmethod
    def _bit(slots: Hashes) -> NDArray[np.uint8]:
        return np.left_shift(np.uint8(1), (slots & np.uint64(7)).astype(np.uint8))

    def find(self, hashes: Hashes, owner: Integers) -> tuple[Integers, Integers, Integers]:
        """(text, item, how many different of its hashes) for every text and item that share any; sorted."""
        slots = hashes >> self._shift
        likely = np.flatnonzero(self._table[slots >> np.uint64(3)] & self._bit(slots))
        if not len(likely) or not len(self._keys):
            nothing = np.zeros(0, dtype=np.int64)
            return nothing, nothing, nothing
        key = np.minimum(np.searchsorted(self._keys, hashes[likely]), len(self._keys) - 1)
        found = self._keys[key] == hashes[likely]
        pairs = np.unique(owner[likely[found]] * len(self._keys) + key[found])  # a gram counts once for a text
        text, key = np.divmod(pairs, len(self._keys))
        counts = self._counts[key]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        item = self._items[np.repeat(self._starts[key], counts) + offsets]
        number_of_items = int(self._items.max()) + 1
        both, shared = np.unique(np.repeat(text, counts) * number_of_items + item, return_counts=True)
        return *np.divmod(both, number_of_items), shared


# ---------------------------------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class GuardIndex:
    """Evaluation sets as hashes: what `build_index` makes and `check` compares with."""

    items: list[Item]
    sets: dict[str, int]  # examples of each set

    def save(self, path: Path | str) -> None:
        """JSONL: a header that can be read, then a line for each item."""
        header = {"format": FORMAT, "version": VERSION, "sets": self.sets, "items": len(self.items)}
        write_jsonl(path, [header, *map(to_row, self.items)])

    @classmethod
    def load(cls, path: Path | str) -> "GuardIndex":
        """Raises UserError for a file that is no index, of a newer version, or not whole."""
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
    def wholes(self) -> Lookup:
        return Lookup(np.array([item.whole for item in self.items], dtype=np.uint64), np.arange(len(self.items)))

    @cached_property
    def long(self) -> Lookup:
        return self._lookup([item.long for item in self.items])

    @cached_property
    def anchors(self) -> Lookup:
        return self._lookup([item.anchors for item in self.items])

    @cached_property
    def anchors_needed(self) -> NDArray[np.float64]:
        return np.array([max(ANCHOR_LEAST, item.anchor_share * len(item.anchors)) for item in self.items])

    @staticmethod
    def _lookup(hashes: list[Hashes]) -> Lookup:
        return Lookup(np.concatenate([NOTHING, *hashes]), np.repeat(np.arange(len(hashes)), list(map(len, hashes))))


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


ARRAYS = {"long": 8, "anchors": 8, "trigrams": 2, "stock_trigrams": 2, "pairs": 2}  # of an Item: bytes of a number


def to_row(item: Item) -> dict[str, Any]:
    """A line of the file: the fields, arrays as base64 of their little-endian bytes."""
    row = dataclasses.asdict(item)
    for name in ARRAYS:
        array = row[name]
        row[name] = base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")
    return {**row, "whole": f"{item.whole:016x}"}


def from_row(row: dict[str, Any]) -> Item:
    arrays: dict[str, Any] = {
        name: np.frombuffer(base64.b64decode(row[name], validate=True), dtype=f"<u{size}").astype(f"u{size}")
        for name, size in ARRAYS.items()
    }
    return Item(**{**row, **arrays, "whole": int(row["whole"], 16)})


def build_index(sets: Mapping[str, Sequence[Example]]) -> GuardIndex:
    """The index of evaluation sets, each with its name; a set phrase is what many items of all sets share."""
    names, texts = [], []
    for name, examples in sets.items():
        for example in examples:
            parts = ("question", example.question, MIN_WHOLE), ("answer", example.reference, MIN_ANSWER)
            for part, text, least in parts:
                if is_compared(text, least):
                    names.append((name, example.id, part))
                    texts.append(text)
    wholes = np.concatenate([NOTHING, *(whole_hashes(chunk) for chunk in in_chunks(texts, len))])
    first = np.zeros(len(texts), dtype=bool)  # of several equal texts: in two sets they are one text
    first[np.unique(wholes, return_index=True)[1]] = True
    long = distinctive(texts, first, LONG)
    anchors = distinctive(texts, first, ANCHOR)
    short = short_grams(texts)
    items = []
    for number, ((name, identifier, part), (trigrams, stock_trigrams, pairs)) in enumerate(zip(names, short)):
        num_long, own_long = long[number]
        items.append(Item(
            name, identifier, part, int(wholes[number]),
            num_long, own_long if num_long >= LONG_LEAST else NOTHING,
            anchors[number][1] if len(pairs) >= PAIR_LEAST else NOTHING, anchor_share(texts[number]),
            trigrams, stock_trigrams, pairs,
        ))  # fmt: skip
    return GuardIndex(items, {name: len(examples) for name, examples in sets.items()})


def only_letters(text: str) -> str:
    return "".join(filter(str.isalnum, fold(text)))


@cache
def stock_phrases() -> tuple[str, ...]:
    return tuple(map(only_letters, read_text(STOCK_PHRASES).split("\n")))


@cache
def stock_grams(size: int) -> Hashes:
    return np.unique(Hashed(stock_phrases()).grams(size)[0])


@cache
def stock_short() -> tuple[Shorts, Shorts]:
    """Trigrams and pairs of the set phrases."""
    hashed = Hashed(stock_phrases())
    texts = range(len(stock_phrases()))
    trigrams, pairs = [hashed.trigrams(text) for text in texts], [hashed.pairs(text) for text in texts]
    return np.unique(np.concatenate(trigrams)), np.unique(np.concatenate(pairs))


def short_grams(texts: list[str]) -> Iterator[tuple[Shorts, Shorts, Shorts]]:
    """Samples of each text's trigrams that are in no set phrase, of its other trigrams, and of such pairs."""
    stock_trigrams, stock_pairs = stock_short()
    for chunk in in_chunks(texts, len):
        hashed = Hashed(chunk)
        for number in range(len(chunk)):
            trigrams, pairs = hashed.trigrams(number)[:SAMPLE], hashed.pairs(number)
            stock = is_in(trigrams, stock_trigrams)
            yield trigrams[~stock], trigrams[stock], pairs[~is_in(pairs, stock_pairs)][:SAMPLE]


def anchor_share(text: str) -> float:
    own = only_letters(text)
    return LATIN_ANCHOR_SHARE if sum(map(str.isascii, own)) > len(own) / 2 else ANCHOR_SHARE


def is_compared(text: str, least: int) -> bool:
    """Whether a text of an evaluation set is long enough and more than (a part of) one set phrase."""
    own = only_letters(text)
    return len(own) >= least and not any(own in phrase for phrase in stock_phrases())


def in_chunks(things: Iterable[ThingT], size: Callable[[ThingT], int]) -> Iterator[list[ThingT]]:
    """The things in lists of about CHUNK characters."""
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


def whole_hashes(texts: list[str]) -> Hashes:
    hashed = Hashed(texts)
    return hashed.spans(hashed.bounds[:-1], hashed.bounds[1:])


def distinctive(texts: list[str], first: NDArray[np.bool_], size: int) -> list[tuple[int, Hashes]]:
    """For each text how many grams are in its sample, and those of them that are no set phrases."""
    sets: list[Hashes] = []
    for chunk in in_chunks(texts, len):
        hashes, owner = Hashed(chunk).grams(size)
        bounds = np.searchsorted(owner, np.arange(len(chunk) + 1))
        sets += [np.unique(hashes[start:end]) for start, end in zip(bounds, bounds[1:])]
    counted = [grams for grams, counts in zip(sets, first) if counts]
    keys, counts = np.unique(np.concatenate([NOTHING, *counted]), return_counts=True)
    common = np.union1d(keys[counts > COMMON], stock_grams(size))
    samples = [grams[:SAMPLE] for grams in sets]
    return [(len(sample), sample[~is_in(sample, common)]) for sample in samples]


def is_in(hashes: NDArray[Any], known: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the hashes are among the known, which are sorted (np.isin would sort them again for each item)."""
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes)


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check(records: Iterable[Record], index: GuardIndex) -> list[Hit]:
    """The hits among records, each (id, {field: text}), read as they come and held a chunk at a time.

    One hit for each record and evaluation example, the clearest of its fields and kinds.
    """
    chunks = in_chunks(records, lambda record: sum(map(len, record[1].values())))
    return [hit for chunk in chunks for hit in check_chunk(chunk, index)]


def check_chunk(records: list[Record], index: GuardIndex) -> list[Hit]:
    places = [(number, name) for number, (_, fields) in enumerate(records) for name in fields]
    hashed = Hashed([records[number][1][name] for number, name in places])
    clearest: dict[tuple[int, str, str], Hit] = {}
    for kind, text, item, share in found(hashed, index):
        number, name = places[text]
        what = index.items[item]
        hit = Hit(records[number][0], name, what.set, what.id, what.part, kind, share)
        clearest.setdefault((number, what.set, what.id), hit)
    return [clearest[key] for key in sorted(clearest, key=lambda key: key[0])]


def found(hashed: Hashed, index: GuardIndex) -> Iterator[tuple[str, int, int, float]]:
    """(kind, text, item, share) of all hits, the clearest kinds first."""
    for text, item in zip(*index.wholes.find(*hashed.wholes())[:2]):
        yield "whole", int(text), int(item), 1.0
    for text, item, shared in zip(*index.long.find(*hashed.grams(LONG))):
        share = shared / index.items[item].num_long
        if share >= LONG_SHARE:
            yield "13-gram", int(text), int(item), round(float(share), 3)
    yield from near_duplicates(hashed, index)


def near_duplicates(hashed: Hashed, index: GuardIndex) -> Iterator[tuple[str, int, int, float]]:
    """Texts that share some 6-grams with an item, if they hold most of its trigrams and of its content words."""
    texts, items, shared = index.anchors.find(*hashed.grams(ANCHOR))
    enough = shared >= index.anchors_needed[items]
    trigrams, pairs, filled = np.zeros(1 << 16, dtype=bool), np.zeros(1 << 16, dtype=bool), -1
    for text, item in zip(texts[enough], items[enough]):
        if text != filled:  # they come sorted
            trigrams[:], pairs[:], filled = False, False, text
            trigrams[hashed.trigrams(text)], pairs[hashed.pairs(text)] = True, True
        own, stock, words = index.items[item].trigrams, index.items[item].stock_trigrams, index.items[item].pairs
        shared_own, shared_stock = trigrams[own].sum(), trigrams[stock].sum()
        share = float(shared_own + shared_stock) / (len(own) + len(stock))
        alike = share >= TRIGRAM_SHARE and shared_own >= OWN_SHARE * len(own)
        if alike and pairs[words].sum() >= PAIR_SHARE * len(words):
            yield "near-duplicate", int(text), int(item), round(share, 3)


def remove_hits(examples: Sequence[Example], index: GuardIndex) -> tuple[list[Example], list[Hit]]:
    """(the examples without a hit, the hits of the others)."""
    hits = check(((str(number), texts_of(example)) for number, example in enumerate(examples)), index)
    bad = {int(hit.record) for hit in hits}
    clean = [example for number, example in enumerate(examples) if number not in bad]
    return clean, [dataclasses.replace(hit, record=examples[int(hit.record)].id) for hit in hits]


def check_training_data(examples: Sequence[Example], options: GuardOptions) -> None:
    """UserError, or a warning on stderr where that is allowed, if examples of an evaluation set are among them."""
    index = load_guard(options.guard)
    hits = check(((f"{example.source} {example.id}", texts_of(example)) for example in examples), index)
    if not hits:
        return
    said = summary(hits, len(examples))
    if not options.allow_contaminated:
        raise UserError(
            f"data: {said}; `python -m kaja.contamination check` lists them all; remove them, "
            "or go on with --allow-contaminated"
        )
    print(f"warning: data: {said}; scores on these sets will be too good", file=sys.stderr)


def texts_of(example: Example) -> dict[str, str]:
    return {"question": example.question, "answer": example.reference}


def summary(hits: Sequence[Hit], records: int) -> str:
    number = len({hit.record for hit in hits})
    sets = Counter(name for _, name in {(hit.record, hit.set) for hit in hits})
    return (
        f"{number} of {records} records are in evaluation sets "
        f"({', '.join(f'{name}: {count}' for name, count in sets.most_common())}), "
        f"the first: {'; '.join(map(described, hits[:3]))}"
    )


def described(hit: Hit) -> str:
    share = "whole" if hit.kind == "whole" else f"{hit.kind}, {hit.share:.0%}"
    return f"{hit.field} of {hit.record!r} is the {hit.part} of {hit.set} {hit.item!r} ({share})"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation sets and the command line


def load_guard(guards: Sequence[str]) -> GuardIndex:
    """The built-in index together with those named: index files, or [NAME=]SPEC of evaluation data, hashed now."""
    indexes = [GuardIndex.load(BUILT_IN)]
    sets: dict[str, list[Example]] = {}
    for guard in guards:
        if is_index(Path(guard)):
            indexes.append(GuardIndex.load(guard))
        else:
            add_set(sets, guard)
    indexes.append(build_index(sets))
    return GuardIndex(
        [item for index in indexes for item in index.items],
        {name: count for index in indexes for name, count in index.sets.items()},
    )


def is_index(path: Path) -> bool:
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"format": "{FORMAT}"' in file.readline()


def add_set(sets: dict[str, list[Example]], named: str) -> None:
    """Read the evaluation set of [NAME=]SPEC into `sets`; UserError for a name that is there already."""
    name, spec = named_spec(named)
    if name in sets:
        raise UserError(f"{named}: {name!r} is the name of two sets; names tell hits apart; write NAME={spec}")
    sets[name] = load_evaluation_set(spec)


def named_spec(named: str) -> tuple[str, str]:
    """ac=answer_carefully=test.json -> (ac, answer_carefully=test.json); without a name the source or file gives it."""
    first, equals, rest = named.partition("=")
    if equals and first not in SOURCES and "/" not in first:
        return first, rest
    return (first if equals and first in SOURCES else Path(named).name.split(".")[0]), named


def load_evaluation_set(spec: str) -> list[Example]:
    """The examples of an evaluation set.

    A file of llm-jp-eval (a dataset, or the prompts of *.eval-prompt.json) and MT-Bench's question.jsonl are known
    by what they hold; everything else is a spec of kaja.data.load_examples.
    """
    path = Path(spec)
    if path.is_file() and path.suffix == ".json" and isinstance(content := read_json(path), dict):
        return llm_jp_eval_examples(content, path)
    if path.is_file() and path.suffix == ".jsonl" and "turns" in next(read_jsonl(path), (0, {}))[1]:
        return mt_bench_examples(path)
    return load_examples(spec)


def llm_jp_eval_examples(content: dict[str, Any], path: Path) -> list[Example]:
    """{"samples": [{"input", "output"}]}, or [{"prompt"}] less what all prompts share: instruction and few shots."""
    samples = content.get("samples")
    if not isinstance(samples, list) or not samples:
        raise UserError(
            f"{path}: an object without \"samples\"; of JSON objects only those of llm-jp-eval are known; "
            "give a JSON array, JSONL, or a file of llm-jp-eval"
        )
    field = "prompt" if isinstance(samples[0], dict) and "prompt" in samples[0] else "input"
    for number, sample in enumerate(samples, start=1):
        if not isinstance(sample, dict) or not isinstance(sample.get(field), str):
            raise UserError(
                f"{path}, sample {number}: no text {field!r}; every sample of llm-jp-eval has one; mend the file"
            )
    texts = [sample[field] for sample in samples]
    if field == "prompt" and len(texts) > 1:
        start = len(os.path.commonprefix(texts))
        texts = [text[start:] for text in texts]
        end = len(os.path.commonprefix([text[::-1] for text in texts]))
        texts = [text[: len(text) - end] for text in texts]
    return [
        Example(str(number), "llm_jp_eval", "helpfulness", text, str(sample.get("output", "")))
        for number, (text, sample) in enumerate(zip(texts, samples), start=1)
    ]


def mt_bench_examples(path: Path) -> list[Example]:
    """Every turn is an example: 81/1 and 81/2 of question 81, with its reference where it has one."""
    examples = []
    for line, row in read_jsonl(path):
        turns, references = row.get("turns"), row.get("reference") or []
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns) or "question_id" not in row:
            raise UserError(f"{path}, line {line}: MT-Bench has \"question_id\" and a list of \"turns\"; mend the line")
        for number, turn in enumerate(turns):
            reference = references[number] if isinstance(references, list) and number < len(references) else ""
            name = f"{row['question_id']}/{number + 1}"
            examples.append(Example(name, "mt_bench", "helpfulness", turn, str(reference)))
    return examples


@dataclass(frozen=True)
class BuildConfig:
    """Make an index of evaluation sets, from files that need not be kept."""

    sets: tyro.conf.Positional[tuple[str, ...]]
    """Evaluation sets, each [NAME=]SPEC: SOURCE=FILE, kaja's JSONL, JSON of llm-jp-eval, MT-Bench's question.jsonl."""
    out: str
    """The index, a .jsonl file."""


@dataclass(frozen=True)
class CheckConfig:
    """List the records of training files that are in evaluation sets. Exit code 2 if there are any."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Training files: kaja's JSONL, or SOURCE=FILE."""
    guard: tuple[str, ...] = ()
    """Indexes, or evaluation sets as [NAME=]SPEC; the demo's evaluation set is always checked."""
    hits: str = ""
    """Write the hits to this JSONL file instead of to the screen."""


def build(config: BuildConfig) -> None:
    if not config.sets:
        raise UserError("sets: no evaluation set; name at least one, as [NAME=]SPEC")
    if Path(config.out).suffix != ".jsonl":
        raise UserError(f"out {config.out}: an index is a .jsonl file; choose such a name")
    sets: dict[str, list[Example]] = {}
    for named in config.sets:
        add_set(sets, named)
    index = build_index(sets)
    index.save(config.out)
    counts = ", ".join(f"{name}: {count} examples" for name, count in index.sets.items())
    print(f"{config.out}: {len(index.items)} questions and answers of {counts}")


def check_files(config: CheckConfig) -> None:
    examples = load_all(config.data)
    hits = check(((f"{e.source} {e.id}", texts_of(e)) for e in examples), load_guard(config.guard))
    if config.hits:
        write_jsonl(config.hits, map(dataclasses.asdict, hits))
    else:
        for hit in hits:
            print(json.dumps(dataclasses.asdict(hit), ensure_ascii=False))
    if hits:
        raise UserError(f"data: {summary(hits, len(examples))}; remove them from the training data")
    print(f"{', '.join(config.data)}: none of {len(examples)} records is in an evaluation set", file=sys.stderr)


Command = (
    Annotated[BuildConfig, tyro.conf.subcommand("build")] | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def main(config: BuildConfig | CheckConfig) -> None:
    if isinstance(config, BuildConfig):
        build(config)
    else:
        check_files(config)


if __name__ == "__main__":
    command: Any = Command  # a union of configs, which `run` takes as it takes one
    sys.exit(cli.run(main, command))
