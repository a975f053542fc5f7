"""CIFAR-10: conventional, B-cos from scratch and B-cosified networks, their accuracy and localisation.

See ``python -m bench.cifar10 --help``.
"""
