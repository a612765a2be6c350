"""kaja/dedup.py: what counts as a duplicate, the index against brute force, the same on every machine."""

import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash

from kaja.dedup import (
    Duplicates,
    bands_and_rows,
    gram_hashes,
    grams,
    jaccard,
    normalised,
)
from kaja.errors import UserError

LONG = (
    "一人暮らしの大学生が一か月三万円で食費を抑えるための献立と買い物のこつを、"
    "栄養のかたよりにも気をつけながら教えてください。"
)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("パンの作り方は？", "パン の\n作り方は?"),
        ("パンの作り方は？", "「パンの作り方は」"),
        ("ＰＤＦを２つに分ける", "PDFを2つに分ける"),
        ("ﾊﾟｿｺﾝの選び方", "パソコンの選び方"),
        ("①を選ぶ", "1を選ぶ"),
        ("1,000円の貯金", "1000円の貯金。"),
        ("GitとSVNの違い", "gitとsvnの違い"),
        ("楽しい旅行♪", "楽しい旅行☆"),
    ],
)
def test_the_same_when_normalised(left: str, right: str) -> None:
    assert normalised(left) == normalised(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("C言語の学び方", "C++の学び方"),
        ("C言語の学び方", "C#言語の学び方"),
        ("体重が1.5倍になった", "体重が15倍になった"),
        ("-5度で凍る", "5度で凍る"),
        ("3+4は？", "3*4は？"),
        ("ビル", "ビール"),
        ("はは", "ばば"),
        ("病院", "美容院"),
        ("！", "？？"),  # nothing but punctuation is still a text
        ("😀", "😢"),
    ],
)
def test_not_the_same(left: str, right: str) -> None:
    assert normalised(left) != normalised(right)


def test_normalised_is_only_empty_for_an_empty_text() -> None:
    assert normalised("") == ""
    assert normalised(" \n") == " \n" and normalised("…") != ""


@pytest.mark.parametrize(
    "edited",
    [
        LONG.replace("、", " ").replace("。", ""),
        LONG.replace("ください", "下さい"),
        LONG.replace("大学生", "社会人"),
        LONG.replace("三万円", "3万円"),
        "すみません。" + LONG,
    ],
)
def test_near_duplicates(edited: str) -> None:
    duplicates = Duplicates()
    duplicates.add("seed-7", LONG)
    assert duplicates.find(edited) == "seed-7"


@pytest.mark.parametrize(
    "other",
    [
        "",
        "一人暮らしの大学生が三か月で英会話を身に付けるための計画と教材の選び方を、予算も考えながら教えてください。",
        "四人家族の献立を、栄養のかたよりにも気をつけながら一週間分考えてください。",
        LONG[: len(LONG) // 2],
        LONG + "また、弁当に向いた作り置きのおかずを五つと、それぞれの保存の方法と日持ちの目安も知りたいです。",
    ],
)
def test_other_texts(other: str) -> None:
    duplicates = Duplicates()
    duplicates.add("seed-7", LONG)
    assert duplicates.find(other) is None


def test_short_questions_of_one_pattern_are_different_questions() -> None:
    duplicates = Duplicates()
    for dish in ("カレー", "餃子", "味噌汁", "肉じゃが", "天ぷら"):
        question = f"{dish}の作り方を教えてください。"
        assert duplicates.find(question) is None
        duplicates.add(dish, question)
    assert duplicates.find("餃子の作り方を教えてください") == "餃子" and len(duplicates) == 5


def test_texts_shorter_than_an_ngram() -> None:
    duplicates = Duplicates()
    duplicates.add("a", "猫")
    duplicates.add("b", "猫か")
    assert (duplicates.find("猫！"), duplicates.find("猫か。"), duplicates.find("犬")) == ("a", "b", None)


def test_of_several_the_first_that_was_added() -> None:
    duplicates = Duplicates()
    duplicates.add("near", LONG.replace("大学生", "社会人"))
    duplicates.add("nearer", LONG.replace("ください", "下さい"))
    assert duplicates.find(LONG) == "near"
    duplicates.add("exact", LONG)
    duplicates.add("again", LONG)
    assert duplicates.find(LONG) == duplicates.find_exact(LONG + "！") == "exact"
    assert duplicates.find_exact(LONG[:-3]) is None


def test_overlap_by_hand() -> None:
    # あいう いうえ うえお / いうえ うえお えおか: 2 shared of 4.
    assert grams("あいうえお", 3) == {"あいう", "いうえ", "うえお"}
    assert jaccard(grams("あいうえお", 3), grams("いうえおか", 3)) == 0.5
    assert grams("ああああ", 3) == {"あああ"} and grams("あ", 3) == {"あ"}


@pytest.mark.parametrize(("threshold", "found"), [(0.5, "a"), (0.51, None)])
def test_the_threshold_is_exact_and_included(threshold: float, found: str | None) -> None:
    duplicates = Duplicates(threshold=threshold, num_perm=256)
    duplicates.add("a", "あいうえお")
    # Below the threshold it cannot be found, at the threshold it is, or escapes the index with probability 0.01.
    assert duplicates.find("いうえおか") == found


def mutated(text: str, rng: random.Random, changes: int) -> str:
    characters = list(text)
    for _ in range(changes):
        characters[rng.randrange(len(characters))] = chr(rng.randrange(0x3042, 0x3094))
    return "".join(characters)


def test_against_brute_force() -> None:
    """Nothing but pairs at or above the threshold, and (nearly) all of them, as comparing all with all says."""
    rng = random.Random(3)
    texts: list[str] = []
    for _ in range(60):
        text = "".join(chr(rng.randrange(0x3042, 0x3094)) for _ in range(rng.randrange(20, 300)))
        texts += [text, *(mutated(text, rng, round(len(text) * share)) for share in (0.01, 0.02, 0.035, 0.05, 0.1))]
    rng.shuffle(texts)
    duplicates, near, missed = Duplicates(), 0, 0
    sets = [{text[start : start + 3] for start in range(len(text) - 2)} for text in texts]
    for number, text in enumerate(texts):
        own = sets[number]
        expected = [n for n in range(number) if len(own & sets[n]) / len(own | sets[n]) >= 0.8]
        found = duplicates.find(text)
        assert found is None or int(found) in expected
        near += bool(expected)
        missed += bool(expected) and found is None
        duplicates.add(str(number), text)
    assert near == 149 and missed <= 1


def test_signatures_estimate_the_overlap() -> None:
    duplicates = Duplicates(num_perm=2048)
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(400))
    for changes in (5, 20, 60):
        other = mutated(text, rng, changes)
        true = jaccard(grams(text, 3), grams(other, 3))
        equal = float((duplicates.signature(text) == duplicates.signature(other)).mean())
        assert equal == pytest.approx(true, abs=4 * (0.25 / 2048) ** 0.5)


def test_signatures_are_those_of_datasketch() -> None:
    """Its own, slower way from hashes to a MinHash would do as well: the permutations are the same."""
    duplicates = Duplicates()
    signature = duplicates.signature(LONG)
    values = np.unique(gram_hashes(normalised(LONG), 3))
    a, b = MinHash(num_perm=96, seed=1).permutations
    slow = [min((int(x) * int(p) + int(q)) % 2**32 for x in values) for p, q in zip(a, b, strict=True)]
    assert signature.dtype == np.uint32 and signature.tolist() == slow


def test_another_rank_may_compute_the_signature() -> None:
    here, there = Duplicates(), Duplicates()
    sent = there.signature(LONG).tolist()  # as it comes through JSON
    here.add("a", LONG, np.array(sent))
    assert here.find(LONG.replace("大学生", "社会人")) == "a"
    assert here.find(LONG.replace("三万円", "3万円"), there.signature(LONG.replace("三万円", "3万円"))) == "a"
    with pytest.raises(ValueError, match=r"shape \(64,\), not \(96,\)"):
        here.find("別の質問です。", Duplicates(num_perm=64, threshold=0.9).signature("別の質問です。"))


def test_hashes_do_not_collide_and_do_not_depend_on_place() -> None:
    rng = random.Random(1)
    text = "".join(chr(rng.randrange(0x3042, 0x9FFF)) for _ in range(20_000))
    values = gram_hashes(text, 3)
    different = len({text[start : start + 3] for start in range(len(text) - 2)})
    assert len(values) == 19_998 and different - len(set(values.tolist())) <= 1
    assert gram_hashes(text[100:103], 3).tolist() == values[100:101].tolist()
    assert abs(float(values.mean()) / 2**32 - 0.5) < 0.01


# Computed once, on x86-64. Another number here means that an index of another machine, or of yesterday, is worthless.
CHECKSUM = 625561939


def checksum() -> int:
    return zlib.crc32(Duplicates().signature(LONG).astype("<u4").tobytes())


def test_signatures_are_the_same_everywhere() -> None:
    assert checksum() == CHECKSUM
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[1]))
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": paths}
    code = "from test_dedup import checksum; print(checksum())"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(CHECKSUM), result.stderr


@pytest.mark.parametrize(
    ("threshold", "num_perm", "expected"),
    # 1 - (1 - .8^6)^16 = .992, and 1 - (1 - .8^7)^13 = .953; 1 - (1 - .5^3)^42 = .996, and 1 - (1 - .5^4)^32 = .873.
    [(0.8, 96, (16, 6)), (0.5, 128, (42, 3)), (1.0, 96, (2, 48))],
)
def test_the_index_finds_99_of_100_at_the_threshold(threshold: float, num_perm: int, expected: tuple[int, int]) -> None:
    assert bands_and_rows(threshold, num_perm) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0: must be above 0 and at most 1"),
        ({"threshold": 1.2}, "threshold=1.2: must be above 0"),
        ({"ngram": 0}, "ngram=0: must be at least 1"),
        ({"threshold": 0.1, "num_perm": 16}, "num_perm=16: too few to find 99% of the pairs at the threshold 0.1"),
    ],
)
def test_impossible_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Duplicates(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    bench = Path(__file__).parents[1] / "bench" / "dedup.py"
    arguments = ("--documents", "2000", "--kind", "question", "--sample", "20", "--guard")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, bench, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^spaces, punctuation, width +\d+ +1\.00 1\.00 1\.00 +\d+ +1\.0000 +0$", result.stdout, re.M)
    reported = re.search(r"precision: (\d+) of (\d+) reported pairs", result.stdout)
    assert reported and reported[1] == reported[2] and "missed: 0 of 20" in result.stdout
    assert re.search(r"found +2,000 of 2,000 planted questions", result.stdout), result.stdout


def test_signatures_stay_with_their_texts_as_their_table_grows() -> None:
    """Texts after one pattern are candidates by the hundred; what decides is each one's own signature and n-grams."""
    known = Duplicates()
    rng = random.Random(0)
    words = ["".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(9)) for _ in range(2600)]
    texts = [f"{word}を上手に使うための正しい手順を教えてください" for word in words]
    for number, text in enumerate(texts):
        known.add(str(number), text)
    for number in (0, 1023, 1024, 2047, 2048, 2599):
        assert known.find(f"{texts[number]}ませんか") == str(number)
    assert known.find(f"{'日本語' * 3}を上手に使うための正しい手順を教えてください") is None
