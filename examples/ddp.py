"""Data-parallel training: each process measures with the others and all apply the same rate.

    torchrun --nproc-per-node 2 examples/ddp.py              # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/ddp.py --shard      # fully_shard (FSDP2): weights and warm start in parts

Prints, from rank 0, the critical rate of the whole batch and the rate applied; leaves a run log and a checkpoint, which
any number of processes can go on from (call again with --resume).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from catapult_opt import CatapultPolicy, CatapultSGD
from catapult_opt.analysis import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="fully_shard in place of DistributedDataParallel")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    task = tasks.rank(2, 512, 10, 10, d=20, seed=0)
    data = TensorDataset(task.train.inputs, task.train.targets)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=128 // dist.get_world_size(), sampler=sampler)

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
    model = fully_shard(model) if args.shard else DistributedDataParallel(model)
    criterion = nn.MSELoss()
    steps = args.epochs * len(loader)
    optimizer = CatapultSGD(
        model.parameters(),
        model=model,
        criterion=criterion,
        policy=CatapultPolicy(total_steps=steps),
        log=args.out / ("resumed.jsonl" if args.resume else "run.jsonl"),
    )
    if args.resume:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=args.out / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        if dist.get_rank() == 0 and optimizer.last is not None:
            rate = optimizer.param_groups[0]["effective_lr"]
            print(f"epoch {epoch}: critical rate {optimizer.last.eta_crit:.3f}, applied {rate:.3f}", flush=True)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=args.out / "checkpoint")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
