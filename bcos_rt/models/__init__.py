"""Source models by name, and checkpoints other projects published."""

from bcos_rt.models.sources import (
    LoadedModel,
    imagenet_class_names,
    known_models,
    load_model,
    metadata_of,
    rebuild_source,
)

__all__ = ["LoadedModel", "imagenet_class_names", "known_models", "load_model", "metadata_of", "rebuild_source"]
