"""The command as a whole: help, versions, exit codes, what goes to which stream."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import bcos_rt
from bcos_rt.cli import doctor as doctor_module

COMMANDS = ("convert", "explain", "export", "doctor")


def test_help_names_every_command(bcos):
    result = bcos("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(bcos, command):
    result = bcos(command, "--help")
    assert result.code == 0
    assert "--json" in result.out


def test_version(bcos):
    assert bcos("--version").out.split() == ["bcos-rt", bcos_rt.__version__]


@pytest.mark.parametrize("module", ["bcos_rt", "bcos_rt.cli"])
def test_runs_as_a_module_and_help_loads_no_torch(module):
    code = (
        "import sys; sys.argv = ['bcos-rt', '--help']\n"
        "from bcos_rt.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = ["-m", "bcos_rt", "--help"] if module == "bcos_rt" else ["-c", code]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "explain" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("explan", "x.png"),
        ("explain",),
        ("explain", "x.png", "--no-such-option"),
        ("explain", "x.png", "--top", "many"),
        ("explain", "x.png", "--top", "0"),
        ("convert", "--model", "timm:resnet18"),
        ("export", "--model", "timm:resnet18"),
        ("evaluate", "-c", "a.safetensors", "--checkpoint=b.safetensors", "--data", "photos"),
    ],
)
def test_wrong_command_lines(bcos, arguments):
    result = bcos(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "rror" in result.err
    result = bcos(*arguments, "--json")
    assert result.code == 2
    assert result.json["error"]["message"]


def test_one_network_is_one(bcos):
    result = bcos("evaluate", "-c", "a.safetensors", "--checkpoint=b.safetensors", "--data", "photos")
    assert "--checkpoint: got 2 values, expected one" in result.err
    result = bcos("randomise", "-m", "small:resnet20", "-m", "small:vit6", "--data", "photos", "-o", "out")
    assert "--model: got 2 values, expected one" in result.err
    assert bcos("evaluate", "-c", "a", "-c", "b", "--help").code == 0
    # What is given again otherwise counts last, as usual.
    result = bcos("evaluate", "-c", "a.safetensors", "--size", "0", "--size", "8", "--data", "photos")
    assert "a.safetensors: no such file" in result.err


def test_json_after_a_double_dash_is_a_file_name(bcos):
    result = bcos("explain", "--model", "timm:resnet18", "--", "--json")
    assert result.code == 2
    assert result.out == ""
    assert "'--json', which does not exist" in result.err


def test_an_unexpected_error_is_a_traceback_and_exit_code_1(bcos, monkeypatch):
    def broken():
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(doctor_module, "examine", broken)
    result = bcos("doctor")
    assert (result.code, result.out) == (1, "")
    assert "Traceback" in result.err
    assert "the disk is on fire" in result.err
    result = bcos("doctor", "--json")
    assert result.code == 1
    assert result.json == {"error": {"type": "RuntimeError", "message": "the disk is on fire"}}
    assert "Traceback" in result.err


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_interruption_is_exit_code_130(bcos, monkeypatch, flags):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "examine", interrupted)
    result = bcos("doctor", *flags)
    assert (result.code, result.out) == (130, "")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_ends_the_process_with_130(tmp_path):
    """A real process, interrupted in the middle of its work."""
    code = (
        "import time\n"
        "import bcos_rt.cli.doctor as d\n"
        "from bcos_rt.cli import main\n"
        "def examine():\n    print('working', flush=True)\n    time.sleep(60)\n"
        "d.examine = examine\n"
        "import sys; sys.argv = ['bcos-rt', 'doctor']; main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # As a terminal starts it: shells have their background jobs ignore SIGINT, tests among them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stderr.readline().strip() == "working"  # prints of libraries go to stderr
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""


def test_warnings_are_single_lines_and_part_of_the_json(bcos, monkeypatch):
    import warnings

    def examine():
        for _ in range(2):
            warnings.warn("mind the gap", stacklevel=1)
        warnings.warn("somebody else's", DeprecationWarning, stacklevel=1)
        print("a library talks")
        return {"value": float("nan"), "problems": []}

    monkeypatch.setattr(doctor_module, "examine", examine)
    result = bcos("doctor", "--json")
    assert result.code == 0
    assert result.json == {"command": "doctor", "value": None, "problems": [], "warnings": ["mind the gap"]}
    assert result.err.splitlines() == ["warning: mind the gap", "a library talks"]


def test_nothing_but_json_on_stdout_of_a_real_process(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "bcos_rt", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["self_check"]["ok"] is True
    assert result.stderr == ""
