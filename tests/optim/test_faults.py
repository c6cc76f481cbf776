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

from catapult_opt import (
    CatapultLR,
    CatapultMonitor,
    CatapultPolicy,
    CatapultSGD,
    MeasurementError,
    MeasurementWarning,
    critical_lr,
    is_measuring,
    read_log,
)
from catapult_opt.report import render, summarize
from catapult_opt.runlog import RunLogWarning

NAN, INF = float("nan"), float("inf")
POLICY = CatapultPolicy(arm_steps=5, hot_steps=3, patience=12)


class Training:
    """A small net with BatchNorm and Dropout under one of the faces."""

    def __init__(
        self, face: str = "CatapultSGD", seed: int = 0, model: nn.Module | None = None, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        norm = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1)]
        self.model = nn.Sequential(*norm) if model is None else model
        self.criterion: Any = nn.MSELoss()
        self.x, self.y = torch.randn(20, 5), torch.randn(20, 1)
        settings = {"model": self.model, "criterion": self.criterion, **settings}
        self.optimizer: torch.optim.Optimizer
        self.controller: Any
        if face == "CatapultSGD":
            settings.setdefault("policy", POLICY)
            self.optimizer = self.controller = CatapultSGD(self.model.parameters(), **settings)
        elif face == "CatapultLR":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
            settings.setdefault("policy", POLICY)
            self.controller = CatapultLR(self.optimizer, **settings)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.5)
            self.controller = CatapultMonitor(self.optimizer, **settings)

    def backward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(self.model(self.x if x is None else x), self.y if y is None else y)
        loss.backward()
        return loss.detach()

    def step(self, x: Tensor | None = None, y: Tensor | None = None) -> float:
        loss = self.backward(x, y)
        self.optimizer.step()
        return float(loss)

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    @property
    def healthy(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.model.state_dict().values())


FACES = ("CatapultSGD", "CatapultLR", "CatapultMonitor")
every_face = pytest.mark.parametrize("face", FACES)
driving_face = pytest.mark.parametrize("face", FACES[:2])


# ------------------------------------------------------------------------------------------------------------- the log


class FullDisk:
    """The log's file on a disk that fills up after so many bytes."""

    def __init__(self, file: io.FileIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if self._room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(data[: self._room])
        self._room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@every_face
def test_disk_full_in_mid_training_is_one_warning_and_the_same_training(face: str, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    plain, full = Training(face), Training(face, log=log)
    torch.manual_seed(1)
    for _ in range(12):
        plain.step()
    torch.manual_seed(1)
    for _ in range(4):
        full.step()
    writer = full.controller._session._writer
    writer._file = FullDisk(writer._file, 30)
    with pytest.warns(RunLogWarning, match="No space left on device") as caught:
        full.steps(8)
    full.controller.log_metrics(val_loss=1.0)
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
    plain, other = Training(face), Training(face, log=tmp_path / "run.jsonl")
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
    training = Training(log=tmp_path / "run.jsonl")
    with pytest.warns(RunLogWarning, match="Permission denied"):
        training.step()
    training.step()


@every_face
def test_two_runs_do_not_write_one_log(face: str, tmp_path: Path) -> None:
    first, second = (Training(face, log=tmp_path / "run.jsonl") for _ in range(2))
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
    training = Training(face, log=log)
    training.controller.log_metrics(val_loss=4.0)
    assert not log.exists()
    training.step()
    training.controller.log_metrics(val_loss=3.0)
    assert read_log(log).metric("val_loss") == {0: 4.0, 1: 3.0}


def test_metrics_right_after_a_resume_are_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    old = Training(log=log)
    old.step(), old.step()
    saved = copy.deepcopy((old.model.state_dict(), old.optimizer.state_dict()))
    old.controller.detach()
    new = Training(log=log, seed=1)
    new.model.load_state_dict(saved[0])
    new.optimizer.load_state_dict(saved[1])
    new.controller.log_metrics(val_loss=4.0)
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
    training = Training(face)
    for _ in range(7):
        training.step()
    training.step(**spoiled(training, where, value))
    assert training.healthy, "weights, and the running statistics of BatchNorm"
    losses = [training.step() for _ in range(60)]
    assert training.healthy
    training.model.eval()
    assert training.criterion(training.model(training.x), training.y).isfinite()
    assert min(losses) < losses[0]


@driving_face
def test_statistics_of_batchnorm_come_back_with_the_snapshot_also_after_a_resume(face: str) -> None:
    """Oracle: the run not interrupted. The snapshot was taken before the checkpoint, the NaN comes after it."""
    whole, first = Training(face), Training(face)
    torch.manual_seed(1)
    for _ in range(4):
        whole.step()
    torch.manual_seed(1)
    for _ in range(4):
        first.step()
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    resumed = Training(face, seed=2)
    resumed.x, resumed.y = first.x, first.y
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    if face == "CatapultLR":
        resumed.controller.load_state_dict(copy.deepcopy(first.controller.state_dict()))
    for training in (whole, resumed):
        torch.manual_seed(3)
        training.step(**spoiled(training, "inputs", NAN))
        training.step()
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@every_face
def test_a_spoiled_first_batch_is_refused(face: str) -> None:
    training = Training(face)
    before = training.weights()
    training.backward(**spoiled(training, "targets", NAN))
    with pytest.raises(MeasurementError, match="first loss is nan: is there a NaN or inf in the batch"):
        training.optimizer.step()
    assert torch.equal(training.weights(), before)


def test_the_monitor_lets_a_spoiled_batch_through_as_it_is() -> None:
    """It changes nothing: a NaN goes into the weights as it does without it."""
    plain, watched = (Training("CatapultMonitor") for _ in range(2))
    plain.controller.detach()
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
    training = Training(face, criterion=criterion)
    training.criterion = training.controller.criterion
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
def test_a_dead_network_is_refused_at_the_first_step(face: str) -> None:
    dead = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.constant_(dead[0].bias, -100.0)
    training = Training(face, model=dead)
    training.backward()
    with pytest.raises(MeasurementError, match=r"no curvature.*dead"):
        training.optimizer.step()


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
    training = Training(face, model=model, log=log, every=1)
    for _ in range(3):
        training.step()
    fuse.lit = True
    known, before = training.controller.last, training.weights()
    buffers = copy.deepcopy(list(model.buffers()))
    training.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        model(training.x)  # a measurement must leave the statistics as this pass does
    with pytest.warns(MeasurementWarning, match="step 4 could not be measured, the last critical rate is kept"):
        training.optimizer.step()
    assert training.controller.last is known
    assert not torch.equal(training.weights(), before), "the step was made"
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    assert not all(map(torch.equal, buffers, model.buffers()))
    assert not is_measuring()
    fuse.lit = False
    training.step()
    training.controller.detach()
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
    training = Training(face, model=model)
    first = training.step()
    fuse.lit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [training.step() for _ in range(150)]
    assert training.healthy
    assert min(losses) < first


# ------------------------------------------------------------------------------------------------------ the user's code


@every_face
def test_a_parameter_that_was_replaced_is_named_instead_of_training_the_old_one(face: str) -> None:
    training = Training(face, every=1)
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
    plain, swapping = Training(face, every=1), Training(face, every=1)
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
    swapping.model.load_state_dict(Training(seed=5).model.state_dict())
    for _ in range(10):
        swapping.step()
    assert swapping.healthy


@every_face
def test_eval_between_forward_and_step_does_not_change_what_is_measured(face: str) -> None:
    """The batch is measured in the mode of its forward pass; the mode of the model afterwards is the user's."""
    straight, between = Training(face, every=1), Training(face, every=1)
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
    assert straight.controller.last == between.controller.last


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

    straight, nested = Training(face, every=1), Training(face, every=1)
    inner, outer = nested.model, Outer(nested.model)
    for training in (straight, nested):
        torch.manual_seed(0)
        for _ in range(6):
            training.model = outer if training is nested else training.model
            training.step()
    nested.model = inner
    assert torch.equal(straight.weights(), nested.weights())
    assert straight.controller.last == nested.controller.last


@pytest.mark.parametrize("face", FACES[1:])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_controlled_optimizer_are_the_optimizer_alone(face: str, way: str) -> None:
    """Model and optimizer copied together train on at the optimizer's own lr, and leave the original alone."""
    training = Training(face)
    for _ in range(3):
        training.step()
    pair = (training.model, training.optimizer)
    model, optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before, counts = training.weights(), training.controller.measured_steps
    nn.MSELoss()(model(training.x), training.y).backward()
    optimizer.step()
    assert torch.equal(training.weights(), before)
    assert training.controller.measured_steps == counts
    assert optimizer.param_groups[0]["lr"] == 0.01
    training.step()


@pytest.mark.parametrize("face", FACES[1:])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_copies_of_a_controller_are_refused(face: str, way: Callable[[Any], Any]) -> None:
    """Its hooks are on one optimizer and one model: a copy would watch nothing."""
    training = Training(face)
    training.step()
    with pytest.raises(TypeError, match=f"{face} cannot be copied or pickled.*make another {face}"):
        way(training.controller)
    training.step()


@every_face
def test_another_dtype_after_construction_and_in_mid_training(face: str) -> None:
    training = Training(face, every=1)
    training.model.double()
    training.x, training.y = training.x.double(), training.y.double()
    for _ in range(5):
        training.step()
    truth = training.controller.last.lambda_max
    assert truth > 0
    if face != "CatapultLR":  # torch's own Adam mixes dtypes no better: its averages stay in the old one
        training.model.float()
        training.optimizer.load_state_dict(training.optimizer.state_dict())  # as torch asks: casts its state
        training.x, training.y = training.x.float(), training.y.float()
        for _ in range(30):
            training.step()
    assert training.healthy


# ------------------------------------------------------------------------------------------------------------- threads


@every_face
def test_trainings_in_threads_do_not_disturb_each_other(face: str) -> None:
    """Each with a model of its own (no dropout: torch's random state is the process' own)."""

    def make(seed: int) -> Training:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        return Training(face, seed=seed, model=model, every=1)

    alone, together = [make(s) for s in range(3)], [make(s) for s in range(3)]
    for training in [*alone, *together]:
        torch.manual_seed(0)
        training.step()  # the random start of the first measurement
    for training in alone:
        for _ in range(25):
            training.step()
    errors: list[BaseException] = []

    def work(training: Training) -> None:
        try:
            for _ in range(25):
                training.step()
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
        assert one.controller.super_critical_steps == other.controller.super_critical_steps


# ---------------------------------------------------------------------------------------------------- hooks and memory


def hooks(training: Training) -> int:
    modules = [*training.model.modules(), training.criterion]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


@every_face
@pytest.mark.parametrize("how", ["detach", "dies"])
def test_hooks_go_with_the_optimizer(face: str, how: str) -> None:
    training = Training(face)
    for _ in range(2):
        training.step()
    assert hooks(training) > 0
    if how == "detach":
        training.controller.detach()
    else:
        del training.controller, training.optimizer
        gc.collect()
    assert hooks(training) == 0
    training.criterion(training.model(training.x), training.y).backward()


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leak(face: str, steps: int, tmp_path: Path, warm: int = 200) -> tuple[int, int]:
    """Live tensors and resident bytes gained over so many steps, measured on each one, with a log."""
    training = Training(face, every=1, log=tmp_path / "run.jsonl")
    for _ in range(warm):
        training.step()
    tensors, memory = live_tensors(), resident_bytes()
    for i in range(steps):
        training.step()
        if i % 50 == 0:
            training.controller.log_metrics(val_loss=1.0)
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
    training = Training()
    training.step()
    other = torch.optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9)
    before = pickle.dumps(training.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: not of a CatapultSGD with a model; its lr=0\.1 is a rate"):
        training.optimizer.load_state_dict(other.state_dict())
    assert pickle.dumps(training.optimizer.state_dict()) == before
    training.step()


def test_a_checkpoint_of_the_optimizer_alone_under_catapult_lr() -> None:
    """Its lr sets no scale there: it may be loaded, and the controller goes on."""
    training = Training("CatapultLR")
    training.step()
    training.optimizer.load_state_dict(torch.optim.Adam(training.model.parameters(), lr=0.5).state_dict())
    training.step()
    rate = training.controller._machine.rate
    assert training.optimizer.param_groups[0]["effective_lr"] == pytest.approx(rate)


def test_a_group_added_under_catapult_lr() -> None:
    training = Training("CatapultLR")
    training.optimizer = torch.optim.SGD(training.model[0].parameters(), lr=0.1)
    training.controller = CatapultLR(training.optimizer, model=training.model, criterion=training.criterion)
    training.step()
    training.optimizer.add_param_group({"params": list(training.model[4].parameters()), "lr": 0.05})
    training.step()
    first, second = (group["effective_lr"] for group in training.optimizer.param_groups)
    assert second == pytest.approx(first / 2)
