"""The ``bcos-rt`` command: ``convert``, ``explain``, ``export`` and ``doctor``.

Modules here import torch and everything built on it inside the functions that need it, so that ``bcos-rt --help``
answers at once.
"""

from bcos_rt.cli.app import app, main

__all__ = ["app", "main"]
