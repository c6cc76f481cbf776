"""What the step saw: hooks on the model and the criterion keep the batches of the step about to be measured.

Every criterion call of a step leaves its value; on a step that will be measured (`Capture.arm`) it also leaves what is
needed to run the forward pass again (see `replay`). Calls whose backward pass never ran (validation) do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .distributed import local
from .replay import ForwardCall, is_measuring, record_forward
from .scaling import LossScaler, UnannouncedScaler, scale_of
from .trees import tensors_in


class LossModule(nn.Module):
    """A plain loss function (outputs, targets) -> scalar as a module, so that its calls can be observed.

    Hooks exist on modules only: a loop that uses a function or a lambda calls `LossModule(function)` in its place.

    Example:
        >>> criterion = LossModule(torch.nn.functional.mse_loss)
        >>> criterion(torch.ones(3), torch.zeros(3))
        tensor(1.)
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        if not callable(function):
            raise TypeError(f"function must be a callable (outputs, targets) -> loss, got {function!r}")
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def as_module(criterion: Any) -> nn.Module:
    """The criterion itself if it is a module, else wrapped as one."""
    if isinstance(criterion, nn.Module):
        return criterion
    if callable(criterion):
        return LossModule(criterion)
    raise TypeError(f"criterion must be an nn.Module or a callable (outputs, targets) -> loss, got {criterion!r}")


@dataclass
class LossCall:
    """One term of the step's loss: a criterion call, the forward passes it depends on, and its weight in the sum."""

    value: Tensor  # detached, 0-d
    weight: Tensor | None = None  # d(step's loss) / d(value), known once backward ran; a GradScaler's factor taken out
    scale: Tensor | None = None  # that factor
    criterion: nn.Module | None = None  # None: the model returned the loss itself
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)  # the tensors among args that depend on the model's outputs
    forwards: list[ForwardCall] = field(default_factory=list)
    link: Link | None = None  # from the model's outputs to `inputs`; None: they are the same tensors
    problem: str = ""  # why it cannot be measured
    made: int = 0  # number of this call since the last step
    finished: int = 0  # number of the latest call when its backward ran


class Link:
    """The user's code between the model's outputs and the criterion, linearised: products with its Jacobian J_g.

    Built while the training graph is alive. Each input of the criterion is taken for itself: another one may be
    computed from the same outputs by way of the model.
    """

    def __init__(self, outputs: list[Tensor], edges: list[list[GradientEdge | None]], inputs: list[Tensor]) -> None:
        self._outputs = [torch.zeros_like(o) for o in outputs]
        self._rows = [_Row(outputs, row, z) for row, z in zip(edges, inputs, strict=True)]

    def jvp(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """J_g t, one tensor per criterion input, for one tangent per output."""
        return [row.jvp(tangents) for row in self._rows]

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """J_g^T s, one tensor per output, for one cotangent per criterion input."""
        total = [o.clone() for o in self._outputs]
        for row, s in zip(self._rows, cotangents, strict=True):
            for x, g in zip(total, row.vjp(s), strict=True):
                if g is not None:
                    x.add_(g)
        return total


class _Row:
    """J_g of one input, from its own backward pass: vjp(v) = J_g^T v is linear in v, so its derivative gives J_g t.

    Only the graph between outputs and input is touched.
    """

    def __init__(self, outputs: list[Tensor], edges: list[GradientEdge | None], z: Tensor) -> None:
        """`edges`: where the graph enters the outputs; None for those that z is not directly computed from."""
        self._zero, self._v = torch.zeros_like(z), torch.ones_like(z, requires_grad=True)
        self._n = len(outputs)
        direct = [(i, edge) for i, edge in enumerate(edges) if edge is not None]
        pulled: Sequence[Tensor | None] = ()
        if direct:
            inputs = [edge for _, edge in direct]
            pulled = torch.autograd.grad([z], inputs, [self._v], create_graph=True, allow_unused=True)
        used = [(i, y) for (i, _), y in zip(direct, pulled, strict=True) if y is not None and _moves(y)]
        self._places, self._pulled = [i for i, _ in used], [y for _, y in used]
        self._t = [torch.zeros_like(outputs[i], requires_grad=True) for i in self._places]
        self._pushed = [self._push(y, t) for y, t in zip(self._pulled, self._t, strict=True)]

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        if not self._places:
            return self._zero
        used = [tangents[i].to(y.dtype) for i, y in zip(self._places, self._pulled, strict=True)]
        return torch.autograd.grad(self._pulled, [self._v], used, retain_graph=True)[0]

    def vjp(self, s: Tensor) -> list[Tensor | None]:
        pulled: list[Tensor | None] = [None] * self._n
        if self._places:
            seeds = [s.to(y.dtype) for y in self._pushed]
            for i, g in zip(
                self._places, torch.autograd.grad(self._pushed, self._t, seeds, retain_graph=True), strict=True
            ):
                pulled[i] = g
        return pulled

    def _push(self, y: Tensor, t: Tensor) -> Tensor:
        pushed = torch.autograd.grad([y], [self._v], [t], create_graph=True, allow_unused=True)[0]
        if pushed is None:
            raise RuntimeError("its backward pass cannot be differentiated")
        return pushed


def _moves(pulled: Tensor) -> bool:
    """Does J_g^T v depend on v? A derivative of zero (rounding) does not; one that only looks constant is refused."""
    if not pulled.requires_grad and bool(pulled.any()):
        raise RuntimeError("its backward pass cannot be differentiated")
    return pulled.requires_grad


class Capture:
    """Hooks on a model and its criterion; hands out the loss calls of the step.

    Args:
        model: the module called in the loop.
        criterion: the module called in the loop, or None where the model's output is (or holds) the loss.
        params: gives the optimizer's trainable parameters, which may change (groups added, layers unfrozen).
        outputs: with criterion None, picks the scalar loss from what the model returns.
        grad_scaler: the torch.amp.GradScaler that scales the step's loss, if one does.
        called: the wrapper that the loop calls and whose outputs it sees, where the model stands inside one.

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
        self._used = [weakref.ref(forward) for forward in _unique([*used, *call.forwards])]
        self._forwards = [f for f in self._forwards if not any(f is forward for forward in call.forwards)]

    def _append(self, call: LossCall, loss: Tensor) -> None:
        self._calls_seen += 1
        call.made = self._calls_seen
        loss.register_hook(_Weigh(self, call))  # type: ignore[no-untyped-call]

    def _backward_ran(self, call: LossCall, weight: Tensor) -> None:
        if self._done and all(p.grad is None and local(p) is p for p in self._params()):
            # Gradients were reset and no step came: that one was skipped (GradScaler). Terms of this same backward pass
            # have no gradients yet either, but they had not finished when this call was made. Sharded parameters do not
            # show what micro-batches without synchronisation left.
            self._done = [done for done in self._done if done.finished >= call.made]
        call.weight, call.finished = weight.detach(), self._calls_seen
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


def loss_of(output: Any, outputs: Callable[[Any], Any] | None) -> Tensor:
    """The scalar loss in a model's output: picked by `outputs`, or the output itself, or its `.loss` / ["loss"]."""
    loss = outputs(output) if outputs is not None else output
    if not isinstance(loss, Tensor):
        loss = loss.get("loss") if hasattr(loss, "get") else getattr(loss, "loss", None)
    if not (isinstance(loss, Tensor) and loss.dim() == 0):
        raise ValueError(
            "criterion=None needs a model that returns a scalar loss (or an output with a scalar .loss); "
            f"got {type(output).__name__}: pass outputs=lambda out: ... that picks it, or pass the criterion"
        )
    return loss


def scalar_loss(loss: Any) -> Tensor:
    """The criterion's value, a ValueError if it is not a 0-d tensor."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(
        f"criterion must return a scalar (0-d) tensor, got {got}: use reduction='mean' or 'sum', or reduce inside it"
    )


def connect(call: LossCall, forwards: Sequence[ForwardCall], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find which arguments of a criterion call depend on which forward passes, and how. Before backward runs."""
    inputs = [t for t in _unique(tensors_in((args, kwargs))) if t.requires_grad and t.is_floating_point()]
    at = {id(o): (f, edge) for f in forwards for o, edge in zip(f.outputs, f.edges, strict=True)}
    if inputs and all(id(z) in at and _same(get_gradient_edge(z), at[id(z)][1]) for z in inputs):
        call.args, call.kwargs, call.inputs = args, kwargs, inputs
        call.forwards = _unique([at[id(z)][0] for z in inputs])
        return
    inputs = [z for z in inputs if z.grad_fn is not None]
    every = [edge for f in forwards for edge in f.edges]
    direct = [_direct([get_gradient_edge(z)], every) for z in inputs]
    used = [edge for edges in direct for edge in edges]
    call.forwards = [f for f in forwards if any(_is_in(edge, used) for edge in f.edges)]
    if not call.forwards:
        return
    call.args, call.kwargs, call.inputs = args, kwargs, inputs
    if any(len(edges) > 1 and any(_direct(_before(edge), edges) for edge in edges) for edges in direct):
        call.problem = (
            "what the criterion is given mixes outputs of the model of which one is computed from the other: give them "
            "to the criterion as arguments of their own, and combine them there"
        )
        return
    outputs, every = [o for f in call.forwards for o in f.outputs], [edge for f in call.forwards for edge in f.edges]
    rows = [[edge if _is_in(edge, edges) else None for edge in every] for edges in direct]
    try:
        with torch.enable_grad():
            call.link = Link(outputs, rows, inputs)
    except RuntimeError as error:
        call.problem = (
            f"the code between model and criterion has no second derivative; move it into the model ({error})"
        )


def _direct(starts: list[GradientEdge], ends: list[GradientEdge]) -> list[GradientEdge]:
    """The ends that the starts are computed from without another end in between."""
    goals = {_key(edge): edge for edge in ends}
    found, seen, todo = {}, set(), list(starts)
    while todo:
        edge = todo.pop()
        if _key(edge) in seen:
            continue
        seen.add(_key(edge))
        if _key(edge) in goals:
            found[_key(edge)] = goals[_key(edge)]
        else:
            todo += _before(edge)
    return list(found.values())


def _before(edge: GradientEdge) -> list[GradientEdge]:
    return [GradientEdge(node, number) for node, number in edge.node.next_functions if node is not None]


def _key(edge: GradientEdge) -> tuple[Node, int]:
    return edge.node, edge.output_nr


def _same(a: GradientEdge, b: GradientEdge) -> bool:
    return _key(a) == _key(b)


def _is_in(edge: GradientEdge, edges: list[GradientEdge]) -> bool:
    return any(_same(edge, other) for other in edges)


def _unique(items: list[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())
