"""An optimizer that carries a controller with it: through copies, checkpoints and new groups of parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .checkpoint import STATE, checked
from .controller import Controller
from .options import MeasuringOptions
from .parameters import check_model, params_of
from .policy import CatapultPolicy
from .state import parse
from .step_hook import Face, attend


class ControlledOptimizer(Face, Optimizer):
    """What `CatapultSGD` is beside its update: an optimizer that holds its controller.

    The controller's numbers are in every parameter group as one JSON string, written when somebody asks for the
    optimizer's state; its tensors are in the parameters' states. Copies and pickles keep both, but no hooks.
    """

    _controller: Controller | None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._controller, self._observer, self._recorder = None, None, None

    def __repr__(self) -> str:
        """As torch's, without the controller's state, which is long and for checkpoints only."""
        lines = super().__repr__().splitlines()
        return "\n".join(line for line in lines if not line.lstrip().startswith(STATE))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its parameters have to be the model's."""
        controller = self.__dict__.get("_controller")  # not there yet while the constructor adds the first groups
        before = len(self.param_groups)
        super().add_param_group(param_group)
        if controller is None:
            return
        try:
            check_model(controller.observer.model, self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[before:]
            raise
        self._complete_groups()

    def attach(
        self, *, model: nn.Module, criterion: Any, policy: CatapultPolicy | None = None, **measuring: Any
    ) -> None:
        """(Re)connect to model and criterion: after a deep copy or unpickling, which keep the state but no hooks.

        Args:
            model, criterion, policy: as for the constructor.
            measuring: every, overhead, engine, log, outputs, grad_scaler, process_group, as for the constructor.

        Raises:
            ValueError, TypeError: an argument is not usable; says which and why. Nothing was changed.
        """
        self._attach(model, criterion, policy, MeasuringOptions(**measuring))

    def _attach(
        self, model: nn.Module, criterion: Any, policy: CatapultPolicy | None, options: MeasuringOptions
    ) -> None:
        settings = {k: float(v) if isinstance(v, Tensor) else v for k, v in self.defaults.items()}
        controller = Controller(
            type(self).__name__,
            self,
            model,
            criterion,
            policy=policy,
            options=options,
            state=self.state,
            settings=settings,
        )
        self._store()
        try:
            text = self.param_groups[0].get(STATE)  # also of the optimizer that this one is a copy of
            state = controller.parse(parse(text)) if text else None
        except ValueError:
            controller.close()
            raise
        self.detach()
        self._controller, self._observer, self._recorder = controller, controller.observer, controller.recorder
        attend(self)
        self._complete_groups()
        if state is not None:
            controller.take(state)

    def detach(self) -> None:
        """Remove the hooks from model and criterion and close the log. `step()` then needs a new `attach`.

        What was counted can still be read.
        """
        if self._controller is not None:
            self._store()
            self._controller.close()
            attend(self, False)
        self._controller = None

    @property
    def phase(self) -> str | None:
        """What the policy does, see `policy`; None without a model."""
        return None if self._controller is None else self._controller.phase

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate the averaged weights: they and their buffers are in the model inside, and back to the bit after it.

        The average runs over calm steps only, so that it never lies in a catapult. Inside, `step()` is refused.

        Raises:
            RuntimeError: there is no model.

        Example:
            >>> from catapult_opt import CatapultSGD
            >>> model = nn.Linear(2, 1)
            >>> optimizer = CatapultSGD(model.parameters(), model=model, criterion=nn.MSELoss())
            >>> with optimizer.averaged():
            ...     outputs = model(Tensor([[1.0, 2.0]]))
        """
        with self._attached().averaged():
            yield

    def use_averaged(self) -> None:
        """Put the averaged weights and buffers into the model for good, at the end of a training.

        Raises:
            RuntimeError: there is no model.
        """
        self._attached().restore()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Absent after unpickling and deep copies (the state of an Optimizer is its groups), kept by load_state_dict.
        for name in ("_controller", "_observer", "_recorder"):
            self.__dict__.setdefault(name, None)
        if self._controller is not None:  # load_state_dict makes a new mapping
            self._controller.memory.keep_in(self.state)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: as the state dict, with the controller's state of this very step."""
        self._store()
        state: dict[str, Any] = super().__getstate__()
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's own, with the controller's state of this very step."""
        self._store()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict: the run then goes on as it would have gone where it was taken, to the bit.

        Parameters are told apart by their names in the model where the state holds them: the same ones in another order
        within their groups are put in order.

        Raises:
            ValueError: with a model, for the state dict of another optimizer, whose lr is a rate and not a multiplier,
                or a controller's state that is damaged; names the field. The state before stays as it was.
        """
        controller = self._controller
        if controller is None:
            super().load_state_dict(state_dict)
            return
        state_dict, state = checked(state_dict, controller, params_of(self))
        super().load_state_dict(state_dict)
        self._complete_groups()
        if state is not None:
            controller.take(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; batches whose gradients are thrown away no longer belong to the step."""
        super().zero_grad(set_to_none)
        if self._controller is not None:
            self._controller.observer.drop_finished()

    def _attached(self) -> Controller:
        if self._controller is None:
            raise RuntimeError(
                "this CatapultSGD has no model, and so no average of its weights: pass model=, or attach"
            )
        return self._controller

    def _complete_groups(self) -> None:
        """What a controlled optimizer's groups hold beside torch's."""
        for group in self.param_groups:
            group.setdefault("effective_lr", 0.0)
            group.setdefault(STATE, "")

    def _store(self) -> None:
        """The controller's state into the groups; what a copy without a model has there stays."""
        if self._controller is None:
            return
        text = json.dumps(self._controller.state_dict(params_of(self)))
        for group in self.param_groups:
            group[STATE] = text

    def _refuse_unattached(self) -> None:
        if any(STATE in group for group in self.param_groups):
            raise RuntimeError(
                "this CatapultSGD was copied, unpickled or detached and has no model to measure: call "
                "optimizer.attach(model=..., criterion=...) first"
            )
