"""Kernels of bcos-rt: :mod:`.ops` is the only door; :mod:`.reference` is the truth they are compared with."""
