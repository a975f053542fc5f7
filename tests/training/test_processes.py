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

from bcos_rt import finetune
from bcos_rt.data import Augmentation
from bcos_rt.data.loading import loader
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, TrainingInterruptedError
from bcos_rt.training import TrainingRecipe, trainer
from tests.training.worker import colours, network

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
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that were started as SLURM's srun starts them, on the CPU (gloo)."""
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


def test_all_processes_end_where_one_has_a_loss_that_is_not_finite(found: list[dict[str, Any]]) -> None:
    assert found[0]["bad"] == found[1]["bad"]
    assert "the loss (labels) is not finite in epoch 1, step 2 of 4" in found[0]["bad"]
    assert "the output of model.3 (Later), in process 1" in found[0]["bad"]


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
    assert trainer._launched() == expected


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "xla_fsdp", "deepspeed", "deepspeed_stage_2", "dp"])
def test_strategies_that_share_out_the_weights_are_refused(strategy: str, tmp_path: Path) -> None:
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
