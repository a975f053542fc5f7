"""The engine: every backend returns what explain() does; images, targets and options are checked."""

from __future__ import annotations

import threading

import pytest
import torch

from bcos_rt import Engine, explain
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, UnsupportedOpError
from bcos_rt.explanation import engine as engine_module
from bcos_rt.graph.fused import build_fused
from bcos_rt.kernels import cpu
from tests.graph.networks import NETWORKS, network
from tests.tolerances import TOLERANCES

SIZE = (34, 30)
needs_cpp = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
BACKENDS = [pytest.param("native", marks=needs_cpp), "eager"]


def assert_same(actual, expected):
    """Logits, W, contributions and residual, each within the tolerance of converted networks."""
    assert torch.equal(actual.target, expected.target)
    for name in ("logits", "weights", "contributions", "residual"):
        wanted = getattr(expected, name)
        limit = TOLERANCES["logits_b2" if name in ("logits", "residual") else "weights_b2"]
        scale = max(float(wanted.abs().max()), 1e-6)
        torch.testing.assert_close(
            getattr(actual, name), wanted, rtol=0, atol=limit * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A network of its name, and its engine on a backend: one is traced once, all backends run its program."""
    made = {}

    def get(name, recipe="default", **options):
        if (name, recipe) not in made:
            net = network(name, recipe)
            path = tmp_path_factory.mktemp("engines") / "net.engine"
            made[name, recipe] = net, Engine(net, SIZE, backend="eager").save(path)
        net, path = made[name, recipe]
        return net, Engine.load(path, **options)

    return get


# All recipes, in float64: tests/graph/test_fuse.py.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", ["default", "kept"])
@pytest.mark.parametrize("name", NETWORKS)
def test_engine_equals_explain(name, recipe, backend, engines):
    net, engine = engines(name, recipe, backend=backend)
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    for targets in (None, 1, [0, -1, 2], [[0, 1], [2, -1], [3, 3]]):
        expected = explain(net, images, targets)
        actual = engine.explain(images, targets)
        assert_same(actual, expected)
        assert float(actual.completeness_error().max()) <= 1e-4 * max(1.0, float(expected.logits.abs().max()))
    assert torch.equal(engine.explain(images).images, expected.images)
    with torch.no_grad():
        torch.testing.assert_close(engine.predict(images), net(images), rtol=1e-4, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize("chunk", [1, 2, 5, None])
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_chunks_change_nothing(name, chunk, engines):
    net, engine = engines(name, backend="native", chunk=chunk)
    images = torch.rand(5, 3, *SIZE)
    assert_same(engine.explain(images, [[0, 1]] * 5), explain(net, images, [[0, 1]] * 5))


@needs_cpp
def test_the_constructor_takes_the_options_too():
    net, images = network("residual"), torch.rand(5, 3, *SIZE)
    engine = Engine(net, images, backend="native", chunk=2)
    assert engine.backend == "native"
    assert_same(engine.explain(images, 1), explain(net, images, 1))


@needs_cpp
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_keeps_the_contribution_map(name, engines):
    (net, _), images = engines(name), torch.rand(2, 3, *SIZE)
    half, full = Engine(net, SIZE, dtype=torch.bfloat16).explain(images, 1), explain(net, images, 1)
    similar = torch.nn.functional.cosine_similarity(half.contributions.flatten(1), full.contributions.flatten(1))
    assert float(similar.min()) > 0.98
    assert half.weights.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_no_images(name, backend, engines):
    _, engine = engines(name, backend=backend)
    empty = engine.explain(torch.rand(0, 3, *SIZE))
    assert empty.weights.shape == (0, 6, *SIZE)
    assert engine.predict(torch.rand(0, 3, *SIZE)).shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_threads_share_an_engine(name, backend, engines):
    _, engine = engines(name, backend=backend)
    images = torch.rand(6, 3, *SIZE)
    expected = [engine.explain(images[i : i + 1], i % 4).weights for i in range(6)]
    results: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        for i in range(start, 6, 3):
            results[i] = engine.explain(images[i : i + 1], i % 4).weights

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(6))


def test_the_engine_keeps_the_weights_it_was_made_with():
    net, images = network("residual"), torch.rand(1, 3, *SIZE)
    engine = Engine(net, SIZE)
    before = engine.predict(images)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    assert torch.equal(engine.predict(images), before)


def test_auto_takes_what_is_there(monkeypatch):
    assert Engine(network("residual"), SIZE).backend == ("native" if cpu.available() else "inductor")
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(engine_module, "_compiler", lambda: False)
    assert Engine(network("residual"), SIZE).backend == "eager"
    with pytest.raises(UnsupportedOpError, match="native"):
        Engine(network("residual"), SIZE, backend="native")


@pytest.mark.parametrize(
    ("name", "backend"), [*(pytest.param(name, "native", marks=needs_cpp) for name in NETWORKS), ("tokens", "eager")]
)
def test_a_saved_engine_starts_without_the_network(name, backend, tmp_path, monkeypatch):
    net, images = network(name), torch.rand(2, 3, *SIZE)
    net.class_names = ["a", "b", "c", "d", "e"][: net(images).shape[1]]
    engine = Engine(net, SIZE, backend=backend)
    path = engine.save(tmp_path / "net.engine")

    def traced(*_: object, **__: object) -> None:
        raise AssertionError("the network was traced again")

    monkeypatch.setattr(torch.export, "export", traced)
    loaded = Engine.load(path, backend=backend)
    expected, actual = engine.explain(images, [[0, 1], [2, -1]]), loaded.explain(images, [[0, 1], [2, -1]])
    for field in ("logits", "target", "weights", "contributions", "residual", "images"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field
    assert actual.class_names == expected.class_names
    assert torch.equal(loaded.predict(images), engine.predict(images))
    assert loaded.summary() == engine.summary()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_engine_is_mixed_when_loaded(backend, tmp_path):
    net, images = network("residual"), torch.rand(2, 3, *SIZE)
    engine = Engine(net, SIZE, dtype=torch.bfloat16, forward_dtype=torch.float32, backend=backend)
    torch.testing.assert_close(engine.predict(images), Engine(net, SIZE, backend=backend).predict(images))
    loaded = Engine.load(engine.save(tmp_path / "net.engine"), backend=backend)
    assert (loaded.dtype, loaded.forward_dtype) == (torch.bfloat16, torch.float32)
    expected, actual = engine.explain(images), loaded.explain(images)
    for field in ("logits", "weights", "contributions", "residual"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field


def test_a_damaged_file_is_said_to_be_one(tmp_path, engines):
    path = engines("residual")[1].save(tmp_path / "net.engine")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"net\.engine"):
        Engine.load(path)
    with pytest.raises(CheckpointError, match="missing"):
        Engine.load(tmp_path / "missing")


def test_summary_names_where_nodes_come_from(engines):
    text = engines("dense")[1].summary()
    assert "34 x 30" in text
    assert "backbone.stem" in text
    assert "fuse_convolutions: conv2d" in text
    assert "MiB" in text


def test_a_conventional_model_gets_its_initial_explanation():
    model = NETWORKS["residual"]().eval()
    images = torch.rand(2, 3, *SIZE)
    actual, expected = Engine(model, images).explain(images), explain(model, images)
    assert_same(actual, expected)
    assert actual.label == expected.label == "initial explanation"


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"example": torch.rand(3, 30, 30)}, InvalidArgumentError, "example"),
        ({"example": "large"}, InvalidTypeError, "example"),
        ({"example": (0, 5)}, InvalidArgumentError, "example"),
        ({"dtype": torch.float16}, InvalidArgumentError, "dtype"),
        ({"forward_dtype": torch.bfloat16}, InvalidArgumentError, "forward_dtype"),
        ({"backend": "nativ"}, InvalidArgumentError, "did you mean"),
        ({"chunk": 0}, InvalidArgumentError, "chunk"),
        ({"net": 3}, InvalidTypeError, "net"),
    ],
)
def test_bad_arguments(arguments, error, names):
    given = {"net": network("residual"), "example": SIZE, **arguments}
    with pytest.raises(error, match=names):
        Engine(given.pop("net"), given.pop("example"), **given)


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (torch.rand(1, 3, 32, 32), InvalidArgumentError, "34 x 30"),
        (torch.rand(1, 6, *SIZE), InvalidArgumentError, "3 \\(RGB\\)"),
        (torch.rand(3, *SIZE), InvalidArgumentError, "batch dimension"),
        (torch.zeros(1, 3, *SIZE, dtype=torch.uint8), InvalidTypeError, "255"),
        (torch.full((1, 3, *SIZE), float("nan")), InvalidArgumentError, "NaN"),
    ],
)
def test_bad_images(images, error, says, engines):
    _, engine = engines("residual")
    with pytest.raises(error, match=says):
        engine.explain(images)
    with pytest.raises(error, match=says):
        engine.predict(images)


def test_bad_targets(engines):
    _, engine = engines("residual")
    with pytest.raises(InvalidArgumentError, match="class 5"):
        engine.explain(torch.rand(1, 3, *SIZE), 5)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_and_explanation_share_packed_weights(dtype, monkeypatch):
    """What the forward pass reads is packed once for both programs."""
    from bcos_rt.graph.backends import native

    made = []
    original = native._Packed.get

    def spy(self, constant, how, make):
        def counted():
            if how[:2] != ("product", True):  # the adjoint's alone
                made.append(how)
            return make()

        return original(self, constant, how, counted)

    monkeypatch.setattr(native._Packed, "get", spy)
    programs = build_fused(network("inverted"), SIZE, dtype)
    native.build([programs.predict])
    alone = len(made)
    native.build([programs.predict, programs.explain])
    assert alone > 3
    assert len(made) - alone == alone + 1  # the stem's filters, which each program folds for itself
