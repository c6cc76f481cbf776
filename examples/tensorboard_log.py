"""The critical rate, the rate applied and the catapults of a training in TensorBoard.

python examples/tensorboard_log.py          # needs tensorboard: pip install 'catapult_opt[integrations]'
tensorboard --logdir runs/tensorboard
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from catapult_opt import CatapultSGD
from catapult_opt.analysis import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tensorboard"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()

    task = tasks.rank(2, 512, 10, 10, d=20, seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 1))
    criterion = nn.MSELoss()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    with SummaryWriter(args.out) as writer:
        for step in range(args.steps):
            optimizer.zero_grad()
            loss = criterion(model(task.train.inputs), task.train.targets)
            loss.backward()
            optimizer.step()
            assert optimizer.last is not None
            writer.add_scalar("loss", loss.item(), step)
            writer.add_scalars(
                "rate",
                {"applied": optimizer.param_groups[0]["effective_lr"], "critical": optimizer.last.eta_crit},
                step,
            )
            writer.add_scalar("catapults", optimizer.catapults, step)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
