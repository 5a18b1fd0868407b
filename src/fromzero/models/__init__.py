"""Models: a name, a class or a description in, a module out; and what can be seen of a module."""

from fromzero.models.catalogue import (
    FAMILIES,
    MODELS,
    TEXT_MODELS,
    Blueprint,
    Sizes,
    blueprint_of_config,
    blueprint_of_file,
    blueprint_of_name,
    blueprint_of_object,
    seeded,
)
from fromzero.models.decoder import Decoder
from fromzero.models.encoder import Encoder
from fromzero.models.families import Family
from fromzero.models.inspect import KEYED, LayerFacts, ModelFacts, Reads, StageFacts, inspect_model
from fromzero.models.layers.attention import choose_path

__all__ = [
    "FAMILIES",
    "KEYED",
    "MODELS",
    "TEXT_MODELS",
    "Blueprint",
    "Decoder",
    "Encoder",
    "Family",
    "LayerFacts",
    "ModelFacts",
    "Reads",
    "Sizes",
    "StageFacts",
    "blueprint_of_config",
    "blueprint_of_file",
    "blueprint_of_name",
    "blueprint_of_object",
    "choose_path",
    "inspect_model",
    "seeded",
]
