"""What the step saw: hooks on the model and the criterion keep the batches of the step about to be measured.

Every criterion call of a step leaves its value; on a step that will be measured (`Capture.arm`) it also leaves what is
needed to run the forward pass again (see `replay`). Calls whose backward pass never ran (validation) do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .criterion import loss_of, scalar_loss
from .distributed import local
from .grad_scaler import LossScaler, UnannouncedScaler, scale_of
from .link import LossCall, connect, unique
from .replay import ForwardCall, is_measuring, record_forward


class Capture:
    """Hooks on a model and its criterion; hands out the loss calls of the step.

    Args:
        model: the module called in the loop.
        criterion: the module called in the loop, or None where the model's output is (or holds) the loss.
        params: gives the optimizer's trainable parameters, which may change (groups added, layers unfrozen).
        outputs: with criterion None, picks the scalar loss from what the model returns.
        grad_scaler: the torch.amp.GradScaler that scales the step's loss, if one does.
        called: the wrapper that the loop calls and whose outputs it sees, where the model is inside one.

    A criterion call is kept alive by its loss until backward runs: a loss that is thrown away (validation with
    gradients enabled) frees its graph at once, as it would without hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        params: Callable[[], Sequence[Tensor]],
        outputs: Callable[[Any], Any] | None = None,
        grad_scaler: LossScaler | None = None,
        called: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self._scaler = grad_scaler
        self._unannounced = UnannouncedScaler() if grad_scaler is None else None
        self.armed = False
        self.compiled = False  # is the hook that runs part of compiled code?
        self.forwards_seen = 0
        self._calls_seen = 0
        self._params = params
        self._outputs = outputs
        self._done: list[LossCall] = []  # backward ran
        self._forwards: list[ForwardCall] = []  # not used by a criterion call yet
        self._used: list[weakref.ref[ForwardCall]] = []  # alive as long as a call that uses them
        self._started: list[ForwardCall] = []
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "_before_forward"), with_kwargs=True),
            (model if called is None else called).register_forward_hook(
                _Hook(self, "_after_forward"), with_kwargs=True
            ),
        ]
        if criterion is not None:
            hook = _Hook(self, "_after_criterion")
            self._handles.append(criterion.register_forward_hook(hook, with_kwargs=True))
        weakref.finalize(self, _remove, self._handles)

    def arm(self, on: bool = True) -> None:
        """From the next forward pass on, keep what a measurement needs (or only the loss values)."""
        self.armed = on

    def take(self) -> list[LossCall]:
        """The step's loss calls whose backward pass ran, and forget everything: the next step starts clean."""
        calls = self._done
        if self._scaler is not None and len(calls) > 1:
            calls = _without_skipped(calls, scale_of(self._scaler, calls[0].value), self.armed)
        self.clear()
        if self._unannounced is not None:  # a scaler is there from the first step on
            self._unannounced.stop()
            self._unannounced = None
        return calls

    @property
    def pending(self) -> bool:
        """Was there any criterion call since the last step?"""
        return self._calls_seen > 0

    def problem(self) -> str | None:
        """Why the step has no loss to work with and what to do, or None."""
        name = type(self.model).__name__
        if self.forwards_seen == 0:
            return (
                f"step() found no forward pass of model ({name}) with gradients enabled since the last step: "
                "call the very module passed as model=, not under torch.no_grad()"
            )
        if self._done:
            return self._unannounced.problem() if self._unannounced is not None else None
        if not self.pending:
            what = "loss that needs gradients" if self.criterion is None else f"call of {type(self.criterion).__name__}"
            return (
                f"step() found a forward pass of model ({name}) but no {what}: call the very criterion passed as "
                "criterion= on the model's outputs; a plain function has to be called as optimizer.criterion(...)"
            )
        return "step() found no backward pass since the last step: call loss.backward() first"

    def clear(self) -> None:
        self._done, self._forwards, self._used, self._started = [], [], [], []
        self.forwards_seen = self._calls_seen = 0

    def drop_finished(self) -> None:
        """Forget the calls whose backward pass already ran: their gradients were thrown away (zero_grad)."""
        self._done = []

    def detach(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)
        if self._unannounced is not None:
            self._unannounced.stop()
        self.clear()

    # hooks; all return None, so that nothing of the user's is changed

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_measuring(self.model) or not torch.is_grad_enabled():
            return
        self.forwards_seen += 1
        if self.armed:
            self._started.append(record_forward(self.model, self._params(), args, kwargs, self.compiled))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_measuring(self.model) or not torch.is_grad_enabled():
            return
        forward = self._started.pop() if self._started else None
        if self.criterion is None:
            loss = loss_of(output, self._outputs)
            if loss.requires_grad:
                self._append(LossCall(loss.detach(), forwards=[forward] if forward else []), loss)
        elif forward is not None:
            forward.finish(output)
            self._forwards.append(forward)

    def _after_criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if is_measuring(self.model):
            return
        if not scalar_loss(loss).requires_grad:
            return
        call = LossCall(loss.detach(), criterion=module)
        if self.armed:
            self._connect(call, args, kwargs)
        self._append(call, loss)

    def _connect(self, call: LossCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = [forward for ref in self._used if (forward := ref()) is not None]
        connect(call, [*used, *self._forwards], args, kwargs)
        self._used = [weakref.ref(forward) for forward in unique([*used, *call.forwards])]
        self._forwards = [f for f in self._forwards if not any(f is forward for forward in call.forwards)]

    def _append(self, call: LossCall, loss: Tensor) -> None:
        self._calls_seen += 1
        call.number = self._calls_seen
        loss.register_hook(_Weigh(self, call))  # type: ignore[no-untyped-call]

    def _backward_ran(self, call: LossCall, weight: Tensor) -> None:
        if self._done and all(p.grad is None and local(p) is p for p in self._params()):
            # Gradients were reset and no step came: that one was skipped (GradScaler). Terms of this same backward pass
            # have no gradients yet either, but they had not finished when this call was made. Sharded parameters do not
            # show what micro-batches without synchronisation left.
            self._done = [done for done in self._done if done.latest_at_backward >= call.number]
        call.weight, call.latest_at_backward = weight.detach(), self._calls_seen
        if self._scaler is not None:
            call.scale = scale_of(self._scaler, call.weight)
            call.weight = call.weight / call.scale
        elif self._unannounced is not None and self.armed:
            self._unannounced.watch(call.weight, self._params())
        if not any(done is call for done in self._done):
            self._done.append(call)


class _Hook:
    """A hook that does not keep its capture alive and is inert in a deep copy or a pickle of the model.

    Where the loop calls a compiled version of the model, the hook is compiled in; what it does then stays outside.
    """

    def __init__(self, capture: Capture | None = None, method: str = "") -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._method = method
        self._outside = _call if capture is None else torch.compiler.disable(_call)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> None:
        capture = self._capture() if self._capture is not None else None
        if capture is None:
            return
        if torch.compiler.is_compiling():
            self._outside(capture, self._method, True, args)
        else:  # the way outside takes its time
            _call(capture, self._method, False, args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _call(capture: Capture, method: str, compiled: bool, args: tuple[Any, ...]) -> None:
    capture.compiled = compiled
    getattr(capture, method)(*args)


class _Weigh:
    """Tensor hook on a loss: tells its weight in the step's loss once backward runs."""

    def __init__(self, capture: Capture, call: LossCall) -> None:
        self._capture, self._call = weakref.ref(capture), call

    def __call__(self, grad: Tensor) -> None:
        capture = self._capture()
        if capture is not None and not is_measuring(capture.model):
            capture._backward_ran(self._call, grad)


def _without_skipped(calls: list[LossCall], scale: Tensor, drop: bool) -> list[LossCall]:
    """Without those of another scale: theirs was a step that the scaler skipped, lowering its scale.

    Emptied where they may not be dropped, which takes reading the scales from the device.
    """
    if drop:
        return [call for call in calls if call.scale is None or bool(call.scale == scale)]
    for call in calls:
        assert call.weight is not None and call.scale is not None
        call.value = torch.where(call.scale == scale, call.value, 0)
        call.weight = torch.where(call.scale == scale, call.weight, 0)
    return calls


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
