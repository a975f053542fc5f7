"""What every test shares: the number of threads, and where the data beside the repository is."""

import os
from pathlib import Path

import pytest
import torch

__all__ = ["shared_dir"]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    elsewhere = [i.nodeid for i in items if i.get_closest_marker("timing") and i.path.name != "test_speed.py"]
    if elsewhere:
        raise pytest.UsageError(
            f"comparisons of wall times belong in tests/test_speed.py, where make runs them: {elsewhere}"
        )


def shared_dir(*parts: str) -> Path:
    """A path in the folder ``shared`` beside the repository; skips the test, saying so, where it is missing."""
    path = Path(__file__).resolve().parents[2].joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"not here: {path}")
    return path
