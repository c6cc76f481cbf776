"""CatapultSGD with Accelerate: gradient accumulation, clipping, a checkpoint.

    python examples/accelerate_loop.py                              # needs accelerate
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Accelerate wraps the model after the optimizer was made, so the processes that train together are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from catapult_opt import CatapultSGD
from catapult_opt.analysis import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    task = tasks.rank(2, 512, 10, 10, d=20, seed=0)
    loader = DataLoader(TensorDataset(task.train.inputs, task.train.targets), batch_size=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 1))
    criterion = nn.MSELoss()
    optimizer = CatapultSGD(
        model.parameters(),
        model=model,
        criterion=criterion,
        process_group=dist.group.WORLD if dist.is_initialized() else None,
        log=args.out / "run.jsonl",
    )
    catapult = optimizer  # `prepare` hides its properties
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(args.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
        if catapult.last is not None:
            rate = catapult.param_groups[0]["effective_lr"]
            accelerator.print(f"epoch {epoch}: critical rate {catapult.last.eta_crit:.3f}, applied {rate:.3f}")
    accelerator.save_state(str(args.out / "checkpoint"))


if __name__ == "__main__":
    main()
