"""Data: a source in, examples out, in an order that is a function of seed and epoch."""

from fromzero.data.answers import Classes, Numbers, Soft
from fromzero.data.augment import Augmentation
from fromzero.data.examples import Examples, Inputs, TensorExamples
from fromzero.data.images import ImageFormat
from fromzero.data.language import corpus_again, load_corpus
from fromzero.data.load import DataFacts, Loaded, Preparation, load, load_again
from fromzero.data.opening import Request
from fromzero.data.order import epoch_order
from fromzero.data.text import TextAsked, TextExamples, TextFormat

__all__ = [
    "Augmentation",
    "Classes",
    "DataFacts",
    "Examples",
    "ImageFormat",
    "Inputs",
    "Loaded",
    "Numbers",
    "Preparation",
    "Request",
    "Soft",
    "TensorExamples",
    "TextAsked",
    "TextExamples",
    "TextFormat",
    "corpus_again",
    "epoch_order",
    "load",
    "load_again",
    "load_corpus",
]
