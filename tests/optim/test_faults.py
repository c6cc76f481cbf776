"""Promise: what goes wrong around a training (disk, data, memory, the user's own changes) is survived, or refused by a
clear error, and never spoils the weights in silence. For every face.

Killed trainings: ``test_kill.py``; wrong arguments: ``test_bad_input.py``; the log by itself: ``test_runlog.py``.
"""

from __future__ import annotations

import copy
import errno
import gc
import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import DRIVING, FACES, QUICK, Training, net

from catapult_opt import (
    CatapultPolicy,
    MeasurementError,
    MeasurementWarning,
    critical_lr,
    is_measuring,
    read_log,
)
from catapult_opt.report import render, summarize
from catapult_opt.runlog import RunLogWarning

NAN, INF = float("nan"), float("inf")


def make(face: str = "CatapultSGD", seed: int = 0, model: nn.Module | None = None, **settings: Any) -> Training:
    """A small net with BatchNorm and Dropout."""
    if model is None:
        model = net(5, 16, 1, activation=nn.ReLU, norm=True, dropout=0.1, seed=seed)
    return Training(face, model, **{**({"policy": QUICK} if face in DRIVING else {}), **settings})


FILE_IO = io.FileIO
every_face = pytest.mark.parametrize("face", FACES)
driving_face = pytest.mark.parametrize("face", DRIVING)


# ------------------------------------------------------------------------------------------------------------- the log


class FullDisk:
    """The log's file on a disk with room for so many bytes."""

    def __init__(self) -> None:
        self.room = 10**6

    def open(self, *args: Any, **kwargs: Any) -> FullDisk:
        self._file = FILE_IO(*args, **kwargs)
        return self

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@every_face
def test_disk_full_in_mid_training_is_one_warning_and_the_same_training(
    face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, disk = tmp_path / "run.jsonl", FullDisk()
    monkeypatch.setattr("catapult_opt.runlog.io.FileIO", disk.open)
    plain, full = make(face), make(face, log=log)
    torch.manual_seed(1)
    plain.steps(12)
    torch.manual_seed(1)
    full.steps(4)
    disk.room = 30
    with pytest.warns(RunLogWarning, match="No space left on device") as caught:
        full.steps(8)
    full.watch.log_metrics(val_loss=1.0)
    assert len([w for w in caught if issubclass(w.category, RunLogWarning)]) == 1
    assert torch.equal(plain.weights(), full.weights())
    read = read_log(log)
    assert read.column("step") == [1, 2, 3, 4]
    assert len(read.dropped) == 1 and "truncated record (30 bytes)" in read.dropped[0]


@every_face
def test_log_in_a_folder_that_cannot_be_written(face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("catapult_opt.runlog.io.FileIO", refuse)
    plain, other = make(face), make(face, log=tmp_path / "run.jsonl")
    torch.manual_seed(1)
    plain.step(), plain.step()
    torch.manual_seed(1)
    with pytest.warns(RunLogWarning, match=r"cannot be written \(Permission denied\).*goes on") as caught:
        other.step(), other.step()
    assert len(caught) == 1
    assert torch.equal(plain.weights(), other.weights())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_log_in_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    training = make(log=tmp_path / "run.jsonl")
    with pytest.warns(RunLogWarning, match="Permission denied"):
        training.step()
    training.step()


@every_face
def test_two_runs_do_not_write_one_log(face: str, tmp_path: Path) -> None:
    first, second = (make(face, log=tmp_path / "run.jsonl") for _ in range(2))
    first.step()
    before = second.weights()
    for _ in range(2):  # the second try is refused like the first
        with pytest.raises(
            (RuntimeError, FileExistsError), match=r"run\.jsonl (is being written by another run|holds)"
        ):
            second.step()
    assert torch.equal(second.weights(), before)
    first.step()
    assert read_log(tmp_path / "run.jsonl").column("step") == [1, 2]


@every_face
def test_metrics_of_before_the_first_step_are_in_the_log(face: str, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    training = make(face, log=log)
    training.watch.log_metrics(val_loss=4.0)
    assert not log.exists()
    training.step()
    training.watch.log_metrics(val_loss=3.0)
    assert read_log(log).metric("val_loss") == {0: 4.0, 1: 3.0}


def test_metrics_right_after_a_resume_are_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    old = make(log=log)
    old.step(), old.step()
    saved = copy.deepcopy(old.checkpoint())
    old.watch.detach()
    new = make(log=log, seed=1)
    new.load(saved)
    new.watch.log_metrics(val_loss=4.0)
    new.step()
    assert read_log(log).metric("val_loss") == {2: 4.0}
    assert read_log(log).column("step") == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- NaN and inf


def spoiled(training: Training, where: str, value: float) -> dict[str, Tensor]:
    x, y = training.x.clone(), training.y.clone()
    (x if where == "inputs" else y)[3, 0] = value
    return {"x": x, "y": y}


@driving_face
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_a_spoiled_batch_leaves_no_trace_in_weights_and_statistics(face: str, value: float, where: str) -> None:
    training = make(face)
    training.steps(7)
    training.step(**spoiled(training, where, value))
    assert training.finite(), "weights, and the running statistics of BatchNorm"
    losses = training.steps(60)
    assert training.finite()
    training.model.eval()
    assert training.criterion(training.model(training.x), training.y).isfinite()
    assert min(losses) < losses[0]


@driving_face
def test_statistics_of_batchnorm_come_back_with_the_average_also_after_a_resume(face: str) -> None:
    """Oracle: the run not interrupted. The average was begun before the checkpoint, the NaN comes after it."""
    whole, first = make(face), make(face)
    torch.manual_seed(1)
    whole.steps(4)
    torch.manual_seed(1)
    first.steps(4)
    resumed = make(face, seed=2)
    resumed.load(copy.deepcopy(first.checkpoint()))
    for training in (whole, resumed):
        torch.manual_seed(3)
        training.step(**spoiled(training, "inputs", NAN))
        training.step()
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@every_face
def test_a_spoiled_first_batch_is_refused(face: str) -> None:
    training = make(face)
    before = training.weights()
    training.backward(**spoiled(training, "targets", NAN))
    with pytest.raises(MeasurementError, match="first loss is nan: is there a NaN or inf in the batch"):
        training.optimizer.step()
    assert torch.equal(training.weights(), before)


def test_the_monitor_lets_a_spoiled_batch_through_as_it_is() -> None:
    """It changes nothing: a NaN goes into the weights as it does without it."""
    plain, watched = (make("CatapultMonitor") for _ in range(2))
    plain.watch.detach()
    for training in (plain, watched):
        torch.manual_seed(0)
        training.step()
        training.step(**spoiled(training, "targets", NAN))
    assert torch.equal(plain.weights().isnan(), watched.weights().isnan())
    assert watched.weights().isnan().any()


# ---------------------------------------------------------------------------------------- criteria without a curvature


@every_face
@pytest.mark.parametrize(
    ("criterion", "name", "advice"),
    [
        (nn.L1Loss(), "L1Loss", "HuberLoss"),
        (nn.functional.l1_loss, "l1_loss", "SmoothL1Loss"),
        (lambda out, y: -(out * y).mean(), "<lambda>", "criterion=None"),
        (nn.HuberLoss(delta=1e-6), "HuberLoss", "scale the targets to unit variance"),
    ],
    ids=["L1Loss", "l1_loss", "linear", "Huber far out"],
)
def test_a_criterion_without_curvature_is_named(face: str, criterion: Any, name: str, advice: str) -> None:
    training = make(face, criterion=criterion)
    before = training.weights()
    training.backward()
    with pytest.raises(MeasurementError, match=f"criterion {name} has no second derivative") as caught:
        training.optimizer.step()
    assert advice in str(caught.value)
    assert torch.equal(training.weights(), before)


def test_log_probabilities_hide_the_curvature_of_the_softmax() -> None:
    """The same loss, once with a rate and once without: the error says which to take."""
    torch.manual_seed(0)
    x, y, linear = torch.randn(6, 3), torch.arange(6) % 4, nn.Linear(3, 4)
    with pytest.raises(MeasurementError, match=r"NLLLoss.*return logits and use CrossEntropyLoss"):
        critical_lr(nn.Sequential(linear, nn.LogSoftmax(1)), nn.NLLLoss(), x, y)
    on_logits = critical_lr(linear, nn.CrossEntropyLoss(), x, y)
    whole = critical_lr(nn.Sequential(linear, nn.LogSoftmax(1)), nn.NLLLoss(), x, y, curvature="hessian")
    assert on_logits.lambda_max == pytest.approx(whole.lambda_max, rel=1e-3)  # of a linear model they are the same


@every_face
def test_a_dead_network_is_told_of_once_and_moves_little_until_it_lives(face: str) -> None:
    dead = net(5, 4, 1, activation=nn.ReLU)
    nn.init.constant_(dead[0].bias, -100.0)
    dead[2].bias.requires_grad_(False)  # it alone would have curvature
    training = make(face, model=dead, every=1, **({"policy": CatapultPolicy()} if face in DRIVING else {}))
    before = training.weights()
    with pytest.warns(MeasurementWarning, match=r"no positive curvature.*dead") as told:
        training.steps(4)
    assert sum(issubclass(w.category, MeasurementWarning) for w in told) == 1
    assert training.watch.measured_steps == 0
    assert torch.equal(training.weights(), before), "no gradient"
    small = training.rates() if face in DRIVING else []
    assert all(0 < rate < 0.01 for rate in small)
    with torch.no_grad():
        dead[0].bias.zero_()
    loss = training.steps(20)[0]
    assert training.watch.measured_steps == 20
    assert training.loss().item() < loss
    assert all(now > 10 * then for now, then in zip(training.rates() if small else [], small, strict=True))


# ------------------------------------------------------------------------------------------------ failed measurements


class Fuse(nn.Module):
    """Fails while measuring, once it is lit."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.lit = error, False

    def forward(self, x: Tensor) -> Tensor:
        if self.lit and is_measuring():
            raise self.error
        return x


@every_face
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("user's")], ids=["oom", "user"]
)
def test_a_measurement_that_fails_costs_nothing_but_itself(face: str, error: Exception, tmp_path: Path) -> None:
    log, fuse = tmp_path / "run.jsonl", Fuse(error)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), fuse, nn.Linear(16, 1))
    training = make(face, model=model, log=log, every=1)
    training.steps(3)
    fuse.lit = True
    known, before = training.watch.last, training.weights()
    buffers = copy.deepcopy(list(model.buffers()))
    training.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        model(training.x)  # a measurement must leave the statistics as this pass does
    with pytest.warns(MeasurementWarning, match="step 4 could not be measured, the last critical rate is kept"):
        training.optimizer.step()
    assert training.watch.last is known
    assert not torch.equal(training.weights(), before), "the step was made"
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    assert not all(map(torch.equal, buffers, model.buffers()))
    assert not is_measuring()
    fuse.lit = False
    training.step()
    training.watch.detach()
    read = read_log(log)
    assert [s["step"] for s in read.measured] == [1, 2, 3, 5]
    assert [(e["step"], e["event"]) for e in read.events if e["event"] == "measurement_failed"] == [
        (4, "measurement_failed")
    ]
    assert summarize(read).failed_measurements == 1
    console = _console()
    render([summarize(read)], [read], console)
    assert "1 measurement failed" in console.file.getvalue()  # type: ignore[attr-defined]


def _console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=200)


@every_face
def test_a_training_whose_measurements_all_fail_but_the_first_goes_on(face: str) -> None:
    fuse = Fuse(RuntimeError("never again"))
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), fuse, nn.Linear(16, 1))
    training = make(face, model=model)
    first = training.step()
    fuse.lit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = training.steps(150)
    assert training.finite()
    assert min(losses) < first


# ------------------------------------------------------------------------------------------------------ the user's code


@every_face
def test_a_parameter_that_was_replaced_is_named_instead_of_training_the_old_one(face: str) -> None:
    training = make(face, every=1)
    training.step()
    training.model[4] = nn.Linear(16, 1)
    before = training.weights()
    training.backward()
    with pytest.raises(RuntimeError, match=r"shape \(1, 16\) is not a parameter of model.*make the optimizer anew"):
        training.optimizer.step()
    assert torch.equal(training.weights(), before)


@every_face
def test_values_put_into_the_parameters_are_trained_from_there(face: str) -> None:
    """An average of weights swapped in for validation and out again; weights loaded from elsewhere."""
    plain, swapping = make(face, every=1), make(face, every=1)
    for training in (plain, swapping):
        torch.manual_seed(0)
        for _ in range(6):
            training.step()
            if training is swapping:
                mine = [p.data for p in training.model.parameters()]
                for p in training.model.parameters():
                    p.data = torch.zeros_like(p)
                with torch.no_grad():
                    training.model.eval()(training.x)
                for p, data in zip(training.model.train().parameters(), mine, strict=True):
                    p.data = data
    assert torch.equal(plain.weights(), swapping.weights())
    swapping.model.load_state_dict(make(seed=5).model.state_dict())
    swapping.steps(10)
    assert swapping.finite()


@every_face
def test_eval_between_forward_and_step_does_not_change_what_is_measured(face: str) -> None:
    """The batch is measured in the mode of its forward pass; the mode of the model afterwards is the user's."""
    straight, between = make(face, every=1), make(face, every=1)
    for training in (straight, between):
        torch.manual_seed(0)
        for _ in range(5):
            training.model.train()
            training.backward()
            if training is between:
                training.model.eval()
            training.optimizer.step()
            assert training.model.training == (training is straight)
    assert torch.equal(straight.weights(), between.weights())
    assert straight.watch.last == between.watch.last


@every_face
def test_a_model_inside_another_one(face: str) -> None:
    """The loop calls the outer model; what is trained and passed as model= is the inner one."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    straight, nested = make(face, every=1), make(face, every=1)
    inner, outer = nested.model, Outer(nested.model)
    for training in (straight, nested):
        torch.manual_seed(0)
        for _ in range(6):
            training.model = outer if training is nested else training.model
            training.step()
    nested.model = inner
    assert torch.equal(straight.weights(), nested.weights())
    assert straight.watch.last == nested.watch.last


@pytest.mark.parametrize("face", FACES[1:])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_controlled_optimizer_are_the_optimizer_alone(face: str, way: str) -> None:
    """Model and optimizer copied together train on at the optimizer's own lr, and leave the original alone."""
    training = make(face)
    training.steps(3)
    pair = (training.model, training.optimizer)
    model, optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before, counts = training.weights(), training.watch.measured_steps
    nn.MSELoss()(model(training.x), training.y).backward()
    optimizer.step()
    assert torch.equal(training.weights(), before)
    assert training.watch.measured_steps == counts
    assert optimizer.param_groups[0]["lr"] == 0.01
    training.step()


@pytest.mark.parametrize("face", FACES[1:])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_copies_of_a_controller_are_refused(face: str, way: Callable[[Any], Any]) -> None:
    """Its hooks are on one optimizer and one model: a copy would watch nothing."""
    training = make(face)
    training.step()
    with pytest.raises(TypeError, match=f"{face} cannot be copied or pickled.*make another {face}"):
        way(training.watch)
    training.step()


@every_face
def test_another_dtype_after_construction_and_in_mid_training(face: str) -> None:
    training = make(face, every=1)
    training.model.double()
    training.batches = [(training.x.double(), training.y.double())]
    training.steps(5)
    truth = training.watch.last.lambda_max
    assert truth > 0
    if face != "CatapultLR":  # torch's own Adam mixes dtypes no better: its averages stay in the old one
        training.model.float()
        training.optimizer.load_state_dict(training.optimizer.state_dict())  # as torch asks: casts its state
        training.batches = [(training.x.float(), training.y.float())]
        training.steps(30)
    assert training.finite()


# ------------------------------------------------------------------------------------------------------------- threads


@every_face
def test_trainings_in_threads_do_not_disturb_each_other(face: str) -> None:
    """Each with a model of its own (no dropout: torch's random state is the process' own)."""

    alone, together = (
        [make(face, model=net(5, 16, 1, norm=True, seed=seed), every=1) for seed in range(3)] for _ in range(2)
    )
    for training in [*alone, *together]:
        torch.manual_seed(0)
        training.step()  # the random start of the first measurement
    for training in alone:
        training.steps(25)
    errors: list[BaseException] = []

    def work(training: Training) -> None:
        try:
            training.steps(25)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(training,)) for training in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.weights(), other.weights())
        assert one.watch.super_critical_steps == other.watch.super_critical_steps


# ---------------------------------------------------------------------------------------------------- hooks and memory


@every_face
@pytest.mark.parametrize("how", ["detach", "dies"])
def test_hooks_go_with_the_optimizer(face: str, how: str) -> None:
    training = make(face)
    training.steps(2)
    assert training.hooks() > 0
    if how == "detach":
        training.watch.detach()
    else:
        training.watch = training.optimizer = None
        gc.collect()
    assert training.hooks() == 0
    training.loss().backward()


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leak(face: str, steps: int, tmp_path: Path, warm: int = 200) -> tuple[int, int]:
    """Live tensors and resident bytes gained over so many steps, measured on each one, with a log."""
    training = make(face, every=1, log=tmp_path / "run.jsonl")
    training.steps(warm)
    tensors, memory = live_tensors(), resident_bytes()
    for i in range(steps):
        training.step()
        if i % 50 == 0:
            training.watch.log_metrics(val_loss=1.0)
            training.optimizer.state_dict()
    return live_tensors() - tensors, resident_bytes() - memory


@every_face
def test_a_hundred_steps_leave_no_tensor_behind(face: str, tmp_path: Path) -> None:
    assert leak(face, 100, tmp_path, warm=30)[0] <= 5


@pytest.mark.slow
@every_face
def test_ten_thousand_steps_leak_no_memory(face: str, tmp_path: Path) -> None:
    tensors, memory = leak(face, 10_000, tmp_path)
    print(f"{face}: {tensors} tensors, {memory / 1e6:.1f} MB after 10,000 measured steps")
    assert tensors <= 5
    assert memory < 8e6


# --------------------------------------------------------------------------------------------- checkpoints of others


def test_a_checkpoint_of_torch_sgd_is_refused_instead_of_scaling_the_rate() -> None:
    training = make()
    training.step()
    other = torch.optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9)
    before = pickle.dumps(training.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: not of a CatapultSGD with a model; its lr=0\.1 is a rate"):
        training.optimizer.load_state_dict(other.state_dict())
    assert pickle.dumps(training.optimizer.state_dict()) == before
    training.step()


def test_a_checkpoint_of_the_optimizer_alone_under_catapult_lr() -> None:
    """Its lr sets no scale there: it may be loaded, and the controller goes on with its own rate."""
    rates = []
    for lr in (0.01, 0.5):
        training = make("CatapultLR", model=net(5, 16, 1))
        training.step()
        training.optimizer.load_state_dict(torch.optim.Adam(training.model.parameters(), lr=lr).state_dict())
        training.step()
        rates += training.rates()
    assert rates[0] == rates[1] > 0


def test_a_group_added_under_catapult_lr() -> None:
    model = net(5, 16, 1)
    training = Training("CatapultLR", model, params=model[0].parameters(), base=lambda params: SGD(params, lr=0.1))
    training.step()
    training.optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.05})
    training.step()
    first, second = training.rates()
    assert second == pytest.approx(first / 2)
