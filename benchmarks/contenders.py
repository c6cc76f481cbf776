"""The optimizers of the generalization benchmark: an entry of `CONTENDERS` each."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controls import BELOW, capped, mean_rate, random_spikes, tracking
from drivers import CDAT, Averaged, Catapult, Driver, GeN, ScheduleFree, Setup
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from catapult_opt import CatapultLR, CatapultPolicy, CatapultSGD

BASELINES = ("sgd", "adamw", "untuned")  # the kinds of contenders that do not depend on this package
_DECIDING = (
    "policy",
    "controller",
    "observer",
    "repetition",
    "schedule",
    "memory",
)  # modules that the rates and weights come from
Build = Callable[[Setup], Driver]


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison."""

    name: str
    label: str
    build: Build
    settings: dict[str, Any]  # all that makes a run of it another one, for the key under which it is kept
    kind: str  # "sgd" or "adamw" (tuned), "untuned", "catapult", or "control"
    start: Callable[[bool, float], float] | None = None  # (NTK net?, critical rate at the start) -> where a grid begins
    after: str | None = None  # another contender, at whose best rate the grid begins
    follows: Callable[[dict[str, Any]], Any] | None = None  # record of CatapultSGD's run -> what the control is given
    package: str | None = None  # of the extra bench

    @property
    def tuned(self) -> bool:
        return self.start is not None or self.after is not None

    def missing(self) -> str | None:
        """What to do if the package is not installed."""
        if self.package is None or importlib.util.find_spec(self.package):
            return None
        return f"{self.label} is left out: {self.package} is missing (pip install --no-deps -r constraints-bench.txt)"


def _sgd(setup: Setup, *, momentum: float = 0.0, cosine: bool = False, averaged: bool = False) -> Driver:
    optimizer = SGD(setup.model.parameters(), lr=setup.lr, momentum=momentum)
    scheduler = CosineAnnealingLR(optimizer, setup.steps) if cosine else None
    return Driver(setup.model, optimizer, scheduler, Averaged(setup.model) if averaged else None, setup.sample)


def _adamw(setup: Setup, *, cosine: bool = False) -> Driver:
    optimizer = AdamW(setup.model.parameters(), lr=setup.lr)
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps) if cosine else None)


def _adamw_as_it_comes(setup: Setup) -> Driver:
    return Driver(setup.model, AdamW(setup.model.parameters()))


def _sgd_as_people_type_it(setup: Setup) -> Driver:
    optimizer = SGD(setup.model.parameters(), lr=0.01, momentum=0.9)
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps))


def _d_adaptation(setup: Setup) -> Driver:
    from dadaptation import DAdaptAdam

    return Driver(setup.model, DAdaptAdam(setup.model.parameters()))


def _prodigy(setup: Setup, *, cosine: bool = False) -> Driver:
    from prodigyopt import Prodigy

    optimizer = Prodigy(setup.model.parameters())
    return Driver(setup.model, optimizer, CosineAnnealingLR(optimizer, setup.steps) if cosine else None)


def _dog(setup: Setup) -> Driver:
    from dog import DoG, PolynomialDecayAverager

    averager = PolynomialDecayAverager(setup.model)
    return Driver(setup.model, DoG(setup.model.parameters()), averager=averager, sample=setup.sample)


def _schedule_free(setup: Setup, *, kind: str) -> Driver:
    import schedulefree

    optimizer = getattr(schedulefree, kind)(setup.model.parameters())
    optimizer.train()
    return ScheduleFree(setup.model, optimizer, sample=setup.sample)


def _catapult(
    setup: Setup, *, length: bool = False, momentum: float = 0.0, base: str | None = None, **settings: Any
) -> Driver:
    """CatapultSGD; where the base is AdamW its controller on that, which has a momentum already."""
    chosen = setup.catapult_policy(**({"total_steps": setup.steps} if length else {}))
    watched: dict[str, Any] = {"model": setup.model, "criterion": setup.criterion, "policy": chosen, **settings}
    if (base or setup.base) == "adamw":
        adamw = AdamW(setup.model.parameters())
        return Catapult(setup, adamw, CatapultLR(adamw, **watched))
    optimizer = CatapultSGD(setup.model.parameters(), momentum=momentum, **watched)
    return Catapult(setup, optimizer, optimizer)


@functools.cache
def _controller() -> dict[str, Any]:
    """The default settings of CatapultSGD and the code that decides: a run under others is not one of ours any more."""
    digest = hashlib.sha256()
    for name in _DECIDING:
        found = importlib.util.find_spec(f"catapult_opt.{name}")
        if found is not None and found.origin is not None:
            digest.update(code_of(Path(found.origin).read_text()).encode())
    return {"policy": dataclasses.asdict(CatapultPolicy()), "code": digest.hexdigest()[:12]}


def code_of(source: str) -> str:
    """What is left without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _baseline(name: str, label: str, kind: str, build: Callable[..., Driver], **extra: Any) -> Contender:
    settings = extra.pop("settings", {})
    return Contender(name, label, functools.partial(build, **settings), settings, kind, **extra)


def _own(name: str, label: str, kind: str, build: Callable[..., Driver], **extra: Any) -> Contender:
    contender = _baseline(name, label, kind, build, **extra)
    return dataclasses.replace(contender, settings={**contender.settings, **_controller()})


def _half_critical(_: bool, eta_crit: float) -> float:
    return eta_crit / 2


def _momentum_start(_: bool, eta_crit: float) -> float:
    return eta_crit / 8


def _adam_start(ntk: bool, _: float) -> float:
    # Weights of size 1 want other steps than those of size 1 / sqrt(width).
    return 0.125 if ntk else 0.004


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        _baseline("sgd", "SGD", "sgd", _sgd, start=_half_critical),
        _baseline("sgd-cosine", "SGD, cosine", "sgd", _sgd, settings={"cosine": True}, after="sgd"),
        _baseline("sgd-averaged", "SGD, averaged", "sgd", _sgd, settings={"averaged": True}, after="sgd"),
        _baseline("momentum", "SGD .9", "sgd", _sgd, settings={"momentum": 0.9}, start=_momentum_start),
        _baseline(
            "momentum-cosine", "SGD .9, cosine", "sgd", _sgd,
            settings={"momentum": 0.9, "cosine": True}, after="momentum",
        ),
        _baseline("adamw", "AdamW", "adamw", _adamw, start=_adam_start),
        _baseline("adamw-cosine", "AdamW, cosine", "adamw", _adamw, settings={"cosine": True}, after="adamw"),
        _baseline("adamw-1e-3", "AdamW at .001", "untuned", _adamw_as_it_comes),
        _baseline("sgd-1e-2", "SGD .9 at .01, cosine", "untuned", _sgd_as_people_type_it),
        _baseline("cdat", "CDAT", "untuned", CDAT, settings={"sigma": 2.0}),
        _baseline("d-adaptation", "D-Adaptation (Adam)", "untuned", _d_adaptation, package="dadaptation"),
        _baseline("gen", "GeN (AdamW)", "untuned", GeN, settings={"every": 4}, package="GeN"),
        _baseline("prodigy", "Prodigy", "untuned", _prodigy, package="prodigyopt"),
        _baseline(
            "prodigy-cosine", "Prodigy, cosine", "untuned", _prodigy, settings={"cosine": True}, package="prodigyopt"
        ),
        _baseline("dog", "DoG, averaged", "untuned", _dog, package="dog"),
        _baseline(
            "schedule-free", "Schedule-Free AdamW", "untuned", _schedule_free,
            settings={"kind": "AdamWScheduleFree"}, package="schedulefree",
        ),
        _baseline(
            "schedule-free-sgd", "Schedule-Free SGD", "untuned", _schedule_free,
            settings={"kind": "SGDScheduleFree"}, package="schedulefree",
        ),
        _own("catapult", "CatapultSGD", "catapult", _catapult),
        _own("catapult-T", "CatapultSGD, total_steps", "catapult", _catapult, settings={"length": True}),
        _own("catapult-m", "CatapultSGD .9", "catapult", _catapult, settings={"momentum": 0.9}),
        _own(
            "catapult-m-T", "CatapultSGD .9, total_steps", "catapult", _catapult,
            settings={"momentum": 0.9, "length": True},
        ),
        _own("catapult-adamw", "CatapultLR on AdamW", "catapult", _catapult, settings={"base": "adamw"}),
        _own("catapult-5", "CatapultSGD, 5 % overhead", "catapult", _catapult, settings={"overhead": 0.05}),
        _own("capped", f"controller capped at {BELOW:g} eta_crit", "control", capped),
        _own("mean-rate", "constant, CatapultSGD's mean rate", "control", mean_rate, follows=lambda r: r["mean_rate"]),
        _own(
            "random-spikes", "spikes at random times", "control", random_spikes, follows=lambda r: r["above"]
        ),
        _own("tracking", "kappa eta_crit tracked, tuned", "control", tracking, start=lambda *_: 1.0),
    )
}  # fmt: skip
