"""Exact and near duplicates among hundreds of thousands of texts, found as they come.

Two texts are exact duplicates when they differ only in width, case, spaces and punctuation (`normalised`), and near
duplicates when the sets of their character n-grams overlap by at least the threshold (Jaccard: shared over all).
datasketch's LSH index of MinHash signatures proposes candidates and the n-grams themselves decide: what is called a
near duplicate is one, and of those at the threshold at most 1 in 100 escapes the index, of closer ones fewer.

Everything follows from the characters, with fixed constants: every machine and process says the same.
"""

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from kaja.errors import UserError
from kaja.text_hashes import BASE, code_points, fold, splitmix64

Signature = npt.NDArray[np.uint32]  # (num_perm,)

THRESHOLD, NUM_PERM, NGRAM = 0.8, 96, 3
RECALL = 0.99  # of the index, for pairs that are just at the threshold

# Not 「-」 before a digit, nor the point in 1.5; 「C」, 「C++」 and 「C#」 are different, and so are 「3+4」 and 「3*4」.
PUNCTUATION = re.compile(r"(?!-\d)(?!(?<=\d)\.\d)[^\w+#*/=<>%^°$¥€£]|_")


def normalised(text: str) -> str:
    """What texts share that differ only in width, case, spaces and punctuation; never empty for a text that is not."""
    plain = fold(text)
    return PUNCTUATION.sub("", plain) or "".join(plain.split()) or text


class Duplicates:
    """The texts added so far, each with its key; `find` names the one that a new text duplicates.

    In memory: the normalised texts, their signatures, and for each text an entry in every table of the index, which
    is most of it: 6 to 7 KB a text in all. bench/dedup.py measures it, and time, recall and precision.

    The defaults are for questions. With trigrams and 0.8, a change of w characters within a question makes it another
    question if it has less than 9 (w + 2) characters: 「カレーの作り方は？」 and 「餃子の作り方は？」 both stay, while a
    question of two lines with one word exchanged is cut.
    """

    def __init__(self, threshold: float = THRESHOLD, num_perm: int = NUM_PERM, ngram: int = NGRAM) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold={threshold}: must be above 0 and at most 1; {THRESHOLD} is usual")
        if ngram < 1:
            raise UserError(f"ngram={ngram}: must be at least 1; {NGRAM} is usual")
        bands, rows = bands_and_rows(threshold, num_perm)
        self.threshold, self.num_perm, self.ngram = threshold, num_perm, ngram
        self._index = MinHashLSH(num_perm=num_perm, params=(bands, rows))
        # datasketch's own permutations, drawn from its fixed seed: h -> a h + b modulo 2^32.
        self._empty = MinHash(num_perm=num_perm, seed=1, scheme="affine32")
        # The signatures' share of equal values estimates the overlap; so far below the threshold it never errs.
        self._hopeless = threshold - 5 * math.sqrt(threshold * (1 - threshold) / num_perm)
        self._keys: list[str] = []
        self._signatures = np.empty((1024, num_perm), dtype=np.uint32)  # of each key; the rows behind are room
        self._texts: list[str] = []  # normalised
        self._numbers: dict[str, int] = {}  # normalised text -> its first place in the lists

    def __len__(self) -> int:
        return len(self._keys)

    def signature(self, text: str) -> Signature:
        """Depends on the text and the constructor's arguments alone: another rank may compute it.

        datasketch would hash the n-grams one by one in Python; here it is one expression per text.
        """
        a, b = self._empty.permutations
        hashes = gram_hashes(normalised(text), self.ngram)
        signature: Signature = (hashes[:, None] * a + b).min(axis=0)
        return signature

    def find_exact(self, text: str) -> str | None:
        """The key of the first text that is the same when normalised, or None."""
        number = self._numbers.get(normalised(text))
        return None if number is None else self._keys[number]

    def find(self, text: str, signature: Signature | None = None) -> str | None:
        """The key of what `text` duplicates, or None; exact duplicates before near ones, earlier before later."""
        exact = self.find_exact(text)
        if exact is not None:
            return exact
        own = self._minhash(text, signature)
        numbers = np.sort(np.array(self._index.query(own), dtype=np.int64))
        # Questions made after the same pattern are candidates by the thousand: most are ruled out all at once.
        alike = (self._signatures[numbers] == own.hashvalues).mean(axis=1) >= self._hopeless
        text_grams = grams(normalised(text), self.ngram)
        for number in numbers[alike]:
            if jaccard(text_grams, grams(self._texts[number], self.ngram)) >= self.threshold:
                return self._keys[number]
        return None

    def add(self, key: str, text: str, signature: Signature | None = None) -> None:
        number, plain = len(self._keys), normalised(text)
        minhash = self._minhash(text, signature)
        self._index.insert(number, minhash, check_duplication=False)
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[number] = minhash.hashvalues
        self._keys.append(key)
        self._texts.append(plain)
        self._numbers.setdefault(plain, number)

    def _minhash(self, text: str, signature: Signature | None) -> Any:
        values = self.signature(text) if signature is None else np.asarray(signature, dtype=np.uint32)
        if values.shape != (self.num_perm,):
            raise ValueError(f"a signature of shape {values.shape}, not ({self.num_perm},)")
        return MinHash(
            hashvalues=values, permutations=self._empty.permutations, seed=1, scheme="affine32"
        )


def bands_and_rows(threshold: float, num_perm: int) -> tuple[int, int]:
    """The index's tables, and the values that one looks at: as many values as find RECALL of pairs at `threshold`.

    A pair of similarity s shares the values of one table with probability s^rows, those of any with
    1 - (1 - s^rows)^bands. More rows mean fewer tables (memory) and fewer false candidates (time).
    """
    for rows in range(num_perm // 2, 0, -1):
        bands = num_perm // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    raise UserError(
        f"num_perm={num_perm}: too few to find {RECALL:.0%} of the pairs at the threshold {threshold:g}; "
        f"raise it (the default is {NUM_PERM})"
    )


def grams(plain: str, ngram: int) -> set[str]:
    """The n-grams of a normalised text; of a shorter one, the text itself."""
    return {plain[start : start + ngram] for start in range(max(1, len(plain) - ngram + 1))}


def jaccard(left: set[str], right: set[str]) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def gram_hashes(plain: str, ngram: int) -> npt.NDArray[np.uint32]:
    """(number of n-grams,): 32 bits for each n-gram of a normalised text, with repetitions, in their order."""
    points = code_points(plain).astype(np.uint64)
    values = np.zeros(max(1, len(points) - ngram + 1), dtype=np.uint64)
    for offset in range(min(ngram, len(points))):
        values = values * np.uint64(BASE) + points[offset : offset + len(values)]
    return (splitmix64(values) >> np.uint64(32)).astype(np.uint32)
