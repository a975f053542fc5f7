"""The CIFAR-10 experiment: every run by itself, resumable; the table from the raw logs.

    python -m bench.cifar10 plan                                    what there is to do, and what is done
    python -m bench.cifar10 run NAME --data cifar10.tar.gz          one training run, or the rest of it
    python -m bench.cifar10 all --data cifar10.tar.gz               every run, one after the other; --name for some
    python -m bench.cifar10 localise --data cifar10.tar.gz          grid pointing games of what is trained
    python -m bench.cifar10 table                                   docs/results/cifar10.csv and cifar10_study.csv
    python -m bench.cifar10 ship resnet20                           the best network, into the package

Weights and states lie in --work (build/cifar10); logs and numbers are copied to --results (bench/results/cifar10),
and the weights of finished runs outside the study, so that other runs can begin with them on another machine. What
has its logs there, or in --work, is finished: to train it again, give folders of your own (--work again --results
again). A run that was stopped, or killed, goes on at its last epoch; one that was told to stop (SIGTERM) leaves its
state beside its logs too, where another machine goes on with it. Two processes with one thread each
(OMP_NUM_THREADS=1, --name) train more images a second here than one with two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bcos_rt.errors import TrainingInterruptedError
from bcos_rt.files import read_rows
from bcos_rt.nn.network import BcosNetwork
from bench.cifar10.images import load_images
from bench.cifar10.networks import COMMITTED_WEIGHTS, build, trained, weights_of
from bench.cifar10.plan import Run, runs
from bench.logs import ROOT, all_epochs, copy_logs, copy_whole

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
RESULTS = ROOT / "bench" / "results" / "cifar10"
Data = Annotated[
    Path,
    typer.Option(
        "--data", metavar="TAR", exists=True, dir_okay=False, help="CIFAR-10 as train/CLASS/*.jpg, test/CLASS/*.jpg."
    ),
]
Work = Annotated[Path, typer.Option(help="Weights, states, decoded images.")]
Names = Annotated[list[str] | None, typer.Option("--name", help="Only these runs, in this order.")]
Results = Annotated[Path, typer.Option(help="Logs and numbers; a run that has its logs here is finished.")]
WORK = ROOT / "build" / "cifar10"


@app.command()
def plan(work: Work = WORK, results: Results = RESULTS) -> None:
    """List the runs and how far each is."""
    table = Table("run", "epochs", "done", "val top-1", "images/s")
    for one in runs():
        rows = max(read_rows(results / one.name / "metrics.csv"), read_rows(work / one.name / "metrics.csv"), key=len)
        last = rows[-1] if rows else {}
        table.add_row(one.name, str(one.recipe.epochs), str(len(rows)), last.get("val_top1", "")[:6],
                      last.get("images_per_s", "")[:5])  # fmt: skip
    console.print(table)


@app.command("run")
def run_one(name: str, data: Data, work: Work = WORK, results: Results = RESULTS) -> None:
    """Train one run, or the rest of it."""
    _train(_chosen([name])[0], data, work, results)


@app.command("all")
def run_all(data: Data, name: Names = None, work: Work = WORK, results: Results = RESULTS) -> None:
    """Train every run that is not finished, and play its grids."""
    for one in _chosen(name):
        _train(one, data, work, results)
        _localise(one, data, work, results)


@app.command()
def localise(
    data: Data,
    name: Names = None,
    work: Work = WORK,
    results: Results = RESULTS,
    grids: Annotated[
        int | None, typer.Option(help="Grids; a fifth or a tenth of them of what is costly. Default: the experiment's.")
    ] = None,
) -> None:
    """Grid pointing games (3 x 3) of every finished run that has none yet."""
    for one in _chosen(name):
        _localise(one, data, work, results, grids)


@app.command("table")
def make_table(
    results: Results = RESULTS, output: Annotated[Path, typer.Option(help="Folder of what is written.")] = ROOT / "docs"
) -> None:
    """Write results/cifar10.csv, results/cifar10_study.csv and images/cifar10.png from the logs."""
    from bench.cifar10.picture import draw
    from bench.cifar10.table import write_tables

    if not any((results / one.name / "metrics.csv").exists() for one in runs()):
        raise typer.BadParameter(f"{results} holds no run's logs", param_hint="--results")
    for folder in ("results", "images"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    write_tables(results, output / "results")
    draw("resnet20", 0, results, output / "images" / "cifar10.png")


@app.command()
def ship(network: str, results: Results = RESULTS) -> None:
    """Put the best B-cosified network of this name into the package, with its numbers."""
    from bench.cifar10.ship import ship_best

    console.print(f"{ship_best(network, results)}")


def _chosen(names: list[str] | None) -> list[Run]:
    found = {one.name: one for one in runs()}
    for name in names or ():
        if name not in found:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(found)}", param_hint="NAME")
    return [found[name] for name in names] if names else list(found.values())


def _finished(one: Run, work: Path, results: Path) -> bool:
    return any(all_epochs(logs / one.name, one.recipe.epochs) for logs in (work, results))


def _localise(one: Run, data: Path, work: Path, results: Path, grids: int | None = None) -> None:
    from bench.cifar10.localise import is_localised, localise_run

    target = results / one.name / "localisation.csv"
    if is_localised(one, target):
        console.print(f"{one.name}: has its grids, in {target.parent}")
        return
    if not _finished(one, work, results) or weights_of(one.name, work, results) is None:
        console.print(f"{one.name}: not trained to the end, or its weights are not here")
        return
    console.print(f"[bold]{one.name}[/bold]: grids")
    net = trained(one, work, results)
    localise_run(one, net, load_images(data, work / "cifar10.npz")["test"], target, grids)


def _train(one: Run, data: Path, work: Path, results: Path) -> None:
    from bcos_rt.training import finetune

    folder, target = work / one.name, results / one.name
    kept = target / "state.pt"
    if _finished(one, work, results):
        _publish(one, work, results)
        console.print(f"{one.name}: trained already, its logs are in {target}")
        return
    if kept.exists() and not (folder / kept.name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        copy_whole(kept, folder / kept.name)
    console.print(f"[bold]{one.name}")
    images = load_images(data, work / "cifar10.npz")
    net = build(one, work, results)
    pictures = images["test"][0][::1250].float() / 255

    def told(row: dict[str, Any]) -> None:
        console.print(
            f"  epoch {row['epoch']:3} train {row['train_top1']:.4f} test {row['val_top1']:.4f} "
            f"{row.get('images_per_s', 0.0):.0f} images/s", highlight=False,
        )  # fmt: skip
        copy_logs(folder, target)

    try:
        finetune(
            net, images["train"], one.recipe, validation=images["test"], output=folder, resume=True,
            explain_images=pictures if isinstance(net, BcosNetwork) else None, accelerator="cpu", console=console,
            on_epoch=told,
        )  # fmt: skip
    except TrainingInterruptedError as error:
        console.print(str(error))
        copy_logs(folder, target)
        copy_whole(folder / kept.name, kept)
        raise typer.Exit(143) from error
    _publish(one, work, results)


def _publish(one: Run, work: Path, results: Path) -> None:
    """Put what a run that is finished here leaves where it is committed; again after a kill in between."""
    folder, target = work / one.name, results / one.name
    if not all_epochs(folder, one.recipe.epochs):
        return
    copy_logs(folder, target)
    (target / "state.pt").unlink(missing_ok=True)
    if not one.variant:
        copy_whole(folder / "last.safetensors", target / COMMITTED_WEIGHTS)


if __name__ == "__main__":
    app()
