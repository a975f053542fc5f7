"""The published implementation as contenders: eager, under ``torch.compile``, and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.benchmark.contender import BCOS, EXPLAIN, FORWARD, TRAIN, Contender, Prepared, UnsupportedError
from bcos_rt.benchmark.contenders import (
    fastest_layout,
    forward_reference,
    gradients,
    start_torch,
    texts_of,
    torch_images,
    torch_module,
)
from bcos_rt.benchmark.memory import MIB
from bcos_rt.nn import BcosNetwork
from bench.explain_bench.published import explanation_mode, published_network

__all__ = ["Published", "Training", "saved_bytes"]

LEARNING_RATE = 1e-5  # small: the weights should stay what they are, and finite, however many steps are timed


class Published(Contender):
    """The published layers in the same network, explained as the published code does: by autograd, factors detached.

    Option "compiled": "" for eager PyTorch in the faster memory layout; "autograd" for autograd through the compiled
    forward pass (its forward pass alone is compiled with freezing); "grad" for ``torch.func.grad`` of it compiled as a
    whole, with freezing, which is what a user who knows the compiler well could do.
    """

    taken = False

    def load(self) -> None:
        start_torch("bcos.modules")
        self.net: BcosNetwork = torch_module(self, "net")
        texts = texts_of(self)
        self.texts = None if texts is None else F.normalize(texts).T

    def prepare(self, mode: str) -> Prepared:
        if mode not in (FORWARD, EXPLAIN):
            raise UnsupportedError(f"{mode!r} is not what this measures")
        compiled = self.options.get("compiled", "")
        # Layers are laid out in place and know one mode: the second mode gets a network of its own.
        net = published_network(self.net if not self.taken else copy.deepcopy(self.net))
        self.taken = True
        images = torch_images(self)
        explanation_mode(net, mode == EXPLAIN)
        answer = _answer if mode == EXPLAIN else _logits
        reference = BCOS if mode == EXPLAIN else forward_reference(self)
        if not compiled:
            run, note = fastest_layout(net, images, self._explain if mode == EXPLAIN else _forward)
            return Prepared(run, answer, reference, {"note": note})
        return Prepared(self._compiled(net, images, mode, compiled), answer, reference)

    def _explain(self, net: BcosNetwork, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Any:
        encoded = torch.cat([images, 1 - images], 1).requires_grad_()
        logits = (forward or net.forward_encoded)(encoded)
        if self.texts is not None:  # their scores
            logits = logits @ self.texts
        return (logits, *gradients(logits, encoded, self.setting.classes))

    def _compiled(self, net: BcosNetwork, images: Tensor, mode: str, how: str) -> Callable[[], Any]:
        from torch._inductor import config

        if mode == FORWARD:
            forward = torch.compile(lambda x: _forward_encoded(net, x))
            with config.patch(freezing=True), torch.no_grad():
                forward(images)

            def predict() -> Tensor:
                with torch.no_grad():
                    return forward(images)

            return predict
        if how == "autograd":
            encoded = torch.compile(net.forward_encoded)
            self._explain(net, images, encoded)
            return lambda: self._explain(net, images, encoded)
        if self.setting.classes > 1 or self.texts is not None:
            raise UnsupportedError("torch.func.grad of K classes would run the forward pass K times")

        def whole(images: Tensor) -> Any:
            def top(encoded: Tensor) -> tuple[Tensor, Tensor]:
                logits = net.forward_encoded(encoded)
                return logits.amax(1).sum(), logits

            encoded = torch.cat([images, 1 - images], 1)
            weights, logits = torch.func.grad(top, has_aux=True)(encoded)
            return logits, weights, (weights * encoded).sum(1)

        compiled = torch.compile(whole)
        with config.patch(freezing=True), torch.no_grad():
            compiled(images)

        def explain() -> Any:
            with torch.no_grad():
                return compiled(images)

        return explain


def _forward_encoded(net: BcosNetwork, images: Tensor) -> Tensor:
    return net.forward_encoded(torch.cat([images, 1 - images], 1))


def _forward(net: BcosNetwork, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return _forward_encoded(net, images)


def _logits(logits: Tensor) -> dict[str, Any]:
    return {"logits": logits.detach().float().numpy()}


def _answer(result: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    names = ("logits", "weights", "contributions")
    return {name: value.detach().float().numpy() for name, value in zip(names, result, strict=True)}


# --- training --------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``: unique storages, without the module's own."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The storage itself is kept here, so that no other can get its address while this counts.
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(size for size, _ in kept.values())
    del result
    return total


class Training(Contender):
    """A training step: forward, cross-entropy, backward, SGD. Option "layers": "ours" or "published"."""

    def load(self) -> None:
        start_torch("bcos.modules", "torch.optim")
        self.net: BcosNetwork = torch_module(self, "net")
        for parameter in self.net.parameters():
            parameter.requires_grad_(True)

    def prepare(self, mode: str) -> Prepared:
        if mode != TRAIN:
            raise UnsupportedError(f"{mode!r} is not what this measures")
        net = self.net if self.options["layers"] == "ours" else published_network(self.net)
        net.train()
        images = torch_images(self)
        labels = torch.arange(len(images))

        def loss(net: BcosNetwork, images: Tensor) -> Tensor:
            return F.cross_entropy(_forward_encoded(net, images), labels)

        saved = saved_bytes(lambda: loss(net, images), net)
        first = loss(net, images)
        names, parameters = zip(*net.named_parameters(), strict=True)
        grads = torch.autograd.grad(first, parameters)
        optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

        def step(net: BcosNetwork, images: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = loss(net, images)
            value.backward()
            optimizer.step()
            return value

        run, note = fastest_layout(net, images, step, calls=3)
        facts = {
            "note": f"{note}; loss {float(first):.6g}, gradient norm {_norm(grads):.6g} of {len(names)} parameters",
            "saved_mib": saved / MIB,
        }
        return Prepared(run, lambda value: {}, "", facts)


def _norm(tensors: Any) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())
