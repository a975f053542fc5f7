"""Exported files: what they compute, hold and leave behind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx
import onnx.inliner

from bcos_rt import Recipe, bcosify, explain, recalibrate
from bcos_rt.errors import BcosError, InvalidArgumentError, InvalidTypeError, MissingDependencyError, UnsupportedOpError
from bcos_rt.export import ExportError, Parity, Tolerances, to_onnx
from bcos_rt.export.functions import FUNCTION_NAMES
from tests.export.harness import Small, open_session, relative, run_file, seeded_images, seeded_norms, small_network
from tests.tolerances import TOLERANCES

SIZE = (32, 40)
EVERYTHING = ["logits", "class_used", "weights", "contributions", "residual", "picture"]


@pytest.fixture(scope="module")
def net():
    net = small_network(Recipe(), SIZE)
    net.class_names = [f"class {i} é" for i in range(7)]
    return net


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return path, to_onnx(net, path, SIZE, verify_images=seeded_images(SIZE, 5, seed=9))


def test_a_residual_of_rounding_alone(tmp_path):
    """Of normalisation by 0.5 nothing is left of the mean in [x, 1 - x], and without biases of anything."""
    half = Recipe(mean=(0.5,) * 3, std=(0.5,) * 3, logit_bias=None)
    net = small_network(half, SIZE)
    images = seeded_images(SIZE, 2)
    assert float(explain(net, images).residual.abs().max()) < 1e-6
    report = to_onnx(net, tmp_path / "net.onnx", SIZE, verify_images=images)
    assert report.parity.differences["residual"].max_relative < 1e-4


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = seeded_norms(torchvision.models.resnet18(num_classes=10), dead=False)
    net, _ = bcosify(model, Recipe())
    recalibrate(net, [seeded_images((64, 64), 4)])
    return model, net.eval()


def compare(given, expected, b, tolerance=None):
    assert relative(given["logits"], expected.logits) < TOLERANCES["onnx_logits"]
    assert given["class_used"].tolist() == expected.target.tolist()
    for name in ("weights", "contributions"):
        mine, true = given[name].astype(np.float64), getattr(expected, name).double().numpy()
        assert mine.shape == true.shape
        if b > 1:
            assert relative(mine, true) < TOLERANCES["weights_b2"], name
        for row, other in zip(mine.reshape(len(mine), -1), true.reshape(len(mine), -1), strict=True):
            assert np.linalg.norm(row - other) < TOLERANCES["weights_b1_l2"] * np.linalg.norm(other), name
            cosine = row @ other / np.linalg.norm(row) / np.linalg.norm(other)
            assert cosine > TOLERANCES["weights_b1_cosine"], name


# What it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 2])
def test_resnet18_batch_of_three_with_mixed_classes(resnet, b, tmp_path):
    model, net = resnet
    if b == 1:
        net, _ = bcosify(model, Recipe.equivalent())
    report = to_onnx(net, tmp_path / "net.onnx", 64)
    images, ids = seeded_images((64, 64)), torch.tensor([4, -1, 9])
    given, expected = run_file(tmp_path / "net.onnx", images, ids), explain(net, images, ids)
    compare(given, expected, b)
    assert relative(given["residual"], expected.residual) < 1e-3
    total = given["contributions"].sum((1, 2)) + given["residual"]
    chosen = np.take_along_axis(given["logits"], given["class_used"][:, None], 1)[:, 0]
    assert np.abs(total - chosen).max() < TOLERANCES["completeness"]
    a, c = given["contributions"][:2]
    assert np.linalg.norm(a - c) > 1e-2 * np.linalg.norm(a)  # two different images, two different maps
    picture = expected.picture().numpy()
    assert (np.abs(given["picture"] - picture) > TOLERANCES["rgba"]).mean() < TOLERANCES["rgba_outliers"] * (3 - b) * 5
    assert report.parity.differences["logits"].max_relative < TOLERANCES["onnx_logits"]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(b=1.5), Recipe(biases="keep"), Recipe.equivalent(), Recipe(weight_norm="unit", head="after_pool"),
     Recipe(logit_temperature=3.0, activations="identity", stem_pool="keep"), Recipe(input_normalization="none")],
    ids=["b1.5", "biases", "equivalent", "unit", "identity", "plain input"],
)  # fmt: skip
def test_recipes(recipe, tmp_path):
    net = small_network(recipe, SIZE)
    to_onnx(net, tmp_path / "net.onnx", SIZE, verify=False)
    images, ids = seeded_images(SIZE), torch.tensor([-1, 0, 6])
    compare(run_file(tmp_path / "net.onnx", images, ids), explain(net, images, ids), recipe.b)


def test_the_batch_is_free(exported, net):
    path, _ = exported
    for count in (1, 2, 5):
        images = seeded_images(SIZE, count, seed=count)
        ids = torch.arange(count) % 7
        compare(run_file(path, images, ids), explain(net, images, ids), 2)


def test_black_and_white_images(exported, net):
    path, _ = exported
    images = torch.cat([torch.zeros(1, 3, *SIZE), torch.ones(1, 3, *SIZE)])
    given = run_file(path, images, torch.tensor([-1, 2]))
    assert all(np.isfinite(v).all() for v in given.values())
    compare(given, explain(net, images, torch.tensor([-1, 2])), 2)


def test_several_classes_of_each_image(net, tmp_path):
    report = to_onnx(net, tmp_path / "net.onnx", SIZE, multi=True)
    assert report.inputs["class_ids"] == ["batch", "k"]
    assert report.outputs["weights"] == ["batch", "k", 6, *SIZE]
    images = seeded_images(SIZE, 2)
    for ids in ([[1, -1, 0, 6], [2, 2, -1, 3]], [[5], [-1]]):
        ids = torch.tensor(ids)
        given, expected = run_file(tmp_path / "net.onnx", images, ids), explain(net, images, ids)
        compare(given, expected, 2)
        assert relative(given["picture"], expected.picture()) < 1e-2


def test_three_channel_network(tmp_path):
    net = small_network(Recipe(input_encoding="three_channel"), SIZE)
    report = to_onnx(net, tmp_path / "net.onnx", SIZE)
    assert "picture" not in report.outputs
    assert report.outputs["weights"] == ["batch", 3, *SIZE]
    images = seeded_images(SIZE)
    compare(run_file(tmp_path / "net.onnx", images, [0, -1, 1]), explain(net, images, [0, -1, 1]), 2)
    with pytest.raises(InvalidArgumentError, match="picture"):
        to_onnx(net, tmp_path / "other.onnx", SIZE, outputs=["picture"])


def test_tied_weights_and_a_layer_used_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            for norm in self.norms:
                x = torch.relu(norm(self.shared(x)))
            return self.head(x.mean((2, 3)))

    for recipe in (Recipe(), Recipe.equivalent()):
        net, _ = bcosify(seeded_norms(Twice()), recipe)
        net.eval()
        to_onnx(net, tmp_path / "net.onnx", 24)
        images = seeded_images((24, 24))
        compare(run_file(tmp_path / "net.onnx", images, [0, -1, 3]), explain(net, images, [0, -1, 3]), recipe.b)


@pytest.mark.parametrize("recipe", [Recipe(weight_norm="unit"), Recipe()], ids=["unit", "published"])
def test_dead_filters_flat_channels_and_tiny_images(recipe, tmp_path):
    """Filters of norm 0, a BatchNorm variance near 0, images smaller than the receptive field."""
    torch.manual_seed(1)
    model = seeded_norms(Small())
    with torch.no_grad():
        model.stem[0].weight[3] = 0
        model.grouped[0].weight[5] = 0
        model.wide[1].running_var[2] = 1e-12
    net, _ = bcosify(model, recipe)
    net.eval()
    size = (9, 7)
    to_onnx(net, tmp_path / "net.onnx", size, verify=False)
    images = seeded_images(size)
    given = run_file(tmp_path / "net.onnx", images, [0, -1, 3])
    assert all(np.isfinite(v).all() for v in given.values())
    compare(given, explain(net, images, [0, -1, 3]), 2)


def test_nothing_in_the_network_changes(net, tmp_path):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    try:
        to_onnx(net, tmp_path / "net.onnx", SIZE, verify=False)
        assert all(m.training for m in net.modules())
    finally:
        net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_double_precision_networks_are_exported_in_single(tmp_path):
    net = small_network(Recipe(), SIZE).double()
    to_onnx(net, tmp_path / "net.onnx", SIZE, outputs=["logits", "weights"])
    assert next(net.parameters()).dtype == torch.float64
    images = seeded_images(SIZE)
    given = run_file(tmp_path / "net.onnx", images, [0, 1, 2])
    assert given["logits"].dtype == np.float32
    assert relative(given["weights"], explain(net, images.double(), [0, 1, 2]).weights) < TOLERANCES["weights_b2"]


# What it holds -----------------------------------------------------------------------------------------------------


def test_inputs_outputs_and_functions(exported):
    path, report = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    inputs = {i.name: i for i in model.graph.input}
    assert list(inputs) == ["image", "class_ids"]
    assert [o.name for o in model.graph.output] == EVERYTHING == list(report.outputs)
    assert inputs["image"].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert inputs["class_ids"].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert not {i.name for i in model.graph.initializer} & set(inputs)  # class_ids is required, not overridable
    assert all(v.doc_string for v in [*model.graph.input, *model.graph.output])
    functions = {f.name for f in model.functions}
    assert functions == {n.op_type for n in model.graph.node if n.domain == "ai.bcos"}
    assert {"BcosConv", "BcosConvRelu", "ColourPicture"} <= functions <= set(FUNCTION_NAMES)
    standard = [n for n in model.graph.node if n.domain == ""]
    standard += [n for f in model.functions for n in f.node]
    assert all(onnx.defs.has(n.op_type) and n.domain == "" for n in standard)


def test_inlined_it_is_standard_ops_only_and_the_same(exported):
    path, _ = exported
    flat = onnx.inliner.inline_local_functions(onnx.load(path))
    assert not flat.functions
    assert {n.domain for n in flat.graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(flat, check_type=True, strict_mode=True, data_prop=True)
    shapes = {o.name: [d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim] for o in inferred.graph.output}
    assert shapes["weights"] == ["batch", 6, *SIZE]
    target = path.with_name("flat.onnx")
    onnx.save(flat, target)
    images = seeded_images(SIZE)
    ours, theirs = run_file(path, images, [0, 1, -1]), run_file(target, images, [0, 1, -1])
    assert all(np.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_each_weight_is_stored_once(exported, net):
    model = onnx.load(exported[0])
    names = {name for name, p in net.named_parameters() if p.ndim in (2, 4)}
    stored = {i.name: int(np.prod(i.dims)) for i in model.graph.initializer if len(i.dims) in (2, 4)}
    weights = {n: c for n, c in stored.items() if n.removesuffix(".folded") in names}
    assert sorted(weights.values()) == sorted(p.numel() for p in net.parameters() if p.ndim in (2, 4))
    assert sum(stored.values()) < 1.1 * sum(weights.values())  # beside them, a pool's constant matrices


def test_metadata(exported, net):
    model = onnx.load(exported[0])
    values = {p.key: p.value for p in model.metadata_props}
    assert model.producer_name == "bcos-rt"
    assert json.loads(values["bcos_rt.class_names"]) == net.class_names
    assert Recipe.from_dict(json.loads(values["bcos_rt.recipe"])) == net.recipe
    assert json.loads(values["bcos_rt.source"]) == net.source
    preprocessing = json.loads(values["bcos_rt.preprocessing"])
    assert preprocessing["range"] == [0.0, 1.0]
    assert preprocessing["size"] == list(SIZE)
    assert preprocessing["channels"] == "RGB"
    assert values["bcos_rt.version"]
    assert open_session(exported[0]).get_modelmeta().custom_metadata_map["bcos_rt.encoding"] == "[x, 1 - x]"


def test_report(exported):
    path, report = exported
    assert report.path == path
    assert report.bytes == path.stat().st_size
    assert report.external_data is None
    assert isinstance(report.parity, Parity)
    assert report.parity.images == 1 + 3 + 5
    assert report.parity.onnx_ms > 0 < report.parity.torch_ms
    assert report.parity.differences["weights"].max_relative < TOLERANCES["weights_b2"]
    assert report.parity.completeness_error < TOLERANCES["completeness"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["parity"]["differences"]["logits"]["max_abs"] == report.parity.differences["logits"].max_abs
    assert "parity: logits" in str(report)
    assert report.__rich__().row_count == len(str(report).splitlines())
    assert sum(report.nodes.values()) == len(onnx.load(path).graph.node)


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_opsets(net, opset, tmp_path):
    to_onnx(net, tmp_path / "net.onnx", SIZE, opset=opset)
    assert {i.domain: i.version for i in onnx.load(tmp_path / "net.onnx").opset_import}[""] == opset


# Options -----------------------------------------------------------------------------------------------------------


def test_forward_only(net, tmp_path):
    report = to_onnx(net, tmp_path / "net.onnx", SIZE, forward_only=True, verify_images=seeded_images(SIZE))
    assert list(report.inputs) == ["image"]
    assert list(report.outputs) == ["logits"]
    images = seeded_images(SIZE)
    with torch.no_grad():
        expected = net(images)
    assert relative(run_file(tmp_path / "net.onnx", images)["logits"], expected) < TOLERANCES["onnx_logits"]
    assert "ConvTranspose" not in report.nodes


def test_forward_only_needs_no_rules(tmp_path):
    """A network that cannot be explained can still be exported for prediction."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(torch.exp(-self.conv(x).abs()).mean((2, 3)))

    net, _ = bcosify(Odd(), Recipe.equivalent())
    with pytest.raises(UnsupportedOpError):
        to_onnx(net, tmp_path / "net.onnx", 16)
    assert os.listdir(tmp_path) == []
    to_onnx(net, tmp_path / "net.onnx", 16, forward_only=True)


@pytest.mark.parametrize("outputs", [["logits"], ["contributions"], ["picture", "residual"], ["weights", "logits"]])
def test_outputs_left_out(net, exported, outputs, tmp_path):
    report = to_onnx(net, tmp_path / "net.onnx", SIZE, outputs=outputs)
    assert list(report.outputs) == [o for o in EVERYTHING if o in outputs]
    assert list(report.inputs) == ["image", "class_ids"]
    images = seeded_images(SIZE)
    mine, full = run_file(tmp_path / "net.onnx", images, [0, -1, 3]), run_file(exported[0], images, [0, -1, 3])
    assert all(np.allclose(mine[name], full[name], rtol=1e-4, atol=1e-6) for name in outputs)
    assert sum(report.nodes.values()) <= sum(exported[1].nodes.values())
    assert ("ConvTranspose" in report.nodes) == (outputs != ["logits"])


def test_half_precision(resnet, tmp_path):
    _, net = resnet
    single = to_onnx(net, tmp_path / "single.onnx", 64, verify=False)
    report = to_onnx(net, tmp_path / "half.onnx", 64, precision="fp16")
    assert report.bytes < 0.55 * single.bytes
    assert report.seed_scale > 1
    images, ids = seeded_images((64, 64)), [3, -1, 0]
    half, full = (run_file(tmp_path / name, images, ids) for name in ("half.onnx", "single.onnx"))
    assert all(v.dtype == (np.int64 if k == "class_used" else np.float32) for k, v in half.items())
    assert all(np.isfinite(v).all() for v in half.values())
    assert relative(half["logits"], full["logits"]) < TOLERANCES["onnx_weights_fp16"]
    for mine, true in zip(half["weights"].reshape(3, -1), full["weights"].reshape(3, -1), strict=True):
        assert mine @ true / np.linalg.norm(mine) / np.linalg.norm(true) > 0.98
    model = onnx.load(tmp_path / "half.onnx")
    weights = [i for i in model.graph.initializer if len(i.dims) == 4]
    assert {i.data_type for i in weights} == {onnx.TensorProto.FLOAT16}
    # Norms stay in fp32: every reduction in a B-cos function reads a cast to float32.
    for function in model.functions:
        made = {o: n for n in function.node for o in n.output}
        for node in function.node:
            if node.op_type == "ReduceSumSquare":
                assert made[node.input[0]].op_type == "Cast"
                assert made[node.input[0]].attribute[0].i == onnx.TensorProto.FLOAT


def test_half_precision_with_every_kind_of_layer(tmp_path):
    for recipe in (Recipe(), Recipe.equivalent()):
        net = small_network(recipe, SIZE)
        report = to_onnx(net, tmp_path / "half.onnx", SIZE, precision="fp16", multi=True)
        assert report.parity.differences["weights"].cosine > 0.98


def test_half_precision_divides_by_nothing_that_became_zero(tmp_path):
    """A ReLU6's gate divides by at least float32's smallest normal number, which float16 does not have."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )
    net, _ = bcosify(model, Recipe.equivalent())
    to_onnx(net.eval(), tmp_path / "half.onnx", SIZE, precision="fp16")
    to_onnx(net, tmp_path / "single.onnx", SIZE)
    dark = torch.zeros(3, 3, *SIZE)
    half, full = (run_file(tmp_path / f"{name}.onnx", dark, [0, 1, 2]) for name in ("half", "single"))
    assert np.isfinite(half["weights"]).all()
    assert relative(half["weights"], full["weights"]) < TOLERANCES["onnx_weights_fp16"]


@pytest.mark.parametrize("outputs", [["residual"], ["logits", "residual"], ["class_used"], ["contributions"]])
def test_half_precision_with_outputs_left_out(net, exported, outputs, tmp_path):
    to_onnx(net, tmp_path / "half.onnx", SIZE, precision="fp16", outputs=outputs)
    images = seeded_images(SIZE)
    mine, full = run_file(tmp_path / "half.onnx", images, [0, 2, 3]), run_file(exported[0], images, [0, 2, 3])
    assert list(mine) == outputs
    assert all(relative(mine[name], full[name] + 1e-30) < 0.2 for name in outputs)


def test_weights_beside_the_file(net, exported, tmp_path):
    report = to_onnx(net, tmp_path / "net.onnx", SIZE, external_data_threshold=1000)
    assert report.external_data == tmp_path / "net.onnx.data"
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    images = seeded_images(SIZE)
    mine, full = run_file(tmp_path / "net.onnx", images, [0, 1, -1]), run_file(exported[0], images, [0, 1, -1])
    assert all(np.array_equal(mine[name], full[name]) for name in EVERYTHING)
    locations = {
        e.value
        for i in onnx.load(tmp_path / "net.onnx", load_external_data=False).graph.initializer
        for e in i.external_data
        if e.key == "location"
    }
    assert locations == {"net.onnx.data"}


def test_progress_names_the_stages(net, tmp_path):
    stages = []
    to_onnx(net, tmp_path / "net.onnx", SIZE, progress=stages.append)
    assert stages == ["capture", "rewrite", "write", "check", "verify"]


# Errors and what they leave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image_size": 0}, InvalidArgumentError, "image_size"),
        ({"image_size": "224"}, InvalidTypeError, "image_size"),
        ({"image_size": (32, 32, 3)}, InvalidTypeError, "image_size"),
        ({"image_size": 32.5}, InvalidTypeError, "image_size"),
        ({"image_size": True}, InvalidTypeError, "image_size"),
        ({"outputs": ["logit"]}, InvalidArgumentError, "did you mean 'logits'"),
        ({"outputs": []}, InvalidArgumentError, "outputs"),
        ({"outputs": "logits"}, InvalidTypeError, "outputs"),
        ({"outputs": ["weights"], "forward_only": True}, InvalidArgumentError, "outputs"),
        ({"multi": True, "forward_only": True}, InvalidArgumentError, "multi"),
        ({"precision": "fp8"}, InvalidArgumentError, "precision"),
        ({"opset": 12}, InvalidArgumentError, "opset"),
        ({"verify_images": [1, 2]}, InvalidTypeError, "verify_images"),
        ({"verify_images": torch.zeros(1, 3, 8, 8)}, InvalidArgumentError, "verify_images"),
        ({"verify_images": torch.zeros(1, 3, *SIZE, dtype=torch.uint8)}, InvalidTypeError, "verify_images"),
        ({"verify_images": torch.full((1, 3, *SIZE), float("nan"))}, InvalidArgumentError, "NaN"),
    ],
)
def test_unusable_arguments(net, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        to_onnx(net, tmp_path / "net.onnx", **{"image_size": SIZE, **settings})
    assert os.listdir(tmp_path) == []


def test_unusable_paths(net, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    for path in ("net.pt", "missing/net.onnx", "folder.onnx"):
        with pytest.raises(InvalidArgumentError, match="path"):
            to_onnx(net, tmp_path / path, SIZE)
    with pytest.raises(InvalidTypeError, match="BcosNetwork"):
        to_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", SIZE)


def test_unwritable_folder(net, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root may write everywhere
    with pytest.raises(InvalidArgumentError, match=r"path: got .*Permission denied"):
        to_onnx(net, tmp_path / "net.onnx", SIZE)


def test_a_file_that_computes_something_else_is_not_left_there(net, exported, tmp_path, monkeypatch):
    """One broken rewrite: the parity check sees it, raises, and what was there before stays."""
    from bcos_rt.export import onnx_export, passes

    real = passes.rewrite

    def broken(program):
        counts = real(program)
        node = max(program.constants, key=lambda n: program.constants[n].numel())
        program.constants[node] = program.constants[node] * 1.05
        return counts

    path = tmp_path / "net.onnx"
    path.write_text("old")
    monkeypatch.setattr(passes, "rewrite", broken)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        to_onnx(net, path, SIZE)
    assert issubclass(ExportError, BcosError)
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert path.read_text() == "old"
    to_onnx(net, path, SIZE, verify=False)  # nobody looked
    assert onnx_export.to_onnx is to_onnx
    assert relative(run_file(path, seeded_images(SIZE), [0, 0, 0])["logits"], [[1.0]]) > 0


def test_a_broken_adjoint_is_noticed_at_b1(tmp_path, monkeypatch):
    """At B = 1 single images may differ by a flipped switch; a wrong adjoint is no such thing."""
    from bcos_rt.export import passes

    net = small_network(Recipe.equivalent(), SIZE)
    real = passes.rewrite

    def broken(program):
        counts = real(program)
        target = torch.ops.aten.conv_transpose2d.input
        first = next(n for n in program.graph.nodes if n.target is target)
        weight = first.args[1]
        wrong = program.add_constant(program.constants[weight] * 1.03, "wrong", weight)
        first.replace_input_with(weight, wrong)
        return counts

    monkeypatch.setattr(passes, "rewrite", broken)
    with pytest.raises(ExportError, match=r"weights|contributions"):
        to_onnx(net, tmp_path / "net.onnx", SIZE)
    assert os.listdir(tmp_path) == []


def test_tolerances_are_an_option(net, tmp_path):
    with pytest.raises(ExportError, match="weights differs"):
        to_onnx(net, tmp_path / "net.onnx", SIZE, tolerances=Tolerances(weights=1e-12))


def test_an_op_without_onnx_form_is_named(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(torch.cumsum(self.conv(x), 1).mean((2, 3)))

    net, _ = bcosify(Odd(), Recipe.equivalent())
    with pytest.raises(UnsupportedOpError, match=r"cumsum.*onnx_op"):
        to_onnx(net, tmp_path / "net.onnx", 16, forward_only=True)
    assert os.listdir(tmp_path) == []


def test_without_onnx_installed(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingDependencyError, match=r"pip install bcos-rt\[onnx\]"):
        to_onnx(net, tmp_path / "net.onnx", SIZE)


def test_importing_the_package_needs_no_onnx():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnx_ir', 'onnxruntime')));"
        "import bcos_rt.export; print(len(bcos_rt.export.ONNX_OPS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100
