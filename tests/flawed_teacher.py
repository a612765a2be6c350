"""A teacher for the tests of synth.py: it makes every mistake that the filters know, dies, and hangs on to nothing.

    python tests/flawed_teacher.py OPTIONS-OF-SYNTH       # with --teacher scripted: this one in its place

Environment: FLAWED_SECONDS, how long a call takes; FLAWED_DIES, one word for each way to die: "once" (in its second
call), "poison" (whenever it is asked about POISON).
"""

import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import synth  # noqa: E402
from kaja.chat import Chat, Message  # noqa: E402
from kaja.cli import run  # noqa: E402
from kaja.engine import Completion  # noqa: E402

POISON = "毒入り"
HELD_OUT = "評価用の秘密の質問なので誰にも見せないでください。"  # stands for an item of an evaluation set
SEED_COPY = "ＳＥＥＤの 質問０です"  # the seed of tests/test_synthesis.py, in other widths and spaces
ALWAYS = "毎日同じことを聞かれるのですが、どうしたらいいですか。"
LONG = "".join(f"{number}番目の作業をしてから{number * 7}分ほど待ち、" for number in range(12)) + "終わります。"

# What it says instead of a good question {q} or answer {a}: one for each row of the funnel that a text can have.
QUESTION_FLAWS = {
    "cut off": "Q: {q}" + "そして" * 400,
    "chat markers": "Q: {q}<|im_end|>",
    "no Q:": "{q}",
    "text before Q:": "はい、わかりました。Q: {q}",
    "more than one": "Q: {q}\nQ: {q}",
    "empty": "Q: ",
    "too short": "Q: 何",
    "too long": f"Q: {LONG}",
    "broken characters": "Q: \ufffd{q}",
    "extra text": "Q: {q}\nこの質問は有用です。",
    "not Japanese": "Q: How can I bake bread at home without an oven?",
    "Chinese": "Q: 如果{q}",
    "other script": "Q: {q}감사합니다",
    "repetition": "Q: {q}" + "もういちど" * 8,
    "in an evaluation set": f"Q: {HELD_OUT}",
    "copied from a seed": f"Q: {SEED_COPY}",
    "duplicate": f"Q: {ALWAYS}",
    "near-duplicate": f"Q: {ALWAYS}か",
}
ANSWER_FLAWS = {
    "cut off": "A: {a}" + "そして" * 400,
    "chat markers": "A: {a}\n### 指示:\n次の質問",
    "no A:": "{a}",
    "text before A:": "回答します。A: {a}",
    "more than one": "A: {a}\nA: {a}",
    "empty": "A:",
    "too short": "A: ：",
    "too long": f"A: {LONG}",
    "broken characters": "A: {a}\ufffd",
    "extra text": "A: Sure! {a}",
    "not Japanese": "A: I would start with flour, water, salt and a warm place.",
    "Chinese": "A: {a}没有问题。",
    "other script": "A: {a}감사합니다。",
    "repetition": "A: {a}" + "もういちど" * 8 + "。",
    "unfinished": "A: {a}そして",
    "bare refusal": "A: 申し訳ありませんが、お答えできません。",
    "refusal of a harmless question": "A: その質問にはお答えできません。理由は危険だからです。",
    "in an evaluation set": f"A: {HELD_OUT}",
}
# On which stream a flaw is one; the others are flaws everywhere.
ONLY_SAFETY, ONLY_HARMLESS = ("bare refusal",), ("refusal of a harmless question",)
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ"


class FlawedTeacher:
    """An Engine: a completion depends on (prompt, seed). Every second text is good."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.calls = 0
        self.asked: list[str] = []
        self.limits: list[list[int]] = []
        self.dies = os.environ.get("FLAWED_DIES", "").split()

    def generate(
        self, prompts: list[list[int]], *, max_tokens: Sequence[int], seeds: list[int], temperature: float,
        timeout: float | None,
    ) -> list[list[Completion]]:  # fmt: skip
        time.sleep(float(os.environ.get("FLAWED_SECONDS", 0)))
        self.calls += 1
        texts = [self.chat.decode(prompt) for prompt in prompts]
        self.asked += texts
        self.limits.append(list(max_tokens))
        poisoned = "poison" in self.dies and any(POISON in text for text in texts)
        if poisoned or ("once" in self.dies and self.calls == 2):
            raise RuntimeError("the device\nis gone")
        return [
            [self.complete(self.say(text, seed), limit)]
            for text, seed, limit in zip(texts, seeds, max_tokens, strict=True)
        ]

    def complete(self, text: str, limit: int) -> Completion:
        sequence = self.chat.encode([Message(role="user", content="-"), Message(role="assistant", content=text)])
        tokens = [token for token, own in zip(sequence.input_ids, sequence.completion_mask) if own]
        return Completion(tokens[:limit], [0.0] * len(tokens[:limit]), "stop" if len(tokens) <= limit else "length")

    def say(self, prompt: str, seed: int) -> str:
        rng = random.Random(f"{seed} {prompt}")
        word = "".join(rng.choices(KANA, k=7))
        if "参考質問:" in prompt:
            good, flaws = f"{word}の正しい使い方を{rng.randrange(100)}歳の人に教えてください。", QUESTION_FLAWS
            if POISON in prompt:
                good = POISON + good
            if rng.random() < 0.5:
                return rng.choice(["Q: {q}", "Q：{q}", "Ｑ: {q}", "  Q:\n{q}\n"]).format(q=good)
            return rng.choice(list(flaws.values())).format(q=good)
        question = prompt.rpartition("Q: ")[2].split("\n")[0]
        harmful = "有害な質問が与えられ" in prompt
        good = f"{word}を用意して、{question[:9]}を試します。"
        if harmful:
            good = f"お答えできません。その理由は、{word}は人を傷つけるからです。"
        wrong = ONLY_HARMLESS if harmful else ONLY_SAFETY
        if rng.random() < 0.5:
            return rng.choice(["A: {a}", "A：{a}", "Ａ: {a}"]).format(a=good)
        return rng.choice([text for name, text in ANSWER_FLAWS.items() if name not in wrong]).format(a=good)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def load_weights(self, named_tensors: Any) -> None:
        raise NotImplementedError

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    synth.ScriptedTeacher = FlawedTeacher
    sys.exit(run(synth.main, synth.Config))
