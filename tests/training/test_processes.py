"""Several processes: what they share, who started them, and signals that reach all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric.strategies import FSDPStrategy
from safetensors.torch import load_file

from bcos_rt import finetune
from bcos_rt.data import Augmentation
from bcos_rt.data.loading import loader
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, TrainingInterruptedError
from bcos_rt.training import TrainingRecipe, trainer
from bcos_rt.training.launch import launched
from bcos_rt.training.sharded import share_out
from tests.training.worker import colours, convnet, network

ROOT = Path(__file__).resolve().parents[2]
PLAIN = TrainingRecipe(
    epochs=2, batch_size=16, lr=5e-3, loss="bce", agc=None, augmentation=Augmentation.none(), log_every=1
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote what they found; they were started as SLURM's srun starts them, on the CPU (gloo)."""
    folder = tmp_path_factory.mktemp("two")
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.two_processes", str(folder)], cwd=ROOT,
            env={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of the two found."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_tasks_of_slurm_are_one_run(found: list[dict[str, Any]]) -> None:
    assert [one["world"] for one in found] == [2, 2]


def test_a_learned_scale_is_the_same_in_all_processes(found: list[dict[str, Any]]) -> None:
    assert found[0]["siglip"] == found[1]["siglip"]
    assert found[0]["siglip"]["bias"] != -10


def test_a_process_may_have_no_image_to_validate(found: list[dict[str, Any]]) -> None:
    assert found[0]["few"] == found[1]["few"]
    for row in found[0]["few"]:
        assert set(row) == {"val_loss", "val_top1", "val_top5", "ema_loss", "ema_top1"}
        assert row["val_top1"] in (0, 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_end_where_one_has_a_loss_that_is_not_finite(found: list[dict[str, Any]], strategy: str) -> None:
    said, weights = found[0]["bad"][strategy]
    assert [said, weights] == found[1]["bad"][strategy]
    # Those after the first step.
    assert weights == pytest.approx(found[0]["bad"]["ddp"][1], rel=1e-5)
    assert weights != pytest.approx([float(p.detach().double().sum()) for p in convnet().parameters()], rel=1e-5)
    assert "the loss (labels) is not finite in epoch 1, step 2 of 4" in said
    assert "the output of model.3 (Later), in process 1" in said


# --- shards ----------------------------------------------------------------------------------------------------------


def test_each_process_holds_its_rows(found: list[dict[str, Any]]) -> None:
    """Of the network and of its average: 7, 5 and 3 filters, and their norms' scales and shifts, in two parts."""
    layers = [(7, 6 * 9), (7, 1), (7, 1), (7, 1), (5, 7 * 9), (5, 1), (5, 1), (5, 1), (3, 5), (3, 1)]
    scalars = 3
    everything = scalars + sum(rows * size for rows, size in layers)
    for rank, one in enumerate(found):
        rows_of = [(rows + 1) // 2 if rank == 0 else rows // 2 for rows, _ in layers]
        mine = scalars + sum(rows * size for rows, (_, size) in zip(rows_of, layers, strict=True))
        assert one["sharded"]["held"] == [[mine, everything]] * 2


def test_what_was_shared_out_is_returned_whole(found: list[dict[str, Any]], folder: Path) -> None:
    for name, file in (("net", "last"), ("averaged", "ema")):
        assert found[0]["sharded"][name] == found[1]["sharded"][name]
        saved = load_file(folder / "fsdp" / f"{file}.safetensors")
        assert sum(found[0]["sharded"][name]) == pytest.approx(sum(float(v.double().sum()) for v in saved.values()))


def numbers(folder: Path) -> dict[str, Any]:
    """All numbers of a run's state but times."""
    kept = torch.load(folder / "state.pt", weights_only=True)
    timed = ("seconds", "images_per_s")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in kept["progress"]["history"]]
    optimizers = {name: kept[name]["state"] for name in ("optimizer0", "optimizer1")}
    return {"model": kept["model"], "average": kept["average"], **optimizers, "rows": rows}


def test_with_shards_a_run_is_what_it_is_without(folder: Path) -> None:
    """Weights, both optimisers' states, the average, every number of the history; B was learned."""
    with_shards, without = numbers(folder / "fsdp"), numbers(folder / "ddp")
    torch.testing.assert_close(with_shards, without, rtol=1e-4, atol=1e-6)
    assert without["rows"][-1]["b"] != 1.5
    assert all(without[name] for name in without if name != "optimizer1")  # SGD's, without momentum, is empty


def test_the_norm_that_is_clipped_is_that_of_all_rows(found: list[dict[str, Any]]) -> None:
    for one in found:
        for strategy in ("fsdp", "fsdp fused"):
            assert one["clipped"][strategy] == pytest.approx(one["clipped"]["ddp"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("what", ["weights", "buffers", "losses", "agreement"])
def test_features_alone_teach_a_network_with_running_statistics(found: list[dict[str, Any]], what: str) -> None:
    for one in found:
        assert one["taught"]["fsdp"][what] == pytest.approx(found[0]["taught"]["ddp"][what], rel=1e-4, abs=1e-5)
    first, last = found[0]["taught"]["ddp"]["losses"]
    assert last < 0.9 * first


def test_what_cannot_be_shared_out_is_named() -> None:
    mixed = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).double())
    with pytest.raises(InvalidArgumentError, match=r"net: got .*torch\.float32 and torch\.float64.*'fsdp'"):
        share_out(mixed, torch.device("cpu"))
    with pytest.raises(InvalidArgumentError, match="net: got a Linear that cannot be copied"):
        trainer._copied(torch.nn.utils.weight_norm(torch.nn.Linear(3, 3)))


def test_a_run_with_shards_that_stopped_goes_on_as_if_it_had_not(found: list[dict[str, Any]], folder: Path) -> None:
    assert [one["stopped"] for one in found] == [True, True]
    torch.testing.assert_close(numbers(folder / "resumed"), numbers(folder / "fsdp"), rtol=0, atol=0)


def test_a_run_with_shards_may_go_on_without(folder: Path) -> None:
    torch.testing.assert_close(numbers(folder / "with_ddp"), numbers(folder / "fsdp"), rtol=1e-4, atol=1e-6)


def test_fp16_is_not_for_shards() -> None:
    recipe = PLAIN.replace(precision="16-mixed")
    with pytest.raises(InvalidArgumentError, match=r"strategy: got 'fsdp' with recipe\.precision='16-mixed'"):
        finetune(network(), colours(32), recipe, strategy="fsdp", accelerator="cpu")


def test_one_process_may_use_shards(tmp_path: Path) -> None:
    """In a process of its own: a process group stays for good."""
    command = (
        "from bcos_rt import finetune\nfrom tests.training.test_processes import PLAIN, colours, network\n"
        f"finetune(network(), colours(32), PLAIN, strategy='fsdp', accelerator='cpu', output={str(tmp_path / 'run')!r})"
    )
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}, (2, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}, (4, 2)),
        ({"SLURM_NTASKS": "1"}, (1, 1)),
        # In a shell that SLURM opened there is one process.
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "bash"}, None),
        # torchrun, also inside SLURM.
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "SLURM_NTASKS": "3", "SLURM_NNODES": "3"}, (4, 3)),
    ],
)
def test_who_started_the_processes(
    variables: dict[str, str], expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("SLURM") or n.endswith("WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "xla_fsdp", "deepspeed", "deepspeed_stage_2", "dp"])
def test_other_strategies_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"strategy: got .*{strategy}"):
        finetune(network(), colours(32), PLAIN, strategy=strategy, output=tmp_path / "run", accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_strategies_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidTypeError, match="strategy: got FSDPStrategy"):
        finetune(network(), colours(32), PLAIN, strategy=FSDPStrategy())  # type: ignore[arg-type]
    # Fabric's environment variables reach past the argument.
    monkeypatch.setattr("lightning_fabric.Fabric", lambda **_: SimpleNamespace(strategy=FSDPStrategy()))
    with pytest.raises(InvalidArgumentError, match="strategy: got FSDPStrategy"):
        finetune(network(), colours(32), PLAIN)


# --- signals to the whole group of processes -------------------------------------------------------------------------


class Slow(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images that take time to read, so that a signal comes while they are read."""

    def __init__(self) -> None:
        self.images, self.labels = colours(64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.01)
        return self.images[index].float() / 255, int(self.labels[index])


def run_for_signal(folder: str) -> None:
    """The run that is told to stop, in a process of its own, with two that read and two for validation."""
    finetune(
        network(), Slow(), PLAIN.replace(epochs=1000), validation=colours(16), output=folder, workers=2,
        accelerator="cpu",
    )  # fmt: skip


def test_sigterm_to_the_group_saves_the_running_epoch(tmp_path: Path) -> None:
    """As SLURM sends it: the processes that read get it too. Twice, for good measure."""
    command = f"from tests.training.test_processes import run_for_signal; run_for_signal({str(tmp_path / 'run')!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.csv").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "TrainingInterruptedError" in said.splitlines()[-1], said
    progress = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]
    # A step takes 0.08 s at least, an epoch 0.3: the signal came within one.
    assert progress["step"] > 0, said
    assert progress["sums"]["images"] == 16 * progress["step"]


class Ending(Slow):
    """Reading, it stops the training and then ends itself, as where a signal ended both."""

    read = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        if self.read == 64 + 40:
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_reader_that_ends_with_the_stop_is_a_stop(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterruptedError, match="epoch 2, step 2 of 4"):
        finetune(network(), Ending(), PLAIN, output=tmp_path / "run", workers=1, accelerator="cpu")
    progress = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"], progress["sums"]["images"]) == (1, 2, 32)


def read_for_ever() -> None:
    """Ends while another process reads for it."""
    batches = iter(loader(Slow(), [[0, 1], [2, 3], [4, 5]] * 100, workers=1))
    next(batches)
    time.sleep(0.3)
    sys.modules["kept"] = batches  # type: ignore[assignment]


def test_a_process_ends_while_others_read_for_it() -> None:
    """It ends them by SIGTERM, which they must not outlive."""
    command = "from tests.training.test_processes import read_for_ever; read_for_ever()"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_readers_outlive_a_sigterm_that_is_not_their_parents() -> None:
    batches = iter(loader(Slow(), [[0, 1], [2, 3], [4, 5]] * 4, workers=1))
    next(batches)
    reader = int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1])
    subprocess.run([sys.executable, "-c", f"import os; os.kill({reader}, 15); os.kill({reader}, 2)"], check=True)
    assert len(list(batches)) == 11
