"""Contestant: tiny-grpo (open-thought/tiny-grpo), of a clone of it: the job's "peer".

Where its train.py imports wandb and sends prompts to "cuda", the clone must not; and masked_mean of its loss.py must
not divide by zero where a completion is nothing but EOS (its own loop skips such micro-batches).

The loop of its main() with its functions, and with what makes it the others' work: one update a step, of gradients that
micro-batches add up (its own loop updates after each), no activation checkpointing, no top-k, float32. It samples one
prompt's group at a time, and EOS is its padding: no completion's EOS is trained on.
"""

import json
import sys
from functools import partial
from pathlib import Path

from measure import Window, read_job, report
from reward import even_share

job = read_job()
sys.path.insert(0, job["peer"])
import torch  # noqa: E402
import train  # noqa: E402
from loss import GRPOLoss, approx_kl_divergence  # noqa: E402
from replay_buffer import Experience, ReplayBuffer, join_experience_batch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: E402

train.system_prompt = ""  # the template then makes <s>, the question and line breaks, which are no tokens
train.GenerationConfig = partial(GenerationConfig, top_k=0)  # else transformers' 50
window = Window()
tokenizer = AutoTokenizer.from_pretrained(job["model"])
tokenizer.pad_token = tokenizer.eos_token
reference, model = (LlamaForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2))


def experience_of(question: str) -> tuple[Experience, list[int]]:
    """A group of completions, judged and with its log-probs; and how long they are."""
    prompt = len(tokenizer(f"<s>{question}")["input_ids"])
    with window.phase("generate"):
        sequences, _, action_mask, completions = train.rollout(
            model, tokenizer, question, "", job["group_size"], max_length=prompt + job["max_completion_tokens"]
        )
    returns = torch.tensor([[even_share(completion)] for completion in completions])
    attention_mask = sequences != tokenizer.eos_token_id
    with window.phase("log_probs"):
        log_probs = train.sequences_log_probs(model, sequences, attention_mask)
        log_probs_ref = train.sequences_log_probs(reference, sequences, attention_mask)
        kl = approx_kl_divergence(log_probs, log_probs_ref, action_mask)
    ended = (~attention_mask[:, prompt:]).any(dim=1)
    experience = Experience(
        sequences, log_probs, log_probs_ref, returns, train.group_advantages(returns), attention_mask, action_mask, kl
    )
    return experience, (action_mask.sum(dim=1) + ended).tolist()


def main() -> None:
    with Path(job["questions"]).open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    train.init_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0)
    objective, buffer = GRPOLoss(clip_eps=0.2, kl_weight=0.04), ReplayBuffer()
    losses, rewards, completion_tokens = [], [], 0
    with window:
        for start in range(0, len(questions), job["batch"]):
            buffer.clear()
            with torch.no_grad():
                for question in questions[start : start + job["batch"]]:
                    experience, lengths = experience_of(question)
                    buffer.append(experience)
                    completion_tokens += sum(lengths)
            batches = DataLoader(buffer, job["micro_batch"], shuffle=True, collate_fn=join_experience_batch)
            model.train()
            optimizer.zero_grad()
            losses.append(0.0)
            for batch in batches:
                log_probs = train.sequences_log_probs(model, batch.sequences, batch.attention_mask)
                loss = objective(log_probs, batch)[0] * len(batch.sequences) / len(buffer)
                loss.backward()
                losses[-1] += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), job["max_grad_norm"])
            optimizer.step()
            rewards.append(sum(row.returns.item() for row in buffer) / len(buffer))
    phases = window.phases
    phases["update"] = window.measured["cpu_seconds"] - phases["generate"] - phases["log_probs"]
    report(
        job, window, losses=losses, phases=phases, completion_tokens=completion_tokens, rewards=rewards,
        torch=torch.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
