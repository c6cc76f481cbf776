"""Promise: a state is checked before anything of it is taken over. What is damaged is refused by name, the state before
stays, and the next step works; what is merely of another version, or in another order, is understood.

Oracle: the run that never loaded anything; states that catapult_opt 0.1.0 wrote.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultLR, CatapultPolicy, CatapultSGD

FORMER = json.loads((Path(__file__).parents[1] / "data" / "states-0.1.0.json").read_text())
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] * X[:, 1:2]
FACES = ["CatapultSGD", "CatapultLR"]
every_face = pytest.mark.parametrize("face", FACES)


class Run:
    """A small network with BatchNorm, trained by one of the driving faces."""

    def __init__(self, face: str, seed: int = 0, order: int = 1, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.criterion = nn.MSELoss()
        params = list(self.model.parameters())[::order]
        self.controller: Any
        self.optimizer: torch.optim.Optimizer
        if face == "CatapultSGD":
            self.controller = CatapultSGD(params, model=self.model, criterion=self.criterion, momentum=0.5, **settings)
            self.optimizer = self.controller
        else:
            self.optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.5)
            self.controller = CatapultLR(self.optimizer, model=self.model, criterion=self.criterion, **settings)

    def advance(self, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(X), Y).backward()
            self.optimizer.step()
            rates.append(self.optimizer.param_groups[0]["effective_lr"])
        return rates

    def weights(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: model, optimizer, and the controller's own where it has one."""
        own = self.controller.state_dict() if isinstance(self.controller, CatapultLR) else None
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "controller": own}
        return copy.deepcopy(saved)

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if isinstance(self.controller, CatapultLR):
            self.controller.load_state_dict(saved["controller"])


def changed(saved: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a value into the controller's state, wherever the face keeps it."""
    groups = saved["optimizer"]["param_groups"]
    document = saved["controller"] or json.loads(groups[0]["catapult_state"])
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if saved["controller"] is None:
        for group in groups:
            group["catapult_state"] = json.dumps(document)


DAMAGED: list[tuple[tuple[str, ...], Any]] = [
    (("observer", "step"), -5),
    (("observer", "step"), 1.5),
    (("observer", "engine"), "evil"),
    (("observer", "step_size"), math.nan),
    (("observer", "step_size"), 1e30),
    (("observer", "repeated"), "yes"),
    (("observer", "batch_size"), 0),
    (("schedule", "due"), "x"),
    (("schedule", "due"), 2**60),
    (("schedule", "due"), -1),
    (("counter", "catapults"), None),
    (("counter", "steps"), True),
    (("counter", "peak"), math.nan),
    (("policy", "phase"), "dance"),
    (("policy", "rate"), math.nan),
    (("policy", "rate"), "abc"),
    (("policy",), [1]),
    (("observer",), 7),
    (("version",), "two"),
    (("version",), 99),
    (("buffers",), 7),
    (("buffers", "1.running_mean"), {"dtype": "float32", "shape": [4], "data": "%%%"}),
    (("buffers", "1.running_mean"), {"dtype": "float32", "shape": [5], "data": "AAAAAA=="}),
    (("buffers", "1.running_mean"), {"dtype": "load", "shape": [4], "data": "AAAA"}),
    (("buffers", "1.running_mean"), None),
]


def assert_refused_and_unharmed(face: str, spoil: Callable[[dict[str, Any]], None], *words: str) -> None:
    other = Run(face, seed=1)
    other.advance(8)
    saved = other.state()
    spoil(saved)
    run, untouched = Run(face), Run(face)
    run.advance(5), untouched.advance(5)
    before = run.state()["optimizer"], run.state()["controller"]
    state = saved["optimizer"] if face == "CatapultSGD" else saved["controller"]
    with pytest.raises(ValueError, match="state_dict") as caught:
        run.controller.load_state_dict(state)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message
    after = run.state()["optimizer"], run.state()["controller"]
    assert str(after) == str(before)
    assert run.advance(6) == untouched.advance(6)
    assert all(torch.equal(a, b) for a, b in zip(run.weights().values(), untouched.weights().values(), strict=True))


@every_face
@pytest.mark.parametrize(("path", "value"), DAMAGED, ids=lambda x: str(x)[:40])
def test_a_damaged_field_is_named_and_nothing_is_taken_over(face: str, path: tuple[str, ...], value: Any) -> None:
    assert_refused_and_unharmed(face, lambda saved: changed(saved, path, value), "state_dict", path[-1])


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000, 5, b"{}"], ids=lambda t: str(t)[:10])
def test_a_state_that_is_no_json_object(text: Any) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        for group in saved["optimizer"]["param_groups"]:
            group["catapult_state"] = text

    assert_refused_and_unharmed("CatapultSGD", spoil, "state_dict")


@pytest.mark.parametrize("key", ["catapult_vector", "catapult_average"])
@pytest.mark.parametrize("value", [torch.zeros(3), torch.full((4, 3), math.nan), "text"], ids=["shape", "nan", "text"])
@every_face
def test_a_tensor_that_does_not_fit(face: str, key: str, value: Any) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        if saved["controller"] is None:
            saved["optimizer"]["state"][0][key] = value
        else:
            saved["controller"][key.removeprefix("catapult_")][0] = value

    assert_refused_and_unharmed(face, spoil, "state_dict", key, "0.weight")


@every_face
def test_unknown_fields_are_ignored_and_missing_ones_defaulted(face: str) -> None:
    run = Run(face)
    run.advance(9)
    saved = run.state()
    for part in ("observer", "schedule", "counter", "policy"):
        changed(saved, (part, "of_a_newer_version"), {"a": [1]})
    changed(saved, ("of_a_newer_version",), 1)
    resumed = Run(face, seed=1)
    resumed.load(saved)
    assert resumed.advance(5) == run.advance(5)
    for part in ("observer", "schedule", "counter", "policy"):
        shortened = copy.deepcopy(saved)
        changed(shortened, (part,), {})
        fresh = Run(face, seed=1)
        fresh.load(shortened)
        fresh.advance(5)
        assert all(bool(t.isfinite().all()) for t in fresh.weights().values())


@every_face
def test_missing_tensors_are_made_anew(face: str) -> None:
    run = Run(face)
    run.advance(6)
    saved = run.state()
    if face == "CatapultSGD":
        for entries in saved["optimizer"]["state"].values():
            del entries["catapult_vector"], entries["catapult_average"]
    else:
        saved["controller"]["vector"] = saved["controller"]["average"] = None
    resumed = Run(face, seed=1)
    resumed.load(saved)
    with resumed.controller.averaged():
        assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), run.model.parameters(), strict=True))
    resumed.advance(3)
    assert resumed.controller.measured_steps >= run.controller.measured_steps


# ------------------------------------------------------------------------------------------------------------ versions


def tensors_of(value: Any) -> Any:
    """The fixture's JSON as it was before it was written."""
    if isinstance(value, list):
        return [tensors_of(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"])
    return {key: tensors_of(v) for key, v in value["dict"]}


@every_face
def test_states_of_0_1_0_still_load(face: str) -> None:
    former = FORMER[face]
    run = Run(face, seed=3)
    run.load({key: tensors_of(former[key]) for key in ("model", "optimizer", "controller")})
    assert run.controller.super_critical_steps == former["super_critical_steps"]
    assert run.controller.catapults == former["catapults"]
    saved = run.state()
    document = saved["controller"] or json.loads(saved["optimizer"]["param_groups"][0]["catapult_state"])
    assert document["version"] == 2
    assert document["observer"]["step"] == former["step"]
    assert document["buffers"].keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    rates = run.advance(5)
    assert all(0 < rate < 100 * former["rate"] for rate in rates)
    assert all(bool(t.isfinite().all()) for t in run.weights().values())


@every_face
def test_the_average_of_0_1_0_was_a_snapshot(face: str) -> None:
    former = FORMER[face]
    run = Run(face, seed=3)
    saved = {key: tensors_of(former[key]) for key in ("model", "optimizer", "controller")}
    if face == "CatapultSGD":
        expected = [entries["catapult_snapshot"] for entries in saved["optimizer"]["state"].values()]
    else:
        expected = saved["controller"]["snapshot"]
    run.load(saved)
    with run.controller.averaged():
        assert all(torch.equal(p, e) for p, e in zip(run.model.parameters(), expected, strict=True))


# ----------------------------------------------------------------------------------------------------- another order


@every_face
def test_parameters_in_another_order_are_put_in_order_by_their_names(face: str) -> None:
    run = Run(face)
    run.advance(9)
    saved = run.state()
    if face == "CatapultLR":  # torch's own optimizer goes by the position: it has no part in this
        saved["optimizer"]["state"] = {}
    turned = Run(face, seed=1, order=-1)
    turned.load(saved)
    with run.controller.averaged():
        expected = run.weights()
    with turned.controller.averaged():
        assert all(torch.equal(t, expected[name]) for name, t in turned.weights().items())
    if face == "CatapultSGD":
        for name, p in turned.model.named_parameters():
            twin = dict(run.model.named_parameters())[name]
            assert torch.equal(
                turned.optimizer.state[p]["momentum_buffer"], run.optimizer.state[twin]["momentum_buffer"]
            )
        assert turned.advance(6) == run.advance(6)


def test_parameters_that_moved_between_groups_are_refused() -> None:
    run = Run("CatapultSGD")
    a, b, c, d, e, f = run.model.parameters()

    def grouped(*groups: list[nn.Parameter]) -> CatapultSGD:
        run.controller.detach()
        found = CatapultSGD([{"params": g} for g in groups], model=run.model, criterion=run.criterion)
        run.optimizer = run.controller = found
        run.advance(2)
        return found

    saved = copy.deepcopy(grouped([a, b, c], [d, e, f]).state_dict())
    with pytest.raises(ValueError, match=r"state_dict: .*'1.bias' is not in the same group"):
        grouped([a, b, d], [c, e, f]).load_state_dict(saved)


def test_a_model_inside_another_one_goes_by_the_position() -> None:
    """As torch does: no name is to be found again."""
    run = Run("CatapultSGD")
    run.advance(5)
    outer = nn.Sequential(copy.deepcopy(run.model))
    optimizer = CatapultSGD(outer.parameters(), model=outer, criterion=nn.MSELoss(), momentum=0.5)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for p, q in zip(outer.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["catapult_average"], run.optimizer.state[q]["catapult_average"])


def test_settings_given_to_a_resumed_run_are_those_in_force() -> None:
    run = Run("CatapultSGD")
    run.advance(12)
    resumed = Run("CatapultSGD", seed=1, policy=CatapultPolicy(total_steps=13))
    resumed.load(run.state())
    assert resumed.advance(3)[-1] < run.advance(3)[-1]
