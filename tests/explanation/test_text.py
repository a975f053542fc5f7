"""Text explanations of image towers: the published numbers, autograd, completeness, the engine."""

import copy
import functools

import pytest
import torch

from bcos_rt import Engine, Recipe, bcosify, explain, explain_text, recalibrate
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.graph import RULES, TokenPooling, build_explanation_graph
from bcos_rt.kernels import cpu
from tests.explanation.test_golden import close
from tests.golden import golden_images, load_golden, seeded
from tests.oracle import detached_factors
from tests.tolerances import TOLERANCES

SIZE = 64
POOLINGS = {"mean": None, "max": None, "cosine_power": 3.5}


def resnet_tower(size=SIZE, width=8, output_dim=24, heads=4):
    modified_resnet = pytest.importorskip("open_clip.modified_resnet")
    return modified_resnet.ModifiedResNet((1, 1, 1, 1), output_dim, heads, image_size=size, width=width)


def transformer_tower():
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(SIZE, 16, width=32, layers=2, heads=4, mlp_ratio=2, output_dim=24)


TOWERS = {"resnet": resnet_tower, "transformer": transformer_tower}


def images(n=2):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def texts(p=3, d=24):
    return torch.randn(p, d, generator=torch.Generator().manual_seed(3))


@functools.cache
def converted(tower):
    """One network for all tests that do not change it: its graphs are then made once."""
    return bcosify(seeded(TOWERS[tower](), 5), Recipe.clip())[0].eval()


@pytest.fixture(params=TOWERS)
def net(request):
    return converted(request.param)


def pooled(tokens, embeddings, pooling):
    """Scores [N, P] written out, the pooling weights detached."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    cosines = torch.einsum("ntd,pd->npt", tokens, unit)
    if pooling == "max":
        return cosines.amax(2)
    factor = 1.0 if pooling == "mean" else cosines.detach().abs() ** (POOLINGS[pooling] - 1)
    return (factor * cosines).mean(2)


def text_oracle(net, x, embeddings, pooling):
    """Scores [N, P] and W [N, P, 6, H, W] by autograd with detached factors."""
    encoded = net.encode(x).detach().requires_grad_()
    with detached_factors():
        outputs = net.backbone(net.encoding(encoded))
    outputs = outputs if outputs.ndim == 3 else outputs[:, None]
    scores = pooled(outputs / outputs.norm(dim=2, keepdim=True).detach(), embeddings, pooling)
    columns = scores.sum(0).unbind()
    weights = [torch.autograd.grad(column, encoded, retain_graph=True)[0] for column in columns]
    return scores.detach(), torch.stack(weights, 1)


def test_published_scores_maps_and_weights():
    golden = load_golden("clip_rn_small")
    net, _ = bcosify(seeded(resnet_tower(224, 16, 128, 8), 21), Recipe.clip())
    x = golden_images(21)
    recalibrate(net, [x])
    result = explain_text(net.eval(), x, torch.tensor(golden["text_embedding"])[None], prompts=["a dog"])
    assert result.logits.shape == (2, 1)
    close(result.logits[:, 0], golden["score"], TOLERANCES["logits_b2"])
    close(result.contributions[:, 0], golden["contribution_map"], TOLERANCES["weights_b2"])
    sample = result.weights[:, 0].flatten()[torch.from_numpy(golden["weight_index"])]
    close(sample, golden["weight_sample"], TOLERANCES["weights_b2"])
    close(result.weights[:, 0].flatten(1).norm(dim=1), golden["weight_norm"], TOLERANCES["weights_b2"])
    # The published script's map differentiates through a second normalisation: it is another one.
    other = torch.tensor(golden["contribution_map_reference_script"])
    assert float((result.contributions[:, 0] - other).abs().max() / other.abs().max()) > 0.01


@pytest.mark.parametrize("pooling", POOLINGS)
def test_against_autograd(net, pooling):
    net, x, embeddings = copy.deepcopy(net).double(), images().double(), texts().double()
    result = explain_text(net, x, 7 * embeddings, pooling, power=POOLINGS[pooling])
    scores, weights = text_oracle(net, x, embeddings, pooling)
    torch.testing.assert_close(result.logits, scores, rtol=1e-10, atol=1e-12)
    assert float((result.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]
    assert float(result.completeness_error().max()) < 1e-12
    assert result.target.tolist() == [[0, 1, 2]] * 2
    assert result.of == "texts"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_the_embeddings_cosines(net, pooling):
    x, embeddings = images(), texts()
    with torch.no_grad():
        tokens = net.tokens_encoded(net.encode(x))
    result = explain_text(net, x, embeddings, pooling, power=POOLINGS[pooling])
    torch.testing.assert_close(result.logits, pooled(tokens, embeddings, pooling), rtol=1e-4, atol=1e-6)
    if pooling == "mean":
        unit = embeddings / embeddings.norm(dim=1, keepdim=True)
        torch.testing.assert_close(result.logits, net(x) @ unit.T, rtol=1e-4, atol=1e-6)


def test_power_one_is_the_mean(net):
    given = explain_text(net, images(), texts(), "cosine_power", power=1.0)
    expected = explain_text(net, images(), texts())
    torch.testing.assert_close(given.weights, expected.weights, rtol=1e-4, atol=1e-7)


def test_a_corrupted_rule_does_not_add_up(net):
    """The residual is computed, not what is missing: completeness can fail."""
    table = dict(RULES)
    add = table[torch.ops.aten.add.Tensor]

    def twice(adjoint, node, grad):
        add(adjoint, node, adjoint.call(torch.ops.aten.mul.Scalar, grad, 2.0))

    table[torch.ops.aten.add.Tensor] = twice
    graph = build_explanation_graph(net, (SIZE, SIZE), pooling=TokenPooling(), rules=table)
    result = graph(net, net.encode(images()), texts(2))
    total = result["contributions"].sum((1, 2)) + result["residual"]
    assert float((total - result["logits"][:, 0]).abs().max()) > 0.01


def test_one_entry_of_an_embedding_is_explained_as_a_class(net):
    """``explain`` knows the embedding's entries; a text along one axis is the same thing."""
    axis = torch.eye(24)[5:6]
    given = explain_text(net, images(), axis)
    expected = explain(net, images(), 5)
    torch.testing.assert_close(given.weights[:, 0], expected.weights, rtol=1e-4, atol=1e-7)


def test_no_image(net):
    result = explain_text(net, images(0), texts())
    assert result.weights.shape == (0, 3, 6, SIZE, SIZE)
    assert result.logits.shape == result.residual.shape == (0, 3)


def test_texts_of_any_norm_and_dtype():
    """Scaled before they get the network's dtype, in which such norms are 0 or infinite."""
    net, x = converted("resnet"), images(1)
    expected = explain_text(net, x, texts())
    engine = Engine(net, x, backend="eager")
    for given in (texts() * 1e-30, texts() * 1e30, texts().double() * 1e60, texts().double() * 1e-60):
        for result in (explain_text(net, x, given), engine.explain_text(x, given)):
            close(result.logits, expected.logits.numpy(), TOLERANCES["logits_b2"])
            close(result.weights, expected.weights.numpy(), TOLERANCES["weights_b2"])


def test_a_compiled_network_is_explained_as_what_it_wraps():
    net, x = converted("resnet"), images(1)
    given = explain_text(torch.compile(net), x, texts())
    assert torch.equal(given.weights, explain_text(net, x, texts()).weights)


def test_picture_names_the_prompts(net, tmp_path):
    result = explain_text(net, images(1), texts(2), prompts=("a dog", "a cat"))
    titles = [axis.get_title() for axis in result.plot().axes]
    assert any("a dog" in title for title in titles)
    assert any(title.startswith("contributions to score") for title in titles)
    assert not any("%" in title for title in titles)
    assert result.save(tmp_path / "texts.png").stat().st_size > 0
    assert explain_text(net, images(1), texts(2)).class_name(1) == "text 1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text_embeddings": torch.ones(24)}, InvalidArgumentError, r"text_embeddings.*\[None\]"),
        ({"text_embeddings": torch.ones(2, 23)}, InvalidArgumentError, r"text_embeddings.*\[P, 24\]"),
        ({"text_embeddings": torch.ones(0, 24)}, InvalidArgumentError, "text_embeddings"),
        ({"text_embeddings": torch.zeros(1, 24)}, InvalidArgumentError, "text_embeddings.*zero"),
        ({"text_embeddings": torch.full((1, 24), torch.nan)}, InvalidArgumentError, "text_embeddings"),
        ({"text_embeddings": torch.ones(1, 24, dtype=torch.int64)}, InvalidTypeError, "text_embeddings.*int64"),
        ({"text_embeddings": "a dog"}, InvalidTypeError, "text_embeddings.*str"),
        ({"pooling": "meen"}, InvalidArgumentError, "pooling.*did you mean 'mean'"),
        ({"pooling": "cosine_power"}, InvalidArgumentError, "power.*None"),
        ({"power": 2.0}, InvalidArgumentError, "power.*'mean'"),
        ({"pooling": "cosine_power", "power": 0.5}, InvalidArgumentError, "power.*at least 1"),
        ({"pooling": "cosine_power", "power": "2"}, InvalidTypeError, "power"),
        ({"prompts": "a dog"}, InvalidTypeError, "prompts"),
        ({"prompts": ["a dog"]}, InvalidArgumentError, "prompts.*2"),
        ({"images": torch.rand(3, SIZE, SIZE)}, InvalidArgumentError, "images"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, error, message):
    net = converted("resnet")
    with pytest.raises(error, match=message):
        explain_text(net, **{"images": images(1), "text_embeddings": texts(2), **arguments})


def test_networks_without_an_embedding_are_refused():
    tower = seeded(resnet_tower(), 5)
    with pytest.raises(InvalidTypeError, match="convert the image tower"):
        explain_text(tower, images(1), texts())
    logits, _ = bcosify(tower, Recipe(attention_pool="tokens", head="after_pool"))
    with pytest.raises(InvalidArgumentError, match="returns logits"):
        explain_text(logits, images(1), texts())


# --- the engine -------------------------------------------------------------------------------------------------------


# A pooling is the same few nodes behind any tower.
IN_ENGINES = [("transformer", "mean"), ("transformer", "max"), ("resnet", "cosine_power")]


@pytest.mark.parametrize(("tower", "pooling"), IN_ENGINES)
def test_engine_is_the_unfused_graph(tower, pooling, tmp_path):
    net, x, embeddings = converted(tower), images(3), texts()
    expected = explain_text(net, x, embeddings, pooling, power=POOLINGS[pooling])
    engine = Engine(net, x, backend="eager", pooling=pooling, power=POOLINGS[pooling])
    path = engine.save(tmp_path / "tower.engine")
    backends = ["eager", "native"] if cpu.available() else ["eager"]
    engines = [engine, *(Engine.load(path, backend=backend) for backend in backends)]
    for one in engines:
        with torch.no_grad():
            torch.testing.assert_close(one.predict(x), net(x), rtol=1e-4, atol=1e-5)
        given = one.explain_text(x, 3 * embeddings, prompts=["a", "b", "c"])
        close(given.logits, expected.logits.numpy(), TOLERANCES["logits_b2"])
        close(given.weights, expected.weights.numpy(), TOLERANCES["weights_b2"])
        close(given.contributions, expected.contributions.numpy(), TOLERANCES["weights_b2"])
        assert float(given.completeness_error().max()) < TOLERANCES["completeness"]
        assert given.target.tolist() == [[0, 1, 2]] * 3
        assert given.class_name(2) == "c"
        assert one.explain_text(images(0), embeddings).weights.shape == (0, 3, 6, SIZE, SIZE)


@pytest.mark.parametrize(("pooling", "forward_dtype"), [("mean", None), ("max", torch.float32)])
def test_engine_of_bfloat16(pooling, forward_dtype):
    net, x, embeddings = converted("resnet"), images(2), texts()
    power = POOLINGS[pooling]
    expected = explain_text(net, x, embeddings, pooling, power=power)
    options = {"dtype": torch.bfloat16, "forward_dtype": forward_dtype, "pooling": pooling, "power": power}
    given = Engine(net, x, backend="eager", **options).explain_text(x, embeddings)
    assert given.logits.dtype == given.weights.dtype == torch.float32
    assert float((given.weights - expected.weights).norm() / expected.weights.norm()) < 0.05
    assert float((given.logits - expected.logits).abs().max()) < (0.02 if forward_dtype is None else 1e-5)


def test_engines_explain_what_their_network_returns():
    net = converted("resnet")
    engine = Engine(net, (SIZE, SIZE), backend="eager")
    with pytest.raises(InvalidArgumentError, match="explain_text instead"):
        engine.explain(images(1))
    with pytest.raises(InvalidArgumentError, match="text_embeddings"):
        engine.explain_text(images(1), torch.ones(2, 7))
    classifier = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    classes = bcosify(classifier, Recipe(head="after_pool"))[0].eval()
    with pytest.raises(InvalidArgumentError, match=r"pooling.*logits"):
        Engine(classes, (SIZE, SIZE), pooling="max")
    with pytest.raises(InvalidArgumentError, match="explain instead"):
        Engine(classes, (SIZE, SIZE), backend="eager").explain_text(images(1), torch.ones(1, 4))
