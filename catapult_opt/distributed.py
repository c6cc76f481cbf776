"""The processes that train together, and what a measurement exchanges among them.

What data-parallel training descends is the mean over the ranks of each rank's own loss, whatever the sizes of their
batches: that is how DistributedDataParallel and `fully_shard` combine gradients. Its curvature, and a product with it,
is the mean of the ranks' own, so that a measurement on R ranks is that of one process on the whole batch. With unequal
parts it is that of the mean of means, which such a training descends.

`Alone` is one process, `Replicas` hold the same weights each (DistributedDataParallel), `Shards` a part of each weight
(`fully_shard`, FSDP2). All that a measurement has to know of them is in their methods. Vectors are lists of plain
tensors: under `Shards` those of the rank's own parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .vectors import Layout, Total, Vector


def local(tensor: Tensor) -> Tensor:
    """The rank's own part of a sharded tensor (a DTensor), sharing its memory; any other tensor as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


class Alone:
    """One process: its part is everything."""

    size = 1
    writes = True  # does this process write the log?
    sharded = False

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean over the ranks of a tensor that each has."""
        return numbers

    def highest(self, numbers: Sequence[float]) -> list[float]:
        """The highest of each number over the ranks."""
        return list(numbers)

    def sum(self, number: float) -> float:
        """Sum over the ranks."""
        return number

    def any(self, flag: bool) -> bool:
        """Is it so on any rank?"""
        return self.highest([float(flag)])[0] > 0

    def common(self, number: float) -> float:
        """Mean over the ranks where they run their forward passes in step (gathering weights), else this rank's own."""
        return number

    def averaged(self, product: Vector) -> Vector:
        """From products with the ranks' own curvature to that with the curvature of the whole loss."""
        return product

    @property
    def total(self) -> Total | None:
        """Sums inner products over the ranks, where each holds a part of every vector."""
        return None

    @property
    def seed(self) -> int:
        """For random vectors: equal where ranks hold the same part."""
        return 0

    def gradients(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], params: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """J^T s for each parameter, leaving `.grad` as it is."""
        return torch.autograd.grad(outputs, params, cotangents, allow_unused=True)

    def weights(self, params: Sequence[Tensor]) -> Vector:
        """What the parameters hold now, to be put back."""
        return [p.data for p in params]

    def put(self, params: Sequence[Tensor], weights: Iterable[Tensor]) -> None:
        """Let the parameters hold other weights, by pointer."""
        for p, w in zip(params, weights, strict=True):
            p.data = w


class _Ranks(Alone):
    """Several processes, which exchange numbers over these groups in turn."""

    def __init__(self, groups: Sequence[Any], size: int, device: torch.device) -> None:
        self._groups, self._device = groups, device
        self.size = size
        self.writes = all(dist.get_rank(group) == 0 for group in groups)

    def mean(self, numbers: Tensor) -> Tensor:
        return _reduced(numbers, self._groups) / self.size

    def highest(self, numbers: Sequence[float]) -> list[float]:
        found = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [float(x) for x in _reduced(found, self._groups, dist.ReduceOp.MAX).tolist()]

    def sum(self, number: float) -> float:
        return float(_reduced(torch.tensor(number, dtype=torch.float64, device=self._device), self._groups))


class Replicas(_Ranks):
    """Ranks that hold the same weights and average their gradients.

    A product with the curvature costs one all-reduce of its own size, as a training step's gradients do.
    """

    def __init__(self, process_group: Any, device: torch.device) -> None:
        super().__init__([process_group], dist.get_world_size(process_group), device)

    def averaged(self, product: Vector) -> Vector:
        layout = Layout(product)
        flat = layout.flat(product)
        for tensor in flat:
            dist.all_reduce(tensor, group=self._groups[0])
            tensor.div_(self.size)
        return layout.parts(flat)


class Shards(_Ranks):
    """Ranks that hold a part of each weight, of a model under `fully_shard`.

    Its own hooks gather the weights in a forward pass and average and scatter the gradients in a backward pass, so a
    product costs what a training step's passes do, and three all-reduces of a few numbers for its inner products.
    Sharded weights cannot be swapped by pointer: they are copied, overwritten and copied back.
    """

    sharded = True

    def __init__(self, model: nn.Module, params: Sequence[Any]) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        if not self._modules:
            raise ValueError(
                "model has sharded parameters (DTensor) but no module under fully_shard, the one supported"
            )
        mesh = params[0].device_mesh if hasattr(params[0], "device_mesh") else None
        kinds = [tuple(p.is_shard() for p in t.placements) if hasattr(t, "placements") else None for t in params]
        if mesh is None or any(
            kind is None or kind != kinds[0] or t.device_mesh != mesh for kind, t in zip(kinds, params, strict=True)
        ):
            raise ValueError(
                "params: all must be sharded by fully_shard over the same mesh, call it on the whole model"
            )
        groups = mesh.get_all_groups()
        super().__init__(groups, mesh.size(), local(params[0]).device)
        self._model = model
        self._sharding = [group for group, shards in zip(groups, kinds[0] or (), strict=True) if shards]
        self._weights: list[Tensor] = []

    def common(self, number: float) -> float:
        return self.sum(number) / self.size

    @property
    def total(self) -> Total | None:
        return lambda inner: _reduced(inner, self._sharding)

    @property
    def seed(self) -> int:
        seed = 0
        for group in self._sharding:
            seed = seed * dist.get_world_size(group) + dist.get_rank(group)
        return seed

    def gradients(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], params: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        kept = [w.grad for w in self._weights]
        try:
            for w in self._weights:
                w.grad = None
            torch.autograd.backward(outputs, cotangents)
            return [None if p.grad is None else local(p.grad) for p in params]
        finally:
            for w, grad in zip(self._weights, kept, strict=True):
                w.grad = grad

    def weights(self, params: Sequence[Tensor]) -> Vector:
        return [local(p).clone() for p in params]

    def put(self, params: Sequence[Tensor], weights: Iterable[Tensor]) -> None:
        for p, w in zip(params, weights, strict=True):
            local(p).data.copy_(w)  # as .data: no new version
        reshard(self._model)
        self._weights = [w for w in self._model.parameters() if w.requires_grad]


Group = Alone
ALONE = Alone()


def group_of(model: nn.Module, params: Sequence[Tensor], process_group: Any = None) -> Group:
    """Who trains together: by the model (DistributedDataParallel, fully_shard), or the process group given.

    Raises:
        ValueError: several processes of which it is not known whether they train together; a wrapper not supported.
    """
    if not _running():
        if process_group is not None:
            raise ValueError(f"process_group={process_group!r} needs torch.distributed: call init_process_group first")
        return ALONE
    trained = [p for p in params if p.requires_grad]
    _refuse_wrappers(model)
    if any(hasattr(p, "to_local") for p in trained):
        if process_group is not None:
            raise ValueError("process_group: leave it out where the model is under fully_shard, which has its own")
        return Shards(model, trained)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        process_group = process_group or model.process_group
    elif process_group is None and dist.get_world_size() > 1:
        raise ValueError(
            f"process_group: {dist.get_world_size()} processes run, and the model says nothing of them: pass the "
            "DistributedDataParallel module as model=, or process_group=torch.distributed.group.WORLD if something "
            "else averages their gradients, or a group of one each (torch.distributed.new_subgroups(1)) if nothing does"
        )
    alone = process_group is None or dist.get_world_size(process_group) == 1
    return ALONE if alone else Replicas(process_group, trained[0].device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, which runs without its collectives; any other as it is."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of modules under fully_shard: the next forward pass gathers them anew."""
    if not _running():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _refuse_wrappers(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "model is wrapped in FullyShardedDataParallel, whose weights cannot be told apart: use fully_shard"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel) and module is not model:
            raise ValueError(
                "model contains a DistributedDataParallel: pass that one as model=; with torch.compile, compile the "
                "module inside it, DistributedDataParallel(torch.compile(module))"
            )


def _reduced(numbers: Tensor, groups: Sequence[Any], op: Any = None) -> Tensor:
    found = numbers.clone()
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.SUM if op is None else op, group=group)
    return found
