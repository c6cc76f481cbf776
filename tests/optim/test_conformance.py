"""Promise: ``CatapultSGD`` without a model keeps the contract that PyTorch's own optimizers are tested for.

Inputs, error inputs and schedulers are those of ``torch.optim.SGD`` in PyTorch's optimizer database
(``torch.testing._internal.common_optimizers``: private, so for tests only); the checks are those of PyTorch's
``test_optim.py`` that apply to one device. Left out: sparse gradients and the fused kernel, both refused.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from catapult_opt import CatapultSGD

pytest.importorskip("expecttest")
database = pytest.importorskip("torch.testing._internal.common_optimizers")

TORCH_SGD = next(info for info in database.optim_db if info.optim_cls is SGD)


def inputs(device: str, dtype: Any = None) -> list[Any]:
    """Those of torch.optim.SGD, whose default rate (CatapultSGD's is 1, for the controller) is spelled out."""
    found = TORCH_SGD.optim_inputs_func(device=device)
    for entry in found:
        entry.kwargs.setdefault("lr", 1e-3)
    return found


def error_inputs(device: str, dtype: Any) -> list[Any]:
    found = TORCH_SGD.optim_error_inputs_func(device=device, dtype=dtype)
    for entry in found:
        if "momentum" in entry.error_regex:  # ours says what it wants instead
            entry.error_regex = "momentum must be a finite number >= 0, got -0.5"
    return found


INFO = database.OptimizerInfo(
    CatapultSGD,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=TORCH_SGD.scheduler_inputs,
    supported_impls=("foreach", "differentiable"),
    not_og_supported_flags=("foreach", "differentiable", "maximize"),
    supports_sparse=False,
)


def configurations(*skip: str) -> list[dict[str, Any]]:
    """Every input with every implementation; "differentiable" is skipped where leaf parameters are stepped."""
    made = database._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO, skip=skip)
    return [entry.kwargs for entry in made]


def label(kwargs: dict[str, Any]) -> str:
    return ",".join(f"{k}={float(v) if isinstance(v, Tensor) else v}" for k, v in kwargs.items() if v is not False)


every_input = pytest.mark.parametrize("kwargs", [entry.kwargs for entry in inputs("cpu")], ids=label)
every_configuration = pytest.mark.parametrize("kwargs", configurations(), ids=label)
every_leaf_configuration = pytest.mark.parametrize("kwargs", configurations("differentiable"), ids=label)
every_schedule = pytest.mark.parametrize("schedule", INFO.scheduler_inputs, ids=lambda s: f"{len(s)}-schedulers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


class Problem:
    """A least-squares problem on a matrix and a vector."""

    def __init__(self, contiguous: bool = True) -> None:
        weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
        self.weight, self.bias = weight[..., 0], bias[..., 0]
        if contiguous:
            self.weight, self.bias = self.weight.contiguous(), self.bias.contiguous()
        self.weight.requires_grad_(), self.bias.requires_grad_()
        self.input = torch.randn(5)

    @property
    def params(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def loss(self, optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def twin(self) -> Problem:
        other = copy.copy(self)
        other.weight, other.bias = (p.detach().clone().requires_grad_() for p in self.params)
        return other


def train(problem: Problem, optimizer: Optimizer, steps: int, schedulers: Any = (), closure: bool = False) -> None:
    for _ in range(steps):
        if closure:
            loss = optimizer.step(functools.partial(problem.loss, optimizer))
        else:
            loss = problem.loss(optimizer)
            optimizer.step()
        loss = loss.detach()
        for scheduler in schedulers:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def assert_goes_the_right_way(problem: Problem, optimizer: Optimizer, schedulers: Any = ()) -> None:
    before = problem.loss(optimizer).item()
    train(problem, optimizer, 20, schedulers)
    after = problem.loss(optimizer).item()
    assert after > before if optimizer.param_groups[0]["maximize"] else after < before


# -------------------------------------------------------------------------------------------------------- the direction


@every_leaf_configuration
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_way(kwargs: dict[str, Any], contiguous: bool) -> None:
    problem = Problem(contiguous)
    assert_goes_the_right_way(problem, CatapultSGD(problem.params, **kwargs))


@every_schedule
@pytest.mark.parametrize("index", range(len(inputs("cpu"))))
def test_goes_the_right_way_under_schedulers(schedule: Any, index: int) -> None:
    kwargs = inputs("cpu")[index].kwargs  # a fresh one: schedulers write into a tensor lr
    problem = Problem()
    optimizer = CatapultSGD(problem.params, foreach=False, **kwargs)
    assert_goes_the_right_way(problem, optimizer, [make(optimizer) for make in schedule])


@every_schedule
def test_groups_go_the_right_way_under_schedulers(schedule: Any) -> None:
    problem = Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
    optimizer = CatapultSGD(groups, lr=1e-3)
    assert_goes_the_right_way(problem, optimizer, [make(optimizer) for make in schedule])


@every_leaf_configuration
def test_groups_with_their_own_weight_decay(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    groups = [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **kwargs, "weight_decay": 0.0}]
    assert_goes_the_right_way(problem, CatapultSGD(groups))


@every_leaf_configuration
def test_groups_with_their_own_lr(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    other = torch.ones(2, requires_grad=True)
    optimizer = CatapultSGD([{"params": problem.params, **kwargs}, {"params": [other]}], lr=1e-28)
    other.grad = torch.ones(2)
    assert_goes_the_right_way(problem, optimizer)
    assert torch.equal(other, torch.ones(2))


@every_leaf_configuration
def test_tensor_lr_is_the_number(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    twin = problem.twin()
    train(problem, CatapultSGD(problem.params, **{**kwargs, "lr": 1e-3}), 5)
    lr = torch.tensor(1e-3)
    optimizer = CatapultSGD(twin.params, **{**kwargs, "lr": lr})
    train(twin, optimizer, 5)
    torch.testing.assert_close(twin.params, problem.params)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(1e-3)


@every_leaf_configuration
def test_closure(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    twin = problem.twin()
    train(problem, CatapultSGD(problem.params, **kwargs), 5)
    train(twin, CatapultSGD(twin.params, **kwargs), 5, closure=True)
    torch.testing.assert_close(twin.params, problem.params, rtol=0, atol=0)


@every_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_foreach_is_the_forloop(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Mixed shapes, one of them empty, one without gradient, and two dtypes in one group."""

    def run(foreach: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).to(dtype) for s in [(3, 2), (3,), (), (0,), (2, 2)]]
        params.append(torch.randn(3, generator=generator).double())
        optimizer = CatapultSGD([p.requires_grad_() for p in params], foreach=foreach, **kwargs)
        for _ in range(4):
            for i, p in enumerate(params):
                p.grad = None if i == 4 else torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        return params

    torch.testing.assert_close(run(True), run(False))


@every_leaf_configuration
def test_complex_is_two_reals(kwargs: dict[str, Any]) -> None:
    z = torch.randn(5, dtype=torch.complex64)
    pair = torch.view_as_real(z).clone()
    first, second = CatapultSGD([z.requires_grad_()], **kwargs), CatapultSGD([pair.requires_grad_()], **kwargs)
    for _ in range(3):
        z.grad = torch.randn_like(z)
        pair.grad = torch.view_as_real(z.grad).clone()
        first.step()
        second.step()
        torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach())


# ----------------------------------------------------------------------------------------------------------- the no-ops


@every_configuration
def test_step_without_gradients_does_nothing(kwargs: dict[str, Any]) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = CatapultSGD(params, **kwargs)
    assert optimizer.step(lambda: torch.ones(1)) == 1
    assert all(map(torch.equal, params, before))
    assert not any(optimizer.state.values())


@every_configuration
def test_step_with_zero_gradients_moves_nothing(kwargs: dict[str, Any]) -> None:
    kwargs = {**kwargs, "weight_decay": 0.0}  # that moves without gradients
    p = torch.randn(5, 1, requires_grad=True)
    before = p.detach().clone()
    if kwargs.get("differentiable"):
        p = p.clone()
    optimizer = CatapultSGD([p], **kwargs)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


@every_configuration
def test_can_be_printed(kwargs: dict[str, Any]) -> None:
    assert repr(CatapultSGD(Problem().params, **kwargs)).startswith("CatapultSGD (")


# ------------------------------------------------------------------------------------------------------- the state dict


def named(params: list[Tensor], yes: bool) -> Any:
    return [(f"name{i}", p) for i, p in enumerate(params)] if yes else params


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


def assert_same_state(got: Any, expected: Any) -> None:
    assert pickle.dumps(plain(got)) == pickle.dumps(plain(expected))


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@every_leaf_configuration
@pytest.mark.parametrize("names", [(False, False), (False, True), (True, False), (True, True)])
def test_state_dict_is_deterministic(kwargs: dict[str, Any], names: tuple[bool, bool]) -> None:
    problem = Problem()
    optimizer = CatapultSGD(named(problem.params, names[0]), **kwargs)
    train(problem, optimizer, 10)
    twin = problem.twin()
    other = CatapultSGD(named(twin.params, names[1]), **kwargs)
    loaded = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(loaded)
    assert_same_state(loaded, optimizer.state_dict())
    if any(names):
        assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]
    for _ in range(5):
        train(problem, optimizer, 1)
        train(twin, other, 1)
        assert all(map(torch.equal, twin.params, problem.params))
    assert_same_state(without_names(other.state_dict()), without_names(optimizer.state_dict()))
    other.param_groups.extend(other.param_groups)
    repeated = without_names(other.state_dict())["param_groups"]
    assert_same_state(repeated[-1], repeated[0])


@every_leaf_configuration
def test_older_state_dicts_can_be_loaded(kwargs: dict[str, Any]) -> None:
    """Of versions that did not know all of the flags yet."""
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 16, 16)
    optimizer = CatapultSGD(model.parameters(), **kwargs)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in (*INFO.not_og_supported_flags, "nesterov"):
            del group[flag]
    optimizer.load_state_dict(old)
    step()
    assert {"foreach", "maximize", "differentiable", "nesterov"} <= set(optimizer.param_groups[0])


@every_leaf_configuration
@pytest.mark.parametrize("names", [False, True])
def test_state_dict_survives_a_weights_only_load(kwargs: dict[str, Any], names: bool) -> None:
    problem = Problem()
    optimizer = CatapultSGD(named(problem.params, names), **kwargs)
    train(problem, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), optimizer.state_dict())


@every_leaf_configuration
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_continue_as_the_original(kwargs: dict[str, Any], way: str) -> None:
    problem = Problem()
    optimizer = CatapultSGD(problem.params, **kwargs)
    train(problem, optimizer, 3)
    pair = (problem, optimizer)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    # deepcopy and pickle of the pair share the parameters between problem and optimizer, as in the original
    assert other.param_groups[0]["params"][0] is twin.weight
    assert public(other) == public(optimizer)
    train(problem, optimizer, 3)
    train(twin, other, 3)
    assert all(map(torch.equal, twin.params, problem.params))
    assert_same_state(other.state_dict(), optimizer.state_dict())


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


@every_leaf_configuration
def test_state_is_cast_to_the_parameters_dtype(kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = CatapultSGD(problem.params, **kwargs)
    train(problem, optimizer, 2)
    halves = [p.detach().bfloat16().requires_grad_() for p in problem.params]
    other = CatapultSGD(halves, **kwargs)
    other.load_state_dict(optimizer.state_dict())
    assert all(v.dtype == torch.bfloat16 for entries in other.state.values() for v in entries.values())


# ---------------------------------------------------------------------------------------------------------------- hooks


@every_configuration
def test_state_dict_hooks(kwargs: dict[str, Any]) -> None:
    def before(optimizer: Optimizer) -> None:
        optimizer.state["test"] = 1

    def after(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state["saw"] = state["state"].pop("test", None)
        return state

    optimizer = CatapultSGD([torch.rand(2, 3, requires_grad=True)], **kwargs)
    optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["saw"] is None
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["saw"] == 1


@every_configuration
def test_load_state_dict_hooks(kwargs: dict[str, Any]) -> None:
    order = []

    def pre(optimizer: Optimizer, state: dict[str, Any]) -> None:
        order.append("pre")
        state["param_groups"][0]["lr"] = 0.002

    def replacing(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("replacing")
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    optimizer = CatapultSGD([torch.rand(2, 3, requires_grad=True)], **kwargs)
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: order.append("post"))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(replacing, prepend=True)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(replacing)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.003
    assert order == ["pre", "post", "replacing", "pre", "post", "replacing", "pre", "replacing", "post"]


@contextmanager
def removed(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every_configuration
def test_step_hooks_run_in_order_and_once(kwargs: dict[str, Any]) -> None:
    order: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: order.append(what)

    params = [torch.ones(2)]
    mine, other = CatapultSGD(params, **kwargs), SGD(params, lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        mine.register_step_pre_hook(note("pre")),
        mine.register_step_post_hook(note("post")),
    ]
    with removed(*handles):
        mine.step()
        other.step()
        mine.step()
    mine.step()
    own = ["global pre", "pre", "post", "global post"]
    assert order == [*own, "global pre", "global post", *own]


def test_step_pre_hook_may_replace_the_closure() -> None:
    optimizer = CatapultSGD([torch.ones(2)], lr=0.1)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], lambda: 5), {}))
    assert optimizer.step() == 5


# --------------------------------------------------------------------------------------------------------------- groups


def test_add_param_group() -> None:
    problem = Problem()
    optimizer = CatapultSGD([problem.weight], lr=1e-3, momentum=0.9)
    optimizer.add_param_group({"params": problem.bias, "lr": 1e-2, "mine": "kept"})
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-2]
    assert optimizer.param_groups[1]["momentum"] == 0.9
    assert optimizer.param_groups[1]["mine"] == "kept"
    assert_goes_the_right_way(problem, optimizer)
    for wrong, error in [
        ([problem.weight], TypeError),
        ({"params": problem.weight}, ValueError),
        ({"params": {problem.weight}}, TypeError),
        ({"params": [1.0]}, TypeError),
        ({"params": problem.weight * 2}, ValueError),
    ]:
        with pytest.raises(error):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 2


def test_frozen_parameters_may_be_passed() -> None:
    problem = Problem()
    frozen = torch.ones(3)
    optimizer = CatapultSGD([*problem.params, frozen], lr=1e-3, weight_decay=0.1)
    assert_goes_the_right_way(problem, optimizer)
    assert torch.equal(frozen, torch.ones(3))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("index", range(len(error_inputs("cpu", torch.float32))))
def test_errors(index: int) -> None:
    entry = error_inputs("cpu", torch.float32)[index]
    arguments = entry.optimizer_error_input
    if arguments.params is None:
        arguments.params = [torch.ones(2, requires_grad=True)]
    expect = pytest.warns if issubclass(entry.error_type, Warning) else pytest.raises
    assert entry.error_on == database.OptimizerErrorEnum.CONSTRUCTION_ERROR
    with expect(entry.error_type, match=entry.error_regex):
        CatapultSGD(arguments.params, **arguments.kwargs)


def test_empty_parameter_list() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        CatapultSGD([], lr=0.1)
