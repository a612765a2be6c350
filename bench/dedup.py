"""Near duplicates (kaja/dedup.py) and the contamination guard (kaja/contamination.py) at the size of a real set.

A corpus is generated: Japanese questions, or questions with answers, from sentence patterns and a vocabulary, with
log-normal numbers of sentences. Of each kind of edit in EDITS, 1% of the documents are edited copies of others.
They pass through Duplicates as through synth.py: find, and add what is new. What is printed:

1. seconds (signature, find, add), documents/s, and the memory that the index added to the process;
2. recall by edit and by the true Jaccard overlap of copy and original (exact n-gram sets);
3. precision: the exact overlap of every pair that was reported;
4. what was missed: some kept documents against all earlier kept ones, exactly;
5. with --guard: the guard's seconds and memory on the same documents against generated evaluation sets, how many of
   the planted evaluation questions it finds, and how many other records hold one by chance: short questions do.

    OMP_NUM_THREADS=1 python bench/dedup.py                            # 20,000 pairs: half a minute
    OMP_NUM_THREADS=1 python bench/dedup.py --documents 240000 --kind question --guard   # 8 minutes

One core. The generator is seeded: the same numbers, except for the times.
"""

import argparse
import random
import re
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaja.contamination import build_index, check  # noqa: E402
from kaja.data import Example  # noqa: E402
from kaja.dedup import Duplicates, gram_hashes, grams, jaccard, normalised  # noqa: E402

# ---- the corpus -----------------------------------------------------------------------------------

PEOPLE = """大学生 会社員 主婦 高校生 新入社員 看護師 教師 店長 留学生 祖母 父 母 妹 同僚 上司 部下 友人 隣人 子ども 高齢者 観光客 初心者
受験生 経営者 農家 漁師 料理人 医師 編集者 研究者 運転手 警察官 弁護士 司書 通訳 審判 選手 作家 画家 職人""".split()
THINGS = """カレー 味噌汁 洗濯物 自転車 パソコン 眼鏡 観葉植物 冷蔵庫 電車の定期券 確定申告 履歴書 住民票 年賀状 英会話 将棋 登山靴 水筒 日記
家計簿 目覚まし時計 顕微鏡 望遠鏡 天気図 百人一首 方程式 元素記号 明治維新 選挙制度 為替 消費税 火災保険 血圧 睡眠 視力 花粉症 肩こり 救急箱
避難経路 非常食 防犯灯 迷惑メール 暗証番号 個人情報 著作権 契約書 領収書 会議録 報告書 企画書 名刺 敬語 俳句 短歌 水彩画 楽譜 尺八 三味線
茶道 盆栽 金魚 柴犬 野良猫 渡り鳥 流氷 火山 台風 地震 津波 潮の満ち引き 月食 人工衛星 再生紙 太陽電池 風力発電 水道水 雨どい 畳 障子 瓦屋根 石垣
商店街 図書館 博物館 市役所 無人駅 高速道路 横断歩道 宅配便 自動販売機 弁当 納豆 梅干し 緑茶 抹茶 豆腐 うどん 餅 寒天 昆布だし 包丁 土鍋
圧力鍋 換気扇 掃除機 電子レンジ 表計算 検索エンジン 暗号 圧縮ファイル 再帰関数 正規表現 データベース 仮想マシン 無線LAN 携帯電話 充電器""".split()
PLACES = """東京 大阪 札幌 仙台 金沢 京都 広島 松山 福岡 那覇 台所 職場 学校 病院 公園 駅前 山小屋 海辺 実家 会議室 体育館 畑 屋上 車内
待合室 受付 倉庫 温室 港 工場""".split()
TIMES = "毎朝 週末 冬休み 梅雨の時期 引っ越しの前 試験の前日 年度末 昼休み 夜中 出発の前 決算期 連休 入学式の後 退職後".split()
DO = """選ぶ 調べる 直す 片付ける 説明する 比べる 保管する 作り直す 申し込む 覚える 教える 使いこなす 記録する 準備する 見分ける 買い換える
持ち運ぶ 点検する 引き継ぐ 楽しむ 始める やめる 減らす 増やす 活用する 整理する 観察する 分解する 予約する 翻訳する""".split()
ADJECTIVES = "安全な 手軽な 丈夫な 静かな 正確な 丁寧な 安い 新しい 古い 小さな 珍しい 身近な 複雑な 急な 公平な 効果的な".split()
REASONS = """失敗が少ない 費用を抑えられる 時間が節約できる けがを防げる 周りの人に喜ばれる 後で困らない 長持ちする 理解が深まる 環境にやさしい
間違いに気付きやすい 気持ちが落ち着く 法律に合っている 味がよくなる 健康によい 目が疲れない""".split()

ASKED = """{place}で{thing}を{do}方法を教えてください。
{person}が{thing}を{do}ときに気を付けることは何ですか。
{thing}と{thing2}の違いを説明してください。
{time}に{thing}を{do}には、どのような手順を踏めばよいでしょうか。
{thing}を{do}ための{adjective}こつはありますか。
なぜ{thing}は{place}で大切にされているのですか。
{person}に{thing}を{do}よう頼まれました。どう答えればよいですか。
{thing}について、{person}にも分かるように三つの点にまとめてください。
{place}の{person}に送る、{thing}を{do}お知らせの文章を書いてください。
{thing}の歴史を簡単に教えてください。
{adjective}{thing}の特徴を五つ挙げてください。
{time}までに{thing}を{do}計画を立てたいのですが、何から始めますか。
{thing}を{do}のに必要な道具と費用を知りたいです。
{thing}の{adjective}使い方を提案してください。""".split("\n")
CONTEXT = """私は{place}に住む{person}です。
{time}に{thing}を{do}ことになりました。
{person}から、{thing}のことで相談を受けています。
予算は{number}円です。
以前は{thing}を使っていましたが、最近{adjective}{thing2}に替えました。
{place}では{thing}を{do}人が増えています。
時間は{number}分ほどしかありません。
{thing}を{do}のは初めてで、{thing2}についても詳しくありません。
{adjective}ものが希望です。
{person}と{person2}の二人で{do}予定です。""".split("\n")
TOLD = """まず{thing}を{do}前に、{place}で{thing2}を確認します。
{thing}は{adjective}ものを選ぶと、{reason}からです。
次に、{person}と相談しながら{thing}を{do}とよいでしょう。
{time}は{place}が混むため、{thing}を{do}のは避けたほうが無難です。
{thing}と{thing2}は似ていますが、{do}ときの手間が違います。
目安は{number}分から{number2}分ほどです。
{person}の場合は、{adjective}方法で{thing}を{do}ことをお勧めします。
その理由は、{reason}うえに、{reason2}からです。
費用は{number}円前後で、{place}でも手に入ります。
{thing}の扱いに慣れていない人は、{person}に手伝ってもらうと安心です。
なお、{thing2}を{do}場合には別の手順が必要になります。
また、{adjective}{thing}なら{reason}ことも知られています。
{place}の窓口で{thing}について尋ねると、{person}が詳しく教えてくれます。
最後に、{thing}を{place}に戻し、{thing2}が{adjective}状態かどうかを見ます。
{reason}ので、{time}に{do}人も少なくありません。
{thing}を{do}ときは、{number}回に分けると{reason}でしょう。
一方で、{thing2}には{adjective}面もあり、{person}には向かないことがあります。
{person}によると、{place}では{thing}より{thing2}が好まれるそうです。""".split("\n")


def sentence(patterns: Sequence[str], rng: random.Random) -> str:
    return rng.choice(patterns).format(
        person=rng.choice(PEOPLE), person2=rng.choice(PEOPLE), thing=rng.choice(THINGS), thing2=rng.choice(THINGS),
        place=rng.choice(PLACES), time=rng.choice(TIMES), do=rng.choice(DO), adjective=rng.choice(ADJECTIVES),
        reason=rng.choice(REASONS), reason2=rng.choice(REASONS), number=rng.randrange(1, 100) * 10,
        number2=rng.randrange(100, 200) * 10,
    )  # fmt: skip


def document(kind: str, rng: random.Random) -> list[str]:
    """The sentences of a question (median 2 to 3), or of a question and its answer (median 8 more)."""
    context = [sentence(CONTEXT, rng) for _ in range(min(12, round(rng.lognormvariate(0.4, 0.7))))]
    question = [*context, sentence(ASKED, rng)]
    if kind == "question":
        return question
    return question + [sentence(TOLD, rng) for _ in range(max(1, min(60, round(rng.lognormvariate(2.1, 0.7)))))]


# ---- edits ----------------------------------------------------------------------------------------


def punctuation(sentences: list[str], rng: random.Random) -> list[str]:
    text = [s.replace("、", rng.choice([" ", "，", ""])).replace("。", rng.choice(["．", "！", " "])) for s in sentences]
    return [s.translate({ord(digit): chr(ord(digit) + 0xFEE0) for digit in "0123456789"}) + "\n" for s in text]


def one_word(sentences: list[str], rng: random.Random) -> list[str]:
    """One thing, person or place is another, wherever it stands."""
    text = "\n".join(sentences)
    words = [(word, pool) for pool in (THINGS, PEOPLE, PLACES) for word in pool if word in text]
    if words:
        word, pool = rng.choice(words)
        text = text.replace(word, rng.choice(pool))
    return text.split("\n")


PARTICLES = {
    "を教えてください": "について教えて下さい", "ください": "下さい", "ですか": "でしょうか", "します": "しましょう",
    "とき": "時", "まず": "はじめに", "よいでしょう": "良いです", "ほど": "くらい", "なぜ": "どうして",
}  # fmt: skip


def particles(sentences: list[str], rng: random.Random) -> list[str]:
    """Other particles, endings and spellings with the same meaning, half of those that could be."""
    edited = list(sentences)
    for old, new in PARTICLES.items():
        edited = [s.replace(old, new) if rng.random() < 0.5 else s for s in edited]
    return edited


def order(sentences: list[str], rng: random.Random) -> list[str]:
    return rng.sample(sentences, len(sentences))


def one_more(sentences: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(sentences) + 1)
    return [*sentences[:place], sentence(CONTEXT, rng), *sentences[place:]]


def half_new(sentences: list[str], rng: random.Random) -> list[str]:
    """No duplicate any more, in most cases."""
    return [s if number % 2 else sentence(TOLD, rng) for number, s in enumerate(sentences)]


Edit = Callable[[list[str], random.Random], list[str]]
EDITS: dict[str, Edit] = {
    "spaces, punctuation, width": punctuation,
    "particles and endings": particles,
    "one word exchanged": one_word,
    "order of sentences": order,
    "one sentence more": one_more,
    "half of the sentences new": half_new,
}
SHARE = 0.01  # of the documents, for each edit


@dataclass
class Document:
    text: str
    edit: str = ""
    original: int = -1  # place in the corpus


def corpus(number: int, kind: str, seed: int) -> list[Document]:
    """Copies stand anywhere behind their originals."""
    rng = random.Random(seed)
    edits = list(EDITS.items())
    plain: list[int] = []
    documents: list[Document] = []
    for place in range(number):
        which = int(rng.random() / SHARE)
        if plain and which < len(edits):
            name, edit = edits[which]
            original = rng.choice(plain)
            sentences = re.split(r"(?<=。)(?!$)", documents[original].text)
            documents.append(Document("".join(edit(sentences, rng)), name, original))
        else:
            plain.append(place)
            documents.append(Document("".join(document(kind, rng))))
    return documents


# ---- measurement ----------------------------------------------------------------------------------


def memory() -> tuple[float, float]:
    """(now, peak) resident size of the process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def overlap(index: Duplicates, left: str, right: str) -> float:
    return jaccard(grams(normalised(left), index.ngram), grams(normalised(right), index.ngram))


def deduplicate(index: Duplicates, documents: Sequence[Document]) -> list[str | None]:
    """Of each document the place of what it duplicates; prints time and memory."""
    before, _ = memory()
    seconds: Counter[str] = Counter()
    found: list[str | None] = []
    for place, document in enumerate(documents):
        started = time.perf_counter()
        signature = index.signature(document.text)
        signed = time.perf_counter()
        found.append(index.find(document.text, signature))
        searched = time.perf_counter()
        if found[-1] is None:
            index.add(str(place), document.text, signature)
        seconds.update(signature=signed - started, find=searched - signed, add=time.perf_counter() - searched)
        if (place + 1) % 20_000 == 0:
            print(f"  {place + 1:,} documents, {seconds.total():.0f} s", file=sys.stderr, flush=True)
    total = seconds.total()
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    now, peak = memory()
    print(f"time     {total:.1f} s ({parts}), {len(documents) / total:,.0f} documents/s")
    each = (now - before) * 2**20 / len(index)
    print(f"memory   {now - before:,.0f} MiB for the index, {each:,.0f} bytes a document; peak of the process "
          f"{peak:,.0f} MiB, with {before:,.0f} MiB of corpus and libraries")
    print(f"kept     {len(index):,} of {len(documents):,}")
    return found


BINS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def print_recall(index: Duplicates, documents: Sequence[Document], found: Sequence[str | None]) -> None:
    """Of the copies; a copy whose original was itself cut is left out."""
    by_edit: defaultdict[str, list[tuple[float, bool]]] = defaultdict(list)
    for document, match in zip(documents, found, strict=True):
        if document.edit and found[document.original] is None:
            true = overlap(index, document.text, documents[document.original].text)
            by_edit[document.edit].append((true, match is not None))
    print(f"\n{'edit':28}{'copies':>8}{'overlap, quartiles':>22}{'at least ' + format(index.threshold, 'g'):>15}"
          f"{'recall':>9}{'found below':>13}")
    for edit in EDITS:
        pairs = by_edit[edit]
        near = [hit for true, hit in pairs if true >= index.threshold]
        below = sum(hit for true, hit in pairs if true < index.threshold)
        quartiles = " ".join(f"{value:.2f}" for value in quantiles([true for true, _ in pairs], n=4))
        recall = f"{fmean(near):.4f}" if near else "-"
        print(f"{edit:28}{len(pairs):>8,}{quartiles:>22}{len(near):>15,}{recall:>9}{below:>13,}")
    print(f"\n{'overlap of copy, original':28}{'copies':>8}{'found':>9}")
    pairs = [pair for some in by_edit.values() for pair in some]
    for low, high in zip(BINS, (*BINS[1:], 1.1)):
        hits = [hit for true, hit in pairs if low <= true < high]
        if hits:
            label = f"{low:g} to {high:g}" if high <= 1 else "1"
            print(f"{label:28}{len(hits):>8,}{fmean(hits):>9.4f}")


def print_precision(index: Duplicates, documents: Sequence[Document], found: Sequence[str | None]) -> None:
    reported = [
        (document, overlap(index, document.text, documents[int(match)].text))
        for document, match in zip(documents, found, strict=True)
        if match is not None
    ]
    true = sum(share >= index.threshold for _, share in reported)
    planted = sum(bool(document.edit) for document, _ in reported)
    print(f"\nprecision: {true:,} of {len(reported):,} reported pairs overlap by at least {index.threshold:g}; "
          f"{planted:,} of them are copies, the others are alike by chance")


def print_missed(index: Duplicates, documents: Sequence[Document], found: Sequence[str | None], sample: int) -> None:
    """A random sample of kept documents against all that were kept before, by the exact sets of hashed n-grams."""
    kept = [place for place, match in enumerate(found) if match is None]
    hashes = [np.unique(gram_hashes(normalised(documents[place].text), index.ngram)) for place in kept]
    sizes = np.array([len(one) for one in hashes])
    starts, everything = np.cumsum(sizes) - sizes, np.concatenate(hashes)
    best = []
    for number in random.Random(0).sample(range(1, len(kept)), min(sample, len(kept) - 1)):
        end = starts[number]
        shared = np.add.reduceat(np.isin(everything[:end], hashes[number]), starts[:number])
        best.append(float(np.max(shared / (sizes[:number] + sizes[number] - shared))))
    missed = sum(value >= index.threshold for value in best)
    print(f"missed: {missed} of {len(best)} kept documents overlap by at least {index.threshold:g} with one kept "
          f"before (exact search; nearest neighbour: median {median(best):.2f}, highest {max(best):.2f})")


# ---- the guard ------------------------------------------------------------------------------------


def evaluation_set(name: str, number: int, seed: int) -> list[Example]:
    rng = random.Random(f"{name} {seed}")
    texts = [("".join(document("question", rng)), "".join(document("pair", rng))) for _ in range(number)]
    return [Example(f"{name}-{n}", name, "helpfulness", *both) for n, both in enumerate(texts)]


def contaminated(documents: Sequence[Document], items: Sequence[Example]) -> Iterator[tuple[str, dict[str, str]]]:
    """The documents as records; behind the first ones, one each, stands an evaluation question."""
    for place, document in enumerate(documents):
        text = document.text + (items[place].question if place < len(items) else "")
        yield str(place), {"question": text}


def guard(documents: Sequence[Document]) -> None:
    """Sizes of AnswerCarefully's test split, ELYZA-tasks-100, MT-Bench and llm-jp-eval's samples."""
    sets = {name: evaluation_set(name, number, seed=1) for name, number in SETS.items()}
    items = [item for some in sets.values() for item in some]
    before, _ = memory()
    started = time.perf_counter()
    index = build_index(sets)
    built = time.perf_counter()
    hits = check(contaminated(documents, items), index)
    ended = time.perf_counter()
    caught = {int(hit.record) for hit in hits}
    planted = min(len(items), len(documents))
    print(f"\nguard    {len(items):,} evaluation examples, index {built - started:.1f} s; {len(documents):,} records "
          f"checked in {ended - built:.1f} s, {len(documents) / (ended - built):,.0f} records/s")
    print(f"memory   {memory()[0] - before:,.0f} MiB, peak of the process {memory()[1]:,.0f} MiB")
    print(f"found    {sum(place < planted for place in caught):,} of {planted:,} planted questions, and "
          f"{sum(place >= planted for place in caught):,} of {len(documents) - planted:,} other records, made of the "
          f"same patterns ({dict(Counter(hit.kind for hit in hits if int(hit.record) >= planted))})")


SETS = {"answer_carefully_test": 336, "elyza_tasks_100": 100, "mt_bench": 160, "llm_jp_eval": 3000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--kind", choices=("question", "pair"), default="pair")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--sample", type=int, default=100, help="kept documents that are compared with all before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guard", action="store_true", help="the contamination guard too")
    options = parser.parse_args()
    started = time.perf_counter()
    documents = corpus(options.documents, options.kind, options.seed)
    lengths = quantiles([len(document.text) for document in documents], n=20)
    print(f"corpus   {len(documents):,} documents ({options.kind}) in {time.perf_counter() - started:.0f} s; "
          f"characters: 5% {lengths[0]:.0f}, median {lengths[9]:.0f}, 95% {lengths[18]:.0f}")
    index = Duplicates(threshold=options.threshold)
    found = deduplicate(index, documents)
    print_recall(index, documents, found)
    print_precision(index, documents, found)
    print_missed(index, documents, found, options.sample)
    if options.guard:
        del index
        guard(documents)


if __name__ == "__main__":
    main()
