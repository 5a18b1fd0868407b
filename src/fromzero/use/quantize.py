"""Quantise: a source in, a speaker out whose weights are laid out to be read for one token after the other, or are 8 or 4 bits each;
and what that costs in quality, measured before a word is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import fromzero.data.tokens as tk
from fromzero.errors import ModelError, UserError, did_you_mean
from fromzero.models.decoder import Decoder
from fromzero.models.scores import device_of, scores_at
from fromzero.use.speak import Speaker, open_speaker

BOUNDS = {"int8": 0.02, "int4": 0.03}  # the part by which the next-token loss may change: where it falls, other words come out too
LEAST = 16  # tokens of the text below that say something about a model
TEXT = (
    "Tea comes from the leaves of an evergreen shrub that grows best where nights are cool, days are warm and rain falls often. The "
    "youngest leaves are picked by hand, spread out in the shade until they are soft, and then heated or left to turn dark, depending on "
    "whether the tea is to be green or black. Good water matters as much as good leaves: if it is too hot, green tea becomes bitter; if it "
    "has stood for a long time, the cup tastes flat.\n\nQ: How long should black tea stay in the pot?\nA: Three to five minutes are enough.\n\n"
    "茶树喜欢温暖湿润的山坡。春天采下的嫩叶最香，先摊开晾软，再用热锅炒干，就成了绿茶。泡茶的水不要太开，否则味道会发苦。\n\n"
    "def minutes(kind):\n    if kind == 'green':\n        return 2\n    return 4\n"
)


@dataclass(frozen=True)
class Cost:
    """What quantising costs. plain, quantised: mean loss of the next token in nats, on TEXT, before and after"""

    kind: str
    plain: float
    quantised: float

    @property
    def grown(self) -> float:
        """The part by which the loss grew"""
        return self.quantised / self.plain - 1

    def __str__(self) -> str:
        quantised, plain = torch.tensor([self.quantised, self.plain]).exp().tolist()  # infinite for a broken model, where math.exp raises
        perplexities = f"perplexity {quantised:.4g} on a fixed text, {plain:.4g} in float32"
        return f"{self.kind}: {perplexities}; next-token loss {self.quantised:.3f}, {self.plain:.3f} in float32 ({self.grown:+.1%})"


def open_quick(source: str, runs: Path, quantize: str | None = None) -> tuple[Speaker, Cost | None]:
    """A speaker as open_speaker opens it, quicker on a CPU: what adapters learned is summed into the matrices, and these are packed.

    quantize:  int8 or int4; None: the numbers stay what they are, and sums are added in another order
    raises:    UserError for another kind or device, ModelError for a model that is not ours or loses more than BOUNDS; as open_speaker
    """
    if quantize is not None and quantize not in BOUNDS:
        raise UserError(f"--quantize {quantize} is not known", mend=did_you_mean(quantize, BOUNDS) or f"{' or '.join(BOUNDS)}")
    try:
        speaker = open_speaker(source, runs, merge=True)
    except ModelError:  # adapters that cannot be merged, or what the same call says again
        speaker = open_speaker(source, runs)
    model = speaker.model
    if quantize is None:
        if isinstance(model, Decoder):
            model.pack("float32")
        return speaker, None
    if not isinstance(model, Decoder):
        raise ModelError(f"'{source}' is no model whose weights are quantised here", why="it is not one of fromzero's own decoders")
    if (device := device_of(model)).type != "cpu":
        raise UserError(f"--quantize is for a CPU, and the model is on {device}", mend="leave it out")
    ids = [*speaker.framed, *tk.encode(speaker.tokenizer, [TEXT], special=False)[0]][: int(min(speaker.context, 1024))]
    if len(ids) < LEAST:
        why = f"the text that it is measured on is {len(ids)} tokens of this model"
        raise ModelError(f"what {quantize} would lose cannot be measured", why=why, mend="leave out --quantize")
    plain = _loss(model, ids)
    model.pack(quantize)
    cost = Cost(quantize, plain, _loss(model, ids))
    if not abs(cost.grown) <= BOUNDS[quantize]:
        mend = "--quantize int8, or leave it out" if quantize == "int4" else "leave out --quantize"
        raise ModelError(
            f"'{source}' is another model with {cost}", why=f"a change of more than {BOUNDS[quantize]:.0%} is refused", mend=mend
        )
    return speaker, cost


def _loss(model: Decoder, ids: list[int]) -> float:
    scores = scores_at(model, [ids], range(len(ids) - 1))
    return float(F.cross_entropy(scores.float(), torch.tensor(ids[1:], device=scores.device)))
