"""Which of a teacher's texts are kept: format, length, language, repetition, refusals. Pure functions on text.

`read_marked` looks at what the teacher said and takes off the mark that the prompts ask for; `why_cut` looks at the
question or answer behind it. Both name the first reason that applies, in the order of `CUTS`: the rows of the
funnel. Cutting good text costs the teacher's time and bends the set, so each filter looks for what can hardly be
anything else, and code, addresses, formulas and quotations are left out of the look where they may hold it.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from kaja.health import opens_with_refusal

Kind = Literal["question", "answer"]

FORMAT = ("cut off", "chat markers", "no {mark}", "text before {mark}", "more than one", "empty")
TEXT = (
    "too short", "too long", "broken characters", "extra text", "not Japanese", "Chinese", "other script", "repetition"
)  # fmt: skip
OF_ANSWERS = ("unfinished", "bare refusal", "refusal of a harmless question")


def rows(kind: Kind, mark: str, reasons: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{kind}: {reason.format(mark=mark)}" for reason in reasons)


CUTS: dict[Kind, tuple[str, ...]] = {
    "question": rows("question", "Q:", FORMAT + TEXT),
    "answer": rows("answer", "A:", FORMAT + TEXT + OF_ANSWERS),
}


@dataclass(frozen=True)
class Limits:
    """For a question or for an answer: one of each."""

    max_chars: int
    min_chars: int = 5  # shorter texts (":", 「解答：」) say nothing, and are known to fool judges
    min_japanese: float = 0.5  # see japanese_share
    max_repeated: float = 0.4  # see repeated_share


# ---- format ---------------------------------------------------------------------------------------

MARKS: dict[Kind, re.Pattern[str]] = {
    "question": re.compile(r"(?<![A-Za-zＡ-Ｚ])[QＱ]\s*[:：]"),
    "answer": re.compile(r"(?<![A-Za-zＡ-Ｚ])[AＡ]\s*[:：]"),
}
# A further mark: 「Q2:」 and 「**A:**」 too.
ANY_MARK = re.compile(r"^[\s*#>]*(?:[QAＱＡ]|Question|Answer)\s*\d*\**\s*[:：]", re.MULTILINE)
QUESTION_MARK = re.compile(r"^[\s*#>]*(?:[QＱ]|Question)\s*\d*\**\s*[:：]", re.MULTILINE)
# Where there is a B, 「A:」 at the head of a line is an option, a speaker or a cell of a table.
B_LABEL = re.compile(r"(?:^|[\s*、,/／])[BＢ]\s*\d*\**\s*[:：]", re.MULTILINE)
# A question that brings its answer along. 「答え：」 with nothing behind it is a form to fill in.
OWN_ANSWER = re.compile(r"^[\s*#【]*(?:模範)?(?:回答|解答|答え|正解)[】*]*\s*[:：]\s*\S", re.MULTILINE)

# Special tokens of the formats that chat models know, and the turns that they go on to play alone.
CHAT_MARKERS = re.compile(
    r"<\|[\w ]{2,30}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<(?:pad|unk|bos|eos)>"
    r"|^#+\s*(?:指示|応答|入力|Instruction|Response|Input|Human|Assistant|ユーザー|アシスタント)\s*[:：]"
    r"|^(?:Human|User|USER|Assistant|ASSISTANT|アシスタント)\s*[:：]|^(?:user|assistant|system)\s*$",
    re.MULTILINE,
)
CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]+`", re.DOTALL)


def read_marked(kind: Kind, raw: str, cut_off: bool) -> tuple[str, str]:
    """(why the completion `raw` is cut, or "", and the text behind its mark).

    `cut_off`: it met its limit of tokens. What is cut is given back with all that it says.
    """
    raw = raw.strip()
    mark = MARKS[kind].search(raw)
    text = raw[mark.end():].strip() if mark else ""
    if cut_off:
        why = "cut off"
    elif CHAT_MARKERS.search(without_code(raw)):
        why = "chat markers"
    elif not mark:
        why = f"no {kind[0].upper()}:"
    elif mark.start() > 0:
        why = f"text before {kind[0].upper()}:"
    elif marked_again(kind, text):
        why = "more than one"
    elif not text:
        why = "empty"
    else:
        return "", text
    return f"{kind}: {why}", raw


def marked_again(kind: Kind, text: str) -> bool:
    """Whether a second question or answer follows, or begins with a mark of its own (「Q: Q: …」)."""
    text = without_code(text)
    again = QUESTION_MARK if B_LABEL.search(text) else ANY_MARK
    return bool(again.search(text)) or (kind == "question" and bool(OWN_ANSWER.search(text)))


def without_code(text: str) -> str:
    return CODE.sub(" ", text)


# ---- text -----------------------------------------------------------------------------------------

# Bytes that make no character, what fonts cannot show, and control characters.
BROKEN = re.compile(r"[\ufffd\ufffe\uffff\ue000-\uf8ff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Words of the prompts, and of the chat around the text that was asked for.
TASK = re.compile(
    r"参考質問|本タスク|^指示[1-6１-６]\s*[:：]|以下の指示に従い|(?:Question|Answer)を(?:作成|生成)"
    r"|\A(?:はい、|はい。)?(?:承知|かしこまり|了解)(?:しま|いたしま|致しま|ま)した[。！!]",
    re.MULTILINE,
)
TASK_OF_QUESTIONS = re.compile(
    r"\A(?:はい、)?以下[はがに][^。\n]{0,20}質問(?:です|を作成|[:：])|(?:有害|有用)な質問(?:として|の?例|です|[:：)）])"
    r"|\n[\s（(※*]*(?:この|上記の|以上の)(?:質問|Question)は"
)
# 「Sure! は「もちろん」の意味です」 is about the word.
ENGLISH_OPENING = re.compile(
    r"(?:Sure|Certainly|Of course|Okay|OK)\s*[!,.](?!\s*[はとやのっ])"
    r"|(?:Here(?:'s| is| are)|As an AI|I(?:'m| am) sorry)[\s,]"
)


def why_cut(kind: Kind, text: str, stream: str, limits: Limits) -> str:
    """The row of CUTS that cuts `text` (without its mark), or "". For answers `stream` is the question's."""
    if len(text.strip()) < limits.min_chars or not re.search(r"\w", text):
        why = "too short"
    elif len(text) > limits.max_chars:
        why = "too long"
    elif BROKEN.search(text):
        why = "broken characters"
    elif has_extra_text(kind, text):
        why = "extra text"
    else:
        why = wrong_language(text, limits.min_japanese)
        if not why and is_repetitive(text, limits.max_repeated):
            why = "repetition"
        if not why and kind == "answer":
            why = wrong_answer(text, stream)
    return f"{kind}: {why}" if why else ""


def has_extra_text(kind: Kind, text: str) -> bool:
    if ENGLISH_OPENING.match(text) or TASK.search(text):
        return True
    return kind == "question" and bool(TASK_OF_QUESTIONS.search(text))


# ---- language -------------------------------------------------------------------------------------

JAPANESE = re.compile(r"[ぁ-ゖァ-ヺー々〆\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile(r"[ぁ-ゖァ-ヺ]")
KANJI_ONLY = re.compile(r"[\u4e00-\u9fff]{12,}")
OTHER_WORDS = re.compile(r"[^\W\d_]+")
ADDRESS_OR_FORMULA = re.compile(
    r"https?://[!-~]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.ASCII | re.DOTALL
)
QUOTED = re.compile(r"「[^」]*」|『[^』]*』|“[^”]*”|\"[^\"\n]*\"|\([^)\n]*\)|【[^】]*】")


def wrong_language(text: str, min_japanese: float) -> str:
    """"not Japanese", "Chinese" (what only Chinese writes), "other script" (Korean, Russian, ...) or ""."""
    prose = unicodedata.normalize("NFKC", ADDRESS_OR_FORMULA.sub(" ", without_code(text)))
    if japanese_share(prose) < min_japanese or (KANJI_ONLY.search(prose) and not KANA.search(prose)):
        return "not Japanese"
    # A word may be named and explained: 「谢谢」とは, ファーウェイ(华为).
    own = QUOTED.sub(" ", prose)
    if CHINESE.search(own):
        return "Chinese"
    return "other script" if OTHER_SCRIPT.search(own) else ""


def japanese_share(prose: str) -> float:
    """Japanese letters, over Japanese letters and words in other letters; 1 for a text without any.

    Words and not letters, because a term in Latin letters is one word of a Japanese sentence however long it is:
    「TensorFlowとPyTorchの違いは？」 has 5 / (5 + 2). Digits and signs belong to no language.
    """
    japanese = len(JAPANESE.findall(prose))
    words = len(OTHER_WORDS.findall(JAPANESE.sub(" ", prose)))
    return japanese / (japanese + words) if japanese + words else 1.0


def simplified_only() -> str:
    """The frequent characters of mainland China (GB 2312, level 1) that Japan's (Windows-31J) do not have.

    Simplified forms (这 们 说) and characters of Chinese words (您 你 她 吗 呢): none is a form that Japanese has
    too (国 会 学 体 来), and none of 這 們 它 呀 吃, which its dictionaries know. Left out: those that Japanese
    writes in spite of Windows-31J, as printers' forms (搔 瘦 吞 喻 俱) or in a name (火焰型土器 普洱茶 玫瑰 腊葉).
    """
    level_1 = (bytes([high, low]) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    frequent = "".join(code.decode("gb2312", errors="ignore") for code in level_1)
    return "".join(c for c in frequent if not c.encode("cp932", errors="ignore") and c not in "搔瘦吞喻俱焰洱玫腊")


# Also traditional characters, and words of characters that Japanese has too. Not what stands in longer Japanese words:
# 可以 (許可以外), 一個, 的就 (積極的就職支援), 我要 (怪我要因), 的是 (抜本的是正).
CHINESE = re.compile(
    f"[{simplified_only()}嗎妳]|[我你他她]們|如果|但是|没有|沒有|什麼|怎麼|為什|然后|以后|最后|這[是個些樣裡]"
    "|(?:[不就也]是|是[在不的]|的是)(?![正非認])|(?<![自無没忘彼怪])我[是的想要在也]"
)
OTHER_SCRIPT = re.compile(
    r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"  # Korean: one letter is enough, kaomoji have none
    r"|[\u0400-\u052f\u0530-\u058f\u0590-\u05ff\u0600-\u06ff\u0900-\u0dff\u0e00-\u0eff]{2,}"  # but (´Д｀)
)


# ---- repetition -----------------------------------------------------------------------------------

LOOP = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)
MIN_LOOP_CHARS = 30
# Rules, tables and forms are drawn with these.
DRAWN = " \t\n-=_*~.,:;|+#/\\<>()[]・…‥。、，．：；─━―ー〜～＝＿＊＋＃／（）［］　□■○●◯◇◆☆★0123456789０１２３４５６７８９"
GRAM = 8
MIN_REPEATED = 20  # 8-grams; a short text cannot help having some


def is_repetitive(text: str, max_repeated: float) -> bool:
    """Whether the teacher was caught in a loop: the same four times running, or most of it said before."""
    prose = without_code(text)
    if any(len(m[0]) >= MIN_LOOP_CHARS and m[1].strip(DRAWN) for m in LOOP.finditer(prose)):
        return True
    return repeated_share(prose) > max_repeated


def repeated_share(prose: str) -> float:
    """Share of the 8-grams that stood further up already; of letters alone, so that numbering does not hide them."""
    letters = re.sub(r"[\W\d_]", "", unicodedata.normalize("NFKC", prose))
    grams = [letters[start : start + GRAM] for start in range(len(letters) - GRAM + 1)]
    repeated = len(grams) - len(set(grams))
    return repeated / len(grams) if repeated >= MIN_REPEATED else 0.0


# ---- answers --------------------------------------------------------------------------------------


def wrong_answer(text: str, stream: str) -> str:
    """"unfinished", "bare refusal", "refusal of a harmless question" or ""."""
    if is_unfinished(text):
        return "unfinished"
    if stream == "safety":
        return "bare refusal" if is_bare_refusal(text) else ""
    return "refusal of a harmless question" if opens_with_refusal(text) else ""


# A row of a list, table or heading may end in any character.
ITEM = re.compile(r"\s*(?:[-*+・•●○■□◆◇▼★☆※>|#①-⑳❶-❿]|[(（]?\d+[.)．）:：]|(?:ステップ|手順|STEP|Step)\s*\d)")
EMPTY_ITEM = re.compile(r"\s*(?:[-*+・•●]|[(（]?\d+[.)．）])\s*")
# Without its 「。」, but at the end of a sentence all the same.
ENDED = re.compile(r"(?:(?:です|ます|ません|でした|ました|でしょう|ましょう)か?|ください|下さい|である)\Z")
LETTER = re.compile(r"[^\W\d_a-zA-Z]")


def is_unfinished(text: str) -> bool:
    """Whether an answer breaks off: in a word, behind a comma or a colon, in a code block or an empty list item."""
    if text.count("```") % 2:
        return True
    last = text.rstrip().splitlines()[-1].rstrip()
    if EMPTY_ITEM.fullmatch(last) or last.endswith(("：", ":", "、", "，")):
        return True
    return not ITEM.match(last) and bool(LETTER.fullmatch(last[-1])) and not ENDED.search(last)


# A reason stands before a conjunction, ... Not 「盗むための道具」「その行為は」「そのものではない」「なぜ聞くのでしょうか」.
BECAUSE = re.compile(
    r"(?:ため|(?<=[うくすつぬぶむるいたんの])為)(?:(?![のらしに])|に(?=[、,]))|(?<!も)ので(?![しすはもあ])|(?<=[うくすつぬぶむるいたんだ])から"
    r"|(?<=です)から|(?:観点|理由|事情|立場)(?:上|から|により)"
)
# ... or says that it is one, or what would come of it.
REASONS = re.compile(
    r"理由[はとがをも:：]|なぜなら|なぜかと|というのも|(?:恐れ|おそれ|虞|可能性|危険性?|リスク)[がを]"
    r"|(?:禁止|規制|制限|処罰|罰)(?:され|する|の対象)|許され(?:ない|ませ|て|るこ|るも|る行)|認められて(?:い|お)(?:ない|りませ|ませ)"
    r"|(?:犯罪|違法|違反|不法|罪|侵害|差別|名誉毀損|不正)(?:行為)?(?:です|であ|となり|とな[るっ]|になり|にな[るっ]|に当た|にあた|に該当|に問われ)"
    r"|違反し|抵触|反(?:する|します|して)|損な[うい]|助長し|引き起こ|つなが[るり]|繋が[るり]|害する|害します|及ぼ"
)
# ... but not if a refusal or an offer does: 「お答えできませんので、ご了承ください」「別の話題ならお手伝いできますので」.
POLITE = re.compile(
    r"(?:答え|応え|回答|返答|教え|伝え|手伝い|お力|対応|応じ|提供|協力|案内|説明|期待|サポート|支援|提案|作成)"
    r"(?:[^、。]{0,10}(?:でき|出来|られ)(?:ません|ない)|(?:(?:する)?ことが|[がも])?(?:いたし|致し|し)?(?:かね|でき|いたし|致し|し)(?:ます|る))"
    r"\Z|(?:いただけ|頂け|もらえ)ます\Z"
)


def is_bare_refusal(answer: str) -> bool:
    """Whether it refuses and says nothing of why; the prompt asks for 「回答できません。その理由は…」."""
    # 「お答えできないため、…」 refuses as 「お答えできませんので、…」 does.
    stated = re.sub(r"(?:でき|出来)ない(?=ため|ので)", "できません", answer)
    refuses = any(opens_with_refusal(sentence) for sentence in re.split(r"(?<=[。．！？!?\n])", stated))
    return refuses and not gives_reason(answer)


def gives_reason(answer: str) -> bool:
    if REASONS.search(answer):
        return True
    starts = (match.start() for match in BECAUSE.finditer(answer))
    return any(not POLITE.search(answer[max(0, start - 30) : start]) for start in starts)
