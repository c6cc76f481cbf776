"""Promise: measuring works on the networks people train, the way they train them.

Each test is an ordinary loop with a monitor (or the optimizer) on it; the oracle is the explicit float64 Jacobian of
that very step: same weights, buffers, batch and dropout mask, on a twin that was never hooked. ``test_refused_*``: what
cannot work says so by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from cases import Tied, cnn_batchnorm, dropout, frozen, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catapult_opt import CatapultMonitor, CatapultPolicy, CatapultSGD, read_log

CE = nn.CrossEntropyLoss
SCALE = 65536.0
Loop = Callable[[nn.Module, Any], Any]  # the user's forward


def vectors(n: int = 6) -> tuple[Any, Tensor]:
    return torch.randn(n, 4), torch.arange(n) % 3


def sequences(n: int = 5) -> tuple[Any, Tensor]:
    return torch.randn(n, 6, 8), torch.arange(n) % 3


def images(n: int = 6) -> tuple[Any, Tensor]:
    return torch.randn(n, 1, 8, 8).to(memory_format=torch.channels_last), torch.arange(n) % 3


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


class Run:
    """A loop with a monitor on it; before every step the truth is worked out on the twin."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        batch: Callable[[], Any] = vectors,
        criterion: Any = None,
        *,
        forward: Loop = lambda model, x: model(x),
        outputs: Callable[[Any], Any] = lambda out: out,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        monitored: Callable[[nn.Module, nn.Module], nn.Module] = lambda model, wrapped: wrapped,
        scaler: torch.amp.GradScaler | None = None,
        announced: bool = True,
        lr: float = 0.01,
        **settings: Any,
    ) -> None:
        self.model, self.twin = make(build), make(build)
        self.batch, self.forward, self.outputs = batch, forward, outputs
        self.called = wrap(self.model)
        self.optimizer = torch.optim.SGD(oracle.trainable(self.model), lr=lr)
        given = CE() if criterion is None else criterion
        self.plain = copy.deepcopy(given)
        self.scaler = scaler
        self.monitor = CatapultMonitor(
            self.optimizer,
            model=monitored(self.model, self.called),
            criterion=given,
            grad_scaler=scaler if announced else None,
            **settings,
        )
        self.criterion = self.monitor.criterion
        self.seed = 0

    def truth(self, x: Any, y: Any) -> float:
        self.twin.load_state_dict(self.model.state_dict())
        return sharpness([oracle.dense(self.twin, self.plain, x, y, self.outputs)])

    def step(self) -> float:
        """Relative error of the measured lambda_max."""
        self.seed += 1
        torch.manual_seed(self.seed)
        x, y = self.batch()
        torch.manual_seed(self.seed)
        expected = self.truth(x, y)
        torch.manual_seed(self.seed)
        self.optimizer.zero_grad()
        loss = self.criterion(self.outputs(self.forward(self.called, x)), y)
        self.backward_and_step(loss)
        found = self.monitor.last
        assert found.eta_crit == pytest.approx(2 / found.lambda_max)
        return found.lambda_max / expected - 1

    def backward_and_step(self, loss: Tensor) -> None:
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def check(self, steps: int = 3, rel: float = 0.03) -> Run:
        errors = [self.step() for _ in range(steps)]
        assert max(map(abs, errors)) < rel, errors
        return self


def sharpness(terms: list[oracle.Truth], weights: tuple[float, ...] = (1.0,)) -> float:
    """lambda_max of sum_i weights_i G_i, as the top eigenvalue of the (small) matrix H_out J J^T."""
    jacobian = np.concatenate([t.jacobian for t in terms])
    h_out = scipy.linalg.block_diag(*(w * t.h_out for t, w in zip(terms, weights, strict=True)))
    return float(np.linalg.eigvals(h_out @ (jacobian @ jacobian.T)).real.max())


def make(build: Callable[[], nn.Module]) -> nn.Module:
    """The same numbers every time; without gradients, so that weight_norm's derived weights can be copied."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
        torch.manual_seed(1)
        return build()


# ---------------------------------------------------------------------------------------------------- architectures


class Attending(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p, self.qkv, self.head = p, nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


class MultiHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 6, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag, self.head = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens).mean(1) * self.bag(tokens)))


class Square(torch.autograd.Function):
    """Without a rule for forward mode, as most people's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.first, self.head = reentrant, nn.Linear(4, 12), nn.Linear(12, 3)
        self.body = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, torch.tanh(self.first(x)), use_reentrant=self.reentrant))


class CountsSteps(nn.Module):
    """A buffer that every pass replaces by another tensor, and that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        self.temperature = self.temperature * 0.8
        return self.net(x) / self.temperature


def spectral(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(4, 30)), nn.Tanh(), norm(nn.Linear(30, 3)))


def tokens() -> tuple[Any, Tensor]:
    return torch.randint(0, 7, (6, 4)), torch.arange(6) % 3


def partly_used() -> nn.Module:
    model = wide()
    model.register_parameter("never", nn.Parameter(torch.ones(4)))
    model[0].requires_grad_(False)
    return model


def batchnorm_net() -> nn.Module:
    return cnn_batchnorm().to(memory_format=torch.channels_last)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "batchnorm, channels_last": (batchnorm_net, images),
    "dropout": (dropout, vectors),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences),
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "sdpa": (Attending, sequences),
    "multihead attention": (MultiHeads, sequences),
    "transformer": (Encoder, sequences),
    "transformer, norm last": (lambda: Encoder(False), sequences),
    "embedding and bag": (Words, tokens),
    "weight_norm, old": (spectral(nn.utils.weight_norm), vectors),
    "weight_norm": (spectral(nn.utils.parametrizations.weight_norm), vectors),
    "spectral_norm, old": (spectral(nn.utils.spectral_norm), vectors),
    "spectral_norm": (spectral(nn.utils.parametrizations.spectral_norm), vectors),
    "buffer replaced": (CountsSteps, vectors),
    "custom function": (lambda: nn.Sequential(nn.Linear(4, 8), Squared(), nn.Linear(8, 3)), vectors),
    "tied": (Tied, tokens),
    "frozen": (frozen, vectors),
    "unused and frozen": (partly_used, vectors),
    "checkpointed inside": (lambda: Checkpointed(False), vectors),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_network(name: str) -> None:
    build, batch = NETWORKS[name]
    Run(build, batch).check()


@pytest.mark.parametrize("name", ["dropout", "transformer", "batchnorm, channels_last"])
def test_checkpointed_as_a_whole(name: str) -> None:
    build, batch = NETWORKS[name]
    Run(build, batch, forward=lambda model, x: checkpoint(model, x, use_reentrant=False)).check()


@pytest.mark.parametrize("name", ["dropout", "transformer", "lstm", "spectral_norm"])
def test_optimizer_in_the_loop(name: str) -> None:
    """CatapultSGD measures what the monitor measures; a first step is there, where the policy says so."""
    build, batch = NETWORKS[name]
    model, twin, criterion = make(build), make(build), CE()
    policy = CatapultPolicy(start=1.0, near=1.0, creep=1e-9, catapults=True)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, policy=policy)
    torch.manual_seed(3)
    x, y = batch()
    torch.manual_seed(4)
    expected = 2 / sharpness([oracle.dense(twin, CE(), x, y)])
    torch.manual_seed(4)
    criterion(model(x), y).backward()
    optimizer.step()
    assert optimizer.last.eta_crit == pytest.approx(expected, rel=0.03)
    assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(expected, rel=0.03)


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dropout", "batchnorm, channels_last", "transformer"])
def test_dtype(name: str, dtype: torch.dtype) -> None:
    """A bfloat16 model is measured in float32, at its own weights; its dropout masks are those of the step."""
    build, batch = NETWORKS[name]

    def cast() -> Any:
        x, y = batch()
        return x.to(dtype), y

    Run(lambda: build().to(dtype), cast).check()


def autocast(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


class AutocastInside(nn.Module):
    def __init__(self, as_float: bool) -> None:
        super().__init__()
        self.net, self.as_float = mlp(), as_float

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.net(x)
        return out.float() if self.as_float else out


@pytest.mark.parametrize("name", ["dropout", "batchnorm, channels_last", "embedding and bag", "transformer"])
def test_autocast(name: str) -> None:
    build, batch = NETWORKS[name]
    Run(build, batch, forward=autocast).check()


def test_autocast_around_the_whole_step() -> None:
    run = Run(wide)
    with torch.autocast("cpu", torch.bfloat16):
        run.check()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("as_float", [False, True], ids=["bfloat16 out", "float32 out"])
def test_autocast_inside_the_model(as_float: bool, tmp_path: Path) -> None:
    """Where it cannot be turned off, finite differences drown: another engine is chosen, and the log says why."""
    run = Run(lambda: AutocastInside(as_float), log=tmp_path / "run.jsonl").check()
    run.monitor.detach()
    [event] = [e for e in read_log(tmp_path / "run.jsonl").events if e["event"] == "engine"]
    assert event["engine"] == "forward"
    assert "away from what the backward pass says" in event["reason"]


# ------------------------------------------------------------------------------------------------------- loss scaling


def scaler(init_scale: float = SCALE, **settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=init_scale, **settings)


@pytest.mark.parametrize("forward", [lambda model, x: model(x), autocast], ids=["float32", "autocast"])
def test_grad_scaler(forward: Loop, tmp_path: Path) -> None:
    """Also where the scale grows at every step; the log has the loss as the loop had it."""
    run = Run(wide, forward=forward, scaler=scaler(growth_interval=1), log=tmp_path / "run.jsonl").check()
    assert run.scaler is not None and run.scaler.get_scale() == 8 * SCALE
    run.monitor.detach()
    assert all(0.5 < loss < 3 for loss in read_log(tmp_path / "run.jsonl").column("loss"))


def test_grad_scaler_with_the_optimizer() -> None:
    """The same run, to the bit, as without a scaler: a power of two takes nothing away."""

    def run(scaled: bool) -> Any:
        model, criterion = make(wide), CE()
        scale = scaler() if scaled else None
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion, every=1, grad_scaler=scale)
        torch.manual_seed(5)
        x, y = vectors()
        trace = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scale.scale(loss).backward()
                scale.step(optimizer)
                scale.update()
            trace.append((loss.item(), optimizer.last.lambda_max, optimizer.param_groups[0]["effective_lr"]))
        return trace

    assert run(True) == run(False)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["at the start", "later"])
def test_grad_scaler_skips_a_step(set_to_none: bool, first: bool, tmp_path: Path) -> None:
    """An infinite gradient: no step, no measurement, and its two batches are no part of the next step."""
    run = Run(wide, scaler=scaler(), log=tmp_path / "run.jsonl")
    assert run.scaler is not None
    if not first:
        run.check(1)
    torch.manual_seed(9)
    bad, good = [[vectors() for _ in range(2)] for _ in range(2)]
    measured = run.monitor.measured_steps
    for batches, factor in ((bad, torch.inf), (good, 1.0)):
        run.optimizer.zero_grad(set_to_none=set_to_none)
        terms = [oracle.dense(twin_of(run), CE(), x, y) for x, y in batches]
        for x, y in batches:
            loss = run.criterion(run.model(x), y) / 2
            run.scaler.scale(loss * factor).backward()
        run.scaler.step(run.optimizer)
        assert run.monitor.measured_steps == measured + (factor == 1.0)
        run.scaler.update()
    assert run.scaler.get_scale() == SCALE / 2
    assert run.monitor.last.lambda_max == pytest.approx(sharpness(terms, (0.5, 0.5)), rel=0.03)
    run.monitor.detach()
    assert read_log(tmp_path / "run.jsonl").column("loss")[-1] == pytest.approx((terms[0].loss + terms[1].loss) / 2)


def twin_of(run: Run) -> nn.Module:
    run.twin.load_state_dict(run.model.state_dict())
    return run.twin


@pytest.mark.parametrize("face", ["monitor", "optimizer"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_refused_grad_scaler_that_nobody_told_of(face: str, accumulate: int) -> None:
    """Rates would be too small by its scale."""
    model, criterion, scale = make(wide), CE(), scaler()
    if face == "monitor":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
        CatapultMonitor(optimizer, model=model, criterion=criterion)
    else:
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    before = copy.deepcopy(model.state_dict())
    for _ in range(accumulate):
        x, y = vectors()
        scale.scale(criterion(model(x), y) / accumulate).backward()
    with pytest.raises(RuntimeError, match="grad_scaler="):
        scale.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("factor", [1024.0, 1000.0])
def test_loss_that_is_meant_to_be_large_is_no_scaler(factor: float) -> None:
    run = Run(wide, lr=1e-6)
    x, y = vectors()
    expected = factor * run.truth(x, y)
    (factor * run.criterion(run.model(x), y)).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e4)
    run.optimizer.step()
    assert run.monitor.last.lambda_max == pytest.approx(expected, rel=0.03)
    assert not any(p._post_accumulate_grad_hooks for p in run.model.parameters())


def test_refused_what_is_no_scaler() -> None:
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler"):
        Run(wide, scaler=65536)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grad_scaler.* needs? a model"):
        CatapultSGD(wide().parameters(), grad_scaler=scaler())


def test_refused_fused_optimizer_under_a_scaler() -> None:
    model, criterion, scale = make(wide), CE(), scaler()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    CatapultMonitor(optimizer, model=model, criterion=criterion, grad_scaler=scale)
    x, y = vectors()
    scale.scale(criterion(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="fused=False"):
        scale.step(optimizer)


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Compile anew, and let nothing be compiled twice."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: torch.compile(model, backend="eager"),
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
    "in place": in_place,
}


def each_way(name: str) -> list[Any]:
    """All ways on the smallest of the networks; on the others, which take seconds to compile, one way by default."""
    return [
        pytest.param(name, wrap, passed, marks=[] if usual or name == "dropout" else [pytest.mark.slow])
        for wrap in WRAPS
        for passed in ("compiled", "uncompiled")
        for usual in [(wrap, passed) == ("aot_eager", "compiled")]
    ]


@pytest.mark.parametrize(
    ("name", "wrap", "passed"), [w for n in ("dropout", "batchnorm, channels_last", "transformer") for w in each_way(n)]
)
def test_compiled(name: str, wrap: str, passed: str, dynamo: Any) -> None:
    """Passed as model= compiled or not; nothing is compiled twice; the wrapped module stays one graph."""
    build, batch = NETWORKS[name]
    pick = (lambda model, wrapped: wrapped) if passed == "compiled" else (lambda model, wrapped: model)
    run = Run(build, batch, wrap=WRAPS[wrap], monitored=pick, every=2)
    run.step()  # a measurement runs without and with gradients: two versions at most
    frames = dynamo.utils.counters["frames"]["total"]
    for _ in range(2):
        unmeasured(run)
        run.check(1)
    assert dynamo.utils.counters["frames"]["total"] == frames, "compiled again"
    if passed == "compiled" and wrap != "in place":
        assert not dynamo.utils.counters["graph_break"], "hooks inside the graph"


def unmeasured(run: Run) -> None:
    x, y = run.batch()
    run.optimizer.zero_grad()
    run.criterion(run.called(x), y).backward()
    run.optimizer.step()


def own_masks(graph: Any, inputs: Any) -> Any:
    """A backend whose random numbers are not those of the uncompiled module, as inductor's are not."""

    def run(*args: Any) -> Any:
        torch.rand(1)
        return graph(*args)

    return run


def test_compiled_with_masks_of_its_own(dynamo: Any) -> None:
    """Passed uncompiled, the masks of the step cannot be had again."""
    run = Run(dropout, wrap=lambda model: torch.compile(model, backend=own_masks), monitored=lambda model, _: model)
    with pytest.raises(RuntimeError, match="pass the compiled module as model="):
        unmeasured(run)


@pytest.mark.slow  # half a minute of generating code: test_compiled and the test above show it with cheap backends
@pytest.mark.parametrize("passed", ["compiled", "uncompiled"])
def test_compiled_by_inductor(passed: str, dynamo: Any) -> None:
    """Its dropout masks are its own. Passed uncompiled they cannot be had again: refused; without dropout it works."""
    pick = (lambda model, wrapped: wrapped) if passed == "compiled" else (lambda model, wrapped: model)
    build = mlp if passed == "compiled" else dropout
    run = Run(build, wrap=torch.compile, monitored=pick)
    x, y = vectors()
    try:
        loss = run.criterion(run.called(x), y)
    except Exception as error:
        pytest.skip(f"inductor does not work here: {type(error).__name__}")
    if passed == "compiled":
        Run(build, wrap=torch.compile, monitored=pick).check(2)
    else:
        loss.backward()
        with pytest.raises(RuntimeError, match="pass the compiled module as model="):
            run.optimizer.step()


# ----------------------------------------------------------------------------------------------- outputs and criteria


class Pair(NamedTuple):
    logits: Tensor
    rest: Any


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FrozenOutput:
    logits: Tensor


class Returns(nn.Module):
    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.net(x))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda o: {"logits": o, "n": 3, "hidden": o * 2}, lambda out: out["logits"]),
    "tuple": (lambda o: (o * 2, o), lambda out: out[1]),
    "list": (lambda o: [None, o], lambda out: out[1]),
    "namedtuple": (lambda o: Pair(o, None), lambda out: out.logits),
    "dataclass": (Output, lambda out: out.logits),
    "frozen dataclass": (FrozenOutput, lambda out: out.logits),
    "twice": (lambda o: {"logits": o, "last": o, "all": [o, o]}, lambda out: 2 * out["logits"]),
    "nested": (lambda o: {"a": (Pair(o, [o]), 1)}, lambda out: out["a"][0].rest[0] * 2),
}


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_outputs(kind: str) -> None:
    wrap, pick = OUTPUTS[kind]
    Run(lambda: Returns(wrap), outputs=pick).check()


class Deep(nn.Module):
    """Every layer's activation in its output, as with output_hidden_states=True; the last is what the head sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        return {"logits": self.head(b), "hidden": (a, b), "last": b}


PICKED: dict[str, Callable[[Any], Tensor]] = {
    "logits": lambda out: out["logits"],
    "reshaped": lambda out: out["logits"].view(3, 2, 3).flatten(0, 1),
    "scaled": lambda out: out["logits"] / 0.3,
    "in place": lambda out: out["logits"].div_(0.3),
    "hidden": lambda out: out["hidden"][0][:, :3] * out["hidden"][0][:, 3:],
}


@pytest.mark.parametrize("picked", list(PICKED))
def test_outputs_computed_from_each_other(picked: str) -> None:
    """The user's code between model and criterion starts from the outputs it uses, whatever else is there."""
    Run(Deep, outputs=PICKED[picked]).check()


class Variational(nn.Module):
    """Reconstruction, mean and log-variance; the first is computed from the others, and all are in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_var, self.decode = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.mean(x), self.log_var(x)
        return self.decode(mean + (log_var / 2).exp() * torch.randn_like(mean)), mean, log_var


class ELBO(nn.Module):
    def forward(self, out: Tensor, mean: Tensor, log_var: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(out, x) + 0.1 * (mean**2 + log_var.exp() - log_var).mean()


@pytest.mark.parametrize("view", [lambda out: out, lambda out: out.view(-1, 4)], ids=["as it is", "view"])
def test_variational_autoencoder(view: Callable[[Tensor], Tensor]) -> None:
    model, twin, criterion = make(Variational), make(Variational), ELBO()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = CatapultMonitor(optimizer, model=model, criterion=criterion)
    x = torch.randn(6, 4)
    x = (x * 16).round() / 16
    state = torch.get_rng_state()

    def together(out: Tensor, y: Tensor) -> Tensor:
        return ELBO()(*out.split([4, 3, 3], 1), y)

    with noise_in_float32():
        expected = sharpness([oracle.dense(twin, together, x, x, lambda out: torch.cat(out, 1))])
        torch.set_rng_state(state)
        out, mean, log_var = model(x)
        criterion(view(out), mean, log_var, x).backward()
        optimizer.step()
    assert watch.last.lambda_max == pytest.approx(expected, rel=0.03)


@contextmanager
def noise_in_float32() -> Iterator[None]:
    """The generator gives other numbers in float64."""
    plain = torch.randn_like
    torch.randn_like = lambda t: torch.randn(t.shape).to(t.dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn_like = plain


CRITERIA: dict[str, Any] = {
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "function": F.cross_entropy,
    "lambda": lambda out, y: 2 * F.cross_entropy(out / 3, y),
}


@pytest.mark.parametrize("kind", list(CRITERIA))
def test_criteria(kind: str) -> None:
    Run(wide, criterion=CRITERIA[kind]).check()


@pytest.mark.parametrize("kind", list(CRITERIA))
def test_criteria_through_the_optimizer(kind: str) -> None:
    model = make(wide)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=CRITERIA[kind])
    x, y = vectors()
    expected = oracle.dense(make(wide), CRITERIA[kind], x, y)
    optimizer.criterion(model(x), y).backward()
    optimizer.step()
    assert optimizer.last.lambda_max == pytest.approx(expected.lambda_max, rel=0.03)


class WithLoss(nn.Module):
    """Returns its loss, alone or as other libraries do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "output": Output(logits, loss), "dict": {"loss": loss, "logits": logits}}[self.kind]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kind", ["loss", "output", "dict"])
def test_loss_returned_by_the_model(kind: str, scaled: bool) -> None:
    """Measured is then the Hessian."""
    model, twin = make(lambda: WithLoss(kind)), make(lambda: WithLoss("loss"))
    scale = scaler() if scaled else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = CatapultMonitor(optimizer, model=model, criterion=None, grad_scaler=scale)
    pick = {"loss": lambda o: o, "output": lambda o: o.loss, "dict": lambda o: o["loss"]}[kind]
    for _ in range(3):
        x, y = vectors()
        twin.load_state_dict(model.state_dict())
        expected = oracle.top_eigenvalue(oracle.hessian(twin.net, F.cross_entropy, x, y))
        optimizer.zero_grad()
        loss = pick(model(x, labels=y))
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
        assert watch.last.lambda_max == pytest.approx(expected, rel=0.03)


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("name", ["dropout", "batchnorm, channels_last", "spectral_norm", "transformer"])
@pytest.mark.parametrize("how", ["backward each", "one backward"])
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_several_forwards_a_step(name: str, how: str, cast: bool) -> None:
    """The curvature of the sum of all terms, each with the masks and buffers of its own pass."""
    build, batch = NETWORKS[name]
    run = Run(build, batch)
    for step in range(2):
        torch.manual_seed(step)
        batches = [batch() for _ in range(3)]
        weights = (0.5, 0.3, 0.2)
        state = torch.get_rng_state()
        twin = twin_of(run)
        terms = []
        for x, y in batches:
            terms.append(oracle.dense(twin, CE(), x, y))
            with torch.no_grad():
                twin(x)  # random numbers and buffers move on
        torch.set_rng_state(state)
        run.optimizer.zero_grad()
        losses = []
        for (x, y), weight in zip(batches, weights, strict=True):
            with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
                out = run.model(x)
            losses.append(weight * run.criterion(out, y))
            if how == "backward each":
                losses[-1].backward()
        if how == "one backward":
            sum(losses).backward()
        run.optimizer.step()
        assert run.monitor.last.lambda_max == pytest.approx(sharpness(terms, weights), rel=0.03)


# ------------------------------------------------------------------------------------------------- what cannot work


def test_refused_sparse_embedding() -> None:
    model, criterion = nn.Sequential(nn.EmbeddingBag(9, 3, sparse=True)), CE()
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
    criterion(model(torch.randint(0, 9, (6, 4))), torch.arange(6) % 3).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_refused_reentrant_checkpoint_inside() -> None:
    run = Run(lambda: Checkpointed(True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run.step()


def test_refused_reentrant_checkpoint_around() -> None:
    run = Run(wide, forward=lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run.step()


def test_refused_model_behind_the_back() -> None:
    """The loop calls a submodule, or a copy: the hooks see nothing."""
    run = Run(wide, forward=lambda model, x: nn.Sequential(*model)(x))
    with pytest.raises(RuntimeError, match=r"model \(Sequential\).*call the very module passed as model="):
        run.step()


def test_refused_function_not_called_through_the_optimizer() -> None:
    model = make(wide)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=F.cross_entropy, policy=CatapultPolicy())
    x, y = vectors()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.criterion"):
        optimizer.step()


def test_refused_outputs_mixed_with_what_they_are_computed_from() -> None:
    run = Run(Deep, outputs=lambda out: torch.cat([out["last"], out["logits"]], 1)[:, :3] + out["logits"])
    with pytest.raises(RuntimeError, match="arguments of their own"):
        run.step()


def test_refused_passes_in_a_chain() -> None:
    """The second pass starts from the first one's output: the step's gradient goes through both."""

    class Refine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.net(x)

    def run(detach: bool) -> Run:
        between = (lambda x: x.detach()) if detach else (lambda x: x)
        return Run(Refine, forward=lambda model, x: model(between(model(x))))

    with pytest.raises(RuntimeError, match="detach them"):
        run(False).step()
    x, y = vectors()
    works = run(True)
    expected = sharpness([oracle.dense(works.twin, CE(), works.twin(x).detach(), y)])
    works.criterion(works.forward(works.model, x), y).backward()
    works.optimizer.step()
    assert works.monitor.last.lambda_max == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("how", ["once differentiable", "detached"])
def test_refused_code_without_a_second_derivative(how: str) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad.detach()

    class Once(Twice):
        backward = staticmethod(torch.autograd.function.once_differentiable(Twice.backward))

    run = Run(wide, outputs=Once.apply if how == "once differentiable" else Twice.apply)
    with pytest.raises(RuntimeError, match="move it into the model"):
        run.step()


def test_code_with_a_derivative_of_zero() -> None:
    """Straight-through rounding between model and criterion."""
    Run(wide, outputs=lambda out: out + torch.round(out)).check()
