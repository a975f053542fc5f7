"""Engine files: programs come back as they were, bit for bit; whatever is not such a file is refused with a reason."""

import json
import math
import operator
import os
import subprocess
import sys
import zipfile

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from bcos_rt import Recipe, bcosify
from bcos_rt.errors import CheckpointError, InvalidArgumentError
from bcos_rt.graph import serialize
from bcos_rt.graph.capture import GraphBuilder
from bcos_rt.graph.fused import build_fused
from bcos_rt.graph.program import Program, propagate
from bcos_rt.graph.serialize import dump, is_engine_file, load
from bcos_rt.graph.specialise import specialise
from bcos_rt.graph.symbols import Sizes, size_text, symbol_names
from tests.kernels.chain import network

aten, bcos = torch.ops.aten, torch.ops.bcos_rt
SIZE = (6, 5)
WRITTEN = {"backend": "eager", "dtype": torch.float32}


class Made:
    """A program in the making: values by node, two symbolic sizes."""

    def __init__(self, classes=True):
        self.sizes = Sizes()
        self.builder = GraphBuilder(self.sizes.mode)
        self.n, self.k = self.sizes.read("N"), self.sizes.read("K")
        self.constants, self.names = {}, {}
        self._pending = []
        with self.sizes.mode:
            image = torch.empty(self.n, 3, *SIZE)
            ids = torch.empty(self.n, self.k, dtype=torch.int64)
        self.image = self.builder.placeholder("image", image)
        self.class_ids = self.builder.placeholder("class_ids", ids) if classes else None

    def constant(self, value, name):
        with self.sizes.mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        with self.builder.graph.inserting_before(next(iter(self.builder.graph.nodes))):
            node = self.builder.placeholder(f"c{len(self.constants)}", fake)
        self.constants[node], self.names[node] = value, name
        return node

    def call(self, *arguments, **options):
        return self.builder.call(*arguments, **options)

    def program(self, outputs):
        program = Program(
            self.builder.graph, self.constants, self.names, self.image, self.class_ids, _made=len(self.constants)
        )
        program.set_outputs(outputs)
        program.graph.lint()
        return program


def code(program):
    return GraphModule(torch.nn.Module(), program.graph).code


def shapes(program):
    """Every node's value in symbols N and K."""
    names = symbol_names(program.image, program.targets)

    def text(value):
        if isinstance(value, torch.Tensor):
            sizes = [size_text(s, names) for s in (*value.shape, *value.stride())]
            return str(value.dtype), str(value.device), sizes
        return [text(v) for v in value] if isinstance(value, tuple | list) else size_text(value, names)

    return {n.name: text(n.meta["val"]) for n in program.graph.nodes if n.op != "output"}


def notes(program):
    keys = ("side", "pass", "fused_from")
    return {n.name: {k: n.meta[k] for k in keys if n.meta.get(k)} for n in program.graph.nodes if n.op != "output"}


def assert_same(program, loaded, *inputs):
    assert code(loaded) == code(program)
    assert shapes(loaded) == shapes(program)
    assert notes(loaded) == notes(program)
    assert {n.name: label for n, label in loaded.names.items()} == {n.name: t for n, t in program.names.items()}
    values = {n.name: value for n, value in loaded.constants.items()}
    assert values.keys() == {n.name for n in program.constants}
    for node, theirs in program.constants.items():
        ours = values[node.name]
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert_bits(ours, theirs)
    if inputs:
        expected, found = program.run(*inputs), loaded.run(*inputs)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].stride() == value.stride()
            assert_bits(found[name], value)


def assert_bits(ours, theirs):
    """Equal with NaN and the sign of zero."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs)))


def inputs_of(program, n=2, k=3):
    generator = torch.Generator().manual_seed(n)
    size = program.image.meta["val"].shape[2:]
    images = torch.rand(n, 3, *size, generator=generator)
    return images, None if program.targets is None else torch.randint(-1, 4, (n, k), generator=generator)


# --- programs come back ----------------------------------------------------------------------------------------------


@st.composite
def programs(draw):
    """A random chain of ops over images, rows and sizes, with every kind of argument the format has a form for."""
    made = Made(classes=draw(st.booleans()))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    values = [made.image]

    def image_value():
        return draw(st.sampled_from(values))

    def constant(*shape, name):
        value = torch.randn(*shape, generator=generator)
        if len(shape) == 4 and draw(st.booleans()):
            value = value.contiguous(memory_format=torch.channels_last)
        if draw(st.booleans()):
            value.reshape(-1)[0] = draw(st.sampled_from([-0.0, math.nan, math.inf]))
        return made.constant(value, name)

    def fused(x):
        channels = x.meta["val"].shape[1]
        out = draw(st.sampled_from([4, 8]))
        weight = constant(out, channels, 3, 3, name="conv.weight")
        scale = constant(out, name="norm.weight") if draw(st.booleans()) else None
        b = draw(st.sampled_from([1.0, 2.0, 1.25]))
        result = made.call(
            bcos.conv2d_fused.default, x, weight, None, None, scale, None, None, [1, 1], [1, 1], [1, 1], 1, b, 1e-6,
            draw(st.sampled_from(["none", "relu", "gelu"])), True, False, True,
        )  # fmt: skip
        result.meta["pass"], result.meta["fused_from"] = "fuse", ("aten.convolution.default", "aten.mul.Tensor")
        made.builder.begin_adjoint()
        return made.call(operator.getitem, result, draw(st.sampled_from([0, 1])))

    def joined(x):
        return made.call(aten.cat.default, [x, image_value()], 1)

    def clamped(x):
        return made.call(aten.clamp.default, x, draw(st.sampled_from([-math.inf, 0.1])), math.inf)

    def padded(x):
        wide = made.call(aten.constant_pad_nd.default, x, [1, 0, 2, 0], draw(st.sampled_from([0.0, -math.inf, 1.5])))
        return made.call(aten.slice.Tensor, made.call(aten.slice.Tensor, wide, 2, 2), 3, 1)

    def cast(x):
        wide = made.call(
            aten._to_copy.default, x, dtype=torch.float64, device=torch.device("cpu"), layout=torch.strided,
            memory_format=torch.channels_last,
        )  # fmt: skip
        return made.call(aten._to_copy.default, wide, dtype=torch.float32)

    def by_rows(x):
        batch = made.call(aten.sym_size.int, made.image, 0)
        channels, height, width = (int(s) for s in x.meta["val"].shape[1:])
        rows = made.call(operator.mul, batch, channels)
        flat = made.call(aten.reshape.default, x, [rows, height * width])
        largest = made.call(aten.max.dim, flat, 1, True)
        divided = made.call(aten.div.Tensor, flat, made.call(operator.getitem, largest, 0))
        again = made.call(operator.floordiv, rows, channels)
        return made.call(aten.reshape.default, divided, [again, channels, height, width])

    def repeated(x):
        if made.class_ids is None:
            return x
        batch, k = made.call(aten.sym_size.int, made.image, 0), made.call(aten.sym_size.int, made.class_ids, 1)
        channels, height, width = (int(s) for s in x.meta["val"].shape[1:])
        wide = made.call(
            aten.expand.default, made.call(aten.unsqueeze.default, x, 1), [batch, k, channels, height, width]
        )
        rows = made.call(aten.reshape.default, wide, [made.call(operator.mul, batch, k), channels, height, width])
        total = made.call(aten.reshape.default, rows, [batch, k, channels, height, width])
        return made.call(aten.sum.dim_IntList, total, [1])

    steps = (fused, joined, clamped, padded, cast, by_rows, repeated)
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=6)):
        values.append(step(image_value()))
    chosen = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    return made.program({f"out {i}": node for i, node in enumerate(chosen)})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=programs(), n=st.integers(1, 3), k=st.integers(1, 3))
def test_a_program_comes_back(tmp_path, program, n, k):
    path = dump({"it": program}, tmp_path / "a.engine", **WRITTEN)
    loaded = load(path).programs["it"]
    assert_same(program, loaded, *inputs_of(program, n, k))
    loaded.graph.lint()
    # Its fake values are what the ops make of them, in symbols: a backend may compile it.
    fresh = loaded.copy()
    propagate(fresh.graph, fresh.image.meta["val"].fake_mode)
    assert [shapes(fresh)[n.name][2][: n.meta["val"].ndim] for n in fresh.outputs.values()] == [
        shapes(loaded)[n.name][2][: n.meta["val"].ndim] for n in loaded.outputs.values()
    ]
    again = dump({"it": loaded}, tmp_path / "b.engine", **WRITTEN)
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def fused():
    return build_fused(network(), SIZE_OF_NETWORK)


SIZE_OF_NETWORK = (20, 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_comes_back(tmp_path, dtype):
    made = build_fused(network(), SIZE_OF_NETWORK, dtype)
    both = {"explain": made.explain, "predict": made.predict}
    path = dump(both, tmp_path / "net.engine", backend="native", dtype=dtype, meta={"classes": ["a", "b"], "x": 0.1})
    found = load(path)
    assert (found.image_size, found.dtype, found.backend) == (SIZE_OF_NETWORK, dtype, "native")
    assert (found.device, found.saved_device) == (torch.device("cpu"), "cpu")
    assert found.meta == {"classes": ["a", "b"], "x": 0.1}
    assert found.torch_version == torch.__version__
    assert list(found.programs) == ["explain", "predict"]
    explain, predict = found.programs.values()
    assert_same(made.explain, explain, *inputs_of(explain))
    assert_same(made.predict, predict, *inputs_of(predict))
    # Symbolic to the end, for any number of images and classes.
    for batch, classes in ((1, 1), (3, 2)):
        fixed = specialise(explain, batch, classes)
        assert tuple(fixed.outputs["contributions"].meta["val"].shape) == (batch, classes, *SIZE_OF_NETWORK)
    # Weights are shared, in the file and in memory.
    stored = path.stat().st_size
    assert stored < 1.3 * sum(v.nbytes for v in explain.constants.values()) + 120_000
    memory = {v.data_ptr() for v in explain.constants.values()}
    assert sum(v.data_ptr() in memory for v in predict.constants.values()) > 10
    assert all(v.data_ptr() % 64 == 0 for v in explain.constants.values())


@pytest.mark.parametrize("name", ["resnet18", "densenet"])
def test_a_whole_network_comes_back(tmp_path, name):
    torch.manual_seed(0)
    # A DenseNet of few layers, wide enough for its weights to be most of the file.
    source = torchvision.models.resnet18() if name == "resnet18" else torchvision.models.DenseNet(64, (2, 2, 2), 64)
    net, _ = bcosify(source, Recipe())
    made = build_fused(net.eval(), (64, 64))
    path = dump({"explain": made.explain, "predict": made.predict}, tmp_path / "net.engine", **WRITTEN)
    found = load(path).programs
    assert_same(made.explain, found["explain"], *inputs_of(made.explain, 1, 2))
    assert_same(made.predict, found["predict"], *inputs_of(made.predict, 2))
    assert path.stat().st_size < 1.1 * sum(v.nbytes for v in net.state_dict().values())


def test_modules_are_kept_for_summaries(tmp_path, fused):
    from bcos_rt.graph.capture import module_of

    loaded = load(dump({"p": fused.predict}, tmp_path / "f", **WRITTEN)).programs["p"]
    pairs = zip(fused.predict.graph.nodes, loaded.graph.nodes, strict=True)
    assert all(module_of(a, "") == module_of(b, "") for a, b in pairs)
    assert {"backbone.pool", "backbone.head"} <= {module_of(n, "") for n in loaded.graph.nodes}


def test_new_constants_of_a_loaded_program_get_names_of_their_own(tmp_path):
    made = Made(classes=False)
    weight = made.constant(torch.ones(3, 1, 1), "w")
    program = made.program({"y": made.call(aten.mul.Tensor, made.image, weight)})
    first = program.add_constant(torch.full((3, 1, 1), 2.0), "w", weight)
    product = program.outputs["y"]
    product.args = (product.args[0], first)
    program.set_outputs({"y": product})
    loaded = load(dump({"p": program}, tmp_path / "f", **WRITTEN)).programs["p"]
    node = loaded.add_constant(torch.zeros(()), "zero", loaded.image)
    loaded.outputs["y"].args = (loaded.outputs["y"].args[0], node)
    assert torch.equal(loaded.run(torch.ones(1, 3, *SIZE), None)["y"], torch.zeros(1, 3, *SIZE))
    GraphModule(torch.nn.Module(), loaded.graph)
    targets = [n.target for n in loaded.graph.nodes if n.op == "placeholder"]
    assert len(set(targets)) == len(targets)


def test_constants_of_every_dtype_and_layout(tmp_path):
    made = Made(classes=False)
    base = torch.arange(48.0).reshape(2, 3, 4, 2)
    given_values = [
        base, base[1], base[:, :, 1:3], base.permute(0, 2, 3, 1), base.transpose(0, 3),
        base.double(), base.half(), base.bfloat16(), base.long(), base.int(), base.short(), base.to(torch.int8),
        base.to(torch.uint8), base > 7, torch.tensor(3.5), torch.zeros(0, 3), torch.ones(1).expand(4, 3),
        base.contiguous(memory_format=torch.channels_last), -torch.zeros(3), torch.zeros(3),
    ]  # fmt: skip
    total = made.call(aten.sum.default, made.image)
    for i, value in enumerate(given_values):
        node = made.constant(value, f"v{i}")
        total = made.call(aten.add.Tensor, total, made.call(aten.sum.default, node))
    program = made.program({"total": total})
    found = load(dump({"p": program}, tmp_path / "f", **WRITTEN)).programs["p"]
    values = {found.names[n]: v for n, v in found.constants.items()}
    for i, value in enumerate(given_values):
        assert_bits(values[f"v{i}"], value)
        # Overlapping memory and memory with gaps becomes contiguous; every dense order is kept.
        if i not in (2, 16):
            assert values[f"v{i}"].stride() == value.stride(), i
    assert values["v18"].data_ptr() != values["v19"].data_ptr()


def test_programs_of_fixed_sizes_stay_fixed(tmp_path, fused):
    fixed = specialise(fused.explain, 2, 3)
    loaded = load(dump({"p": fixed}, tmp_path / "f", **WRITTEN)).programs["p"]
    assert_same(fixed, loaded, *inputs_of(fixed, 2, 3))
    assert tuple(loaded.image.meta["val"].shape) == (2, 3, *SIZE_OF_NETWORK)


def test_a_new_process_loads_without_tracing(tmp_path, fused):
    path = dump({"p": fused.predict}, tmp_path / "f", **WRITTEN)
    images, _ = inputs_of(fused.predict)
    torch.save([images, fused.predict.run(images, None)["logits"]], tmp_path / "expected.pt")
    script = f"""
import sys, torch
from bcos_rt.graph.serialize import load
def forbidden(*args, **options): raise AssertionError("traced")
torch.export.export = torch.compile = torch.fx.symbolic_trace = forbidden
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
found = load({str(path)!r}).programs["p"].run(images, None)["logits"]
assert torch.equal(found, expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


# --- other files, and how it is written ------------------------------------------------------------------------------


def small(value=1.0):
    made = Made(classes=False)
    return made.program({"y": made.call(aten.mul.Tensor, made.image, made.constant(torch.tensor(value), "factor"))})


def test_other_files_go_with_it(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"package" * 1000)
    files = {"inductor-2x3.pt2": tmp_path / "a.pt2", "notes.txt": b""}
    found = load(dump({"p": small()}, tmp_path / "f", files=files, **WRITTEN))
    assert found.files == ("inductor-2x3.pt2", "notes.txt")
    assert found.read("inductor-2x3.pt2") == b"package" * 1000
    folder = tmp_path / "out"
    folder.mkdir()
    assert found.extract("notes.txt", folder).read_bytes() == b""
    with pytest.raises(InvalidArgumentError, match=r"'inductor-2x3\.pt2', 'notes\.txt'"):
        found.read("other")
    with pytest.raises(InvalidArgumentError, match="letters, digits"):
        dump({"p": small()}, tmp_path / "g", files={"../up": b""}, **WRITTEN)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = dump({"p": small(1.0)}, tmp_path / "deep" / "f", **WRITTEN)
    before = path.read_bytes()

    def fails(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(serialize.safetensors.torch, "save", fails)
        with pytest.raises(InvalidArgumentError, match="disk full"):
            dump({"p": small(2.0)}, path, **WRITTEN)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    dump({"p": small(2.0)}, path, **WRITTEN)
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(InvalidArgumentError, match="a directory"):
        dump({"p": small()}, path.parent, **WRITTEN)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_the_format_has_no_form_for(tmp_path):
    made = Made(classes=False)
    other = made.program({"y": made.call(torch.ops.prims.sin.default, made.image)})
    writes = Made(classes=False)
    in_place = writes.program({"y": writes.call(aten.relu_.default, writes.call(aten.clone.default, writes.image))})
    named = Made(classes=False)
    value = torch.ones(2, dtype=torch.complex64)
    complex_ = named.program({"y": named.call(aten.real.default, named.constant(value, "z"))})
    for program, message in ((other, "prims.sin"), (in_place, "relu_"), (complex_, "complex64")):
        with pytest.raises(InvalidArgumentError, match=message):
            dump({"p": program}, tmp_path / "f", **WRITTEN)
    with pytest.raises(InvalidArgumentError, match="meta"):
        dump({"p": small()}, tmp_path / "f", meta={"x": object()}, **WRITTEN)
    with pytest.raises(InvalidArgumentError, match="meta"):
        dump({"p": small()}, tmp_path / "f", meta={"x": math.nan}, **WRITTEN)
    with pytest.raises(InvalidArgumentError, match="one image size"):
        dump({"p": small(), "q": build_fused(network(), (20, 18)).predict}, tmp_path / "f", **WRITTEN)
    with pytest.raises(InvalidArgumentError, match="name"):
        dump({"a/b": small()}, tmp_path / "f", **WRITTEN)
    assert list(tmp_path.iterdir()) == []


# --- files that are damaged, or none ---------------------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="a directory"):
        load(tmp_path)
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a", b"b")
    for name in ("text", "zip"):
        with pytest.raises(CheckpointError, match="not an engine file"):
            load(tmp_path / name)
        assert not is_engine_file(tmp_path / name)
    assert not is_engine_file(tmp_path)
    assert is_engine_file(dump({"p": small()}, tmp_path / "f", **WRITTEN))


@pytest.fixture(scope="module")
def written(tmp_path_factory, fused):
    path = tmp_path_factory.mktemp("written") / "f"
    programs = {"explain": fused.explain, "predict": fused.predict}
    return dump(programs, path, backend="eager", dtype=torch.float32, files={"x.pt2": b"12345" * 20})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_says_so(tmp_path, written, data):
    content = written.read_bytes()
    (tmp_path / "cut").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match="cut: not an engine file, or damaged"):
        load(tmp_path / "cut")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_are_noticed_or_do_not_matter(tmp_path, written, data):
    content = bytearray(written.read_bytes())
    # The zip's own records lie at the end; most of the rest is weights.
    places = st.one_of(st.integers(0, len(content) - 1), st.integers(len(content) - 1500, len(content) - 1))
    content[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped").write_bytes(content)
    try:
        found = load(tmp_path / "flipped")
    except CheckpointError:
        return
    for name, program in load(written).programs.items():
        assert_same(program, found.programs[name])


def rewritten(path, target, changes):
    """The same zip with other contents: ``changes`` maps a name to a function of its bytes, or to None."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            change = changes.get(name, lambda content: content)
            if change is not None:
                sink.writestr(name, change(source.read(name)))
    return target


def edited(change):
    """A change of JSON, in place or as the value that is returned."""

    def function(content):
        data = json.loads(content)
        result = change(data)
        return json.dumps(data if result is None else result).encode()

    return function


def put(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edited(change)


def first_call(data, target):
    return next(n for n in data["nodes"] if n.get("target") == target)


def on_call(op, /, **entries):
    return edited(lambda data: first_call(data, op).update(entries))


CONV = "bcos_rt.conv2d_fused.default"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", put("format", value="other"), "not a bcos-rt engine file"),
        ("manifest.json", put("format_version", value=2), "format version 2, this version of bcos-rt reads 1"),
        ("manifest.json", lambda _: b"{", "does not parse"),
        ("manifest.json", lambda _: b"[" * 100_000, "does not parse"),
        ("manifest.json", lambda _: b"[1]", "is a list"),
        ("manifest.json", put("device", value="tpu"), "device is 'tpu'"),
        ("manifest.json", put("dtype", value="float3"), "dtype is 'float3'"),
        ("manifest.json", put("image_size", value=[4]), "image_size is"),
        ("manifest.json", put("image_size", value=[4, 4]), "not (4, 4)"),
        ("manifest.json", put("programs", value=["explain", "gone"]), "gone.json is missing"),
        ("manifest.json", put("programs", value=[3]), "3 is not a name"),
        ("manifest.json", put("files", value=["../x"]), "'../x' is not a name"),
        ("manifest.json", put("meta", value=3), "meta is a int"),
        ("manifest.json", put("layouts", value={"gone": [0]}), "layouts of constants that are not there"),
        ("constants.safetensors", None, "no constants.safetensors"),
        ("constants.safetensors", lambda content: content[:100], "constants.safetensors"),
        ("programs/explain.json", None, "explain.json is missing"),
        ("programs/explain.json", lambda _: b"nonsense", "program 'explain'"),
        ("programs/explain.json", lambda _: b"[" * 100_000, "program 'explain'"),
        ("programs/explain.json", lambda _: b"[]", "not a dict"),
        ("programs/explain.json", edited(lambda d: d["nodes"].pop(0) and None), "node"),
        ("programs/explain.json", put("nodes", 0, "constant", value="gone"), "'gone' is missing"),
        ("programs/explain.json", put("nodes", 0, "op", value="call_module"), "of kind 'call_module'"),
        ("programs/explain.json", put("nodes", 0, "is", value="image"), ""),
        ("programs/explain.json", put("nodes", 1, "name", value="import"), "is not a name"),
        ("programs/explain.json", put("outputs", value={"logits": 10**6}), "none of those before it"),
        ("programs/explain.json", put("outputs", value={"logits": -1}), "none of those before it"),
        ("programs/explain.json", put("outputs", value=[]), "outputs is a list"),
        ("programs/explain.json", put("constants_made", value=None), "constants_made"),
        ("programs/explain.json", on_call(CONV, target="os.system"), "unknown or refused op 'os.system'"),
        ("programs/explain.json", on_call(CONV, target="prims.sin.default"), "unknown or refused"),
        ("programs/explain.json", on_call(CONV, target="aten.from_file.default"), "unknown or refused"),
        ("programs/explain.json", on_call(CONV, target="aten.relu_.default"), "writes to its arguments"),
        ("programs/explain.json", on_call(CONV, target="aten.sin.out"), "writes to its arguments"),
        ("programs/explain.json", on_call(CONV, target="aten.conv3d.nonsense"), "unknown or refused"),
        ("programs/explain.json", on_call(CONV, target="aten.__class__.mro"), "unknown or refused"),
        ("programs/explain.json", on_call(CONV, target=["aten"]), "unknown or refused"),
        ("programs/explain.json", on_call(CONV, args=[None] * 40), "does not take"),
        ("programs/explain.json", on_call(CONV, args=[{"node": 10**6}]), "none of those before it"),
        ("programs/explain.json", on_call(CONV, args=[{"code": "1"}]), "argument"),
        ("programs/explain.json", on_call(CONV, args=[{"dtype": "float7"}]), "argument"),
        ("programs/explain.json", on_call(CONV, args=[{"device": "moon"}]), "moon"),
        ("programs/explain.json", on_call(CONV, kwargs={"x); import os #": 1}), "is not a name"),
        ("programs/explain.json", on_call(CONV, kwargs={"x": 1}), "does not take"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": ["N.__class__"]}), "a size of"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": ["N**N"]}), "a size of"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": ["1" * 500]}), "a size of"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": ["N//0"]}), "a size of"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": [-1]}), "a size of"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32"}), "no entry 'shape'"),
        ("programs/explain.json", on_call(CONV, value={"dtype": "float32", "shape": [2], "strides": []}), "strides"),
        ("programs/explain.json", on_call(CONV, fused_from=3), "fused_from"),
        ("programs/explain.json", on_call("aten.sym_size.int", value={"size": "Q"}), "a size of 'Q'"),
    ],
)  # fmt: skip
def test_a_tampered_file_is_refused(tmp_path, written, name, change, message):
    path = rewritten(written, tmp_path / "bad", {name: change})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], ["0", "1", "2", "3"], 3])
def test_a_tampered_layout_is_refused(tmp_path, order):
    made = Made(classes=False)
    value = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    program = made.program({"y": made.call(aten.mul.Tensor, made.image, made.constant(value, "m"))})
    path = dump({"p": program}, tmp_path / "f", **WRITTEN)
    bad = rewritten(path, tmp_path / "bad", {"manifest.json": put("layouts", "m", value=order)})
    with pytest.raises(CheckpointError, match="the layout of m"):
        load(bad)


def test_names_cannot_carry_code(tmp_path, written):
    """Generated code holds the names of inputs: one that is no identifier is refused before any code is made."""

    def change(data):
        image = next(n for n in data["nodes"] if n.get("is") == "image")
        image["target"] = "image): raise SystemExit #"

    with pytest.raises(CheckpointError, match="is not a name"):
        load(rewritten(written, tmp_path / "bad", {"programs/explain.json": edited(change)}))


def test_compressed_entries_are_refused(tmp_path, written):
    """Sizes are then bounded by the file's."""
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as sink:
        for name in source.namelist():
            sink.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        load(tmp_path / "z")


def test_a_file_for_another_device(tmp_path, written, monkeypatch):
    path = rewritten(written, tmp_path / "cuda", {"manifest.json": put("device", value="cuda")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="there is none here"):
        load(path)
    found = load(path, device="cpu")
    assert (found.device.type, found.saved_device) == ("cpu", "cuda")


# --- sizes as text ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_sizes_come_back(data):
    sizes = Sizes()
    n, k = sizes.read("N"), sizes.read("K")
    names = {n.node.expr: "N", k.node.expr: "K"}
    leaf = st.sampled_from([n, k]) | st.integers(1, 50)
    tree = st.recursive(
        leaf,
        lambda inner: st.tuples(
            st.sampled_from([operator.add, operator.mul, operator.floordiv, operator.mod]), inner, st.integers(1, 9)
        ) | st.tuples(st.sampled_from([operator.add, operator.mul]), inner, inner),
        max_leaves=6,
    )  # fmt: skip

    def value(node, where):
        if isinstance(node, tuple):
            function, left, right = node
            return function(value(left, where), value(right, where))
        return where.get(id(node), node)

    drawn = data.draw(tree)
    text = size_text(value(drawn, {}), names)
    # What was read may be written otherwise (2*(N + 1) as 2*N + 2), and is the same number.
    again = size_text(sizes.read(text), names)
    words = {"Mod": operator.mod, "PythonMod": operator.mod, "Max": max, "Min": min}
    for at in ({"N": 4, "K": 7}, {"N": 9, "K": 2}, {"N": 1, "K": 50}):
        expected = value(drawn, {id(n): at["N"], id(k): at["K"]})
        for found in (text, again):
            assert (found if isinstance(found, int) else eval(found, at | words)) == expected


def test_a_stranger_among_the_sizes():
    sizes, other = Sizes(), Sizes()
    with pytest.raises(ValueError, match="not on N and K alone"):
        size_text(other.read("K") + 1, {sizes.read("N").node.expr: "N"})
