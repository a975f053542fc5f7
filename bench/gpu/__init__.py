"""Everything to be checked and measured on a GPU, in one run: ``python -m bench.gpu`` (``make gpu``).

Stages, each in its own process so that a fault of the GPU ends one of them and not the run:

    environment   what the machine is: GPU, driver, clocks, versions           environment.json
    correctness   the tests of the kernels, on the device                      correctness.xml
    graph         a residual block captured in a CUDA graph, replay == eager
    onnx          the exported file in onnxruntime's CUDA provider: parity, time
    benchmark     every layer shape of the networks, all contenders            layers.csv
    sanitizer     compute-sanitizer over every op at small ragged sizes
    plots         totals.png, roofline.png

Whatever is known is written at once: killing the run loses only the measurement under way.
"""
