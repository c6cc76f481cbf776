"""Promise: a run that is interrupted anywhere and continued from its checkpoint is, to the bit, the run it would have
been. Oracle: a second run, uninterrupted.

``test_resume_*`` by every way a checkpoint can take, in every phase of the policy; ``test_copies_*`` what a copy of a
hooked model or optimizer is; ``test_initialisation_*`` the step that torch.distributed.checkpoint takes on its own.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel
from training import QUICK, Training, net, product

from catapult_opt import CatapultPolicy, CatapultSGD, critical_lr, read_log

STEPS = 44
POLICY = replace(QUICK, total_steps=STEPS, cooldown=0.2)
# Every small rise is a spike.
WARY = CatapultPolicy(start=0.5, climb=0.5, creep=0.2, hold=1, rise=0.05, total_steps=STEPS)
# Hardly any height is allowed, so that spikes are undone.
UNDOING = replace(WARY, creep=0.5, height=1e-3)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full-batch": {"policy": POLICY},
    "restoring": {"policy": UNDOING},
    "momentum": {
        "policy": replace(WARY, start=1.0, near=1.0, creep=0.3),
        "every": 2,
        "momentum": 0.9,
        "weight_decay": 1e-3,
    },
    "every-3": {"policy": POLICY, "every": 3},
    "mini-batch": {"policy": replace(WARY, creep=0.5), "batches": 4, "momentum": 0.5, "nesterov": True},
    "two-groups": {"policy": POLICY, "groups": True},
}
every_configuration = pytest.mark.parametrize("name", list(CONFIGURATIONS))
some_configurations = pytest.mark.parametrize("name", ["restoring", "momentum", "every-3", "mini-batch"])


class Run(Training):
    """A training of one configuration, the same every time but for the weights."""

    def __init__(self, name: str, seed: int = 0, **more: Any) -> None:
        self.name, settings = name, {**CONFIGURATIONS[name], **more}
        count, groups = settings.pop("batches", 1), settings.pop("groups", False)
        model, (x, y) = net(6, 24, 1, activation=nn.ReLU, seed=seed), product()
        params: Any = list(model.parameters())
        if groups:
            params = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
        self.whole, self.settings = (x, y), settings
        batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
        super().__init__("CatapultSGD", model, batches, params=params, **settings)

    def advance(self, steps: int = 1) -> list[Any]:
        return [(self.step(), *self.seen()) for _ in range(steps)]

    def seen(self) -> tuple[Any, ...]:
        """All of a run that a user can see, and all that the next step depends on."""
        optimizer = self.optimizer
        weights = [p.detach().numpy().tobytes() for p in self.model.parameters()]
        state = [
            sorted((k, v.numpy().tobytes()) for k, v in optimizer.state[p].items()) for p in self.model.parameters()
        ]
        counts = (optimizer.catapults, optimizer.super_critical_steps)
        return self.rates(), optimizer.phase, counts, weights, state


_uninterrupted: dict[str, list[Any]] = {}


def uninterrupted(name: str) -> list[Any]:
    if name not in _uninterrupted:
        _uninterrupted[name] = Run(name).advance(STEPS)
    return _uninterrupted[name]


# ------------------------------------------------------------------------------------------- the ways of a checkpoint


def through_torch_save(old: Run) -> Run:
    """The usual: torch.save, a new process with other weights, torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(old.checkpoint(), file)
    file.seek(0)
    new = fresh(old)
    new.load(torch.load(file, weights_only=True))
    return new


def through_older_self(old: Run) -> Run:
    """Loading into the very run that is already some steps further."""
    saved, done = copy.deepcopy(old.checkpoint()), old.done
    old.advance(2)
    old.load(saved)
    old.done = done
    return old


def through_a_batch_seen_before_loading(old: Run) -> Run:
    """The new run has made forward passes and steps of its own before the checkpoint is loaded."""
    new = fresh(old)
    new.advance(3)
    new.loss(*new.whole).backward()
    new.load(copy.deepcopy(old.checkpoint()))
    new.done = old.done
    return new


def through_deepcopy(old: Run) -> Run:
    """Model and optimizer copied together, then attached."""
    return attached(old, *copy.deepcopy((old.model, old.optimizer)))


def through_pickle(old: Run) -> Run:
    return attached(old, *pickle.loads(pickle.dumps((old.model, old.optimizer))))


def through_detach(old: Run) -> Run:
    old.optimizer.detach()
    return attached(old, old.model, old.optimizer)


def through_distributed_checkpoint(old: Run, tmp_path: Path, flat: bool = False) -> Run:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save({"model": old.model.state_dict(), "optimizer": optimizer_state(old, options)}, checkpoint_id=tmp_path)
    new = fresh(old)
    saved = {"model": new.model.state_dict(), "optimizer": optimizer_state(new, options)}
    dcp.load(saved, checkpoint_id=tmp_path)
    new.model.load_state_dict(saved["model"])
    set_optimizer_state_dict(new.model, new.optimizer, saved["optimizer"], options=options)
    return new


def optimizer_state(run: Run, options: StateDictOptions) -> dict[str, Any]:
    return get_optimizer_state_dict(run.model, run.optimizer, options=options)


def fresh(old: Run) -> Run:
    new = Run(old.name, seed=1)
    new.done = old.done
    return new


def attached(old: Run, model: nn.Module, optimizer: CatapultSGD) -> Run:
    new = fresh(old)
    new.optimizer.detach()
    new.model, new.optimizer, new.watch = model, optimizer, optimizer
    arguments = {k: v for k, v in new.settings.items() if k in ("policy", "every")}
    optimizer.attach(model=model, criterion=new.criterion, **arguments)
    return new


WAYS: dict[str, Callable[[Run], Run]] = {
    "torch.save": through_torch_save,
    "older self": through_older_self,
    "after other steps": through_a_batch_seen_before_loading,
    "deepcopy": through_deepcopy,
    "pickle": through_pickle,
    "detach and attach": through_detach,
}


# -------------------------------------------------------------------------------------------------------------- resume


def assert_continues(run: Run, steps: int) -> None:
    """The next steps are those of the uninterrupted run, in all that is to be seen and all that later steps need."""
    assert run.advance(steps) == uninterrupted(run.name)[run.done - steps : run.done]


def assert_resumes(name: str, after: int, way: Callable[[Run], Run], steps: int = 6) -> None:
    run = Run(name)
    run.advance(after)
    seen = run.seen()
    run = way(run)
    assert run.seen()[3:] == seen[3:], "the checkpoint holds weights and state"
    assert_continues(run, min(steps, STEPS - after))


@every_configuration
def test_the_runs_pass_through_every_phase(name: str) -> None:
    """Of the tests below: they prove little otherwise."""
    phases = {step[2] for step in uninterrupted(name)}
    assert phases >= ({"calm", "back"} if name == "restoring" else {"calm", "spike", "back"})
    assert uninterrupted(name)[-1][3][1] > 0, "super-critical steps"
    if name == "restoring":
        weights = [step[4] for step in uninterrupted(name)]
        assert any(later == earlier for i, later in enumerate(weights) for earlier in weights[:i]), "weights came back"


@every_configuration
def test_resume_after_every_step(name: str) -> None:
    run = Run(name)
    for _ in range(1, STEPS):
        run.advance()
        assert_continues(through_torch_save(run), min(3, STEPS - run.done))


@every_configuration
def test_resume_again_and_again(name: str) -> None:
    """A run that never makes more than two steps in one process."""
    run = Run(name)
    while run.done < STEPS:
        assert_continues(run, 2)
        run = through_torch_save(run)


def one_step_of_each_phase(name: str) -> list[int]:
    phases = [step[2] for step in uninterrupted(name)]
    return sorted({1, *(phases.index(phase) + 2 for phase in set(phases))} & set(range(1, STEPS)))


@some_configurations
@pytest.mark.parametrize("way", list(WAYS))
def test_resume_by_every_way_in_every_phase(name: str, way: str) -> None:
    for after in one_step_of_each_phase(name):
        assert_resumes(name, after, WAYS[way])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
@pytest.mark.parametrize("flat", [False, True])
@some_configurations
def test_resume_through_distributed_checkpoint(name: str, flat: bool, tmp_path: Path) -> None:
    for after in one_step_of_each_phase(name):
        way = partial(through_distributed_checkpoint, tmp_path=tmp_path / str(after), flat=flat)
        assert_resumes(name, after, way)


@some_configurations
def test_asking_for_the_state_changes_nothing_of_the_run(name: str) -> None:
    """It is written when somebody asks: a run asked at every step, in three ways, is the one never asked."""
    run = Run(name)
    for i, expected in enumerate(uninterrupted(name)):
        ways = (run.optimizer.state_dict, partial(copy.deepcopy, run.optimizer), partial(pickle.dumps, run.optimizer))
        ways[i % 3]()
        assert run.optimizer.param_groups[0]["catapult_state"]
        assert run.advance() == [expected]


def test_resume_before_the_first_step() -> None:
    for way in WAYS.values():
        if way is not through_older_self:
            assert_resumes("full-batch", 0, way)


def test_resume_in_half_precision_keeps_the_controller() -> None:
    """load_state_dict casts tensors to the parameter's dtype: nothing of the controller may lose digits by it."""
    run = Run("full-batch")
    while run.optimizer.super_critical_steps == 0:
        run.advance()
    saved = run.optimizer.state_dict()
    new = fresh(run)
    new.model.bfloat16()
    new.optimizer.load_state_dict(saved)
    for group, expected in zip(new.optimizer.param_groups, run.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
    assert new.optimizer.phase == run.optimizer.phase
    assert new.optimizer.super_critical_steps == run.optimizer.super_critical_steps


def test_the_state_is_plain() -> None:
    """What every kind of checkpoint can hold: tensors shaped like the parameter, and plain values in the groups."""
    run = Run("momentum")
    run.advance(5)
    state = run.optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for p, entries in zip(run.model.parameters(), state["state"].values(), strict=True):
        assert all(isinstance(v, Tensor) and v.shape == p.shape and not v.requires_grad for v in entries.values())
    for group in state["param_groups"]:
        assert all(isinstance(v, (int, float, str, bool, type(None))) for k, v in group.items() if k != "params")


def test_phase_and_counts_are_there_before_the_first_step_after_loading() -> None:
    run = Run("full-batch")
    while run.optimizer.super_critical_steps == 0:
        run.advance()
    for way in (through_torch_save, through_pickle):
        new = way(run)
        got = new.optimizer
        assert (got.phase, got.catapults, got.super_critical_steps) == run.seen()[1:2] + run.seen()[2]


@pytest.mark.parametrize("after", [0, 1, 8, 9])
@pytest.mark.parametrize("process", ["new", "same"])
def test_log_after_a_resume(after: int, process: str, tmp_path: Path) -> None:
    """One log: the header once, and every step once, as if never interrupted."""
    paths = [tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"]
    Run("full-batch", log=paths[0]).advance(20)
    run = Run("full-batch", log=paths[1])
    run.advance(after)
    saved = copy.deepcopy(run.checkpoint())
    run.advance(3)  # lost: the checkpoint is older than the crash
    if process == "new":
        run.optimizer.detach()
        if after == 0:
            return  # a run from the start is another run, see the next test
        run = Run("full-batch", seed=1, log=paths[1])
    run.load(saved)
    run.advance(20 - after)
    whole, resumed = (read_log(path) for path in paths)
    for column in ("step", "loss", "effective_lr", "eta_crit", "lambda_max", "super_critical", "phase"):
        assert resumed.column(column) == whole.column(column)
    assert resumed.column("step") == list(range(1, 21))
    assert sum('"header"' in line for line in paths[1].read_text().splitlines()) == 1
    assert [(e["step"], e["event"]) for e in resumed.events] == [(e["step"], e["event"]) for e in whole.events]
    assert all("superseded" in line for line in resumed.dropped)


def test_log_of_a_resumed_run_in_a_file_of_its_own(tmp_path: Path) -> None:
    run = Run("full-batch", log=tmp_path / "first.jsonl")
    run.advance(8)  # step 9 is not measured
    new = Run("full-batch", seed=1, log=tmp_path / "second.jsonl")
    new.load(copy.deepcopy(run.checkpoint()))
    new.advance(4)
    first, second = (read_log(tmp_path / f"{name}.jsonl") for name in ("first", "second"))
    assert second.column("step") == [9, 10, 11, 12]
    assert second.header["batch_size"] == first.header["batch_size"] == 40
    assert second.header["parameters"] == first.header["parameters"]


def test_printed_as_torch_prints_settings_without_the_state() -> None:
    run = Run("full-batch")
    run.advance(2)
    group = run.optimizer.param_groups[0]
    printed = [line.split(":")[0].strip() for line in repr(run.optimizer).splitlines()]
    settings = sorted(k for k in group if k not in ("params", "catapult_state"))
    assert {"catapult_state"} <= group.keys()
    assert printed == ["CatapultSGD (", "Parameter Group 0", *settings, ")"]


def test_a_second_run_does_not_write_into_the_log_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run = Run("full-batch", log=path)
    run.advance(3)
    run.optimizer.detach()
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"run\.jsonl holds a run already"):
        Run("full-batch", log=path).advance(1)
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- copies


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", list(COPIES))
def test_copies_of_a_hooked_model_are_inert(kind: str) -> None:
    """Their forward passes are not taken for the loop's, before, between and after the loop's own."""
    run = Run("full-batch")
    expected = uninterrupted("full-batch")
    got = []
    for _ in range(12):
        twin = COPIES[kind](run.model)
        wrong = run.criterion(twin(run.x * 3), run.y)
        got += run.advance()
        wrong.backward()
        run.criterion(twin(run.x * 2), run.y).detach()
    assert got == expected[:12]


def test_copies_of_a_model_outlive_the_optimizer() -> None:
    run = Run("full-batch")
    run.advance(2)
    twin = copy.deepcopy(run.model)
    model, x = run.model, run.x
    del run
    gc.collect()
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("steps", [0, 3])
def test_copies_of_the_optimizer_refuse_to_step_until_attached(steps: int) -> None:
    """A copy that trained on silently, at lr = 1, would be worse than one that stops."""
    run = Run("full-batch")
    run.advance(steps)
    for twin in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        before = pickle.dumps(twin.state_dict())
        for p in twin.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"attach\(model="):
            twin.step()
        assert pickle.dumps(twin.state_dict()) == before
    run.optimizer.detach()
    with pytest.raises(RuntimeError, match=r"attach\(model="):
        run.optimizer.step()


def test_copies_of_the_optimizer_do_not_disturb_the_original() -> None:
    run = Run("restoring")
    got = []
    for _ in range(20):
        copy.deepcopy(run.optimizer)
        run.optimizer.state_dict()
        got += run.advance()
    assert got == uninterrupted("restoring")[:20]


def test_two_optimizers_on_one_model() -> None:
    """A GAN's or an ensemble's: each trains its half, and measures and counts for itself.

    Oracle: the critical rate of each half alone.
    """

    class Pair(nn.Module):
        def __init__(self, a: nn.Module, b: nn.Module) -> None:
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    runs = Run("full-batch"), Run("full-batch", seed=3)
    pair = Pair(runs[0].model, runs[1].model)
    for run in runs:
        run.optimizer.detach()
        run.optimizer = CatapultSGD(run.model.parameters(), model=pair, criterion=run.criterion, policy=POLICY, every=1)
    for _ in range(20):
        truths = [critical_lr(run.model, nn.MSELoss(), run.x, run.y).eta_crit for run in runs]
        outputs = pair(runs[0].x)
        for run in runs:
            run.optimizer.zero_grad()
        sum(run.criterion(o, run.y) for run, o in zip(runs, outputs, strict=True)).backward()
        for run in runs:
            run.optimizer.step()
        for run, truth in zip(runs, truths, strict=True):
            assert run.optimizer.last.eta_crit == pytest.approx(truth, rel=0.15)  # the solver stops at a tenth
    assert runs[0].optimizer.param_groups[0]["effective_lr"] != runs[1].optimizer.param_groups[0]["effective_lr"]


# ------------------------------------------------------------------------------------------------------ initialisation


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seen_a_forward", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_initialisation_moves_measures_logs_and_counts_nothing(
    seen_a_forward: bool, momentum: float, tmp_path: Path
) -> None:
    """torch.distributed.checkpoint steps with zero gradients at lr = 0 to see which state there will be."""
    path = tmp_path / "run.jsonl"
    run = Run("full-batch", momentum=momentum, log=path)
    if seen_a_forward:  # of a smoke test of the model, say
        run.model(run.x)
    before = copy.deepcopy(run.model.state_dict())
    forwards = []
    run.model.register_forward_hook(lambda *_: forwards.append(1))
    state = get_optimizer_state_dict(run.model, run.optimizer)
    assert_equal(run.model.state_dict(), before)
    assert all(p.grad is None for p in run.model.parameters())
    assert forwards == []
    assert not path.exists()
    optimizer = run.optimizer
    assert (optimizer.phase, optimizer.catapults, optimizer.super_critical_steps) == ("calm", 0, 0)
    assert optimizer.last is None
    assert {name for entries in state["state"].values() for name in entries} == {
        "catapult_vector", "catapult_average", *(["momentum_buffer"] if momentum else []),
    }  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 1.0
    if momentum == 0.0:  # torch.optim.SGD's own momentum buffer would start from the zero gradient, too
        assert_continues(run, 14)
        assert json.loads(path.read_text().splitlines()[1])["step"] == 1


def test_initialisation_in_the_middle_of_a_run_changes_nothing() -> None:
    run = Run("restoring")
    got = run.advance(7)
    get_optimizer_state_dict(run.model, run.optimizer)
    got += run.advance(STEPS - 7)
    assert got == uninterrupted("restoring")
