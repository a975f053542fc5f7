"""The CIFAR-10 experiment: its plan, its networks, and the table made from logs."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bcos_rt.files import read_rows, write_csv
from bcos_rt.training.run import save_network
from bench.cifar10 import __main__ as program
from bench.cifar10.localise import is_localised, localise_run, methods_for
from bench.cifar10.networks import COMMITTED_WEIGHTS, build, weights_of
from bench.cifar10.picture import draw
from bench.cifar10.plan import POOL_STUDY, STUDY, Run, runs
from bench.cifar10.ship import LARGEST, ship_best
from bench.cifar10.table import epoch_of_passing, write_tables


def logs(folder: Path, name: str, accuracies: list[float], methods: dict[str, float]) -> None:
    rows = [{"epoch": i + 1, "val_top1": a, "images_per_s": 300.0} for i, a in enumerate(accuracies)]
    write_csv(folder / name / "metrics.csv", rows, list(rows[0]))
    found = [{"method": method, "mean": mean, "grids": 63} for method, mean in methods.items()]
    write_csv(folder / name / "localisation.csv", found, ("method", "mean", "grids"))


def test_table_from_logs(tmp_path: Path) -> None:
    rising = [0.5 + 0.03 * i for i in range(12)]  # 0.83 at the end
    logs(tmp_path, "resnet20-standard-seed0", [0.9] * 12, {"grad_cam": 0.4, "occlusion": 0.3, "random": 0.9})
    costly = [{"method": "integrated_gradients", "mean": 0.45, "grids": 12}]
    write_csv(tmp_path / "resnet20-standard-seed0" / "localisation_costly.csv", costly, ("method", "mean", "grids"))
    logs(tmp_path, "resnet20-bcos-seed0", rising, {"bcos": 0.8, "grad_cam": 0.2})
    logs(tmp_path, "resnet20-bcosified-seed0", [0.7, 0.8, 0.84, *[0.85] * 9], {"bcos": 0.75})
    logs(tmp_path, "resnet20-standard-seed1", [0.9] * 12, {})
    logs(tmp_path, "resnet20-bcosified-seed1", [0.9] * 5, {})  # not finished: no row
    logs(tmp_path, "resnet20-bcos-seed1", rising, {})
    logs(tmp_path, "resnet20_pool-standard-seed0", [0.9] * 12, {})  # of the study alone: no row
    logs(tmp_path, "resnet20-bcosified-b1-seed0", [0.6, 0.7, 0.75], {"bcos": 0.25})
    write_tables(tmp_path, tmp_path / "out")
    (row,) = read_rows(tmp_path / "out" / "cifar10.csv")
    assert row == {
        "model": "resnet20", "seed": "0", "pretrained_top1": "90.00", "bcos_top1": "83.00", "bcosified_top1": "85.00",
        "delta": "+2.00", "scratch_epochs": "12", "t": "3", "speedup": "4.0", "loc_bcos": "80.00",
        "loc_bcosified": "75.00", "loc_best_posthoc": "45.00", "best_posthoc": "integrated_gradients",
        "loc_grids": "63", "best_posthoc_grids": "12",
    }  # fmt: skip
    (study,) = read_rows(tmp_path / "out" / "cifar10_study.csv")
    assert (study["model"], study["variant"], study["top1"]) == ("resnet20", "b1", "75.00")
    assert (study["localisation"], study["grids"]) == ("25.00", "63")


@pytest.mark.parametrize("module", ["bench.cifar10", "bench.few_images"])
def test_folders_without_logs_make_no_table(module: str, tmp_path: Path) -> None:
    main = importlib.import_module(f"{module}.__main__")
    result = CliRunner().invoke(main.app, ["table", "--results", str(tmp_path / "again"), "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--results" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["bench.cifar10 localise --data", "bench.few_images measure --photos"])
@pytest.mark.parametrize("what", ["missing.tar", ""])
def test_data_that_are_no_file_are_named(command: str, what: str, tmp_path: Path) -> None:
    module, *arguments = command.split()
    main = importlib.import_module(f"{module}.__main__")
    result = CliRunner().invoke(main.app, [*arguments, str(tmp_path / what)])
    assert result.exit_code == 2
    assert arguments[-1] in result.output


def test_picture_of_what_there_is(tmp_path: Path) -> None:
    logs(tmp_path, "resnet20-bcosified-seed0", [0.6, 0.7], {})
    draw("resnet20", 0, tmp_path, tmp_path / "first.png")
    logs(tmp_path, "resnet20-bcos-seed0", [0.5, 0.65], {})
    shares = np.linspace(0, 1, 20, dtype=np.float32)
    np.savez(tmp_path / "resnet20-bcos-seed0" / "localisation.npz", **{"resnet20-bcos-seed0/bcos": shares})
    draw("resnet20", 0, tmp_path, tmp_path / "second.png")
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("first.png", "second.png")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).mean() > 0.01


@pytest.mark.parametrize("module", ["bench.cifar10", "bench.few_images"])
def test_the_commands_of_the_help_are_taken(module: str) -> None:
    main = importlib.import_module(f"{module}.__main__")
    shown = re.findall(rf"^ +python -m {module} (.*?)  +", main.__doc__, re.MULTILINE)
    assert shown
    for line in shown:
        # Options are read before --help is obeyed.
        result = CliRunner().invoke(main.app, [*line.split(), "--help"])
        assert result.exit_code == 0, (line, result.output)


def test_never_passing_stays_blank() -> None:
    rows = [{"epoch": "1", "val_top1": "0.5"}, {"epoch": "2", "val_top1": "0.7"}]
    assert epoch_of_passing(rows, 0.8) is None
    assert epoch_of_passing(rows, 0.7) == 2


def test_every_run_has_a_name_of_its_own_and_a_source_before_it() -> None:
    names = [run.name for run in runs()]
    assert len(set(names)) == len(names)
    for i, run in enumerate(runs()):
        assert run.source is None or run.source in names[:i]
    assert {run.variant for run in runs()} == {"", *STUDY, *POOL_STUDY}


@pytest.mark.parametrize("run", [run for run in runs() if run.seed == 0], ids=lambda run: run.name)
def test_every_network_can_be_built(run: Run, tmp_path: Path) -> None:
    if run.source is not None:
        source = next(r for r in runs() if r.name == run.source)
        # The source's weights are the committed ones, as on a machine that did not train it.
        committed = tmp_path / "results" / source.name / COMMITTED_WEIGHTS
        save_network(build(source, tmp_path / "work", tmp_path / "results"), committed)
    net = build(run, tmp_path / "work", tmp_path / "results").eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_weights_of_this_machine_come_before_the_committed_ones(tmp_path: Path) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    name = "resnet20-standard-seed0"
    assert weights_of(name, work, results) is None
    committed, mine = results / name / COMMITTED_WEIGHTS, work / name / "last.safetensors"
    committed.parent.mkdir(parents=True)
    committed.touch()
    assert weights_of(name, work, results) == committed
    # Written after every epoch: before the last one it is not yet what the run ends with.
    logs(work, name, [0.1] * 11, {})
    mine.touch()
    assert weights_of(name, work, results) == committed
    logs(work, name, [0.1] * 12, {})
    assert weights_of(name, work, results) == mine


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    """Not silently: whoever wants to train it again is to know where its logs are, and to give another folder."""
    name = "resnet20-standard-seed0"
    logs(tmp_path / "results", name, [0.1] * 12, {"bcos": 0.5})
    write_csv(tmp_path / "results" / name / "localisation_costly.csv", [], ("method", "mean"))
    data = tmp_path / "cifar10.tar.gz"
    data.touch()
    for command in ("run", "all", "localise"):
        named = [name] if command == "run" else ["--name", name]
        arguments = ["--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        result = CliRunner().invoke(program.app, [command, *named, *arguments])
        assert result.exit_code == 0, result.output
        said = "".join(result.stderr.split())
        assert str(tmp_path / "results" / name) in said, said
        assert ("trainedalready" in said) == (command != "localise")
        assert ("hasitsgrids" in said) == (command != "run")
    elsewhere = ["--data", "none.tar.gz", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "again")]
    result = CliRunner().invoke(program.app, ["run", name, *elsewhere])
    assert result.exit_code == 2
    assert "none.tar.gz" in result.output


def test_a_finished_run_is_published_again_after_a_kill(tmp_path: Path) -> None:
    name, results = "resnet20-standard-seed0", tmp_path / "results"
    work = tmp_path / "work"
    logs(work, name, [0.1] * 12, {})
    for file in ("steps.csv", "recipe.json", "last.safetensors"):
        (work / name / file).write_text("x")
    logs(results, name, [0.1] * 11, {})
    (results / name / "state.pt").write_text("x")
    program._train(next(r for r in runs() if r.name == name), tmp_path / "none.tar.gz", work, results)
    assert len(read_rows(results / name / "metrics.csv")) == 12
    assert (results / name / COMMITTED_WEIGHTS).read_text() == "x"
    assert not (results / name / "state.pt").exists()


def test_a_source_that_was_never_trained_is_named(tmp_path: Path) -> None:
    run = next(r for r in runs() if r.kind == "bcosified")
    with pytest.raises(SystemExit, match=str(run.source)):
        build(run, tmp_path, tmp_path)


def test_the_best_seed_is_shipped_with_its_numbers(tmp_path: Path) -> None:
    results, folder = tmp_path / "results", tmp_path / "packaged"
    logs(results, "resnet20-bcosified-seed1", [0.9] * 12, {})
    with pytest.raises(SystemExit, match="no B-cosified run is finished and localised"):
        ship_best("resnet20", results, folder)
    for seed, top1 in ((0, 0.84), (1, 0.86)):
        logs(results, f"resnet20-standard-seed{seed}", [0.8] * 11 + [0.9 + seed / 100], {})
        logs(results, f"resnet20-bcosified-seed{seed}", [0.7] * 11 + [top1], {"bcos": 0.75 + seed / 10})
        (results / f"resnet20-bcosified-seed{seed}" / COMMITTED_WEIGHTS).write_bytes(b"weights" * (seed + 1))
    target = ship_best("resnet20", results, folder)
    assert target.read_bytes() == b"weights" * 2
    about = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert (about["seed"], about["test_top1"], about["test_top1_conventional"]) == (1, 0.86, 0.91)
    assert about["grid_pointing_3x3"] == 0.85
    assert [command.split()[4] for command in about["commands"]] == [
        "resnet20-standard-seed1", "resnet20-bcosified-seed1",
    ]  # fmt: skip
    (results / "resnet20-bcosified-seed1" / COMMITTED_WEIGHTS).write_bytes(bytes(LARGEST + 1))
    with pytest.raises(SystemExit, match=f"{LARGEST + 1} bytes"):
        ship_best("resnet20", results, folder)
    assert target.read_bytes() == b"weights" * 2


def test_methods_that_refuse_a_network_are_left_out(tmp_path: Path) -> None:
    for name, left_out in (("resnet20", set()), ("vit6", {"grad_cam", "guided_backprop", "deep_lift"})):
        run = next(run for run in runs() if run.network == name and run.kind == "standard")
        methods = methods_for(run, build(run, tmp_path, tmp_path).eval(), 32)
        assert {"gradient", "input_x_gradient", "guided_backprop", "deep_lift", "grad_cam", "random"} - left_out == set(
            methods
        )
        assert "random" in methods


@pytest.mark.parametrize(("network", "variant"), [("resnet20", "full"), ("vit6", "strided_padded")])
def test_conventional_networks_play_costly_methods_on_fewer_grids(network: str, variant: str, tmp_path: Path) -> None:
    """A network that knows ten hues."""
    run = next(run for run in runs() if run.network == network and run.kind == "standard")
    assert not is_localised(run, tmp_path / "localisation.csv")

    class Hues(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 10, 4, 4)
            self.relu = torch.nn.ReLU()
            with torch.no_grad():
                self.conv.weight.copy_(60 * (hues - 0.5)[:, :, None, None].expand(-1, -1, 4, 4) / 16)
                self.conv.bias.copy_(-30 * (hues - 0.5).square().sum(1))  # the nearest hue wins

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.conv(x - 0.5)).mean((2, 3))

    corners = torch.tensor([[(c >> i) & 1 for i in range(3)] for c in range(8)], dtype=torch.float32)
    hues = torch.cat([corners, torch.tensor([[0.5, 0.5, 1.0], [1.0, 0.5, 0.5]])])
    labels = torch.arange(10).repeat(6)
    images = hues[labels][:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    localise_run(run, Hues().eval(), (images, labels), tmp_path / "localisation.csv", grids=5)
    rows = read_rows(tmp_path / "localisation.csv")
    assert {row["method"] for row in rows} >= {"gradient", "input_x_gradient", "grad_cam", "random"}
    assert {row["variant"] for row in rows} == {variant}
    assert is_localised(run, tmp_path / "localisation.csv")
    costly = read_rows(tmp_path / "localisation_costly.csv")
    assert {(row["method"], row["grids"]) for row in costly} == {("integrated_gradients", "1"), ("occlusion", "1")}
