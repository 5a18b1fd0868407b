"""Stop strings: found wherever the tokens are cut, with nothing of them given out, and of several the one that is whole first."""

import random
from collections.abc import Sequence

import pytest

from fromzero.data import tokens as tk
from fromzero.use.spelling import Spelling

BYTES, PAIRS = tk.byte_pairs(["a"], 257), tk.byte_pairs(["ab abab baab 東東 é\n\nUser: " * 9] * 3, 330)


def spelled(tokenizer: str, ids: Sequence[int], stops: Sequence[str]) -> tuple[list[str], bool]:
    """Pieces, read until a stop, and whether there was one"""
    spelling, pieces = Spelling(tokenizer, (), stops), []
    for token in ids:
        pieces.append(spelling.add(token))
        if spelling.stopped:
            return pieces, True
    return [*pieces, spelling.end()], spelling.stopped


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """By its definition: read letter by letter until some stop string is whole"""
    for end in range(len(text) + 1):
        if whole := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, whole))], True
    return text, False


@pytest.mark.parametrize("tokenizer", [BYTES, PAIRS], ids=["bytes", "pairs"])
def test_a_stop_string_is_found_whatever_the_tokens_and_nothing_of_it_is_given_out(tokenizer: str) -> None:
    dice, found = random.Random(0), 0
    for _ in range(400):
        text = "".join(dice.choice("ab é東\n") for _ in range(dice.randint(0, 12)))
        stops = ["".join(dice.choice("ab 東\n") for _ in range(dice.randint(1, 4))) for _ in range(dice.randint(0, 3))]
        (ids,) = tk.encode(tokenizer, [text], special=False)
        pieces, stopped = spelled(tokenizer, ids, stops)
        assert ("".join(pieces), stopped) == cut(text, stops), (text, stops)
        found += stopped
    assert 60 < found < 340


def test_only_what_may_begin_a_stop_string_waits() -> None:
    (ids,) = tk.encode(BYTES, ["so\n\nUse it\n\nUser: x"], special=False)
    pieces, stopped = spelled(BYTES, ids, ["\n\nUser:"])
    assert stopped and [piece for piece in pieces if piece] == ["s", "o", "\n\nUse ", "i", "t"]
    pieces, stopped = spelled(BYTES, ids[:6], ["\n\nUser:"])
    assert not stopped and pieces[-1] == "\n\nUs", "at the end it is given out"


def test_of_several_that_end_in_one_token_that_counts_which_is_whole_first() -> None:
    longer = tk.byte_pairs(["xxabyy " * 50], 270)
    for tokenizer, count in ((longer, 1), (BYTES, 6)):
        (ids,) = tk.encode(tokenizer, ["xxabyy"], special=False)
        pieces, stopped = spelled(tokenizer, ids, ["xxabyy", "ab"])
        assert len(ids) == count and stopped and "".join(pieces) == "xx"
