"""CatapultLR on AdamW in the Trainer of transformers: a tiny GPT-2 with random weights, which returns its own loss.

python examples/hf_trainer.py       # needs transformers and accelerate: pip install 'catapult_opt[integrations]'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from catapult_opt import CatapultLR


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count up from a random start, modulo 64."""

    def __init__(self, n: int = 256, length: int = 16) -> None:
        starts = torch.randint(64, (n, 1), generator=torch.Generator().manual_seed(0))
        self.words = (starts + torch.arange(length)) % 64

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.words[i]}


class ShowCatapults(TrainerCallback):
    """Adds the critical rate and the rate applied to the Trainer's own logs."""

    def __init__(self, controller: CatapultLR, optimizer: torch.optim.Optimizer) -> None:
        self.controller, self.optimizer = controller, optimizer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.controller.last is not None:
            logs["eta_crit"] = self.controller.last.eta_crit
            logs["effective_lr"] = self.optimizer.param_groups[0]["effective_lr"]
            logs["catapults"] = self.controller.catapults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2, help="(default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CatapultLR(optimizer, model=model, criterion=None, log=args.out / "run.jsonl")
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # else the Trainer lets the rate decay
    settings = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        logging_steps=4,
        report_to="none",
        disable_tqdm=True,
    )
    show = ShowCatapults(controller, optimizer)
    Trainer(model, settings, train_dataset=Counting(), optimizers=(optimizer, constant), callbacks=[show]).train()


if __name__ == "__main__":
    main()
