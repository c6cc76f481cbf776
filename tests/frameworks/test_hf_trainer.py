"""Promise: in the Trainer of transformers a training is, to the bit, that of the plain PyTorch loop.

A tiny GPT-2 with random weights, which returns its own loss (criterion=None): measured is the loss' full Hessian.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from framework_loop import FEATURES, Feature, Seen, assert_same, schedule_for
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from catapult_opt import CatapultLR, CatapultSGD

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, BATCHES, LENGTH, WORDS = 4, 6, 8, 32


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Accelerate keeps one state a process; it has no public way to start over."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Words(Dataset[dict[str, Tensor]]):
    """Random words, the same every time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(WORDS, (BATCH * BATCHES, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.words[i]}


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def optimizer_for(kind: str, model: nn.Module, feature: Feature, **more: Any) -> tuple[Any, Any]:
    groups: Any = [p for p in model.parameters() if p.requires_grad]
    if feature.groups:
        groups = [
            {"params": [p for p in groups if p.ndim == 2]},
            {"params": [p for p in groups if p.ndim < 2], "lr": 0.5},
        ]
    connection: dict[str, Any] = {"model": model, "criterion": None, "every": 1, **more}
    if kind == "CatapultSGD":
        optimizer: Any = CatapultSGD(groups, **connection)
        return optimizer, optimizer
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    return optimizer, CatapultLR(optimizer, **connection)


def plain(kind: str, feature: Feature, size: int = BATCH) -> Seen:
    """What the Trainer does, by hand: the losses of a step are summed over its words and divided by their number."""
    model, words, seen = gpt2(), Words().words, Seen()
    optimizer, watch = optimizer_for(kind, model, feature)
    schedule = schedule_for(optimizer) if feature.schedule else None
    called = torch.compile(model, backend="eager") if feature.compile else model
    model.train()
    for _ in range(feature.epochs):
        for step in words.split(size * feature.accumulate):
            for batch in step.split(size):
                count = torch.tensor(step.numel())
                with torch.autocast("cpu", torch.bfloat16) if feature.amp else nullcontext():
                    called(input_ids=batch, labels=batch, num_items_in_batch=count).loss.backward()
            if feature.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), feature.clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
            seen.step(optimizer, watch)
    return seen.end(model)


class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def __init__(self, optimizer: Any, watch: Any) -> None:
        self.optimizer, self.watch, self.seen = optimizer, watch, Seen()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.step(self.optimizer, self.watch)


def trainer(kind: str, feature: Feature, out: Path, process_group: Any = None, **settings: Any) -> tuple[Any, Look]:
    model = gpt2()
    optimizer, watch = optimizer_for(kind, model, feature, process_group=process_group)
    schedule = schedule_for(optimizer) if feature.schedule else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        num_train_epochs=feature.epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=feature.accumulate,
        max_grad_norm=feature.clip or 0.0,
        bf16=feature.amp,
        torch_compile=feature.compile,
        torch_compile_backend="eager" if feature.compile else None,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy=settings.pop("save_strategy", "no"),
        train_sampling_strategy="sequential",
        **settings,
    )
    look = Look(optimizer, watch)
    made = transformers.Trainer(
        model, arguments, train_dataset=Words(), optimizers=(optimizer, schedule), callbacks=[look]
    )
    return made, look


def train(kind: str, feature: Feature, out: Path) -> Seen:
    made, look = trainer(kind, feature, out)
    made.train()
    return look.seen.end(made.model)


SLOW = pytest.param("compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("feature", [SLOW if name == "compile" else name for name in FEATURES if name != "amp"])
def test_trainer(feature: str, tmp_path: Path) -> None:
    assert_same(train("CatapultSGD", FEATURES[feature], tmp_path), plain("CatapultSGD", FEATURES[feature]))


def test_amp(tmp_path: Path) -> None:
    """The measurement is in full precision, so the first one is that of the training without autocast."""
    ours, oracle = train("CatapultSGD", FEATURES["amp"], tmp_path), plain("CatapultSGD", Feature())
    assert ours.eta_crit[0] == pytest.approx(oracle.eta_crit[0], rel=0.01)


def test_resume(tmp_path: Path) -> None:
    """From the checkpoint of the first epoch another Trainer goes on as the run of two epochs."""
    whole = plain("CatapultSGD", Feature(epochs=2))
    first, before = trainer("CatapultSGD", Feature(), tmp_path, save_strategy="epoch")
    first.train()
    second, after = trainer("CatapultSGD", Feature(epochs=2), tmp_path)
    second.train(resume_from_checkpoint=True)
    assert before.seen.eta_crit + after.seen.eta_crit == whole.eta_crit
    assert all(torch.equal(p, q) for p, q in zip(second.model.parameters(), whole.weights, strict=True))


def test_critical_rate_of_adamw_on_gpt2() -> None:
    """Against Lanczos on the preconditioned Hessian by double backward, in float64."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    words = (torch.randint(64, (8, 1)) + torch.arange(16)) % 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CatapultLR(optimizer, model=model, criterion=None)
    model(input_ids=words, labels=words).loss.backward()
    exact = copy.deepcopy(model).double()
    params = list(exact.parameters())
    roots = torch.cat([p.grad.double().abs().add(1e-8).rsqrt().flatten() for p in model.parameters()])
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(exact(input_ids=words, labels=words).loss, params, create_graph=True)

        def product(v: np.ndarray) -> np.ndarray:
            parts = (roots * torch.from_numpy(v).flatten()).split([p.numel() for p in params])
            shaped = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
            got = torch.autograd.grad(slope, params, shaped, retain_graph=True)
            return (roots * torch.cat([g.flatten() for g in got])).numpy()

        operator = LinearOperator((len(roots),) * 2, matvec=product, dtype=np.float64)
        expected = float(eigsh(operator, k=1, which="LA", tol=1e-3, return_eigenvectors=False)[0])
    optimizer.step()
    assert controller.last is not None
    assert controller.last.lambda_max == pytest.approx(expected, rel=0.01)


def test_catapult_lr_on_adamw(tmp_path: Path) -> None:
    assert_same(train("CatapultLR", Feature(), tmp_path), plain("CatapultLR", Feature()))
