"""kaja/text_hashes.py: hashes by their definition, n-grams and sentences by hand, the inverted index by brute force."""

import doctest
import random
import unicodedata

import numpy as np

from kaja import text_hashes
from kaja.text_hashes import HashedTexts, InvertedIndex, fold


def polynomial(text: str) -> int:
    """The hash of a text by its definition, in Python's integers: what other machines and versions must give."""
    def scrambled(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    total = sum(scrambled(ord(c) + 0xB7E151628AED2A6B) * pow(0x9E3779B97F4A7C15, n, 2**64) for n, c in enumerate(text))
    return scrambled(total % 2**64 ^ len(text))


def test_hashes_are_what_they_are_everywhere() -> None:
    hashed = HashedTexts(["ＡＢｃ、ｶﾞラスの 皿", "", "硝子のお皿とガラスの皿"])
    folded = ["abcガラスの皿", "", "硝子のお皿とガラスの皿"]
    assert hashed.wholes().tolist() == [polynomial(text) for text in folded]
    grams, owner = hashed.grams(6)
    expected = [(polynomial(text[n : n + 6]), i) for i, text in enumerate(folded) for n in range(len(text) - 5)]
    assert list(zip(grams.tolist(), owner.tolist())) == expected
    trigrams = hashed.by_text(*hashed.trigrams())
    assert [len(some) for some in trigrams] == [6, 0, 9]
    assert trigrams[0].tolist() == [polynomial(folded[0][n : n + 3]) >> 48 for n in range(6)]
    pairs = hashed.by_text(*hashed.content_bigrams())
    assert [some.tolist() for some in pairs] == [
        [polynomial(pair) >> 48 for pair in some]
        for some in (("ab", "bc", "cガ", "ガラ", "ラス"), (), ("硝子", "ガラ", "ラス"))
    ]
    assert polynomial("鍵") == 0x81e71820aaa44977  # a change of the constants breaks all indexes: raise VERSION


def test_sentence_runs() -> None:
    texts = ["犬が走る。猫は寝る！鳥", "", "質問：魚は泳ぐ"]
    hashes, owner = HashedTexts(texts).sentence_runs(max_sentences=2, min_characters=4)
    runs = [
        ("犬が走る猫は寝る鳥", 0), ("質問魚は泳ぐ", 2),  # all of them; the second is its two sentences too
        ("犬が走る", 0), ("猫は寝る", 0), ("魚は泳ぐ", 2), ("犬が走る猫は寝る", 0), ("猫は寝る鳥", 0), ("質問魚は泳ぐ", 2),
    ]  # fmt: skip
    assert sorted(zip(hashes.tolist(), owner.tolist())) == sorted((polynomial(text), number) for text, number in runs)


def test_texts_without_letters() -> None:
    hashed = HashedTexts(["。", ""])
    assert hashed.wholes().tolist() == [polynomial("")] * 2
    assert [len(hashes) for hashes, _ in (hashed.grams(2), hashed.trigrams(), hashed.content_bigrams())] == [0, 0, 0]
    assert len(hashed.sentence_runs(3, 1)[0]) == 0


def test_folding_is_nfkc_and_case_folding() -> None:
    rng = random.Random(0)
    odd = "？！％～…　５＝\u0338\u3099ﾞはハﾊÅÅßⅣ㍿①…"
    for _ in range(500):
        text = "".join(rng.choice(odd) for _ in range(12))
        assert fold(text) == unicodedata.normalize("NFKC", text).casefold()
    assert doctest.testmod(text_hashes) == (0, 1)


def test_the_inverted_index_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**64, 60, dtype=np.uint64)
    items = [np.unique(rng.choice(pool[:40], size)) for size in (0, 1, 5, 9, 30)]
    hashes, owner = rng.choice(pool, 80), np.sort(rng.integers(0, 7, 80))
    expected = []
    for text in range(7):
        held = set(hashes[owner == text].tolist())
        shared = [len(held & set(item.tolist())) for item in items]
        expected += [(text, item, count) for item, count in enumerate(shared) if count]
    assert len(expected) > 10
    assert list(zip(*(column.tolist() for column in InvertedIndex(items).find(hashes, owner)))) == expected
    for nothing in InvertedIndex([]).find(hashes, owner), InvertedIndex(items).find(hashes[:0], owner[:0]):
        assert [len(column) for column in nothing] == [0, 0, 0]
