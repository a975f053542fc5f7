"""Training with weights, gradients, optimiser states and averages shared out among processes (FSDP).

torch's ``fully_shard`` (FSDP2) keeps of every parameter the rows of one process, as a DTensor, and makes it whole for
the forward and backward pass. Rows of a convolution's or linear layer's weight are whole filters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from bcos_rt.errors import InvalidArgumentError

__all__ = [
    "broadcast",
    "clip_norm",
    "copy_whole",
    "load_whole",
    "local",
    "share_out",
    "shared_like",
    "whole",
    "whole_state",
]


def share_out(net: nn.Module, device: torch.device) -> nn.Module:
    """Leave of every parameter of ``net`` this process's rows, on ``device``; every process holds those of the first.

    The network is one unit: which of its modules are called, and which are only read by others, a traced network does
    not say. Scalars (a learned B) stay whole: their gradients are each process's own.

    Raises:
        InvalidArgumentError: parameters of several dtypes are trained.
    """
    dtypes = sorted({str(p.dtype) for p in net.parameters() if p.requires_grad})
    if len(dtypes) > 1:
        raise InvalidArgumentError(
            "net", f"trained parameters of {' and '.join(dtypes)}", "one dtype, with strategy='fsdp'"
        )
    net.to(device)
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # rows, not channels last
    broadcast((*net.parameters(), *net.buffers()))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {p for p in net.parameters() if p.ndim == 0}
    fully_shard(net, mesh=mesh, ignored_params=scalars)
    return net


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, from all processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of a network that is shared out into one that is not, in every process."""
    for kind in ("named_parameters", "named_buffers"):
        targets = dict(getattr(target, kind)(remove_duplicate=False))
        for name, value in getattr(source, kind)(remove_duplicate=False):
            targets[name].copy_(whole(value))


def whole_state(thing: nn.Module | Optimizer) -> dict[str, Any]:
    """The state dictionary that ``thing`` would have if nothing of it were shared out."""
    state: dict[str, Any] = thing.state_dict()
    if isinstance(thing, Optimizer):  # its inner dictionaries are the optimiser's own
        return {**state, "state": {i: {k: _on_host(v) for k, v in one.items()} for i, one in state["state"].items()}}
    for name, value in state.items():  # in place: an attribute of it has the versions of the layers
        state[name] = _on_host(value)
    return state


def _on_host(value: Any) -> Any:
    # What is whole may be more than a GPU holds.
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def load_whole(thing: nn.Module | Optimizer, state: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` gave, whether or not ``thing`` is shared out, then or now."""
    if isinstance(thing, Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        moments = {i: {k: shared_like(v, parameters[i]) for k, v in one.items()} for i, one in state["state"].items()}
        thing.load_state_dict({**state, "state": moments})
    else:
        now = thing.state_dict()
        shared = OrderedDict((k, shared_like(v, now[k]) if k in now else v) for k, v in state.items())
        shared._metadata = getattr(state, "_metadata", now._metadata)  # type: ignore[attr-defined]
        thing.load_state_dict(shared)


def shared_like(value: Any, other: Tensor) -> Any:
    """``value`` shared out as ``other`` is, where it has that shape (an optimiser's step count has not)."""
    if not isinstance(other, DTensor) or not isinstance(value, Tensor) or value.shape != other.shape:
        return value
    # Every process has read the file: nothing need be sent.
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def clip_norm(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale all gradients so that their common norm, over all processes' rows, is at most ``largest``.

    As ``torch.nn.utils.clip_grad_norm_``, which takes no mixture of parameters that are shared out and others.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [local(g) for g in gradients if isinstance(g, DTensor)]
    if not rows:
        nn.utils.clip_grad_norm_(parameters, largest)
        return
    square = nn.utils.get_total_norm(rows).square()
    dist.all_reduce(square)
    others = nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    total = (square + others.to(square.device).square()).sqrt()
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
