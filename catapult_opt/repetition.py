"""Is it the same batch as before? By all that a step was given, in any order of its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .link import LossCall
from .trees import tensors_in

# Odd multipliers of a multiplicative hash (Knuth's, and one of SplitMix64). Arithmetic of int64 wraps around, so that
# sums are exact and do not depend on the order.
_MULTIPLIER, _MIXER = 6364136223846793005, -4658895280553007687


def batch_hash(calls: Sequence[LossCall]) -> int | None:
    """A number that is the same for the same tensors given to model and criterion, whatever the order of the samples.

    Samples are the entries of the first dimension that most of the tensors share. What has another length counts as a
    whole: the same adjacency, mask or prompt does not make two batches the same. What the criterion is given that comes
    from the model does not count.

    Args:
        calls: of one step; a sum over them, so that the same samples in other micro-batches are the same batch.

    Returns:
        None where the values cannot be read (meta or sparse tensors), or there are none.
    """
    total: Tensor | None = None
    for call in calls:
        found = _hash_of_call(call)
        if found is None:
            return None
        total = found if total is None else total + found.to(total.device)
    return None if total is None else int(total)


def _hash_of_call(call: LossCall) -> Tensor | None:
    given = [t for f in call.forwards for t in tensors_in((f.args, f.kwargs))]
    made = {id(z) for z in call.inputs}
    given += [t for t in tensors_in((call.args, call.kwargs)) if id(t) not in made and not t.requires_grad]
    if not given or any(t.is_meta or t.layout != torch.strided for t in given):
        return None
    lengths = [len(t) for t in given if t.dim() > 0]
    samples = max(lengths, key=lengths.count, default=0)
    device = given[0].device
    rows = torch.zeros(samples, dtype=torch.int64, device=device)
    whole = torch.zeros((), dtype=torch.int64, device=device)
    for place, t in enumerate(given):
        hashes = _row_hashes(t.detach() if t.dim() > 0 else t.detach().reshape(1)).to(device)
        salted = _mixed(hashes + place)
        if len(hashes) == samples and t.dim() > 0:
            rows = rows * _MULTIPLIER + salted
        else:
            whole = whole * _MULTIPLIER + (salted * torch.arange(1, len(salted) + 1, device=device)).sum()
    return _mixed(rows).sum() + _mixed(whole)


def _row_hashes(t: Tensor) -> Tensor:
    """An int64 for each entry of the first dimension, by its bytes."""
    words = _words(t.reshape(len(t), -1)) if t.numel() else torch.zeros(len(t), 1, dtype=torch.int64, device=t.device)
    places = torch.arange(1, words.shape[1] + 1, device=t.device) * _MULTIPLIER
    return _mixed(words + _mixed(places)).sum(1)


def _words(rows: Tensor) -> Tensor:
    """The bits of each number as an int64."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).reshape(len(rows), -1)
    if rows.dtype == torch.bool:
        return rows.long()
    if not rows.is_floating_point():
        return rows.long()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[rows.element_size()]
    return rows.contiguous().view(bits).long()


def _mixed(x: Tensor) -> Tensor:
    """Bits spread over the whole number, so that sums of hashes tell different sets apart."""
    x = (x ^ (x >> 30)) * _MIXER
    x = (x ^ (x >> 27)) * _MULTIPLIER
    return x ^ (x >> 31)
