"""Data: a source in, examples out, in an order that is a function of seed and epoch."""

from fromzero.data.again import again
from fromzero.data.answers import Classes, Numbers, Soft
from fromzero.data.augment import Augmentation
from fromzero.data.chat import chat_again, load_chat
from fromzero.data.contents import Contents, differences
from fromzero.data.conversations import ChatFacts
from fromzero.data.examples import IGNORED, Examples, Inputs, TensorExamples
from fromzero.data.images import ImageFormat
from fromzero.data.kept import KeptExamples
from fromzero.data.language import corpus_again, load_corpus
from fromzero.data.load import DataFacts, Loaded, Preparation, load, load_again
from fromzero.data.opening import ChatAsked, Request
from fromzero.data.order import count_batches, epoch_batches, epoch_order, largest_batch
from fromzero.data.text import TextAsked, TextExamples, TextFacts, TextFormat, places
from fromzero.data.turns import ChatFormat

__all__ = [
    "IGNORED",
    "Augmentation",
    "ChatAsked",
    "ChatFacts",
    "ChatFormat",
    "Classes",
    "Contents",
    "DataFacts",
    "Examples",
    "ImageFormat",
    "Inputs",
    "KeptExamples",
    "Loaded",
    "Numbers",
    "Preparation",
    "Request",
    "Soft",
    "TensorExamples",
    "TextAsked",
    "TextExamples",
    "TextFacts",
    "TextFormat",
    "again",
    "chat_again",
    "corpus_again",
    "count_batches",
    "differences",
    "epoch_batches",
    "epoch_order",
    "largest_batch",
    "load",
    "load_again",
    "load_chat",
    "load_corpus",
    "places",
]
