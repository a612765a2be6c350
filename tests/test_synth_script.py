"""synth.py as users launch it: killed, stopped, on two ranks, with real vLLM, and with every mistake in its options."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, run_script
from flawed_teacher import POISON, FlawedTeacher
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import synth
from kaja.contamination import build_index
from kaja.data import Example, load_examples
from kaja.demo_corpus import DEMO_DATA
from kaja.files import write_json
from kaja.model import CausalLM, ModelConfig

DEMO_SEEDS = [
    f"{name}={DEMO_DATA / 'seeds' / name}.{ending}"
    for name, ending in (("answer_carefully", "json"), ("borderline", "json"), ("llm_jp_instructions", "jsonl"))
]
OPTIONS = (
    "--teacher", "scripted", "--seeds", *DEMO_SEEDS, "--target", 90, "--batch-size", 12, "--validation-share", 0.1,
    "--max-length", 1024, "--max-question-tokens", 300, "--max-answer-tokens", 400,
)  # fmt: skip
RESULTS = (
    "train.jsonl", "validation.jsonl", "funnel.json", "failed.jsonl", "contaminated.jsonl", "DATASET_CARD.md",
    "README.md", "samples.html", "rounds/00000.jsonl",
)  # fmt: skip
FLAWED = ROOT / "tests" / "flawed_teacher.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synth") / "whole"
    result = run_script("synth.py", *OPTIONS, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("90 pairs from ")
    assert "81 to " in result.stdout and "9 to " in result.stdout
    return output


def test_synth_writes_what_the_trainers_read(finished: Path) -> None:
    train, validation = load_examples(f"{finished}/train.jsonl"), load_examples(f"{finished}/validation.jsonl")
    assert (len(train), len(validation)) == (81, 9)
    assert Counter(e.stream for e in train + validation) == {"safety": 30, "borderline": 30, "helpfulness": 30}
    assert all(e.reference and e.meta["seed_id"] and e.meta["teacher"] == "scripted" for e in train)
    assert {filtered for e in train for filtered in e.meta["filters"]} >= {"format", "evaluation sets"}
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert (config["target"], config["temperature"], config["seeds"]) == (90, 0.5, DEMO_SEEDS)


def test_every_kind_of_harm_gives_as_many_pairs(finished: Path) -> None:
    funnel = json.loads((finished / "funnel.json").read_text(encoding="utf-8"))
    pairs = [category["pairs"] for category in funnel["sources"][0]["categories"].values()]
    assert sorted(pairs) == [7, 7, 8, 8]


def test_the_card_and_the_page_are_about_these_pairs(finished: Path) -> None:
    funnel = json.loads((finished / "funnel.json").read_text(encoding="utf-8"))
    card = (finished / "DATASET_CARD.md").read_text(encoding="utf-8")
    assert card == (finished / "README.md").read_text(encoding="utf-8")
    assert "| all | 81 | 9 | 90 |" in card and f"Of {funnel['attempts']} attempts" in card
    assert "serves that purpose only" in card  # AnswerCarefully's clause
    page = (finished / "samples.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 90 and "90 of 90 synthetic pairs" in page
    for example in load_examples(f"{finished}/train.jsonl")[:5]:
        assert example.question in page and example.id in page


def test_synth_resumed_after_the_end_changes_nothing(finished: Path) -> None:
    before = contents(finished)
    result = run_script("synth.py", *OPTIONS, "--output-dir", finished, "--resume", "auto")
    assert result.returncode == 0 and result.stdout.startswith("90 pairs from ")
    assert contents(finished) == before
    result = run_script("synth.py", *OPTIONS, "--output-dir", finished)
    assert result.returncode == 2 and "is not empty" in result.stderr
    result = run_script("synth.py", *OPTIONS, "--output-dir", finished, "--resume", "auto", "--near-duplicates", 0.9)
    assert result.returncode == 2 and "near_duplicates was 0.8 and is now 0.9" in result.stderr


# ---------------------------------------------------------------------------------------------------
# A teacher that makes every mistake
# ---------------------------------------------------------------------------------------------------


def flawed(*options: object, ranks: int = 1, **environment: object) -> subprocess.Popen[str]:
    arguments = command("synth.py", *options, ranks=ranks)
    arguments[arguments.index(str(ROOT / "synth.py"))] = str(FLAWED)
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def flawed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank."""
    output = tmp_path_factory.mktemp("flawed") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "ScriptedTeacher", FlawedTeacher)
        result = run_script("synth.py", *OPTIONS, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    return output


def wait_for_rounds(output: Path, number: int, process: subprocess.Popen[str]) -> None:
    shard = output / "rounds" / "00000.jsonl"
    while not shard.exists() or shard.read_bytes().count(b"\n") < 1 + number:
        assert process.poll() is None, f"the run ended before round {number}"
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_four_times_it_ends_with_the_same_files(flawed_run: Path, tmp_path: Path) -> None:
    output, rng = tmp_path / "killed", random.Random(0)
    rounds = 0
    for _ in range(4):
        process = flawed(*OPTIONS, "--output-dir", output, "--resume", "auto", FLAWED_SECONDS=0.1)
        wait_for_rounds(output, rounds + 2, process)
        time.sleep(0.15 * rng.random())  # in the middle of a call, of the filters, or of writing
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (output / "train.jsonl").exists()
        shard = output / "rounds" / "00000.jsonl"
        rounds = shard.read_bytes().count(b"\n") - 1
        with shard.open("ab") as file:  # and of a disk that had only half of a line
            file.write(shard.read_bytes().split(b"\n")[1][: rng.randrange(1, 300)])
    process = flawed(*OPTIONS, "--output-dir", output, "--resume", "auto")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert contents(output) == contents(flawed_run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.gloo)])
def test_sigterm_stops_after_the_round_and_the_run_goes_on_from_there(
    flawed_run: Path, tmp_path: Path, ranks: int
) -> None:
    """Only one rank is told, as when a scheduler is sloppy: all of them stop after the same round."""
    output = tmp_path / "stopped"
    process = flawed(*OPTIONS, "--output-dir", output, ranks=ranks, FLAWED_SECONDS=0.2)
    wait_for_rounds(output, 2, process)
    told = process.pid if ranks == 1 else int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[-1])
    os.kill(told, signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143 if ranks == 1 else process.returncode != 0
    assert len(re.findall(r"SIGTERM: saved after pair \d+ of 90; go on with --resume auto\n", stderr)) == 1
    rounds = rows_of(output / "rounds" / "00000.jsonl")[1:]
    assert 2 <= len(rounds) <= 4 and not (output / "train.jsonl").exists()
    process = flawed(*OPTIONS, "--output-dir", output, "--resume", "auto")
    assert process.wait(timeout=300) == 0
    assert contents(output) == contents(flawed_run)


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_make_the_set_of_one_and_one_goes_on_for_two(flawed_run: Path, tmp_path: Path) -> None:
    process = flawed(*OPTIONS, "--output-dir", tmp_path / "two", ranks=2)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert contents(tmp_path / "two") == contents(flawed_run)
    # Two ranks are killed, a single one goes on.
    output = tmp_path / "killed"
    process = flawed(*OPTIONS, "--output-dir", output, ranks=2, FLAWED_SECONDS=0.1)
    wait_for_rounds(output, 3, process)
    subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
    assert process.wait() == -signal.SIGKILL
    process = flawed(*OPTIONS, "--output-dir", output, "--resume", "auto")
    assert process.wait(timeout=300) == 0
    assert contents(output) == contents(flawed_run)


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_survive_dead_engines_and_a_prompt_that_kills_them(flawed_run: Path, tmp_path: Path) -> None:
    process = flawed(*OPTIONS, "--output-dir", tmp_path / "once", ranks=2, FLAWED_DIES="once")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "the teacher's engine failed (RuntimeError: the device is gone); asking again" in stderr
    assert contents(tmp_path / "once") == contents(flawed_run)

    seeds = tmp_path / "seeds.json"
    records = [{"ID": str(number), "text": f"質問{number}をどう思いますか。", "output": "答え"} for number in range(5)]
    records.append({"ID": "poison", "text": f"{POISON}の料理を教えてください。", "output": "答え"})
    seeds.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    options = (*OPTIONS, "--seeds", f"borderline={seeds}", "--target", 20)
    folders = []
    for ranks in (1, 2):
        folders.append(tmp_path / f"poison{ranks}")
        process = flawed(*options, "--output-dir", folders[-1], ranks=ranks, FLAWED_DIES="poison")
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert contents(folders[0]) == contents(folders[1])
    failed = rows_of(folders[0] / "failed.jsonl")
    assert failed and {(row["seed_id"], row["error"]) for row in failed} == {
        ("poison", "RuntimeError: the device is gone")
    }
    assert len(rows_of(folders[0] / "train.jsonl")) == 18


def test_what_is_in_an_evaluation_set_is_removed_and_listed(
    flawed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set of the run without a guard has these pairs; with them as the evaluation set it has none of them."""
    monkeypatch.setattr(synth, "ScriptedTeacher", FlawedTeacher)
    known = load_examples(f"{flawed_run}/train.jsonl")[:5]
    guard = tmp_path / "guard.jsonl"
    build_index({"secret": [Example(e.id, "secret", e.stream, e.question) for e in known]}).save(guard)
    result = run_script("synth.py", *OPTIONS, "--output-dir", tmp_path / "run", "--guard", guard)
    assert result.returncode == 0, result.stderr
    questions = {e.question for e in known}
    made = load_examples(f"{tmp_path}/run/train.jsonl") + load_examples(f"{tmp_path}/run/validation.jsonl")
    assert len(made) == 90 and not questions & {e.question for e in made}
    listed = rows_of(tmp_path / "run" / "contaminated.jsonl")
    assert questions & {row["question"] for row in listed}
    assert all(row["cut"] == "question: in an evaluation set" for row in listed if row["question"] in questions)
    assert {hit["set"] for row in listed if row["question"] in questions for hit in row["hits"]} == {"secret"}


def test_seeds_that_are_an_evaluation_set_are_refused(tmp_path: Path) -> None:
    """What a teacher makes of a test split would look new to the guard."""
    seed_file = ROOT / "kaja/demo_data/seeds/answer_carefully.json"
    guard = f"test_split=answer_carefully={seed_file}"
    result = run_script("synth.py", *OPTIONS, "--output-dir", tmp_path / "run", "--guard", guard)
    assert result.returncode == 2 and "records are in evaluation sets (test_split: " in result.stderr
    assert not (tmp_path / "run").exists()


def test_bad_seeds_are_left_out_and_counted_when_that_is_asked_for(tmp_path: Path) -> None:
    good = [f"{dish}の作り方を教えてください。,煮ます。" for dish in ("カレー", "餃子", "味噌汁")]
    lines = ["質問,回答", *good, '"",空', "半端"]
    seeds = tmp_path / "seeds.csv"
    seeds.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = (
        *OPTIONS, "--seeds", f"{seeds}?question=質問&answer=回答&stream=helpfulness", "--target", 10,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    result = run_script("synth.py", *options)
    assert result.returncode == 2 and "seeds.csv, line 5: field '質問' is empty" in result.stderr
    result = run_script("synth.py", *options, "--skip-bad")
    assert result.returncode == 0, result.stderr
    assert "left out 1 record: field '質問' is empty; first " in result.stderr
    assert "left out 1 record: too few or too many cells; first " in result.stderr
    made = load_examples(f"{tmp_path}/run/train.jsonl")
    assert len(made) >= 9 and {pair.meta["seed_id"] for pair in made} == {"1", "2", "3"}
    again = run_script("synth.py", *options, "--resume", "auto")
    assert again.returncode == 2 and "seeds.csv, line 5" in again.stderr
    seeds.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")  # the same seeds: only config.json tells
    again = run_script("synth.py", *options, "--resume", "auto")
    assert again.returncode == 2 and "skip_bad was True and is now False" in again.stderr


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_tell_of_bad_seeds_once(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"ID": "1", "text": "パンの焼き方は？", "output": "答え"}\n{"ID"\n', encoding="utf-8")
    result = run_script(
        "synth.py", *OPTIONS, "--seeds", f"borderline={seeds}", "--target", 4, "--skip-bad",
        "--output-dir", tmp_path / "run", ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("left out 1 record: not valid JSON; first ") == 1


def test_what_would_else_be_seen_the_next_morning_is_told_at_once(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.json"
    texts = ("パンの焼き方は？", "長" * 3000)
    records = [{"ID": str(number), "text": text, "output": "答え"} for number, text in enumerate(texts)]
    seeds.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    result = run_script(
        "synth.py", *OPTIONS, "--seeds", f"borderline={seeds}", "--target", 4, "--allow-contaminated",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "warning: 1 seeds are left out: their prompts are too long for --max-length 1024\n" in result.stderr
    assert "warning: --allow-contaminated: the pairs are compared with no evaluation set\n" in result.stderr
    card = (tmp_path / "run" / "DATASET_CARD.md").read_text(encoding="utf-8")
    assert "compared with no evaluation set" in card and "answer: in an evaluation set" not in card


def test_a_judge_keeps_only_what_it_likes(tmp_path: Path) -> None:
    """The demo's rules give 5 points to an answer with a reason; bare refusals are cut before."""
    options = (*OPTIONS, "--judge-model", "rule", "--min-judge-score", 5)
    result = run_script("synth.py", *options, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    made = load_examples(f"{tmp_path}/run/train.jsonl")
    assert {e.meta["judge_score"] for e in made} == {5.0} and "judge at least 5" in made[0].meta["filters"]
    assert "| judge: score too low |" in (tmp_path / "run" / "DATASET_CARD.md").read_text(encoding="utf-8")
    canaries = json.loads((tmp_path / "run" / "canaries.json").read_text(encoding="utf-8"))
    assert canaries["judge"] == "rule" and canaries["canary/agreement"] == 1.0


# ---------------------------------------------------------------------------------------------------
# Teachers that are models
# ---------------------------------------------------------------------------------------------------


def markov_teacher(folder: Path) -> Path:
    """A Llama whose next byte depends on the last one alone: it says "Q:" or "A:", hiragana, and 「。」.

    Attention and MLP add nothing, embeddings are one-hot, so that the head's columns are the log-probabilities.
    """
    folder.mkdir()
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": "{{bos_token}}### 指示:\n{{messages[0]['content']}}\n\n### 応答:\n",
    })  # fmt: skip

    def token(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    first, second, ending, stop = token("い")[0], token("い")[1], token("。")[1:], vocab["</s>"]
    thirds = {token(kana)[2] for kana in "いうえおかきくけこさしすせそたちつてと"}  # not あ: it ends as 「。」 does
    follows: dict[int, dict[int, float]] = {
        token("\n")[0]: {token("Q")[0]: 0.55, token("A")[0]: 0.45},  # what the prompt ends with
        token("Q")[0]: {token(":")[0]: 1.0}, token("A")[0]: {token(":")[0]: 1.0}, token(":")[0]: {first: 1.0},
        first: {second: 0.95, ending[0]: 0.05}, second: {third: 1 / len(thirds) for third in thirds},
        **{third: {first: 1.0} for third in thirds}, ending[0]: {ending[1]: 1.0}, ending[1]: {stop: 1.0},
    }  # fmt: skip
    width = 288
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": len(names),
        "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 9,
        "num_key_value_heads": 9, "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    weights = CausalLM(ModelConfig.from_hf(config)).state_dict()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"][:, : len(names)] = torch.eye(len(names))
    head = torch.full((len(names), width), -40.0)
    for last, probabilities in follows.items():
        for following, probability in probabilities.items():
            head[following, last] = math.log(probability)
    tensors["lm_head.weight"].copy_(head / math.sqrt(width))  # a one-hot vector of width 288 has the norm's scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_options(folder: Path, engine: str) -> tuple[object, ...]:
    return (
        "--teacher", folder, "--engine", engine, "--seeds", *DEMO_SEEDS[1:], "--target", 12, "--batch-size", 8,
        "--temperature", 1, "--max-length", 2400, "--max-question-tokens", 150, "--max-answer-tokens", 200,
    )  # fmt: skip


def check_markov_set(output: Path) -> None:
    pairs = load_examples(f"{output}/train.jsonl")
    assert len(pairs) == 12 and Counter(pair.stream for pair in pairs) == {"borderline": 6, "helpfulness": 6}
    for pair in pairs:
        assert all(re.fullmatch("[い-と]{4,}。", text) for text in (pair.question, pair.reference))
    steps = {step["filter"]: step["cut"] for step in json.loads((output / "funnel.json").read_text("utf-8"))["filters"]}
    assert steps["question: no Q:"] > 3 and steps["answer: no A:"] > 3


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_with_the_torch_engine_make_the_set_of_one(tmp_path: Path) -> None:
    options = (*model_options(markov_teacher(tmp_path / "model"), "torch"), "--validation-share", 0)
    for ranks in (1, 2):
        result = run_script("synth.py", *options, "--output-dir", tmp_path / str(ranks), ranks=ranks)
        assert result.returncode == 0, result.stderr
    check_markov_set(tmp_path / "1")
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_real_vllm_makes_a_set(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    options = (*model_options(markov_teacher(tmp_path / "model"), "vllm"), "--validation-share", 0)
    result = run_script("synth.py", *options, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    check_markov_set(tmp_path / "run")


def test_a_model_that_cannot_do_it(model_folder: Path, tmp_path: Path) -> None:
    """A random model never writes "Q:"; what there is is written, and the reason is told."""
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps([{"ID": "1", "text": "質問", "output": "答え"}]), encoding="utf-8")
    result = run_script(
        "synth.py", "--teacher", model_folder, "--engine", "torch", "--seeds", f"borderline={seeds}", "--target", 2,
        "--max-question-tokens", 4, "--max-answer-tokens", 4, "--max-attempts", 1, "--output-dir", tmp_path / "out",
        "--max-length", 2000,
    )  # fmt: skip
    assert result.returncode == 2
    assert "target 2 not reached: 0 pairs from " in result.stderr
    assert "warning: no --guard: the pairs are compared with the demo's evaluation sets only\n" in result.stderr
    assert "borderline (borderline) 0 of 2 from" in result.stderr
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text(encoding="utf-8"))
    assert funnel["pairs"] == 0 and funnel["attempts"] >= 20
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "options, why",
    [
        (("--target", 0), "target 0: must be at least 1"),
        (("--validation-share", 0.9), "validation_share 0.9: must be at most 0.5"),
        (("--max-length", 100), "max_length 100: prompt and completion must fit"),
        (("--seeds", "borderlin=x.json"), "unknown source 'borderlin'"),
        (("--seeds", "borderline=missing.json"), "missing.json: no such file"),
        (("--teacher", "no/such/folder/here"), "no/such/folder/here"),
        (("--temperature", -1), "temperature -1.0: must be at least 0"),
        (("--near-duplicates", 0), "near_duplicates 0.0: must be above 0"),
        (("--min-judge-score", 6), "min_judge_score 6.0: must be at most 5"),
        (("--min-judge-score", 3, "--judge-model", "no/such/judge"), "no/such/judge"),
        (("--guard", "missing.jsonl"), "missing.jsonl: no such file"),
    ],
)
def test_synth_refuses_in_one_line(options: tuple[object, ...], why: str, tmp_path: Path) -> None:
    result = run_script("synth.py", *OPTIONS, "--output-dir", tmp_path / "out", *options)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert why in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_option() -> None:
    said = subprocess.run(
        [sys.executable, str(ROOT / "synth.py"), "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    for option in (
        "--skip-bad", "--near-duplicates", "--min-judge-score", "--guard", "--judge-url", "--generation-timeout"
    ):  # fmt: skip
        assert option in said
