"""One op, or one network, through ONNX and onnxruntime."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from bcos_rt import recalibrate
from bcos_rt.export.builder import OnnxBuilder
from bcos_rt.export.functions import DOMAIN, make_functions
from bcos_rt.export.ops import emit
from bcos_rt.graph.capture import GraphBuilder

TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}


def through_onnx(target, *args, constants=(), opset=18, **kwargs):
    """``target(*args)`` computed by the op table's ONNX nodes; arguments at the positions ``constants`` are weights."""
    graph = GraphBuilder(FakeTensorMode())
    nodes, values, feed = {}, {}, {}
    for i, value in enumerate(args):
        for j, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, torch.Tensor):
                nodes[i, j] = graph.placeholder(f"x{i}_{j}", graph.fake_mode.from_tensor(tensor))
                (values if i in constants else feed)[nodes[i, j]] = tensor
    given = [
        [nodes.get((i, j), v) for j, v in enumerate(value)] if isinstance(value, list) else nodes.get((i, 0), value)
        for i, value in enumerate(args)
    ]
    node = graph.call(target, *given, **kwargs)
    b = OnnxBuilder(opset, values)
    inputs = []
    for placeholder, tensor in feed.items():
        shape = ir.Shape(["n", *tensor.shape[1:]] if tensor.ndim else [])
        b.values[placeholder] = ir.Value(name=placeholder.name, shape=shape, type=ir.TensorType(TYPES[tensor.dtype]))
        inputs.append(b.values[placeholder])
    emit(b, node)
    results = b.values[node]
    results = list(results) if isinstance(results, tuple) else [results]
    results = [b.op("Identity", r) for r in results]
    metas = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    for result, meta in zip(results, metas, strict=False):
        result.type = ir.TensorType(TYPES[meta.dtype])
    outputs = run_nodes(b, inputs, results, {p.name: t.numpy() for p, t in feed.items()}, opset)
    return outputs if len(outputs) > 1 else outputs[0]


def run_nodes(b, inputs, outputs, feed, opset=18):
    imports = {"": opset, DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=b.nodes, initializers=list(b.initializers.values()), opset_imports=imports)
    graph.name = "test"
    model = ir.Model(graph, ir_version=10, functions=make_functions(b.functions, opset))
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feed)]


def open_session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_file(path, images, class_ids=None):
    """The file's outputs by name."""
    session = open_session(path)
    names = [o.name for o in session.get_outputs()]
    feed = {"image": images.numpy()}
    if class_ids is not None:
        feed["class_ids"] = torch.as_tensor(class_ids).numpy()
    return dict(zip(names, session.run(names, feed), strict=True))


def relative(given, expected):
    """Largest difference over the largest magnitude."""
    given, expected = (np.asarray(v, dtype=np.float64) for v in (given, expected))
    return float(np.abs(given - expected).max() / np.abs(expected).max())


def seeded_images(size, count=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    fine = torch.rand(count, 3, *size, generator=generator)
    return 0.7 * nn.functional.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


class Small(nn.Module):
    """Strided, dilated, grouped and depthwise convolutions, a residual, every pool, a gate and a linear head."""

    def __init__(self, classes=7):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.grouped = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32))
        self.skip = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.last = nn.Sequential(nn.Conv2d(32, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = self.wide(self.pool(self.stem(x)))
        x = torch.relu(self.grouped(x) + self.skip(x))
        x = self.depthwise(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.last(x * gate)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def seeded_norms(model, seed=1, dead=True):
    """Random norm statistics; one channel of each norm is dead and one negative, as in real networks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                c = module.num_features
                module.running_mean.copy_(0.1 * torch.randn(c, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(c, generator=generator))
                module.weight.copy_(0.5 + torch.rand(c, generator=generator))
                module.bias.copy_(0.1 * torch.randn(c, generator=generator))
                if dead:
                    module.weight[0], module.weight[1] = 0.0, -0.7
    return model.eval()


def small_network(recipe, size, seed=0, classes=7):
    from bcos_rt import bcosify

    torch.manual_seed(seed)
    model = seeded_norms(Small(classes))
    net, _ = bcosify(model, recipe)
    if recipe.b > 1:
        recalibrate(net, [seeded_images(size, 4)])
    return net.eval()


def input_of(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first
