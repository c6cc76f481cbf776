"""Memory at the peak of a measurement, in copies of the weights: `python benchmarks/memory.py`.

Each configuration runs in a process of its own: plain SGD, CatapultMonitor measuring every step, and CatapultSGD at its
defaults, three steps on an MLP of 25 and of 100 million parameters. On the CPU the peak is that of the resident size;
on CUDA, where there is one, that of the allocator. Printed is the difference to plain SGD over the size of the weights,
in their precision.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from catapult_opt import CatapultMonitor, CatapultSGD

FACES = ("plain", "monitor", "sgd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(parameters: float) -> nn.Module:
    """Eight square layers: activations are small beside the weights."""
    width = int((parameters / 8) ** 0.5)
    return nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))


def train(face: str, parameters: float, dtype: str, device: str) -> dict[str, float]:
    """Peak bytes of a few steps, and the bytes of the weights."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, criterion = network(parameters).to(device, DTYPES[dtype]), nn.MSELoss()
    x = torch.randn(8, model[0].in_features, device=device, dtype=DTYPES[dtype])
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher: Any = None
    if face == "monitor":
        watcher = CatapultMonitor(optimizer, model=model, criterion=criterion, every=1)
    elif face == "sgd":
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), torch.zeros_like(x)).backward()
        optimizer.step()
    del watcher
    if device == "cuda":
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak, "weights": float(sum(p.numel() * p.element_size() for p in model.parameters()))}


def measured(face: str, parameters: float, dtype: str, device: str) -> dict[str, float]:
    """In a process of its own: a peak cannot be reset."""
    command = [sys.executable, __file__, "--one", face, str(parameters), dtype, device]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[25e6, 100e6], help="numbers of parameters")
    parser.add_argument("--json", help="write every number to this file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        face, parameters, dtype, device = options.one
        print(json.dumps(train(face, float(parameters), dtype, device)))
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = Table(title="peak above plain SGD, in copies of the weights")
    for column in ("device", "parameters", "precision", "CatapultMonitor", "CatapultSGD"):
        table.add_column(column, justify="right")
    rows = []
    for device in devices:
        for size in options.sizes:
            for dtype in DTYPES:
                found = {face: measured(face, size, dtype, device) for face in FACES}
                copies = {
                    face: (found[face]["peak"] - found["plain"]["peak"]) / found["plain"]["weights"]
                    for face in FACES[1:]
                }
                rows.append({"device": device, "parameters": size, "precision": dtype, **copies})
                table.add_row(device, f"{size:.3g}", dtype, *(f"{x:.1f}" for x in copies.values()))
    Console().print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
