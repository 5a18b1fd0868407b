"""Models: a name, a class or a description in, a module out; and what can be seen of a module."""

from fromzero.models.catalogue import MODELS, Blueprint, blueprint_of_file, blueprint_of_name, blueprint_of_object, seeded
from fromzero.models.inspect import LayerFacts, ModelFacts, inspect_model

__all__ = [
    "MODELS",
    "Blueprint",
    "LayerFacts",
    "ModelFacts",
    "blueprint_of_file",
    "blueprint_of_name",
    "blueprint_of_object",
    "inspect_model",
    "seeded",
]
