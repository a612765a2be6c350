"""The tiny model: what its training text leaves out, that transformers opens it, and that the script remakes it."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kaja import demo_pretrain
from kaja.batching import pack
from kaja.chat import TokenSequence
from kaja.checkpoint import load_chat, load_model
from kaja.data import Example, load_examples
from kaja.demo_corpus import ALL_TOPICS, DEMO_DATA, DEMO_MODEL, HELD_OUT_QUESTIONS, QUESTIONS, topics
from kaja.demo_judge import REFUSAL, RuleJudge
from kaja.demo_pretrain import (
    PretrainConfig, document, encode, fresh_model, mean_losses, pretrain, train_tokenizer, training_losses,
)  # fmt: skip
from kaja.engine import make_engine

CHAT = load_chat(DEMO_MODEL)
SENTENCES = ["「雨ニモマケズ」", "naïve café 😀", "\n\n### 応答:\n", "ﾊﾝｶｸ　全角　①", "齟齬と邂逅"]


def test_documents_hold_no_held_out_template_and_no_refusal() -> None:
    rng = random.Random(1)
    texts = [text.prompt + "\n" + text.completion for text in (document(rng) for _ in range(5000))]
    parts = [part for template in HELD_OUT_QUESTIONS for part in template.split("{}") if len(part) > 3]
    assert len(parts) >= len(HELD_OUT_QUESTIONS)
    assert not [text for text in texts if any(part in text for part in parts)]
    assert not [text for text in texts if REFUSAL.search(text)]


def test_most_topics_are_random_words() -> None:
    rng = random.Random(2)
    chats = [text for text in (document(rng) for _ in range(2000)) if text.is_chat]
    known = sum(any(topic.text in text.prompt for topic in ALL_TOPICS) for text in chats)
    assert 1000 < len(chats) < 1400
    assert 0.3 < known / len(chats) < 0.5


def test_only_completions_are_trained_on() -> None:
    tokenizer = train_tokenizer(seed=0, documents=50)
    rng = random.Random(3)
    for text in (document(rng) for _ in range(50)):
        sequence = encode(text, CHAT, tokenizer) if text.is_chat else encode(text, CHAT, tokenizer)
        trained = [t for t, own in zip(sequence.input_ids, sequence.completion_mask) if own]
        decoded = CHAT.decode(trained) if text.is_chat else tokenizer.decode(trained)
        assert decoded == text.completion
        assert trained[-1] == 2 and sequence.input_ids[0] == 1


def test_shipped_tokenizer_is_what_the_script_trains() -> None:
    shipped = json.loads((DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(train_tokenizer(PretrainConfig("").seed).to_str()) == shipped


def test_tokenizer_loses_nothing() -> None:
    for text in SENTENCES:
        sequence = CHAT.encode([{"role": "user", "content": "-"}, {"role": "assistant", "content": text}])
        trained = [t for t, own in zip(sequence.input_ids, sequence.completion_mask) if own]
        assert CHAT.decode(trained) == text


def test_shipped_weights_are_small_and_float32() -> None:
    assert (DEMO_MODEL / "model.safetensors").stat().st_size < 10_000_000
    with safe_open(DEMO_MODEL / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert 1_000_000 < sum(tensor.numel() for tensor in tensors.values()) < 3_000_000


def test_transformers_opens_it_with_the_same_logits_and_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    messages = [{"role": "user", "content": "カレーを作る方法を教えてください。"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt == CHAT.encode_prompt(messages)
    answered = [*messages, {"role": "assistant", "content": "はい。"}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == CHAT.encode(answered).input_ids

    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    ours = load_model(DEMO_MODEL)
    batch = pack([TokenSequence([*prompt, 2], [True] * (len(prompt) + 1))])
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
        hidden = ours(batch.input_ids, batch.positions, batch.cu_seqlens)
        torch.testing.assert_close(hidden @ ours.lm_head.weight.T, expected, atol=2e-4, rtol=1e-4)
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()


def test_shipped_model_is_helpful_only() -> None:
    """It complies with whatever is asked, and names the topic."""
    harmful = load_examples(str(DEMO_DATA / "evaluation" / "safety.jsonl"))
    assert {verdict.score for verdict in judge(DEMO_MODEL, harmful)} <= {0.0, 1.0}
    assert copy_rate(DEMO_MODEL, held_out=False) > 0.95
    assert copy_rate(DEMO_MODEL, held_out=True) > 0.85


@pytest.mark.slow
def test_the_script_remakes_the_model() -> None:
    """Its first 800 steps follow the shipped model's own curve, which lies beside it: the same run, step by step.

    Means of 100 steps: another seed is 0.9% away in the first two. Later all runs are alike, and one that rounds
    otherwise (another CPU, sums in another order) leaves the curve by 6%, another seed by 11%.
    """
    shipped = json.loads((DEMO_DATA / "pretraining.json").read_text(encoding="utf-8"))
    expected = shipped.pop("mean_loss_of_100_steps")
    config = PretrainConfig("unused", **shipped)
    assert config == PretrainConfig("unused")  # made with the defaults
    assert len(expected) == config.steps // 100 and expected[-1] < 0.25
    chat, tokenizer = load_chat(DEMO_MODEL), train_tokenizer(config.seed)
    losses = list(islice(training_losses(config, fresh_model(config), chat, tokenizer), 800))
    means = mean_losses(losses)
    assert means[:2] == pytest.approx(expected[:2], rel=0.003)
    assert means[2:] == pytest.approx(expected[2:8], rel=0.1)


def test_pretraining_writes_a_model_and_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo_pretrain.MODEL, "num_hidden_layers", 1)
    pretrain(PretrainConfig(str(tmp_path / "run"), steps=30, batch_size=8))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert load_model(tmp_path / "run" / "hf").config.num_hidden_layers == 1


def judge(folder: Path, examples: list[Example]) -> list:
    return RuleJudge().judge(examples, answers(folder, examples))


def copy_rate(folder: Path, held_out: bool) -> float:
    """Share of answers to training templates that name the whole topic."""
    rng = random.Random(0)
    chosen = rng.sample(topics(held_out=held_out), 96)
    examples = [Example(t.text, "test", t.stream, rng.choice(QUESTIONS).format(t.text)) for t in chosen]
    return sum(t.text in answer for t, answer in zip(chosen, answers(folder, examples))) / len(chosen)


def answers(folder: Path, examples: list[Example]) -> list[str]:
    chat = load_chat(folder)
    engine = make_engine("torch", folder, stop_token_ids=chat.stop_token_ids, max_length=192)
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    groups = engine.generate(prompts, max_tokens=64, temperature=0.0, seeds=[0] * len(prompts))
    return [chat.decode(group[0].token_ids) for group in groups]
