"""CatapultSGD in Lightning, and a callback that logs the rate, the critical rate and the catapults.

    python examples/lightning_module.py               # needs lightning: pip install 'catapult_opt[integrations]'

Where several processes train, the model is wrapped after `configure_optimizers`: pass
`process_group=torch.distributed.group.WORLD` there, as below.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from catapult_opt import CatapultSGD
from catapult_opt.analysis import tasks


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 1))
        self.criterion = nn.MSELoss()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self.criterion(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CatapultSGD(
            self.net.parameters(),
            model=self.net,
            criterion=self.criterion,
            process_group=dist.group.WORLD if dist.is_initialized() else None,
        )


class LogCatapults(L.Callback):
    """Logs what CatapultSGD did in each step, to whatever loggers the trainer has."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, CatapultSGD) and optimizer.last is not None:
                module.log("effective_lr", optimizer.param_groups[0]["effective_lr"])
                module.log("eta_crit", optimizer.last.eta_crit)
                module.log("catapults", float(optimizer.catapults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()

    L.seed_everything(0)
    task = tasks.rank(2, 512, 10, 10, d=20, seed=0)
    loader = DataLoader(TensorDataset(task.train.inputs, task.train.targets), batch_size=128)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        logger=CSVLogger(args.out, name=None, version=""),
        log_every_n_steps=1,
        callbacks=[LogCatapults()],
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), loader)
    print(f"Wrote {args.out / 'metrics.csv'}")


if __name__ == "__main__":
    main()
