"""Single ops, timed: ``bcos-rt bench kernels``.

* :mod:`.layers`: the shapes, layers of ResNet-18 and -50, DenseNet-121, EfficientNet-Lite0 and ViT-B/16.
* :mod:`.cases`: an op on a shape: our kernel, the same in PyTorch op by op, the definition in float64.
* :mod:`.timing`: times, and what this machine reaches at best in a copy and in a matrix product.
* :mod:`.rows`: cases as rows of a table.
* :mod:`.committed`: a table against an earlier one.
"""
