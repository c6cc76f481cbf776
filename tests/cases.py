"""One declarative list of cases, loss x reduction x architecture, that every exactness test runs through.

A case says how to make a model, a criterion and a batch of n samples. ``case.build(dtype)`` makes them from one fixed
seed in float32 and casts, so that both dtypes hold the same numbers and share one float64 truth.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 6
Criterion = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Any, Tensor]  # (inputs, targets); inputs: tensor, tuple (positional), or dict (keyword arguments)


@dataclass(frozen=True)
class Problem:
    """What a user would have in hand."""

    model: nn.Module
    criterion: Criterion
    batches: list[Batch]
    outputs: Callable[[Any], Tensor] | None  # user code between the model and the criterion

    @property
    def inputs(self) -> Any:
        return self.batches[0][0]

    @property
    def targets(self) -> Tensor:
        return self.batches[0][1]

    def first_argument(self, inputs: Any) -> Tensor:
        """The forward of the user's loop, up to what the criterion gets."""
        if isinstance(inputs, dict):
            value = self.model(**inputs)
        elif isinstance(inputs, tuple):
            value = self.model(*inputs)
        else:
            value = self.model(inputs)
        return value if self.outputs is None else self.outputs(value)


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    criterion: Callable[[], Criterion]
    batch: Callable[[int], Batch]
    outputs: Callable[[Any], Tensor] | None = None
    # True: nn.MSELoss, whose NTK must be reported. None: a squared error that only its value shows (a plain function
    # or a subclass): reported or not, but right. False: another loss, where a number would be meaningless.
    squared: bool | None = False
    hessian: bool = True  # False: the full Hessian takes long, and another case has the same operations

    def build(self, dtype: torch.dtype = torch.float32, batches: int = 1) -> Problem:
        """Batch sizes go BATCH, BATCH - 1, BATCH, ...: a reduction by a remembered batch size shows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model, criterion = self.model(), self.criterion()
            data = [self.batch(BATCH - i % 2) for i in range(batches)]
        if isinstance(criterion, nn.Module):
            criterion = criterion.to(dtype)
        return Problem(model.to(dtype), criterion, [_cast(b, dtype) for b in data], self.outputs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


# ---------------------------------------------------------------------------------------------------------- models


def mlp(n_in: int = 4, n_out: int = 3, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(n_in, 7), act(), nn.Linear(7, n_out))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def cnn_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))


def temporal() -> nn.Module:  # (N, C, T)
    return nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 3, 1))


def batchnorm(momentum: float | None = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


def batchnorm_partly_frozen() -> nn.Module:
    """Train mode at the top, one BatchNorm held in eval mode by the user, with statistics of its own."""
    model = batchnorm()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    model[1].eval()
    return model


def eval_mode() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def layernorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def groupnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 3)
    )


def dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 3)
    )


def batchnorm_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def weight_norm() -> nn.Module:
    wn = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wn(nn.Linear(4, 6)), nn.Tanh(), wn(nn.Linear(6, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], hidden: int = 3, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = kind(4, hidden, batch_first=True, **kwargs)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class SequenceModel(nn.Module):
    """(N, T) tokens to (N, T, C) logits: the user flattens them before the criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 3, padding_idx=0)
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


class Attention(nn.Module):
    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout_p if self.training else 0.0
        )
        return self.head(out.transpose(1, 2).reshape(n, t, 4).mean(1))


class MultiHead(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Bag(nn.Module):
    """Two inputs: tokens and where each bag starts."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4, mode="mean")
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens, offsets)))


class Tied(nn.Module):
    """The decoder's weight is the embedding's: one parameter, two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.mix(self.embed(tokens).mean(1))))


class Repeated(nn.Module):
    """One submodule called several times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = torch.tanh(self.cell(h))
        return self.head(h)


def frozen() -> nn.Module:
    model = relu_mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Unused(nn.Module):
    """One parameter and one layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.net = mlp()
        self.never = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class InplaceRelu(nn.Module):
    """In-place activations, a zero-dimensional parameter and a buffer counted in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return self.gain * self.head(F.relu(self.first(x), inplace=True))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(2, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor, context: Tensor, *, scale: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.a(x) * torch.sigmoid(self.b(context)))
        return self.head(hidden if scale is None else hidden * scale)


class DictOutputs(nn.Module):
    """A dict with more in it than the criterion gets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "other": self.other(hidden), "logits": self.head(hidden)}


class TupleOutputs(DictOutputs):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out["other"], out["logits"]


# -------------------------------------------------------------------------------------------------------- criteria


class HalvedMSE(nn.MSELoss):
    """A subclass of a known loss with another factor."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) / 2


class Tempered(nn.CrossEntropyLoss):
    """A subclass of a known loss that does something else with the logits."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input / 0.5, target)


class Focal(nn.Module):
    def __init__(self, gamma: float = 1.5) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)
        return (-self.weight[target] * (1 - log_p.exp()) ** self.gamma * log_p).mean()


class WithPenalty(nn.Module):
    """Known losses inside a criterion of the user's: none of them is the criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.mse = nn.MSELoss()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 3 * self.mse(output, target) + 0.1 * output.pow(4).sum()


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    r = output - target
    return (r + F.softplus(-2 * r)).mean()


def cauchy(output: Tensor, target: Tensor) -> Tensor:
    """Not convex: H_out has negative entries where |output - target| > 1."""
    return torch.log1p((output - target) ** 2).mean()


def coupled(output: Tensor, target: Tensor) -> Tensor:
    """Couples the samples of the batch (a variance): H_out is not block-diagonal."""
    r = output - target
    return r.pow(2).sum(1).mean() + 2 * r.sum(1).var()


# --------------------------------------------------------------------------------------------------------- batches


def regression(n_in: int = 4, n_out: int = 3, spread: float = 1.0) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, n_in), spread * torch.randn(n, n_out))


def classes(*shape: int, k: int = 3) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, *(shape or (4,))), torch.arange(n) % k)


def with_ignored(n: int) -> Batch:
    targets = torch.arange(n) % 3
    targets[1::3] = -100
    return torch.randn(n, 4), targets


def probabilities(n: int) -> Batch:
    return torch.randn(n, 4), torch.randn(n, 3).softmax(-1)


def labels_in_time(ignore: bool) -> Callable[[int], Batch]:
    def batch(n: int) -> Batch:
        targets = torch.randint(0, 3, (n, 5))
        if ignore:
            targets[torch.rand(n, 5) < 0.4] = 7
            targets[0, 0] = 1
        return torch.randn(n, 4, 5), targets

    return batch


def binary(n_out: int = 3) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, 4), torch.randint(0, 2, (n, n_out)).float())


def counts(n: int) -> Batch:
    return torch.randn(n, 4), torch.poisson(torch.full((n, 3), 2.0))


def images(n: int) -> Batch:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 3


def tokens(n: int) -> Batch:
    return torch.randint(0, 7, (n, 4)), torch.randint(0, 7, (n,))


def bags(n: int) -> Batch:
    return (torch.randint(0, 11, (3 * n,)), torch.arange(0, 3 * n, 3)), torch.arange(n) % 3


def language(n: int) -> Batch:
    """Next-token targets, already flattened as the user's loop does; 0 is padding."""
    text = torch.randint(1, 9, (n, 4))
    text[-1, 2:] = 0
    targets = torch.randint(1, 4, (n, 4))
    targets[text == 0] = 0
    return text, targets.view(-1)


MSE, CE = nn.MSELoss, nn.CrossEntropyLoss
SEQUENCE = functools.partial(classes, 5, 4)

CASES = [
    # --- losses x reductions, on one small MLP
    Case("mse-mean", mlp, MSE, regression(), squared=True),
    Case("mse-sum", mlp, lambda: MSE(reduction="sum"), regression(), squared=True),
    Case("mse-one-output", lambda: mlp(n_out=1), MSE, regression(n_out=1), squared=True),
    Case("mse-large-residuals", mlp, MSE, regression(spread=30.0), squared=True),
    Case("mse-functional", mlp, lambda: F.mse_loss, regression(), squared=None),
    Case("mse-half-sum", mlp, lambda: lambda o, t: 0.5 * ((o - t) ** 2).sum(), regression(), squared=None),
    Case("mse-sum-over-n", mlp, lambda: lambda o, t: ((o - t) ** 2).sum() / len(o), regression(), squared=None),
    Case("mse-subclass-halved", mlp, HalvedMSE, regression(), squared=None),
    Case("mse-inside-user-criterion", mlp, WithPenalty, regression()),
    Case("ce", mlp, CE, classes()),
    Case("ce-sum", mlp, lambda: CE(reduction="sum"), classes()),
    Case("ce-class-weights", mlp, lambda: CE(weight=torch.tensor([0.2, 1.0, 3.0])), classes()),
    Case("ce-class-weights-sum", mlp, lambda: CE(weight=torch.tensor([0.2, 1.0, 3.0]), reduction="sum"), classes()),
    Case("ce-label-smoothing", mlp, lambda: CE(label_smoothing=0.2), classes()),
    Case("ce-ignore-index", mlp, CE, with_ignored),
    Case("ce-ignore-index-own-sum", mlp, lambda: CE(ignore_index=1, reduction="sum"), classes()),
    Case(
        "ce-weights-smoothing-ignore",
        mlp,
        lambda: CE(weight=torch.tensor([0.2, 1.0, 3.0]), label_smoothing=0.1, ignore_index=-100),
        with_ignored,
    ),
    Case("ce-probabilities", mlp, CE, probabilities),
    Case(
        "ce-probabilities-weights-smoothing",
        mlp,
        lambda: CE(weight=torch.tensor([0.2, 1.0, 3.0]), label_smoothing=0.1),
        probabilities,
    ),
    Case("ce-functional", mlp, lambda: F.cross_entropy, classes()),
    Case("ce-partial", mlp, lambda: functools.partial(F.cross_entropy, label_smoothing=0.3), classes()),
    Case("ce-subclass-tempered", mlp, Tempered, classes()),
    Case("ce-sequence", temporal, CE, labels_in_time(ignore=False)),
    Case("ce-sequence-sum", temporal, lambda: CE(reduction="sum"), labels_in_time(ignore=False)),
    Case(
        "ce-sequence-weights-ignore",
        temporal,
        lambda: CE(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=7),
        labels_in_time(ignore=True),
    ),
    Case(
        "ce-dense-prediction",
        segmentation,
        CE,
        lambda n: (torch.randn(n, 1, 2, 3), torch.randint(0, 3, (n, 2, 3))),
    ),
    Case("bce", mlp, nn.BCEWithLogitsLoss, binary()),
    Case("bce-pos-weight", mlp, lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.3, 1.0, 4.0])), binary()),
    Case(
        "bce-weight-pos-weight-sum",
        mlp,
        lambda: nn.BCEWithLogitsLoss(
            weight=torch.tensor([2.0, 0.5, 1.0]), pos_weight=torch.tensor([0.3, 1.0, 4.0]), reduction="sum"
        ),
        binary(),
    ),
    Case("huber", mlp, lambda: nn.HuberLoss(delta=0.7), regression()),
    Case("smooth-l1-sum", mlp, lambda: nn.SmoothL1Loss(beta=0.7, reduction="sum"), regression()),
    Case("poisson-nll", mlp, nn.PoissonNLLLoss, counts),
    Case("log-cosh", mlp, lambda: log_cosh, regression(spread=0.5)),
    Case("focal", mlp, Focal, classes()),
    Case("not-convex", mlp, lambda: cauchy, regression()),
    Case("samples-coupled", mlp, lambda: coupled, regression()),
    # --- architectures
    Case("linear", lambda: nn.Linear(4, 3), MSE, regression(), squared=True),
    Case("mlp-relu", relu_mlp, MSE, regression(), squared=True),
    Case("cnn", cnn, CE, images),
    Case("cnn-mse", cnn, MSE, lambda n: (torch.randn(n, 1, 8, 8), torch.randn(n, 3)), squared=True, hessian=False),
    Case("cnn-batchnorm", cnn_batchnorm, CE, images),
    Case("batchnorm", batchnorm, MSE, regression(), squared=True),
    Case("batchnorm-cumulative", lambda: batchnorm(None), CE, classes(), hessian=False),
    Case("batchnorm-partly-frozen", batchnorm_partly_frozen, MSE, regression(), squared=True),
    Case("eval-mode", eval_mode, CE, classes()),
    Case("layernorm", layernorm, CE, classes()),
    Case("groupnorm", groupnorm, CE, images),
    Case("dropout", dropout, MSE, regression(), squared=True),
    Case("dropout-ce", dropout, CE, classes(), hessian=False),
    Case("batchnorm-dropout", batchnorm_dropout, CE, classes()),
    Case("weight-norm", weight_norm, MSE, regression(), squared=True),
    Case("gru", lambda: Recurrent(nn.GRU), CE, SEQUENCE()),
    Case(
        "lstm",
        lambda: Recurrent(nn.LSTM),
        MSE,
        lambda n: (torch.randn(n, 5, 4), torch.randn(n, 3)),
        squared=True,
        hessian=False,
    ),
    Case(
        "lstm-dropout", lambda: Recurrent(nn.LSTM, hidden=2, num_layers=2, dropout=0.3), CE, SEQUENCE(), hessian=False
    ),
    Case("attention-sdpa", Attention, CE, SEQUENCE()),
    Case("attention-sdpa-dropout", lambda: Attention(0.2), CE, SEQUENCE(), hessian=False),
    Case("multihead-attention", MultiHead, CE, SEQUENCE()),
    Case("multihead-attention-dropout", lambda: MultiHead(0.2), CE, SEQUENCE(), hessian=False),
    Case("transformer-block", TransformerBlock, CE, SEQUENCE(), hessian=False),
    Case("embedding-bag", Bag, CE, bags),
    Case("tied-weights", Tied, CE, tokens),
    Case("repeated-module", Repeated, MSE, regression(), squared=True),
    Case("frozen-parameters", frozen, MSE, regression(), squared=True),
    Case("unused-parameters", Unused, CE, classes()),
    Case("inplace-and-scalar", InplaceRelu, CE, classes()),
    # --- inputs, outputs, and the user's code between model and criterion
    Case("several-inputs", TwoInputs, CE, lambda n: ((torch.randn(n, 4), torch.randn(n, 2)), torch.arange(n) % 3)),
    Case(
        "keyword-inputs",
        TwoInputs,
        MSE,
        lambda n: (
            {"x": torch.randn(n, 4), "context": torch.randn(n, 2), "scale": torch.tensor(0.7)},
            torch.randn(n, 3),
        ),
        squared=True,
    ),
    Case("dict-outputs", DictOutputs, CE, classes(), outputs=lambda out: out["logits"]),
    Case("tuple-outputs", TupleOutputs, MSE, regression(), outputs=lambda out: out[1], squared=True),
    Case(
        "squeeze",
        lambda: mlp(n_out=1),
        nn.BCEWithLogitsLoss,
        lambda n: (torch.randn(n, 4), (torch.arange(n) % 2).float()),
        outputs=lambda out: out.squeeze(1),
    ),
    Case(
        "squeeze-mse",
        lambda: mlp(n_out=1),
        MSE,
        lambda n: (torch.randn(n, 4), torch.randn(n)),
        outputs=lambda out: out.squeeze(1),
        squared=True,
    ),
    Case("view", SequenceModel, lambda: CE(ignore_index=0), language, outputs=lambda out: out.view(-1, 4)),
    Case(
        "nonlinear-between",
        mlp,
        MSE,
        regression(),
        outputs=lambda out: 2 * torch.sigmoid(out[:, [2, 0, 1]]),
        squared=True,
    ),
]

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "case names must be unique"
