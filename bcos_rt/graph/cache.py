"""Explanation graphs kept while their network lives: capturing costs seconds, running milliseconds."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from bcos_rt.graph.adjoint import ExplanationGraph, build_explanation_graph
from bcos_rt.graph.attention import Attention
from bcos_rt.graph.texts import TokenPooling
from bcos_rt.nn.exponent import exponents
from bcos_rt.nn.network import BcosNetwork

__all__ = ["explanation_graph"]

# Beside the networks, not in them; the least recently used of more than this many graphs of one network goes.
GRAPHS_PER_NETWORK = 8
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, ExplanationGraph]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _structure(net: nn.Module) -> Any:
    """Changes when the network's graph could: layers, their options, parameter shapes, dtypes, devices."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    # A schedule of B moves it by less than repr() shows.
    return repr(net), tuple(exponents(net).values()), tuple((n, t.shape, t.dtype, t.device) for n, t in tensors)


def _recomputes(graph: ExplanationGraph) -> bool:
    """Whether a softmax is made again in the adjoint; where none is, "auto" and "store" are one graph."""
    return any(node.target is torch.ops.bcos_rt.attention.default for node in graph.module.graph.nodes)


def explanation_graph(
    net: BcosNetwork,
    image_size: tuple[int, int],
    *,
    multi: bool = False,
    pooling: TokenPooling | None = None,
    attention: Attention = "auto",
) -> ExplanationGraph:
    """The kept explanation graph of a network for one image size; see :func:`build_explanation_graph`.

    The graph reads the network's parameters when it runs; changed weights need no new graph, changed layers get one.
    """
    structure = _structure(net)
    key, automatic = ((image_size, multi, pooling, choice, structure) for choice in (attention, "auto"))
    with _LOCK:
        graphs = _GRAPHS.setdefault(net, OrderedDict())
        if key not in graphs:
            kept = graphs.get(automatic)
            if attention != "store" or kept is None or _recomputes(kept):
                kept = build_explanation_graph(net, image_size, multi=multi, pooling=pooling, attention=attention)
            graphs[key] = kept
            while len(graphs) > GRAPHS_PER_NETWORK:
                graphs.popitem(last=False)
        graphs.move_to_end(key)
        return graphs[key]
