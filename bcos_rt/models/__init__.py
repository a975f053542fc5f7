"""Source models by name, and checkpoints other projects published."""

from bcos_rt.models.published import ImportReport, import_published, published_recipe
from bcos_rt.models.sources import (
    LoadedModel,
    imagenet_class_names,
    known_models,
    load_model,
    metadata_of,
    rebuild_source,
)

__all__ = [
    "ImportReport",
    "LoadedModel",
    "imagenet_class_names",
    "import_published",
    "known_models",
    "load_model",
    "metadata_of",
    "published_recipe",
    "rebuild_source",
]
