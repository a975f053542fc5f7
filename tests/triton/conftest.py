"""These tests run in a process of their own: in Triton's interpreter (``TRITON_INTERPRET=1``, read when a kernel is
decorated, so it must be set before anything imports Triton) or on a GPU (``BCOS_RT_TEST_DEVICE=cuda``). Any other
process skips the folder."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
    INTERPRETING = False
else:
    from bcos_rt.kernels.triton.launch import interpreting
    from tests.triton import guard, interpreter

    INTERPRETING = interpreting()
    if INTERPRETING:
        interpreter.fix_bfloat16()
        interpreter.save_time()

ON_GPU = os.environ.get("BCOS_RT_TEST_DEVICE", "") == "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING and ON_GPU:
        raise pytest.UsageError("TRITON_INTERPRET and BCOS_RT_TEST_DEVICE=cuda exclude each other")
    if not (INTERPRETING or ON_GPU):
        reason = "needs TRITON_INTERPRET=1 (set before Python starts) or BCOS_RT_TEST_DEVICE=cuda"
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a test go."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def guards(device: str) -> Iterator["guard.Guards"]:
    """Bands around every operand and result; see ``guard.py``. Verified when the test ends."""
    # A GPU overflows without a word.
    with np.errstate(all="ignore"), guard.guarding(device) as active:
        yield active
