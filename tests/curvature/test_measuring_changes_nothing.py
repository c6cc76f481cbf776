"""Promise: measuring changes nothing, to the bit.

``test_training_*``: a training run with a monitor on it against the same run without. ``test_critical_lr_*``: all that
one call could disturb, before and after, also when the model, the criterion or a backward raises half-way.
"""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, Case, Problem
from torch import Tensor, nn

from catapult_opt import CatapultMonitor, critical_lr

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SEED = 20


# ------------------------------------------------------------------------------------------- what there is to disturb


def bits(value: Any) -> Any:
    """A comparable picture of a value: tensors by dtype, shape, strides and bytes (so that -0.0 != 0.0, NaN == NaN)."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().view(-1)
        return str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad, raw.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [bits(item) for item in value]
    return value


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def hooks(module: nn.Module) -> dict[str, list[Any]]:
    return {
        f"{name}.{kind}": list(getattr(sub, kind, ()))
        for name, sub in module.named_modules()
        for kind in HOOKS
        if len(getattr(sub, kind, ()))
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: bits(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "gradients": {name: bits(p.grad) for name, p in model.named_parameters()},
        "buffers": {name: bits(b) for name, b in model.named_buffers()},
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def model_objects(model: nn.Module) -> dict[str, Any]:
    """Identities: the same tensors in the same memory, no attribute added to any module or parameter."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.data_ptr()) for name, t in tensors.items()},
        "gradients": {
            name: (id(p.grad), p.grad.data_ptr()) for name, p in model.named_parameters() if p.grad is not None
        },
        "leaves": {name: (p.is_leaf, type(p), sorted(vars(p))) for name, p in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "forwards": {name: getattr(module.forward, "__func__", None) for name, module in model.named_modules()},
    }


def global_state() -> dict[str, Any]:
    return {
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "python rng": random.getstate(),
        "numpy rng": bits_of_numpy_rng(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "math attention": torch.backends.cuda.math_sdp_enabled(),
    }


def bits_of_numpy_rng() -> Any:
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), rest


def state_of(problem: Problem) -> dict[str, Any]:
    criterion = problem.criterion
    is_module = isinstance(criterion, nn.Module)
    return {
        **model_state(problem.model),
        "criterion": model_state(criterion) if is_module else None,
        "hooks": hooks(problem.model),
        "criterion hooks": hooks(criterion) if is_module else None,
        "batches": [bits(batch) for batch in problem.batches],
        **model_objects(problem.model),
        **global_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Names what differs instead of printing bytes."""
    differing = []
    for key in before:
        if before[key] == after[key]:
            continue
        old, new = before[key], after[key]
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            differing.append(f"{key}: {', '.join(map(str, names))}")
        else:
            differing.append(key)
    assert not differing, "; ".join(differing)


def seed_everything() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


@contextmanager
def unchanged(problem: Problem) -> Iterator[None]:
    before = state_of(problem)
    yield
    assert_same(before, state_of(problem))


# --------------------------------------------------------------------------------------------------------- training

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
}


def train(case: Case, make: str, *, monitored: bool, dtype: torch.dtype = torch.float32, every: int = 1) -> Any:
    """Four steps over two batches; everything that a run leaves behind."""
    problem = case.build(dtype, batches=2)
    model, criterion = problem.model, problem.criterion
    optimizer = OPTIMIZERS[make]([p for p in model.parameters() if p.requires_grad])
    hooks_before = hooks(model), len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
    seed_everything()
    monitor = None
    if monitored:
        monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, every=every)
        if not isinstance(criterion, nn.Module):  # hooks cannot see a plain function
            criterion = monitor.criterion
    losses, along = [], []
    for epoch in range(2):
        for inputs, targets in problem.batches:
            optimizer.zero_grad(set_to_none=epoch == 0)
            loss = criterion(problem.first_argument(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(bits(loss))
            along.append((model_state(model), global_state()))
    measured = monitor is not None and monitor.last is not None
    if monitor is not None:
        monitor.detach()
        hooks_after = hooks(model), len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
        assert hooks_after == hooks_before, "detach() leaves no hook behind"
    final = {
        "losses": losses,
        **model_state(model),
        "optimizer": bits(optimizer.state_dict()),
        "batches": [bits(batch) for batch in problem.batches],
        **{
            f"after step {i} ({what})": state
            for i, pair in enumerate(along)
            for what, state in zip("mg", pair, strict=True)
        },
        **global_state(),
    }
    return final, measured


@every_case
def test_training_with_a_monitor_is_bit_identical(case: Case) -> None:
    plain, _ = train(case, "nesterov", monitored=False)
    watched, measured = train(case, "nesterov", monitored=True)
    assert measured, "the run with the monitor must really have measured"
    assert_same(plain, watched)


@pytest.mark.parametrize("name", ["batchnorm-dropout", "lstm-dropout", "tied-weights", "mse-half-sum"])
@pytest.mark.parametrize("make", list(OPTIMIZERS))
@pytest.mark.parametrize("every", [1, 3])
def test_training_in_float64_at_intervals_is_bit_identical(name: str, make: str, every: int) -> None:
    plain, _ = train(BY_NAME[name], make, monitored=False, dtype=torch.float64)
    watched, measured = train(BY_NAME[name], make, monitored=True, dtype=torch.float64, every=every)
    assert measured
    assert_same(plain, watched)


def test_training_with_accumulated_gradients_is_bit_identical() -> None:
    """Two forwards per step: .grad already holds something when the second backward adds to it."""

    def run(monitored: bool) -> dict[str, Any]:
        problem = BY_NAME["batchnorm-dropout"].build(batches=4)
        model, criterion = problem.model, problem.criterion
        optimizer = OPTIMIZERS["nesterov"](list(model.parameters()))
        seed_everything()
        monitor = CatapultMonitor(optimizer, model=model, criterion=criterion, every=1) if monitored else None
        for i, (inputs, targets) in enumerate(problem.batches):
            (criterion(model(inputs), targets) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        if monitor is not None:
            monitor.detach()
        return {**model_state(model), **global_state(), "optimizer": bits(optimizer.state_dict())}

    assert_same(run(False), run(True))


def test_training_that_keeps_its_graph_can_still_use_it() -> None:
    """backward(retain_graph=True), and a second backward through the same graph before the step."""

    def run(monitored: bool) -> dict[str, Any]:
        problem = BY_NAME["layernorm"].build()
        optimizer = OPTIMIZERS["nesterov"](list(problem.model.parameters()))
        seed_everything()
        if monitored:
            CatapultMonitor(optimizer, model=problem.model, criterion=problem.criterion, every=1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = problem.criterion(problem.model(problem.inputs), problem.targets)
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
        return {**model_state(problem.model), **global_state()}

    assert_same(run(False), run(True))


def test_training_does_not_keep_graphs_alive() -> None:
    """After the step, and after detach, no output of an earlier step is held."""
    problem = BY_NAME["mse-mean"].build()
    optimizer = OPTIMIZERS["nesterov"](list(problem.model.parameters()))
    monitor = CatapultMonitor(optimizer, model=problem.model, criterion=problem.criterion, every=1)
    references = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(problem.inputs), problem.targets)
        references.append(weakref.ref(loss))
        loss.backward()
        optimizer.step()
    del loss
    monitor.detach()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


# ----------------------------------------------------------------------------------------------- one call, undisturbed


def with_gradients(problem: Problem) -> Problem:
    """Some gradients there already, one of them missing, as in the middle of a step; the RNGs at a known place."""
    seed_everything()
    g = torch.Generator().manual_seed(5)
    params = [p for p in problem.model.parameters() if p.requires_grad]
    for p in params[1:]:
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
    return problem


def measure(problem: Problem, **kwargs: Any) -> Any:
    if problem.outputs is not None:
        kwargs["outputs"] = problem.outputs
    return critical_lr(problem.model, problem.criterion, problem.inputs, problem.targets, **kwargs)


@every_case
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_critical_lr_leaves_everything_bit_identical(case: Case, curvature: str) -> None:
    problem = with_gradients(case.build())
    with unchanged(problem):
        assert measure(problem, curvature=curvature).lambda_max > 0


@pytest.mark.parametrize("name", ["batchnorm-dropout", "gru", "tied-weights", "frozen-parameters"])
def test_critical_lr_is_repeatable(name: str) -> None:
    """The same call twice from the same RNG state: the same bits. So nothing of the first call is left anywhere."""
    problem = with_gradients(BY_NAME[name].build())
    first = measure(problem)
    second = measure(problem)
    assert (first.lambda_max, first.residual, first.matvecs) == (second.lambda_max, second.residual, second.matvecs)


@pytest.mark.parametrize("name", ["mse-mean", "cnn-batchnorm", "dropout", "lstm", "attention-sdpa", "tied-weights"])
def test_critical_lr_between_forward_and_backward(name: str) -> None:
    """The user's own graph is still valid and gives the same gradients."""

    def gradients(measuring: bool) -> dict[str, Any]:
        problem = BY_NAME[name].build()
        seed_everything()
        loss = problem.criterion(problem.first_argument(problem.inputs), problem.targets)
        if measuring:
            measure(problem)
        loss.backward()
        return {**model_state(problem.model), **global_state()}

    assert_same(gradients(False), gradients(True))


def test_critical_lr_leaves_inputs_that_require_grad_alone() -> None:
    problem = BY_NAME["mse-mean"].build()
    leaf = problem.inputs.requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    (leaf * 1).sum().backward()
    before = bits(leaf.grad)
    with unchanged(problem):
        measure(problem)
    assert bits(leaf.grad) == before


def test_critical_lr_with_the_users_own_hooks() -> None:
    """They are still there, in their order, and parametrising ones did their work during the measurement."""
    problem = BY_NAME["mse-mean"].build(torch.float64)
    handles = [
        problem.model.register_forward_hook(lambda module, args, output: None),
        problem.model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        problem.model[0].register_forward_hook(lambda module, args, output: output + 1),
    ]
    with unchanged(problem):
        with_hooks = measure(problem, tol=1e-7, max_matvecs=400).lambda_max
    for handle in handles:
        handle.remove()
    bare = nn.Sequential(Scaled(problem.model[0]), *problem.model[1:])
    expected = critical_lr(bare, problem.criterion, problem.inputs, problem.targets, tol=1e-7, max_matvecs=400)
    assert with_hooks == pytest.approx(expected.lambda_max, rel=1e-4)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(2 * x) + 1


# ------------------------------------------------------------------------------------------ one call, interrupted


class Boom(Exception):
    pass


class Fuse:
    """Raises at the k-th use; counts its uses."""

    def __init__(self) -> None:
        self.uses, self.blow_at = 0, 0

    def burn(self) -> None:
        self.uses += 1
        if self.uses == self.blow_at:
            raise Boom


class Fused(nn.Module):
    """Blows before or after the wrapped module ran (after: BatchNorm statistics and the RNG have moved on)."""

    def __init__(self, inner: nn.Module, fuse: Fuse, *, after: bool) -> None:
        super().__init__()
        self.inner, self.fuse, self.after = inner, fuse, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.after:
            self.fuse.burn()
        value = self.inner(*args, **kwargs)
        if self.after:
            self.fuse.burn()
        return value


class FusedBackward(nn.Module):
    """Blows in a backward pass."""

    def __init__(self, inner: nn.Module, fuse: Fuse) -> None:
        super().__init__()
        self.inner, self.fuse = inner, fuse

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self.inner(*args, **kwargs)
        if value.requires_grad:
            value.register_hook(lambda gradient: self.fuse.burn())
        return value


def fused(problem: Problem, where: str) -> tuple[Problem, Fuse]:
    fuse = Fuse()
    model, criterion = problem.model, problem.criterion
    if where == "backward":
        model = FusedBackward(model, fuse)
    elif where == "criterion":
        criterion = Fused(criterion, fuse, after=False)
    else:
        model = Fused(model, fuse, after=where == "after forward")
    return Problem(model, criterion, problem.batches, problem.outputs), fuse


WHERE = ["before forward", "after forward", "backward", "criterion"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", ["batchnorm-dropout", "lstm-dropout", "tied-weights"])
def test_critical_lr_interrupted_leaves_everything_bit_identical(name: str, curvature: str, where: str) -> None:
    """An exception out of every single forward, backward and criterion call that a measurement makes."""
    problem, fuse = fused(BY_NAME[name].build(), where)
    with_gradients(problem)
    settings = {"curvature": curvature, "tol": 0.0, "max_matvecs": 4}
    expected = measure(problem, **settings)
    uses = fuse.uses
    assert uses >= 1, "the measurement must pass here at least once"
    for k in range(1, uses + 1):
        fuse.uses, fuse.blow_at = 0, k
        with unchanged(problem), pytest.raises(Boom):
            measure(problem, **settings)
    fuse.blow_at = 0
    again = measure(problem, **settings)
    assert (again.lambda_max, again.matvecs) == (expected.lambda_max, expected.matvecs), "and the next call works"


@pytest.mark.parametrize("where", ["before forward", "after forward", "backward"])
def test_training_interrupted_in_a_measurement_leaves_everything_bit_identical(where: str) -> None:
    """Whether a failing measurement ends the step or only costs the measurement: weights, statistics and gradients are
    those from before the step, or those of the step without a monitor, never anything else.
    """

    def run(blow_at: int | None) -> tuple[dict[str, Any], dict[str, Any], int, bool]:
        problem, fuse = fused(BY_NAME["batchnorm-dropout"].build(), where)
        optimizer = OPTIMIZERS["nesterov"](list(problem.model.parameters()))
        seed_everything()
        if blow_at is not None:
            CatapultMonitor(optimizer, model=problem.model, criterion=problem.criterion, every=1)
        problem.criterion(problem.model(problem.inputs), problem.targets).backward()
        before = {**model_state(problem.model), **global_state()}
        fuse.uses, fuse.blow_at = 0, blow_at or 0
        raised = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        except Boom:
            raised = True
        return before, {**model_state(problem.model), **global_state()}, fuse.uses, raised

    before, after, _, _ = run(None)
    _, watched, uses, _ = run(0)
    assert_same(after, watched)
    assert uses >= 1
    for k in range(1, uses + 1):
        _, state, _, raised = run(k)
        assert_same(before if raised else after, state)
