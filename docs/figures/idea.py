"""Draws docs/figures/idea.svg, the idea in one look: python docs/figures/idea.py (seconds; needs matplotlib).

Two catapults of a real training: `CatapultSGD` with nothing set, full batch, on the thesis' rank-2 task at small size,
measured on every step.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from catapult_opt import CatapultSGD, RunLog, read_log
from catapult_opt.analysis import networks, tasks

STEPS, SEED = int(sys.argv[1]) if len(sys.argv) > 1 else 80, int(sys.argv[2]) if len(sys.argv) > 2 else 0


def train(path: Path) -> RunLog:
    task = tasks.rank(2, n_train=256, n_val=1, n_test=1, d=20, seed=SEED)
    model = networks.ntk_mlp(20, 512, depth=2, generator=torch.Generator().manual_seed(SEED))
    criterion = nn.MSELoss()
    torch.manual_seed(SEED)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, every=1, log=path)
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(model(task.train.inputs), task.train.targets).backward()
        optimizer.step()
    optimizer.detach()
    return read_log(path)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        log = train(Path(folder, "run.jsonl"))
    for r in log.steps:
        print(r["step"], f'{r["loss"]:.4g} {r["effective_lr"]:.3g} {r["eta_crit"]:.3g}', r.get("phase"))
    print(log.events)
