"""EfficientNet-Lite0 B-cosified with 400 photographs without labels. See ``python -m bench.few_images --help``."""
