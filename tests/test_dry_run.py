"""The dry run's text: what fits what, and what it advises."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kaja import dry_run
from kaja.dry_run import (
    ELYZA_JUDGE, LADDER, dry_run_grpo, judge_config_of, model_config_of, recommendation, recommendation_grpo, report,
    tokens_per_second,
)  # fmt: skip
from kaja.errors import UserError
from kaja.files import write_json
from kaja.grpo_plan import GRPOSettings, plan_grpo
from kaja.memory_plan import GIB, Settings, SimulatedMemory, parameter_count, plan_memory
from kaja.model import ModelConfig

NAME = "llm-jp/llm-jp-3-13b-instruct"
LLM_JP_13B = model_config_of(NAME)
CHECKPOINTING = Settings(activation_checkpointing=True)
JUDGE = "elyza/Llama-3-ELYZA-JP-8B-AWQ"


def simulated(peak_gib: float) -> SimulatedMemory:
    return SimulatedMemory(parameters=0.0, gradients=0.0, optimizer=0.0, peak=peak_gib * GIB)


@pytest.mark.parametrize(
    ("size", "billions"),
    [("150m", 0.152), ("440m", 0.445), ("980m", 0.99), ("1.8b", 1.87), ("3.7b", 3.78), ("7.2b", 7.29), ("13b", 13.7)],
)
def test_the_ladder_is_known_offline(size: str, billions: float) -> None:
    config = model_config_of(f"llm-jp/llm-jp-3-{size}-instruct3")
    assert config == model_config_of(f"llm-jp/llm-jp-3-{size}")
    assert parameter_count(config) == pytest.approx(billions * 1e9, rel=0.01)
    assert config.head_dim == {"150m": 64, "980m": 192}.get(size, 128)
    assert size in LADDER


def test_a_folder_needs_only_its_config(model_folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    })  # fmt: skip
    assert model_config_of(str(tmp_path)).head_dim == 4
    assert model_config_of(str(model_folder)).num_hidden_layers == 2


def test_of_a_hub_model_only_the_config_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(repo: str, file: str) -> str:
        fetched.append((repo, file))
        write_json(tmp_path / "config.json", {
            "model_type": "qwen3", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        })  # fmt: skip
        return str(tmp_path / "config.json")

    monkeypatch.setattr(dry_run, "hf_hub_download", download)
    assert model_config_of("owner/name").qk_norm
    # A model of the ladder's name that is not of the ladder.
    assert model_config_of("llm-jp/llm-jp-3-172b").qk_norm
    assert fetched == [("owner/name", "config.json"), ("llm-jp/llm-jp-3-172b", "config.json")]


def test_unknown_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, file: str) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr(dry_run, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"^owner/name: no config.json on the hub \(offline\); check"):
        model_config_of("owner/name")
    with pytest.raises(UserError, match="no such model folder"):
        model_config_of(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="config.json: no such file"):
        model_config_of(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "gpu_memory", "sentence"),
    [
        (CHECKPOINTING, 80, "Fits 8 x 80 GB as it is."),
        (Settings(), 80, "Does not fit 8 x 80 GB as it is; fits with --activation-checkpointing on."),
        (
            replace(CHECKPOINTING, reduce_every="step"), 80,
            "Does not fit 8 x 80 GB as it is; fits with --reduce-every micro-batch.",
        ),
        (
            Settings(), 40,
            "Does not fit 8 x 40 GB as it is; fits with --activation-checkpointing on --micro-batch-size 1.",
        ),
        (CHECKPOINTING, 40, "Does not fit 8 x 40 GB as it is; fits with --micro-batch-size 1."),
        (replace(CHECKPOINTING, cpu_offload=True), 40, "Fits 8 x 40 GB as it is."),
        (
            replace(CHECKPOINTING, max_length=32768), 80,
            "Does not fit 8 x 80 GB as it is; fits with --micro-batch-size 2.",
        ),
        (Settings(), 1, "Does not fit GPUs of 1 GB, however many; take larger ones or lower --max-length."),
    ],
)  # fmt: skip
def test_advice_for_13b(settings: Settings, gpu_memory: float, sentence: str) -> None:
    assert recommendation(LLM_JP_13B, settings, gpu_memory) == sentence


def test_advice_is_kept_by_the_plan() -> None:
    """A number of GPUs that is advised fits, half of it does not."""
    settings = replace(CHECKPOINTING, world_size=1)
    sentence = recommendation(LLM_JP_13B, settings, 24)
    found = re.search(r", or on (\d+) GPUs with --micro-batch-size (\d)\.$", sentence)
    assert found is not None, sentence
    enough = replace(settings, world_size=int(found[1]), micro_batch_size=int(found[2]))
    assert dry_run.fits(plan_memory(LLM_JP_13B, enough), 24)
    half = replace(enough, world_size=enough.world_size // 2)
    for micro_batch_size in (1, 2, 4):
        assert not dry_run.fits(plan_memory(LLM_JP_13B, replace(half, micro_batch_size=micro_batch_size)), 24)


def test_report_for_13b() -> None:
    text = report(NAME, LLM_JP_13B, CHECKPOINTING, 80, simulated(40.76))
    lines = text.split("\n")
    assert text.isascii() and len(lines) < 60 and max(map(len, lines)) <= 110
    assert lines[0] == f"{NAME}: 13,707,924,480 parameters on 8 x 80 GB"
    assert lines[-1] == "Fits 8 x 80 GB as it is."

    def row(label: str) -> list[str]:
        (line,) = (line for line in lines if line.strip().startswith(label))
        return line.strip().removeprefix(label).split()

    assert row("parameters (float32, 1/8)") == ["6.4", "0.0"]
    assert row("optimiser (two float32 moments, 1/8)") == ["12.8", "0.0"]
    # 25.5 GiB of parameters, gradients and moments leave the GPU, in the simulated column too.
    assert row("sum simulated with torch's memory tracker") == ["40.8", "15.2"]
    assert row("80 GB have 78.8 GiB") == ["fits", "fits"]
    # With 4 sequences, reduced every step, 13B fits 80 GB only with both, and then no GPU of 40 GB.
    (cells,) = (re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r" +on +yes +step", line))
    assert cells[-1].endswith("(80)")
    (cells,) = (re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r" +off +no +micro-batch", line))
    assert cells[-1].endswith("(-)")


def test_report_names_the_given_gpu_and_micro_batch() -> None:
    text = report(NAME, LLM_JP_13B, replace(CHECKPOINTING, micro_batch_size=3, replicas=2), 24, simulated(1))
    assert "on 8 x 24 GB (2 copies of the model)" in text
    assert "of 24, 40, 80 GB" in text
    assert re.search(r"--reduce-every +1 +2 +3 +4\n", text)


@pytest.mark.parametrize(
    ("length", "tflops", "published"), [(4096, 989, 4717), (2048, 312, 1668)], ids=["8xH100", "8xA100"]
)
def test_speed_is_near_the_published(length: int, tflops: float, published: float) -> None:
    settings = replace(CHECKPOINTING, max_length=length)
    assert tokens_per_second(LLM_JP_13B, settings, tflops * 1e12) == pytest.approx(published, rel=0.1)


def test_speed_counts_what_checkpointing_and_offload_cost() -> None:
    def speed(settings: Settings, config: ModelConfig = LLM_JP_13B) -> float:
        return tokens_per_second(config, settings, 989e12)

    assert speed(Settings()) == pytest.approx(4 / 3 * speed(CHECKPOINTING))
    offloaded = replace(CHECKPOINTING, cpu_offload=True)
    assert speed(offloaded) < speed(CHECKPOINTING)
    assert speed(replace(offloaded, reduce_every="step")) > speed(offloaded)
    # The fewer streams a step has, the more its one update of the weights on the host weighs.
    assert speed(replace(offloaded, global_batch_size=32)) < speed(replace(offloaded, reduce_every="step"))
    # 16 ranks of two nodes update half as many weights on each host.
    assert speed(replace(offloaded, world_size=16, global_batch_size=512)) > speed(offloaded)


@pytest.mark.slow
def test_dry_run_of_a_folder(model_folder: Path) -> None:
    text = dry_run.dry_run(str(model_folder), Settings(world_size=2, max_length=64), 16)
    assert text.split("\n")[-1] == "Fits 2 x 16 GB as it is."
    assert "sum simulated with torch's memory tracker" in text


# ---------------------------------------------------------------------------------------------------
# GRPO
# ---------------------------------------------------------------------------------------------------


def test_the_judge_is_known_offline(tmp_path: Path) -> None:
    assert judge_config_of(JUDGE) == ELYZA_JUDGE
    assert judge_config_of("rule") is None
    config = {"model_type": "llama", "vocab_size": 10}
    write_json(tmp_path / "config.json", config)
    assert judge_config_of(str(tmp_path)) == config
    assert parameter_count(ModelConfig.from_hf(ELYZA_JUDGE)) == 8_030_261_248


def cells(text: str, label: str, line: int = 0) -> list[str]:
    found = [row for row in text.split("\n") if row.strip().startswith(label)]
    return re.split(r"\s{2,}", found[line].strip().removeprefix(label).strip())


@pytest.mark.parametrize("judge", [JUDGE, "rule"])
@pytest.mark.parametrize("gpu_memory", [24, 40, 80])
@pytest.mark.parametrize("settings", [
    GRPOSettings(), GRPOSettings(sleep="none", judge_memory=0.2), GRPOSettings(kl_coef=0.0, cpu_offload=True),
])  # fmt: skip
def test_grpo_report_is_short_and_narrow(settings: GRPOSettings, gpu_memory: float, judge: str) -> None:
    text = dry_run_grpo(NAME, judge, settings, gpu_memory)
    lines = text.split("\n")
    assert text.isascii() and len(lines) < 45 and max(map(len, lines)) <= 110
    assert lines[0] == f"{NAME}: 13,707,924,480 parameters on 8 x {gpu_memory} GB"
    assert text.endswith(".")
    assert ("judge's server" in text) == (judge != "rule")
    assert ("log_probs" in text) == (settings.kl_coef > 0)


def test_grpo_report_for_13b() -> None:
    settings = GRPOSettings()
    text = dry_run_grpo(NAME, JUDGE, settings, 80)
    plan = plan_grpo(LLM_JP_13B, ELYZA_JUDGE, settings, 80)
    assert cells(text, "GiB per GPU") == list(plan.phases)
    assert cells(text, "policy: AdamW's moments (float32, 1/8)") == ["12.8"] * 5
    assert cells(text, "policy's engine: weights, CUDA graphs") == ["26.5", "26.5", "0.0", "0.0", "26.5"]
    # The sum of each column is its peak, to the digit shown.
    rows = [cells(text, label) for label in (
        "policy: parameters (float32, 1/8)", "policy: gradients (float32, 1/8)",
        "policy: AdamW's moments (float32, 1/8)", "reference: parameters (float32, 1/8)",
        "gathered weights (bfloat16)", "activations and buffers", "policy's engine: weights, CUDA graphs",
        "policy's engine: keys and values", "judge's server: weights, CUDA graphs, context",
        "judge's server: keys and values",
        "activations of the engines at work", "margin (CUDA, NCCL, fragments)",
    )]  # fmt: skip
    for column, peak in enumerate(cells(text, "peak")):
        assert sum(float(row[column]) for row in rows) == pytest.approx(float(peak), abs=0.6)
    assert cells(text, "80 GB have 78.8 GiB") == ["fits"] * 5
    # Without sleep the update does not fit, even without keys and values.
    assert float(cells(text, "always")[3]) > 78.8 > float(cells(text, "except in training")[3])
    assert cells(text, "completions, each of 768 tokens")[-1] == "64"
    assert f"Host memory per node, GiB: {(plan.host_slept / GIB + 153):,.0f} (sleeping engine " in text


AT_A_TIME = r"\d+ of a rank's 64 completions at a time"


@pytest.mark.parametrize(
    ("settings", "gpu_memory", "sentence"),
    [
        (GRPOSettings(), 80, f"Fits 8 x 80 GB as it is, fullest in generate, with {AT_A_TIME}"),
        (
            GRPOSettings(sleep="none"), 80,
            "Does not fit 8 x 80 GB as it is; fits if the policy's engine sleeps while the trainer works "
            f".{AT_A_TIME}.",
        ),
        (
            GRPOSettings(activation_checkpointing=False, micro_batch_size=64), 80,
            "Does not fit 8 x 80 GB as it is; fits with --activation-checkpointing on, with --micro-batch-size 32 "
            f".{AT_A_TIME}.",
        ),
        (
            GRPOSettings(), 40,
            r"Does not fit 8 x 40 GB as it is; fits with --cpu-offload, with the judge on other GPUs "
            rf"\(--judge-gpus, --judge-url\) .{AT_A_TIME}., or on 128 GPUs, with the judge on other GPUs .*",
        ),
        (
            GRPOSettings(), 24,
            "Does not fit GPUs of 24 GB, however many: even with --micro-batch-size 1, .*, sync takes 37.. GiB; .*",
        ),
    ],
)  # fmt: skip
def test_grpo_advice_for_13b(settings: GRPOSettings, gpu_memory: float, sentence: str) -> None:
    assert re.fullmatch(sentence + r"\.", recommendation_grpo(LLM_JP_13B, ELYZA_JUDGE, settings, gpu_memory))


def test_grpo_advice_is_kept_by_the_plan() -> None:
    """A number of GPUs that is advised fits, half of it does not."""
    settings = GRPOSettings(world_size=1)
    config = model_config_of("llm-jp/llm-jp-3-7.2b")
    sentence = recommendation_grpo(config, None, settings, 40)
    pattern = r", or on (\d+) GPUs(?:, with --micro-batch-size (\d))? \((\d+) of a rank's (\d+) completions"
    found = re.search(pattern, sentence)
    assert found is not None, sentence
    enough = replace(settings, world_size=int(found[1]), micro_batch_size=int(found[2] or 8))
    plan = plan_grpo(config, None, enough, 40)
    assert plan.fits and (plan.policy.at_a_time, plan.policy.sequences) == (int(found[3]), int(found[4]))
    for micro_batch_size in (1, 2, 4, 8):
        half = replace(enough, world_size=enough.world_size // 2, micro_batch_size=micro_batch_size)
        assert not plan_grpo(config, None, half, 40).fits
