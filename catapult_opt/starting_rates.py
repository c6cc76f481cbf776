"""``catapult-opt critical-lr``: the critical rate of a user's model and data for each optimizer, before training."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from .monitor import CatapultMonitor
from .runlog import encode

__all__ = ["FactoryError", "StartingRate", "load_factory", "run", "starting_rates"]

_SAFE = 0.5  # of the critical rate: a constant rate to start from that leaves mini-batch noise some room
_OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": partial(SGD, lr=1.0),
    "SGD, momentum 0.9": partial(SGD, lr=1.0, momentum=0.9),
    "SGD, momentum 0.9, Nesterov": partial(SGD, lr=1.0, momentum=0.9, nesterov=True),
    "Adam": partial(Adam, lr=1.0),
    "AdamW": partial(AdamW, lr=1.0),
    "RMSprop": partial(RMSprop, lr=1.0),
    "Adagrad": partial(Adagrad, lr=1.0),
}
# Their first steps divide by the present gradient alone: the critical rate of a first step is not that of later ones.
_ADAPTIVE = ("Adam", "AdamW", "RMSprop", "Adagrad")


class FactoryError(ValueError):
    """The factory named on the command line cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class StartingRate:
    """What one optimizer could start with.

    Attributes:
        optimizer: its name in `torch.optim`, with its settings.
        lambda_max: of the curvature, divided by the optimizer's preconditioner where it has one.
        eta_crit: the critical learning rate of the first step.
        start: a constant rate to start from: half of ``eta_crit``.
        residual: relative bound on the error of ``lambda_max``.
        first_step_only: whether later steps bear other rates, because the first one divides by this one gradient.
    """

    optimizer: str
    lambda_max: float
    eta_crit: float
    start: float
    residual: float
    first_step_only: bool


def starting_rates(
    model: nn.Module, criterion: nn.Module | None, inputs: Any, targets: Any = None
) -> list[StartingRate]:
    """The critical learning rate of the first step of each of torch's common optimizers, on one batch.

    Args:
        model, criterion: as in the training loop; criterion None where the model returns the loss.
        inputs: what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        targets: what the criterion is called with beside the outputs.

    Nothing of the user's changes: every optimizer makes its step on a copy.

    Raises:
        ValueError, RuntimeError: the batch cannot be measured, or the model's loss is not a tensor of one number.
        Exception: whatever the model, the criterion or copying them raises.

    Source: thesis Def. 3.2.2; the optimizers' own critical rates: `catapult_opt.curvature.critical`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> rates = starting_rates(model, nn.MSELoss(), torch.eye(2), torch.zeros(2, 1))
        >>> rates[0].optimizer, round(rates[0].eta_crit, 3), round(rates[1].eta_crit, 3)
        ('SGD', 0.667, 1.267)
    """
    return [_first_step(name, make, model, criterion, inputs, targets) for name, make in _OPTIMIZERS.items()]


def _first_step(
    name: str, make: Callable[..., Optimizer], model: nn.Module, criterion: Any, inputs: Any, targets: Any
) -> StartingRate:
    try:
        model, criterion = copy.deepcopy((model, criterion))
    except Exception as error:
        raise TypeError(f"the model or the criterion cannot be copied, which measuring needs: {error}") from error
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"the model ({type(model).__name__}) has no parameter that requires a gradient")
    optimizer = make(trainable)
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion)
    rng = torch.get_rng_state()
    outputs = _call(model, inputs)
    loss = getattr(outputs, "loss", outputs) if criterion is None else monitor.criterion(outputs, targets)  # type: ignore[misc]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        who = "the model, with criterion None," if criterion is None else "the criterion"
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"{who} must return the loss, a tensor of one number (or have it as .loss), but returned {found}"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    torch.set_rng_state(rng)
    critical = monitor.last
    monitor.detach()
    assert critical is not None
    start = _SAFE * critical.eta_crit
    return StartingRate(name, critical.lambda_max, critical.eta_crit, start, critical.residual, name in _ADAPTIVE)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def load_factory(spec: str) -> Callable[[], Any]:
    """The function that ``module:function`` names, looked up in the present folder too.

    Raises:
        FactoryError: no such module or function, a module that fails when it is imported, or what it names is not a
            function, or one that needs arguments.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise FactoryError(f"{spec!r} must read module:function, such as train:setup")
    if module_name.endswith(".py"):
        raise FactoryError(f"{spec!r} names a file, but must name a module: try {module_name[:-3]}:{name}")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise FactoryError(f"{spec!r}: {module_name!r} is no name of a module: name it as `import` would")
    here = str(_here())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with _told(f"{module_name} cannot be imported"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FactoryError(f"{module_name}: {error}; it is sought in {here} and among the installed modules") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise FactoryError(f"{module_name} has no function {name!r}")
    if _needs_arguments(factory):
        raise FactoryError(f"{spec} must be a function without arguments, got {name}{inspect.signature(factory)}")
    return factory  # type: ignore[no-any-return]


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise FactoryError(f"the present folder cannot be read ({error.strerror}): change to another one") from error


@contextlib.contextmanager
def _told(what: str, pass_on: tuple[type[Exception], ...] = (ModuleNotFoundError,)) -> Iterator[None]:
    """Tell what the user's code raises as the last line of its traceback does, with the place in the user's file."""
    try:
        yield
    except BaseException as error:  # SystemExit too: the user's code does not decide our exit status
        if isinstance(error, (KeyboardInterrupt, *pass_on)):
            raise
        line = "".join(traceback.format_exception_only(type(error), error)[-1:])
        raise FactoryError(f"{what}: {' '.join(line.split())}{_place(error)}") from error


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    ours, here = Path(__file__).parent, _here()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if here in path.parents and ours not in path.parents and "site-packages" not in path.parts:
            return f" ({path.relative_to(here)}, line {frame.lineno})"
    return ""


def _needs_arguments(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return True
    except ValueError:  # some built-in functions have no signature
        return False
    return False


def run(spec: str, as_json: bool, console: Console) -> None:
    """Print the table (or JSON) of the model and batch that ``spec`` makes. What the factory prints goes to stderr.

    Raises:
        FactoryError: the factory cannot be used, or its batch not measured, whatever the reason.
    """
    with contextlib.redirect_stdout(sys.stderr):  # so that JSON stays JSON
        rates = _measured(spec)
    if as_json:
        print(json.dumps([encode(asdict(rate)) for rate in rates], indent=2, allow_nan=False))
    else:
        console.print(_table(rates))


def _measured(spec: str) -> list[StartingRate]:
    factory = load_factory(spec)
    with _told(f"{spec} failed", pass_on=()):
        made = factory()
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], nn.Module):
        raise FactoryError(
            f"{spec} must return (model, criterion, inputs, targets), targets left out where criterion is None; "
            f"it returned {_described(made)}"
        )
    if len(made) == 3 and made[1] is not None:
        raise FactoryError(f"{spec} must return targets too, (model, criterion, inputs, targets), or criterion None")
    sentences = TypeError, ValueError, RuntimeError  # torch's own for shapes that do not fit, and ours
    try:
        with _told(spec, pass_on=sentences):
            return starting_rates(*made)
    except sentences as error:
        if isinstance(error, FactoryError):
            raise
        advice = "; inputs is a list, so one argument: return a tuple for several" if isinstance(made[2], list) else ""
        raise FactoryError(f"{spec}: {error}{_place(error)}{advice}") from error


def _described(made: Any) -> str:
    if not isinstance(made, tuple):
        return f"a {type(made).__name__}"
    return f"({', '.join(type(item).__name__ for item in made[:6])})"


def _table(rates: list[StartingRate]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="start: half the critical rate, constant. Above the critical rate the loss catapults (CatapultSGD).\n"
        "* of the very first step, which divides by this one gradient: later steps bear more or less.",
        caption_justify="left",
    )
    table.add_column("optimizer")
    for name in ("lambda_max", "eta_crit", "start"):
        table.add_column(name, justify="right")
    for rate in rates:
        star = " *" if rate.first_step_only else ""
        table.add_row(rate.optimizer + star, f"{rate.lambda_max:.4g}", f"{rate.eta_crit:.4g}", f"{rate.start:.2g}")
    return table
