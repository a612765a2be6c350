"""Contestant: train_sft.py of this checkout (or of another: the job's "checkout"), its loop timed from outside."""

import sys
from pathlib import Path
from typing import Any

from measure import Window, read_job, report

job = read_job()
sys.path.insert(0, job["checkout"])
import torch  # noqa: E402
import train_sft  # noqa: E402
from kaja.tracking import complete_rows  # noqa: E402

window, train = Window(), train_sft.train


def timed_train(
    model: Any, optimizer: Any, data: Any, total_steps: int, config: Any, output_dir: Path, ranks: Any
) -> None:
    with window:
        train(model, optimizer, data, total_steps, config, output_dir, ranks)
    rows = complete_rows(output_dir / "metrics.jsonl", total_steps)
    if ranks.is_main:
        report(
            job, window, losses=[row["loss"] for row in rows], tokens=sum(row["tokens"] for row in rows),
            trained_tokens=sum(row["trained_tokens"] for row in rows),
            torch=torch.__version__,
        )  # fmt: skip
    raise SystemExit  # what follows, saving and samples, belongs to nobody's measurement


train_sft.train = timed_train
train_sft.main(train_sft.Config(
    model=job["model"], data=(job["questions"],), output_dir=job["output_dir"], global_batch_size=job["batch"],
    micro_batch_size=job["micro_batch"], max_length=job["max_length"], learning_rate=job["learning_rate"],
    min_learning_rate=job["min_learning_rate"], max_grad_norm=job["max_grad_norm"],
))  # fmt: skip
