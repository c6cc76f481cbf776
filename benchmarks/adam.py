"""Do catapults help under Adam? CatapultLR on Adam against Adam at the best constant rate, on the task of drop_in.py.

Full-batch training on the rank-2 task (see examples/drop_in.py); test loss at the best validation loss. Contenders:

* ``adam R``: Adam at the constant rate R;
* ``catapults``: CatapultLR on Adam as it comes, which goes above Adam's own critical rate;
* ``with a budget``: the same with the length of the training known, so that its last 30 % settle below the edge;
* ``below the edge``: the same controller never going above, at 0.05 times the critical rate of each step, that
  is at 1.9 / lambda_max: at 0.8 times, Adam's first steps, whose momentum is not built up yet, diverge.

    python benchmarks/adam.py --grid              # Adam at each rate of the grid, seeds 0 to 2: about 5 minutes
    python benchmarks/adam.py                     # the contenders on seeds 3 to 7, Adam at --rate: about 15 minutes

Outcome with the policy of commit f737027 (not repeated with a later one), seeds 3 to 7, mean ± sd:

* adam 1: .402 ± .185 (.701 .192 .348 .398 .370)
* catapults: .490 ± .418 (.207 .145 .510 1.192 .396); with a budget: .439 ± .414 (.222 .145 .270 1.161 .396)
* below the edge: 1.040 ± .067 (1.079 1.125 .993 1.044 .956)

Going above the edge is worth a lot to Adam, but does not beat its best constant rate: with a budget three seeds of five
are better, one is about equal and one is spoilt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from drop_in import EVALUATE_EVERY, FULL, QUICK, Setting, evaluate

from catapult_opt import CatapultLR, CatapultPolicy
from catapult_opt.analysis import tasks
from catapult_opt.analysis.networks import ntk_mlp

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def train(setting: Setting, seed: int, rate: float, policy: CatapultPolicy | None = None) -> tuple[float, float, str]:
    """Test loss and AGOP alignment at the best validation loss, and what the controller did."""
    task = tasks.rank(2, setting.n_train, setting.n_eval, setting.n_eval, d=setting.d, seed=seed)
    model = ntk_mlp(setting.d, setting.width, depth=2, generator=torch.Generator().manual_seed(10_000 + seed))
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    controller = CatapultLR(optimizer, model=model, criterion=criterion, policy=policy) if policy else None
    best: dict[str, float] = {"val_loss": float("inf"), "test_loss": float("nan"), "agop_alignment": float("nan")}
    for step in range(1, setting.steps + 1):
        optimizer.zero_grad()
        criterion(model(task.train.inputs), task.train.targets).backward()
        optimizer.step()
        if step % EVALUATE_EVERY == 0:
            metrics = evaluate(model, criterion, task)
            best = metrics if metrics["val_loss"] < best["val_loss"] else best
    did = ""
    if controller is not None:
        did = f"{controller.catapults} catapults, {controller.super_critical_steps}/{controller.measured_steps} above"
    return best["test_loss"], best["agop_alignment"], did


def compare(name: str, setting: Setting, seeds: list[int], rate: float, policy: CatapultPolicy | None = None) -> None:
    losses, features, begun = [], [], time.perf_counter()
    for seed in seeds:
        loss, agop, did = train(setting, seed, rate, policy)
        losses.append(loss)
        features.append(agop)
        if did:
            print(f"    {name}, seed {seed}: {loss:.3f} ({did})", flush=True)
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    each = " ".join(f"{loss:.3f}" for loss in losses)
    seconds = (time.perf_counter() - begun) / len(seeds)
    mean, agop = statistics.mean(losses), statistics.mean(features)
    print(f"{name:16} test loss {mean:.3f}{spread}  ({each})  AGOP {agop:.3f}  {seconds:.0f} s a run", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="search Adam's best constant rate, seeds 0 to 2")
    parser.add_argument("--rate", type=float, default=FULL.adam_lr, help="of constant Adam (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 with --grid, else 3 4 5 6 7")
    parser.add_argument("--quick", action="store_true", help="a small net on a small task; not a comparison")
    args = parser.parse_args(argv)
    setting = QUICK if args.quick else FULL
    if args.grid:
        for rate in GRID:
            compare(f"adam {rate:g}", setting, args.seeds or [0, 1, 2], rate)
        return
    seeds = args.seeds or [3, 4, 5, 6, 7]
    compare(f"adam {args.rate:g}", setting, seeds, args.rate)
    compare("catapults", setting, seeds, 0.001, CatapultPolicy())
    compare("with a budget", setting, seeds, 0.001, CatapultPolicy(total_steps=setting.steps))
    compare("below the edge", setting, seeds, 0.001, CatapultPolicy(total_steps=setting.steps, settle=1e-9, cool=0.05))


if __name__ == "__main__":
    main()
