"""The books of captured runs, with a device that captures nothing, and the order of what is asked of CUDA."""

import contextlib
import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from bcos_rt.graph.backends import captured
from bcos_rt.graph.backends.captured import Captures, CudaGraphs


class FakeGraphs:
    """A device whose graphs are closures: a replay computes into the same tensors, and spoils all others' results."""

    def __init__(self):
        self.is_busy, self.fails = False, None
        self.events, self.alive = [], []
        self.inside = 0

    def busy(self):
        return self.is_busy

    @contextlib.contextmanager
    def turn(self):
        self.inside += 1
        assert self.inside == 1, "two replays at a time"
        time.sleep(0.001)
        yield
        self.inside -= 1

    def capture(self, run):
        if self.fails is not None:
            raise self.fails
        assert self.inside == 0
        graph = FakeReplay(self, run)
        self.alive.append(graph)
        self.events.append("capture")
        return graph, graph.outputs

    def wait(self):
        self.events.append("wait")


class FakeReplay:
    def __init__(self, graphs, run):
        self.graphs, self.run = graphs, run
        self.outputs = run()

    def replay(self):
        assert self.graphs.inside == 1, "a replay out of turn"
        for other in self.graphs.alive:
            for value in other.outputs.values():
                value.fill_(torch.nan if value.is_floating_point() else 77)
        for name, value in self.run().items():
            self.outputs[name].copy_(value)
        self.graphs.events.append("replay")

    def release(self):
        self.graphs.alive.remove(self)
        self.graphs.events.append("release")


def doubled(x):
    return {"y": 2 * x}


def test_a_shape_runs_once_and_is_then_captured():
    graphs = FakeGraphs()
    captures = Captures(graphs)
    owner = captures.owner()
    results = []
    for i in range(4):
        results.append(captures.call(owner, doubled, (torch.full((2, 3), float(i)),))["y"])
        assert len(captures) == min(i, 1)
    assert graphs.events == ["capture", "replay", "replay", "replay"]
    # Results belong to the caller: no later replay has touched them.
    assert [float(r.mean()) for r in results] == [0.0, 2.0, 4.0, 6.0]


def test_captured_at_once_where_wanted():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    assert torch.equal(captures.call(captures.owner(), doubled, (torch.ones(2),))["y"], torch.full((2,), 2.0))
    assert graphs.events == ["capture", "replay"]


def test_shapes_dtypes_and_functions_are_told_apart():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    first, second = captures.owner(), captures.owner()
    calls = [
        (first, doubled, torch.ones(2)), (first, doubled, torch.ones(3)),
        (first, doubled, torch.ones(2, dtype=torch.uint8)), (second, lambda x: {"z": x + 1}, torch.ones(2)),
    ]  # fmt: skip
    for _ in range(2):
        for owner, run, x in calls:
            (value,) = captures.call(owner, run, (x,)).values()
            assert torch.equal(value, 2 * x)
            assert value.dtype == x.dtype
    assert len(captures) == len(graphs.alive) == 4


def test_the_least_recently_used_goes_first():
    graphs = FakeGraphs()
    captures = Captures(graphs, limit=2, capture_at=1)
    owner = captures.owner()
    a, b, c = (torch.ones(n) for n in (1, 2, 3))
    for x in (a, b, a, c):
        assert torch.equal(captures.call(owner, doubled, (x,))["y"], 2 * x)
    # b went, after everything was done on the device.
    assert graphs.events == ["capture", "replay", "capture", "replay", "replay", "wait", "release", "capture", "replay"]
    assert sorted(g.outputs["y"].numel() for g in graphs.alive) == [1, 3]
    graphs.events.clear()
    captures.call(owner, doubled, (a,))
    assert graphs.events == ["replay"]
    captures.clear()
    assert graphs.alive == []
    assert len(captures) == 0
    assert torch.equal(captures.call(owner, doubled, (c,))["y"], 2 * c)


def test_without_graphs_everything_just_runs():
    captures = Captures(None)
    owner = captures.owner()
    x = torch.ones(2)
    for _ in range(3):
        assert torch.equal(captures.call(owner, doubled, (x,))["y"], 2 * x)
    assert len(captures) == 0
    captures.clear()


def test_a_caller_who_captures_himself_and_empty_inputs():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    owner = captures.owner()
    assert captures.call(owner, doubled, (torch.ones(0, 3),))["y"].shape == (0, 3)
    graphs.is_busy = True
    captures.call(owner, doubled, (torch.ones(2),))
    assert graphs.events == []


def test_what_cannot_be_captured_runs_and_is_said_once():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    owner = captures.owner()
    graphs.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match=r"\(2, 3\).*not permitted when stream is capturing"):
        captures.call(owner, doubled, (torch.ones(2, 3),))
    graphs.fails = None
    for _ in range(3):
        assert torch.equal(captures.call(owner, doubled, (torch.ones(2, 3),))["y"], torch.full((2, 3), 2.0))
    assert graphs.events == []
    # Another shape may still be.
    captures.call(owner, doubled, (torch.ones(4),))
    assert graphs.events == ["capture", "replay"]


def test_out_of_memory_gives_up_the_other_graphs_and_tries_again_later():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    owner = captures.owner()
    captures.call(owner, doubled, (torch.ones(1),))
    graphs.fails = torch.OutOfMemoryError("out of memory")
    assert torch.equal(captures.call(owner, doubled, (torch.ones(2),))["y"], torch.full((2,), 2.0))
    assert graphs.alive == []
    graphs.fails = None
    captures.call(owner, doubled, (torch.ones(2),))
    assert len(captures) == 1


def test_an_error_of_the_function_itself_is_passed_on():
    def broken(x):
        raise ValueError("no such shape")

    captures = Captures(FakeGraphs(), capture_at=1)
    with pytest.warns(RuntimeWarning, match="no such shape"), pytest.raises(ValueError, match="no such shape"):
        captures.call(captures.owner(), broken, (torch.ones(2),))


def test_a_callers_inference_mode_stays_his():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    owner = captures.owner()
    with torch.inference_mode():
        captures.call(owner, doubled, (torch.ones(2),))
    # In-place copies into tensors made in inference mode would fail here.
    result = captures.call(owner, doubled, (torch.full((2,), 3.0, requires_grad=True).detach(),))["y"]
    assert not result.is_inference()
    result.add_(1)


def test_threads_get_their_own_results():
    graphs = FakeGraphs()
    captures = Captures(graphs, limit=3)
    owners = [captures.owner(), captures.owner()]
    functions = [doubled, lambda x: {"y": x + 10}]
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            which = int(torch.randint(0, 2, (), generator=generator))
            x = torch.rand(int(torch.randint(1, 4, (), generator=generator)), generator=generator)
            result = captures.call(owners[which], functions[which], (x,))["y"]
            time.sleep(0.0005)
            if not torch.equal(result, functions[which](x)["y"]):
                failures.append((seed, which, x, result))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert "replay" in graphs.events
    assert len(captures) <= 3


def test_first_runs_of_a_process_come_one_after_the_other():
    """Triton's loading of a kernel is not safe in several threads."""
    inside, most = [], []
    gate = threading.Barrier(4)

    def slow(x):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return {"y": x}

    def work():
        captures = Captures(FakeGraphs())
        gate.wait()
        captures.call(captures.owner(), slow, (torch.ones(1),))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_nothing_is_freed_before_the_device_is_done():
    graphs = FakeGraphs()
    captures = Captures(graphs, capture_at=1)
    captures.call(captures.owner(), doubled, (torch.ones(1),))
    gone = weakref.ref(captures)
    graphs.events.clear()
    del captures
    gc.collect()
    assert gone() is None
    assert graphs.events == ["wait", "release"]


# --- what is asked of CUDA -------------------------------------------------------------------------------------------


class FakeCuda:
    """``torch.cuda`` that writes down what is called, on which stream."""

    def __init__(self):
        self.log = []
        self.current = FakeStream(self, "caller")
        self.streams, self.pools = 0, 0
        self.capturing, self.fail_capture = False, False
        fake = self

        class Event:
            def record(self, stream):
                fake.log.append(f"record {stream.name}")

            def synchronize(self):
                fake.log.append("synchronize")

        class CUDAGraph:
            def replay(self):
                fake.log.append(f"replay {fake.current.name}")

            def reset(self):
                fake.log.append("reset")

        class Graph:
            def __init__(self, graph, pool, stream, capture_error_mode):
                self.pool, self.stream = pool, stream
                assert capture_error_mode == "thread_local"

            def __enter__(self):
                assert not fake.capturing
                fake.capturing = True
                fake.current = self.stream  # as torch's: it stays, should ending the capture fail
                fake.log.append(f"begin {self.pool} {self.stream.name}")

            def __exit__(self, *_):
                fake.capturing = False
                if fake.fail_capture:
                    raise RuntimeError("capture failed")
                fake.log.append("end")

        self.module = SimpleNamespace(
            Event=Event, CUDAGraph=CUDAGraph, graph=Graph, Stream=self.stream_made, stream=self.on,
            current_stream=lambda _: self.current, device=lambda _: contextlib.nullcontext(),
            graph_pool_handle=self.pool, is_current_stream_capturing=lambda: self.capturing,
        )  # fmt: skip

    def stream_made(self, _):
        self.streams += 1
        return FakeStream(self, f"side{self.streams}")

    def pool(self):
        self.pools += 1
        return f"pool{self.pools}"

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_event(self, _):
        self.cuda.log.append(f"{self.name} waits for the last turn")

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(captured.torch, "cuda", fake.module)
    return fake


def test_the_order_of_streams_events_and_captures(cuda):
    graphs = CudaGraphs(torch.device("cuda", 0))
    captures = Captures(graphs, limit=1)
    owner = captures.owner()

    def run(x):
        cuda.log.append(f"run {cuda.current.name}")
        return {"y": x + 1}

    captures.call(owner, run, (torch.ones(2),))
    assert cuda.log == ["run caller"]
    cuda.log.clear()
    captures.call(owner, run, (torch.ones(2),))
    turn = ["caller waits for the last turn", "replay caller", "record caller"]
    capture = ["run side1", "run side1", "begin {} side1", "run side1", "end", "caller waits for side1"]
    assert cuda.log == ["side1 waits for caller", *(line.format("pool1") for line in capture), *turn]
    cuda.log.clear()
    captures.call(owner, run, (torch.ones(2),))
    assert cuda.log == turn
    # The only graph of the pool goes: its handle may not be used again.
    captures.call(owner, run, (torch.ones(3),))
    cuda.log.clear()
    captures.call(owner, run, (torch.ones(3),))
    expected = ["synchronize", "reset", "side1 waits for caller", *(line.format("pool2") for line in capture), *turn]
    assert cuda.log == expected


def test_graphs_share_a_pool_as_long_as_one_lives(cuda):
    graphs = CudaGraphs(torch.device("cuda", 0))
    first, _ = graphs.capture(lambda: {})
    second, _ = graphs.capture(lambda: {})
    first.release()
    graphs.capture(lambda: {})
    assert cuda.pools == 1
    assert [line for line in cuda.log if line.startswith("begin")] == ["begin pool1 side1"] * 3
    del second


def test_after_a_failed_capture_the_callers_stream_is_current_and_all_else_is_new(cuda):
    graphs = CudaGraphs(torch.device("cuda", 0))
    graphs.capture(lambda: {})
    cuda.fail_capture = True
    with pytest.raises(RuntimeError, match="capture failed"):
        graphs.capture(lambda: {})
    assert cuda.current.name == "caller"
    cuda.fail_capture = False
    cuda.log.clear()
    graphs.capture(lambda: {})
    assert "begin pool2 side2" in cuda.log


def test_a_callers_own_capture_is_seen(cuda):
    graphs = CudaGraphs(torch.device("cuda", 0))
    assert not graphs.busy()
    cuda.capturing = True
    assert graphs.busy()
