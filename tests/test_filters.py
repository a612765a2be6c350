"""kaja/filters.py: what a teacher gets wrong, and the good Japanese beside it that must pass."""

import re

import pytest

from kaja.demo_corpus import ANSWERS, BARE_REFUSALS, QUESTIONS, REASONS, REFUSALS_WITH_REASON, topics
from kaja.filters import (
    CHINESE,
    CUTS,
    Kind,
    Limits,
    is_bare_refusal,
    is_unfinished,
    japanese_share,
    read_marked,
    repeated_share,
    why_cut,
)

LIMITS = Limits(max_chars=2000)


def why(text: str, kind: Kind = "answer", stream: str = "helpfulness") -> str:
    """The reason alone; it must be a row of the funnel."""
    cut = why_cut(kind, text, stream, LIMITS)
    assert cut in ("", *CUTS[kind])
    return cut.removeprefix(f"{kind}: ")


# ---- format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "raw", "text"),
    [
        ("question", "Q: パンの作り方は？", "パンの作り方は？"),
        ("question", "Ｑ：パンの作り方は？ ", "パンの作り方は？"),
        ("question", "\n Q:\nパンの作り方は？", "パンの作り方は？"),
        ("question", "Q : パンの作り方は？", "パンの作り方は？"),
        ("question", "Q: 「Q: A:」とは何の略？", "「Q: A:」とは何の略？"),
        ("question", "Q: FAQ: よくある質問の書き方は？", "FAQ: よくある質問の書き方は？"),
        ("question", "Q: 首都はどこ？\nA: 大阪\nB: 東京", "首都はどこ？\nA: 大阪\nB: 東京"),
        ("question", "Q: 首都はどこ？\nA: 大阪　B: 東京", "首都はどこ？\nA: 大阪　B: 東京"),
        ("question", "Q: 3×4を計算してください。\n答え：", "3×4を計算してください。\n答え："),
        ("question", "Q: 解答形式: 選択式の試験の受け方は？", "解答形式: 選択式の試験の受け方は？"),
        ("answer", "A: 粉を練ります。", "粉を練ります。"),
        ("answer", "Ａ： 粉を練ります。", "粉を練ります。"),
        ("answer", "A: 会話の例です。\nA: こんにちは。\nB: こんにちは。", "会話の例です。\nA: こんにちは。\nB: こんにちは。"),
        ("answer", "A: 設定です。\n```yaml\nA: 1\nQ: 2\n```\n以上です。", "設定です。\n```yaml\nA: 1\nQ: 2\n```\n以上です。"),
        ("answer", "A: 取り消し線は`<s>`と`</s>`で囲みます。", "取り消し線は`<s>`と`</s>`で囲みます。"),
        ("answer", "A: ### 応答時間\n平均は2秒です。", "### 応答時間\n平均は2秒です。"),
        ("answer", "A: ユーザー：初心者\n目的：学習です。", "ユーザー：初心者\n目的：学習です。"),
    ],
)
def test_marks_are_taken_off(kind: Kind, raw: str, text: str) -> None:
    assert read_marked(kind, raw, cut_off=False) == ("", text)


@pytest.mark.parametrize(
    ("kind", "raw", "reason"),
    [
        ("question", "", "no Q:"),
        ("question", "パンの作り方は？", "no Q:"),
        ("question", "A: パンの作り方は？", "no Q:"),
        ("question", "FAQ: パンの作り方は？", "no Q:"),
        ("question", "Question: パンの作り方は？", "no Q:"),
        ("question", "**Q**: パンの作り方は？", "no Q:"),
        ("question", "質問です。\nQ: パンの作り方は？", "text before Q:"),
        ("question", "はい。Q: パンの作り方は？", "text before Q:"),
        ("question", "Here is a similar question:\n\nQ: パンの作り方は？", "text before Q:"),
        ("question", "Q: Q: パンの作り方は？", "more than one"),
        ("question", "Q: パンの作り方は？\n Q：何？", "more than one"),
        ("question", "Q: パンの作り方は？\nQ2: 餃子の作り方は？", "more than one"),
        ("question", "Q: パンの作り方は？\n**Q:** 餃子の作り方は？", "more than one"),
        ("question", "Q: パンの作り方は？\nA: 練ります。", "more than one"),
        ("question", "Q: パンの作り方は？\n\nAnswer: 練ります。", "more than one"),
        ("question", "Q: パンの作り方は？\n\n【回答】: 練ります。", "more than one"),
        ("question", "Q: パンの作り方は？\n模範解答：練ります。", "more than one"),
        ("question", "Q: 首都は？\nA: 大阪\nB: 東京\nQ: 次は？", "more than one"),
        ("question", "Q: \n", "empty"),
        ("answer", "Q: 粉を練ります。", "no A:"),
        ("answer", "粉を練ります。", "no A:"),
        ("answer", "回答します。\nA: 粉を練ります。", "text before A:"),
        ("answer", "Q: パンの作り方は？\nA: 粉を練ります。", "text before A:"),
        ("answer", "A: 粉を練ります。\nA: 粉を練ります。", "more than one"),
        ("answer", "A: A: 粉を練ります。", "more than one"),
        ("answer", "A: 粉を練ります。\n\nQ: 次の質問です。", "more than one"),
        ("answer", "A:", "empty"),
        ("answer", "A: 粉を練ります。<|im_end|>", "chat markers"),
        ("answer", "<|im_start|>assistant\nA: 粉を練ります。", "chat markers"),
        ("answer", "A: 粉を練ります。\nuser\nQ: 次は？", "chat markers"),
        ("answer", "A: 粉を練ります。\n### 指示:\n次です。", "chat markers"),
        ("answer", "A: 粉を練ります。\n\n### Response: 次です。", "chat markers"),
        ("answer", "A: 粉を練ります。</s>", "chat markers"),
        ("answer", "A: 粉を練ります。[INST] 次は？ [/INST]", "chat markers"),
        ("answer", "A: 粉を練ります。\nアシスタント：はい。", "chat markers"),
        ("answer", "A: 粉を練ります。<|eot_id|><|start_header_id|>user", "chat markers"),
    ],
)
def test_formats_that_are_cut(kind: Kind, raw: str, reason: str) -> None:
    cut, text = read_marked(kind, raw, cut_off=False)
    assert (cut, text) == (f"{kind}: {reason}", raw.strip())
    assert cut in CUTS[kind]


def test_what_met_the_limit_of_tokens_is_cut_off_whatever_it_says() -> None:
    assert read_marked("question", "Q: パンの作り方は？", cut_off=True)[0] == "question: cut off"
    assert read_marked("answer", "", cut_off=True)[0] == "answer: cut off"


# ---- length, what does not belong -----------------------------------------------------------------


def test_length_is_counted_in_characters_and_both_ends_are_allowed() -> None:
    limits = Limits(max_chars=8, min_chars=5)
    lengths = {length: why_cut("question", "あ" * length, "safety", limits) for length in (4, 5, 8, 9)}
    assert lengths == {4: "question: too short", 5: "", 8: "", 9: "question: too long"}
    assert why("：") == why("解答：") == why(" " * 20) == why("……！？（）") == "too short"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("answer", "粉を\ufffd練ります。", "broken characters"),
        ("answer", "粉を練ります\x00。", "broken characters"),
        ("answer", "粉を\ue000練ります。", "broken characters"),
        ("answer", "Sure! 東京は日本の首都です。", "extra text"),
        ("answer", "Here is the answer:\n東京は日本の首都です。", "extra text"),
        ("answer", "I'm sorry, but 爆弾の作り方はお教えできません。危険だからです。", "extra text"),
        ("answer", "承知いたしました。東京は日本の首都です。", "extra text"),
        ("answer", "はい、かしこまりました。東京は日本の首都です。", "extra text"),
        ("answer", "東京は日本の首都です。\n指示3: 正しい回答を理由も加えて生成しました。", "extra text"),
        ("question", "パンの作り方は？\n\n（この質問は、料理の基本を問うものです。）", "extra text"),
        ("question", "パンの作り方は？（参考質問に類似した質問です）", "extra text"),
        ("question", "有害な質問の例です。人の財布を取るには？", "extra text"),
        ("question", "以下は類似の質問です。\nパンの作り方は？", "extra text"),
        ("question", "了解しました。パンの作り方は？", "extra text"),
        # About the words themselves, or about other instructions.
        ("question", "「承知しました」と「了解しました」の違いは？", ""),
        ("question", "了解しましたと言われたときの返事は？", ""),
        ("question", "面接で有用な質問を十個考えてください。", ""),
        ("question", "以下の質問に答えてください。\n日本の首都はどこですか。", ""),
        ("question", "次の文を読んでください。\n太郎は走った。\n上記の質問に答えてください。", ""),
        ("question", "中学生向けの理科の質問を作成してください。", ""),
        ("question", "OKとNGの由来を教えてください。", ""),
        ("answer", "Sure! は「もちろん」という意味です。", ""),
        ("answer", "改行と\tタブは制御文字です。\r\n二つあります。", ""),
        ("answer", "楽しい旅行になりましたね😊", ""),
    ],
)
def test_broken_characters_and_extra_text(kind: Kind, text: str, reason: str) -> None:
    assert why(text, kind) == reason


# ---- language -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "東京です。その理由は、国会があるからです。",
        "TensorFlowとPyTorchの違いは、計算グラフの作り方です。",
        "HTMLではdivやspan、pやa、ulやliなどのタグで文書の構造を表します。",
        "ＷｉｎｄｏｗｓとＬｉｎｕｘの両方で動きます。",
        "ﾊﾟｿｺﾝの電源を入れます。",
        "次のように書きます。\n```python\nfor line in open(path, encoding='utf-8'):\n    print(line.strip(), end=' and more')\n"
        "```\n一行ずつ読むので、大きなファイルでも動きます。",
        "詳しくは https://www.example.com/guide/first-steps/index.html?lang=en&from=top をご覧ください。",
        "連絡先は support.desk@mail.example.co.jp です。",
        "質量とエネルギーの関係は $E = mc^2$、運動量は \\(p = mv\\) です。",
        "12 + 30 = 42",
        "1. 北海道\n2. 青森県\n3. 岩手県\n4. 宮城県\n5. 秋田県",
        "- 卵：2個\n- 牛乳：100ml\n- 砂糖：30g",
        "| 都市 | 人口 |\n|---|---|\n| 東京 | 1400万 |",
        "# 手順\n\n1. **準備**：道具をそろえる\n2. **実行**：順番に進める",
        "(´Д｀)や(；ω；)は残念な気持ちを表します。",
        # Kanji that Chinese has too, rare ones, and printers' forms.
        "国会で来年度の予算が審議され、学校の体育も議論されました。",
        "虫が這うように進み、呪文を呟く。嘘をついて叱られた。",
        "縄文時代の火焰型土器と、普洱茶の話です。",
        "瘦せた体を搔き、𠮟られて涙を吞みました。",
        "髙橋さんと山﨑さんは、葛飾区の辻󠄀さんの隣に住んでいます。",
        "習近平国家主席と李克強首相は、同じ年に就任しました。",
        "是非、合理的な判断をなさってください。我が家の他の都合は終了後に就寝します。",
        "許可以外の手続きは不要です。皇后来日の記事です。怪我要因と抜本的是正策、自我的な面もあります。",
        "積極的就職支援と合理的首都機能移転の話です。",
        "独立行政法人国立病院機構東京医療中心です。",
        # Quoted, explained.
        "「谢谢」は中国語で「ありがとう」、『안녕』は韓国語であいさつです。",
        "ファーウェイ（华为）は中国の企業です。",
        "ロシア語では\"спасибо\"と言います。",
        "The quick brown foxは、すべての文字を含む英文の始まりです。",
        "微分係数αとβ、角度θの関係です。",
    ],
)
def test_japanese(text: str) -> None:
    assert why(text) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I cannot help with that request because it is illegal.", "not Japanese"),
        ("The capital of Japan is Tokyo, 東京です。", "not Japanese"),
        ("Tokyoは首都です。The reason is that the government and the parliament are located there.", "not Japanese"),
        ("Je ne peux pas répondre à cette question.", "not Japanese"),
        ("이 질문에는 답할 수 없습니다.", "not Japanese"),
        ("日本国憲法第九十六条改正手続要綱", "not Japanese"),
        ("您可以通过以下方法学习。", "Chinese"),
        ("這個問題您可以問他們，也可以問我們。", "Chinese"),
        ("日本の首都は东京です。国会があるからです。", "Chinese"),
        ("これは非常に重要な问题です。", "Chinese"),
        ("她は学校で日本語を教えています。", "Chinese"),
        ("まず材料を準備します。然后、混ぜます。", "Chinese"),
        ("但是、例外もあります。", "Chinese"),
        ("我想知道日本的首都在何処ですか。", "Chinese"),
        ("原因は不是天候です。", "Chinese"),
        ("これは例です。我的家是在東京都内。そうです。", "Chinese"),
        ("この方法は효과적です。", "other script"),
        ("この方法はとても важно です。", "other script"),
        ("これは สวัสดี という挨拶です。", "other script"),
    ],
)
def test_other_languages(text: str, reason: str) -> None:
    assert why(text) == reason
    assert why(text, "question") == reason


def test_japanese_share_counts_words_of_latin_letters_and_single_japanese_letters() -> None:
    assert japanese_share("TensorFlowとPyTorchの違いは") == 5 / 7
    assert japanese_share("a b c あ") == 1 / 4
    assert japanese_share("12 + 30 = 42 ！") == 1.0
    assert why_cut("answer", "a b c あります。", "safety", Limits(100, min_japanese=0.6)) == "answer: not Japanese"
    assert why_cut("answer", "a b c あります。", "safety", Limits(100, min_japanese=0.5)) == ""


def test_no_everyday_kanji_is_taken_for_chinese() -> None:
    """The first of the school grades, and characters whose Japanese and simplified forms are one."""
    first_grade = (
        "一右雨円王音下火花貝学気九休玉金空月犬見五口校左三山子四糸字耳七車手十出女小上森人水正生青夕石赤千川先早草足村大男竹中虫町"
        "天田土二日入年白八百文木本名目立力林六"
    )
    assert not CHINESE.search(first_grade + "国会体点号当来旧声医区双虫尽励担抱涌涙蝉鴎麺籠鬱々仝〆")
    simplified = "这们说话语读请让认识谁门问间闻东车马鸟买卖对时书头发动务为么您你她吗呢吧哪产"
    assert "".join(CHINESE.findall(simplified)) == simplified


# ---- repetition -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "お答えできます。" * 5,
        "まず準備をします。" + "次に確認をして、" * 8 + "終わります。",
        "すごく" + "す" * 40 + "ごいです。",
        "絵文字です。" + "😀" * 40 + "。",
        "\n".join(f"{number}. 早寝早起きをして、朝ごはんを食べます。" for number in range(1, 8)),
        "大切なのは、毎日少しずつ続けることと、記録を付けることです。あきらめずに進みましょう。\n" * 2,
    ],
)
def test_loops(text: str) -> None:
    assert why(text) == "repetition"


@pytest.mark.parametrize(
    "text",
    [
        "お答えできます。お答えできます。",
        "ゴロゴロ、ゴロゴロ、ゴロゴロと雷が鳴り、わっしょい、わっしょい、わっしょいと神輿が通ります。",
        "生麦生米生卵、隣の客はよく柿食う客だ、東京特許許可局、と三回言います。",
        "署名欄です。\n氏名：＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿＿\n以上です。",
        "円周率の近似です。1/3は0.33333333333333333333333333333333333333です。",
        "表です。\n| 項目 | 値 |\n|------|------|------|------|------|------|------|\n| 高さ | 30 |\n以上です。",
        "はい。\n----------------------------------------------------\n次の章です。",
        "\n".join(f"{n}月は、{word}を楽しむことができます。" for n, word in enumerate("雪見 梅 桜 藤 新緑 紫陽花 海".split(), 1)),
        "表を作るコードです。\n```\n" + "print('ab')\n" * 12 + "```\n同じ行を十二回書いています。",
        "あああああああああああああああ、と叫びました。",
    ],
)
def test_repetition_that_is_wanted(text: str) -> None:
    assert why(text) == ""


def test_repeated_share_by_hand() -> None:
    line = "あいうえおかきくけこさしすせそたちつてとなにぬねの"  # 25 letters: 18 8-grams
    # 75 letters: 68 grams, 25 of them new, 7 of those across the seam.
    assert repeated_share("1. " + line + "\n2) " + line + "！3、" + line) == 43 / 68
    assert repeated_share(line) == 0.0
    assert repeated_share(line + line) == 0.0  # 18 of 43, too few to tell
    assert why_cut("answer", (line + "。") * 3, "borderline", Limits(500, max_repeated=0.7)) == ""


# ---- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "粉を練ります。",
        "粉を練ります",
        "はい、そのとおりです",
        "そのとおりですか",
        "「粉を練ります」",
        "合計は30",
        "使うのはPython",
        "次のとおりです。\n1. 粉を練る\n2. 焼く",
        "次のとおりです。\n- 焼く",
        "次のとおりです。\n・焼く",
        "次のとおりです。\n① 練る\n② 焼く",
        "次のとおりです。\n（1）練る\n（2）焼く",
        "次のとおりです。\nステップ1 練る",
        "表です。\n| 品 | 値 |\n|---|---|\n| 卵 | 二個 |",
        "こう書きます。\n```\nprint(1)\n```",
        "がんばってください！",
        "楽しみですね♪",
        "終わりです😊",
        "（以上）",
    ],
)
def test_finished(text: str) -> None:
    assert not is_unfinished(text)


@pytest.mark.parametrize(
    "text",
    [
        "粉を練ってから、",
        "粉を練ります。そして焼",
        "犯罪にあたるか",
        "手順は次のとおりです：",
        "手順は次のとおりです。\n1. 練る\n2.",
        "手順は次のとおりです。\n- 練る\n- ",
        "こう書きます。\n```python\nprint(1)",
        "次のとおりです。\n- 練ってから、",
        "3日間練ってから焼",
    ],
)
def test_unfinished(text: str) -> None:
    assert is_unfinished(text)
    assert why(text + " " if len(text) < 5 else text) == "unfinished"


def test_a_question_may_end_in_any_way() -> None:
    assert why("パンの作り方を教えて", "question") == ""


BARE = [
    "申し訳ありませんが、お答えできません。",
    "申し訳ありませんが、そのようなご質問にはお答えできません。",
    "申し訳ありませんが、そのようなご質問にはお答えできません。他に何かお手伝いできることはありますか？",
    "お答えできませんので、ご了承ください。",
    "お答えできないため、別の質問をお願いします。",
    "申し訳ございませんが、AIアシスタントとしてそのような質問には回答できません。別の話題でしたらお手伝いできますので、お気軽にご質問ください。",
    "申し訳ありませんが、その質問には回答いたしかねます。ご理解いただけますと幸いです。",
    "ご期待に沿えず申し訳ありませんが、お手伝いできません。",
    "その件についてはコメントを差し控えさせていただきます。",
    "盗むための道具についてはお答えできません。",
    "申し訳ありませんが、そのような行為はお手伝いできません。",
    "お答えできません。なぜそのようなことを聞くのでしょうか。",
    "お答えできません。専門家なら適切に対応していただけますので、ご相談ください。",
    "ご質問ありがとうございます。大変お困りのことと思います。しかし、お答えできません。",
]
WITH_REASON = [
    "申し訳ありませんが、犯罪行為につながる恐れがあるため、お答えできません。",
    "お答えできません。その理由は、他人の車を盗むことは犯罪にあたるからです。",
    "その行為は法律で禁止されています。そのため、お答えできません。",
    "お答えできません。爆発物の製造は法律で禁止されているためです。",
    "回答できません。他人のアカウントに無断で入ることは不正アクセス禁止法に違反します。",
    "法律で認められていませんので、お教えできません。",
    "申し訳ありませんが、個人情報の保護の観点から、お答えできません。",
    "申し訳ありませんが、安全上の理由から、その方法はお教えできません。",
    "お答えできません。なぜなら、人を傷つけるからです。",
    "申し訳ありませんが、特定の人種を侮辱する文章は作成できません。差別を助長し、人を深く傷つけることになります。",
    "お答えできません。名誉毀損に該当する可能性があります。",
    "法律で禁止されているため、お答えできませんので、ご了承ください。",
    "違法行為になるためお答えできません。",
    "危険なのでお教えできません。",
    "他人の迷惑になるから、お手伝いできません。",
    "詐欺は犯罪です。お手伝いできません。",
    "悪用できますので、お答えできません。",
    "犯罪に使われる為、お答えできません。",
    "いじめは許されることではありません。お答えできません。",
    "お答えできません。無断で撮影することはプライバシーの侵害に当たります。",
]
NO_REFUSAL = [
    "鍵をなくしたときは、専門の業者に頼み、身分証を見せて開けてもらいます。",
    "他人の車を壊してはいけません。器物損壊罪に問われます。",
    "暗証番号は、家族にも教えてはいけません。",
]


@pytest.mark.parametrize("text", BARE)
def test_bare_refusals_are_cut_from_the_safety_stream(text: str) -> None:
    assert is_bare_refusal(text)
    assert why(text, stream="safety") == "bare refusal"


@pytest.mark.parametrize("text", WITH_REASON + NO_REFUSAL)
def test_reasons_are_kept(text: str) -> None:
    assert not is_bare_refusal(text)
    assert why(text, stream="safety") == ""


@pytest.mark.parametrize("stream", ["borderline", "helpfulness"])
@pytest.mark.parametrize("text", BARE[:3] + WITH_REASON[:2])
def test_harmless_questions_are_not_refused(stream: str, text: str) -> None:
    assert why(text, stream=stream) == "refusal of a harmless question"


@pytest.mark.parametrize("stream", ["borderline", "helpfulness"])
@pytest.mark.parametrize("text", NO_REFUSAL + ["残念ながら、この機種は水中では使用できません。防水ケースを使いましょう。"])
def test_limits_and_warnings_are_no_refusals(stream: str, text: str) -> None:
    assert why(text, stream=stream) == ""


# ---- all together ---------------------------------------------------------------------------------


def test_the_first_reason_in_the_order_of_the_funnel() -> None:
    """A text with every flaw, and then one flaw less each time."""
    limits = Limits(max_chars=400)
    texts = [
        "\ufffd参考質問 these are many words of another language 您 пример " + "あ" * 400 + "、",
        "\ufffd参考質問 these are many words of another language 您 пример " + "あ" * 40 + "、",
        "参考質問 these are many words of another language 您 пример " + "あ" * 4 + "、",
        "these are many words of another language 您 пример " + "あ" * 4 + "、",
        "您 пример " + "あ" * 40 + "、",
        "пример " + "あ" * 40 + "、",
        "あ" * 40 + "、",
        "お答えできません、",
        "お答えできません。",
    ]
    found = [why_cut("answer", text, "safety", limits) for text in texts]
    assert found == [cut for cut in CUTS["answer"][7:] if cut != "answer: refusal of a harmless question"]


def test_rows_of_the_funnel() -> None:
    assert CUTS["question"][:4] == (
        "question: cut off", "question: chat markers", "question: no Q:", "question: text before Q:"
    )  # fmt: skip
    assert [len(CUTS["question"]), len(CUTS["answer"])] == [14, 17]
    assert all(re.match(f"{kind}: ", cut) for kind, cuts in CUTS.items() for cut in cuts)


def test_the_demo_s_own_texts_pass() -> None:
    for topic in topics()[::3]:
        for question in QUESTIONS:
            assert why(question.format(topic.text), "question", topic.stream) == ""
        if topic.stream == "safety":
            good, bad = REFUSALS_WITH_REASON, BARE_REFUSALS
        else:
            good, bad = [answer + reason for answer in ANSWERS for reason in REASONS], REFUSALS_WITH_REASON
        assert {why(answer.format(topic.text), stream=topic.stream) for answer in good} == {""}
        assert "" not in {why(answer.format(topic.text), stream=topic.stream) for answer in bad}
