"""A state dict of `CatapultSGD` from a checkpoint, checked and put in order before torch takes it over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .controller import Controller, ControllerState
from .memory import check_entries
from .parameters import parameter_names
from .state import parse

# The controller's state but for its tensors, as a JSON string in every group: it survives every kind of checkpoint.
STATE = "catapult_state"
# Where 0.1.0 kept the buffers of its snapshot.
_FORMER_BUFFERS = "catapult_buffers"


def checked(
    state_dict: dict[str, Any], controller: Controller, params: Sequence[Tensor]
) -> tuple[dict[str, Any], ControllerState | None]:
    """The state dict as torch is to take it, and the controller's state in it, if there is one.

    Args:
        state_dict: what `CatapultSGD.state_dict` gave, now or in catapult_opt 0.1.0.
        controller: that is to take it over.
        params: all parameters of the optimizer, in its order.

    Raises:
        ValueError: the state dict of another optimizer, or a damaged one; names the field. Nothing was changed.
    """
    _check_own(state_dict)
    former = next((g.get(_FORMER_BUFFERS) for g in state_dict["param_groups"]), None)
    groups = [{k: v for k, v in g.items() if k != _FORMER_BUFFERS} for g in state_dict["param_groups"]]
    text = groups[0].get(STATE) if groups else ""
    document = parse(text) if text != "" else {}
    state = controller.parse({"buffers": former or {}, **document}) if document else None
    names = parameter_names(controller.observer.model, params)
    groups = _in_order(groups, document.get("parameters"), names)
    entries = dict(state_dict.get("state", {}))
    keys = [key for group in groups for key in group["params"]]
    for key, p, name in zip(keys, params, names, strict=False):
        if key in entries:
            entries[key] = check_entries(entries[key], p, name)
    return {**state_dict, "param_groups": groups, "state": entries}, state


def _in_order(groups: list[dict[str, Any]], saved: Any, names: list[str]) -> list[dict[str, Any]]:
    """The groups with the parameters of each in the order of the present ones, by their names.

    torch goes by the position alone. Where names are not known, or none is to be found again (the model stands inside
    another one now), the position is all there is.

    Raises:
        ValueError: some of the parameters are at other places, and it is not a mere change of order within a group.
    """
    keys = [key for group in groups for key in group["params"]]
    # torch.distributed.checkpoint puts parameters in order itself, and names them by strings.
    if saved == names or not isinstance(saved, list) or len(saved) != len(keys) or len(names) != len(keys):
        return groups
    if any(isinstance(key, str) for key in keys) or not any(name in names for name in saved):
        return groups
    ordered, first = [], 0
    for group in groups:
        places = range(first, first + len(group["params"]))
        first = places.stop
        at = {saved[i]: keys[i] for i in places}
        missing = [names[i] for i in places if names[i] not in at]
        if missing:
            raise ValueError(
                f"state_dict: its parameters are in other places than this optimizer's, and {missing[0]!r} is not in "
                "the same group: make the groups as they were when the state was saved"
            )
        ordered.append({**group, "params": [at[names[i]] for i in places]})
    return ordered


def _check_own(state_dict: dict[str, Any]) -> None:
    """A ValueError for the state dict of an optimizer without a controller."""
    groups = state_dict.get("param_groups")
    if groups is None:
        raise ValueError(
            f"state_dict has no param_groups but {list(state_dict)}: pass what optimizer.state_dict() gave"
        )
    if groups and not any(STATE in group for group in groups):
        raise ValueError(
            f"state_dict: not of a CatapultSGD with a model; its lr={groups[0].get('lr')!r} is a rate, and here lr "
            "only multiplies the rate that is measured. Load the model's weights alone, and leave the optimizer new"
        )
