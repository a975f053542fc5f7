"""``bcos-rt bench``."""

import csv

import pytest

pytest.importorskip("onnxruntime")


def test_times_a_saved_network(bcos, checkpoint, tmp_path):
    options = ("--size", 32, "--threads", 1, "--rounds", 2, "--seconds", 0, "--csv", tmp_path / "out.csv", "--json")
    result = bcos("bench", checkpoint, "--backends", "onnx,plain", *options)
    assert result.code == 0, result.err
    rows = {(r["contender"], r["mode"]): r for r in result.json["rows"]}
    for mode in ("forward", "explain"):
        assert rows["onnx", mode]["status"] == "ok", rows["onnx", mode]
        assert rows["onnx", mode]["median_ms"] > 0
    assert rows["onnx", "explain"]["error_weights"] < 1e-3
    assert rows["plain", "explain"]["status"] == rows["plain onnx", "forward"]["status"] == "ok"
    assert result.json["machine"]["cpu"]["model"]
    with open(tmp_path / "out.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backends", "nativ"), "did you mean"),
        (("--backends", ","), "at least one name"),
        (("--csv", "out.txt"), ".csv"),
        (("torchvision:resnet181",), "resnet18"),
        (("--weights", "no-such-file.pth"), "an existing file"),
    ],
)
def test_bad_input_is_named(bcos, arguments, message):
    result = bcos("bench", *arguments)
    assert result.code == 2
    assert message in result.err


def test_the_default_command_needs_no_name(bcos):
    assert "network" in bcos("bench", "--help").out
    assert bcos("bench", "network", "--help").out == bcos("bench", "network", "-h").out
    assert "--backends" in bcos("bench", "network", "--help").out
