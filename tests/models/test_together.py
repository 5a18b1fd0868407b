"""Several texts at once: no text's tokens depend on which others share a step, and what a text held is freed when it goes."""

import random
from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fromzero.errors import ModelError, NumbersError, UserError
from fromzero.models.generate import generate
from fromzero.models.layers.attention import Attend
from fromzero.models.rnn import RNN
from fromzero.models.sampling import penalised, shares_of
from fromzero.models.scores import scores_at
from fromzero.models.together import NOTHING, Batch, Made, Sampling
from tests.models.test_generate import CASES, Own, build, one_thread  # noqa: F401

PROMPTS = [torch.randint(97, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (5, 1, 19, 60, 19, 14, 2, 30)]


def alone(model: nn.Module, ids: Sequence[int], asked: Sampling, stops: Collection[int] = ()) -> list[Made]:
    batch = Batch(model, stops)
    batch.add(ids, asked)
    made: list[Made] = []
    while len(batch):
        made += batch.step()
    return made


def told(made: Sequence[Made]) -> tuple[list[int], list[float], list[str]]:
    return [one.token for one in made], [one.logprob for one in made], [one.ended for one in made]


@pytest.mark.parametrize("case", CASES)
def test_texts_that_join_and_leave_at_any_step_get_the_tokens_they_get_alone(case: str) -> None:
    """Prompts of 1 to 60 tokens and up to 12 more: over the ends of windows, of LongRoPE's short range, and of a cache's room of 64"""
    model, dice = build(case, torch.float64), random.Random(case)
    batch, waiting, made, asked, steps = Batch(model, ()), list(PROMPTS), {}, {}, 0
    while waiting or len(batch):
        steps += 1
        for _ in range(dice.choice((0, 1, 1, 2, 3)) if waiting else 0):
            if waiting:
                ids, most = waiting.pop(0), dice.randint(6, 12)
                sampling = Sampling(most=12 if len(ids) == 60 else most, temperature=dice.choice((0.0, 1.0)), seed=len(waiting))
                number = batch.add(ids, sampling)
                made[number], asked[number] = [], (ids, sampling)
        if len(batch) > 3 and dice.random() < 0.2:
            going = [number for number in made if not made[number] or not made[number][-1].ended]
            batch.remove(dice.choice([number for number in going if len(asked[number][0]) not in (30, 60)]))
        for one in batch.step():
            made[one.number].append(one)
    assert len(made) == len(PROMPTS) and steps >= 9 and sum(map(len, made.values())) >= 30
    for number, (ids, sampling) in asked.items():
        tokens, logs, ended = told(made[number])
        again, logs_again, ended_again = (part[: len(tokens)] for part in told(alone(model, ids, sampling)))
        assert (tokens, ended) == (again, ended_again)
        assert logs == pytest.approx(logs_again, abs=1e-10)
        if not tokens:  # it left before its first step
            continue
        read = [[*ids, *tokens[:n]] for n in range(len(tokens))]  # without any cache
        rows = torch.tensor([len(one) for one in read]).cumsum(0) - 1
        whole = scores_at(model, read, rows.tolist()).log_softmax(1)[torch.arange(len(tokens)), tokens]
        assert logs == pytest.approx(whole.tolist(), abs=1e-10)


@pytest.mark.parametrize("model", [RNN(outputs=97, vocabulary=97, width=16, per="token"), Own()])
def test_modules_without_a_cache_read_all_texts_whole_each_step(model: nn.Module) -> None:
    batch = Batch(model.train(), {8})
    numbers = [batch.add(ids, Sampling(most=5)) for ids in ([3, 4], [1], [6, 7, 2])]
    made = [one for _ in range(5) for one in batch.step()]
    assert model.training and len(batch) == 0
    for number, ids in zip(numbers, ([3, 4], [1], [6, 7, 2]), strict=True):
        assert [one.token for one in made if one.number == number] == [one.token for one in alone(model, ids, Sampling(most=5), {8})]


def test_a_text_ends_at_a_stop_after_its_most_tokens_or_where_the_model_reads_no_more() -> None:
    own = Own()
    assert told(alone(own, [3, 4], Sampling(most=9), {7}))[::2] == ([5, 6, 7], ["", "", "stop"])
    assert told(alone(own, [3, 4], Sampling(most=2), {7}))[::2] == ([5, 6], ["", "length"])
    model = build("gpt2", torch.float64)
    made = alone(model, [5] * 94, Sampling(most=9))
    assert [one.ended for one in made] == ["", "context"]
    assert [one.ended for one in alone(model, [5] * 94, Sampling(most=2))] == ["", "length"]
    with pytest.raises(ModelError, match="the prompt has 96 tokens, the model reads 96; shorten it"):
        Batch(model, ()).add([5] * 96, Sampling())
    for wrong in (97, -1):
        with pytest.raises(UserError, match=f"token {wrong} is none of the 97 that the model knows"):
            Batch(model, ()).add([5, wrong], Sampling())
    with pytest.raises(UserError, match="there is nothing to go on with"):
        Batch(model, ()).add([], Sampling())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Sampling(min_p=1.5), "min_p is 1.5; it is from 0 to 1"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty is 0.0; it is above 0; 1 changes nothing"),
        (Sampling(seed=2**64), "seed is 18446744073709551616; it is a whole number of 64 bits"),
        (Sampling(logprobs=-1), "logprobs is -1; it is 0 or more"),
        (Sampling(most=0), "max_tokens is 0; it is 1 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_a_text_is_added(asked: Sampling, said: str) -> None:
    batch = Batch(Own(), ())
    with pytest.raises(UserError, match=said):
        batch.add([1], asked)
    assert len(batch) == 0 and batch.step() == []


def held(batch: Batch) -> int:
    """Bytes of keys and values"""
    pasts = [past for shelf in batch._shelves.values() for past in shelf.cache.layers]
    return sum(t.untyped_storage().nbytes() for past in pasts for t in (past.k, past.v) if t is not None)


def test_what_a_text_held_is_freed_when_it_is_removed_or_ends_and_no_cache_is_twice_what_it_holds() -> None:
    model = build("llama", torch.float32)
    one = 2 * 3 * 2 * 12 * 4  # bytes a token: keys and values, layers, heads, their width, float32
    batch = Batch(model, ())
    long = batch.add([5] * 70, Sampling(most=20))
    short = [batch.add([6] * 10, Sampling(most=most)) for most in (4, 20)]
    batch.step()
    assert held(batch) == one * (128 + 64 + 64)
    batch.remove(long)
    batch.remove(long)
    assert held(batch) == one * (64 + 64) and len(batch) == 2
    crowd = [batch.add([6] * 64, Sampling(most=9)), batch.add([6] * 60, Sampling(most=9))]
    batch.step()
    assert held(batch) == one * 64 * 4
    batch.step()
    assert held(batch) == one * (64 * 3 + 128), "the one that is full moves to a cache of twice the room, the others stay"
    for number in crowd:
        batch.remove(number)
    ended = [made for _ in range(1) for made in batch.step() if made.ended]
    assert [made.number for made in ended] == short[:1] and held(batch) == one * 64
    batch.remove(short[1])
    assert held(batch) == 0 and len(batch) == 0 and batch.step() == []


class Calls(TorchDispatchMode):
    """How often torch is asked to compute"""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_single_score_that_is_no_number_ends_the_step(monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    model = build("llama", torch.float32)
    batch, scores = Batch(model, ()), model.scores
    for ids in PROMPTS[:3]:
        batch.add(ids, Sampling(most=9))
    monkeypatch.setattr(model, "scores", lambda states: scores(states).index_put_((torch.tensor(1), torch.tensor(7)), torch.tensor(broken)))
    with pytest.raises(NumbersError, match="the model's scores are no numbers"):
        batch.step()


def test_a_step_of_many_texts_takes_few_more_calls_than_a_step_of_one() -> None:
    model, counts = build("llama", torch.float32), []
    for size in (1, 16):
        batch = Batch(model, ())
        for number in range(size):
            batch.add([5] * (10 + number), Sampling(most=40))
        batch.step()
        with Calls() as calls:
            batch.step()
        counts.append(calls.count)
    drawing = 15 * 5  # a text's own scores and logprob; the best token of all texts is found at once
    assert counts[1] - counts[0] <= drawing + 20, counts


def test_modules_keep_their_modes_and_are_looked_at_when_a_text_is_added_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32).train()
    frozen = model.blocks[0].eval()
    batch, walks = Batch(model, ()), []
    batch.add([1, 2], Sampling(most=9))
    walk = nn.Module.modules
    model.eval()
    frozen_batch = Batch(model, ())
    frozen_batch.add([1, 2], Sampling(most=9))
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(1) or walk(self))
    frozen_batch.step()
    assert not walks
    model.train()
    frozen.eval()
    batch.step()
    assert model.training and model.blocks[1].attention.training and not frozen.attention.training


def test_logprobs_are_the_models_own_whatever_is_drawn() -> None:
    model, ids = build("qwen3", torch.float64), list(PROMPTS[2])
    for one in alone(model, ids, Sampling(most=6, temperature=2.0, top_k=3, repetition_penalty=1.3, seed=1, logprobs=4)):
        logs = scores_at(model, [ids], [-1])[0].log_softmax(0)
        best = logs.topk(4)
        assert one.logprob == pytest.approx(float(logs[one.token]), abs=1e-10)
        assert [token for token, _ in one.likeliest] == best.indices.tolist()
        assert [log for _, log in one.likeliest] == pytest.approx(best.values.tolist(), abs=1e-10)
        ids.append(one.token)


def test_only_what_is_allowed_is_taken_and_where_nothing_is_the_text_ends() -> None:
    seen: list[list[int]] = []

    def even(made: Sequence[int]) -> Tensor | None:
        seen.append(list(made))
        if len(made) == 4:
            return torch.zeros(50, dtype=torch.bool)
        return None if len(made) == 3 else torch.arange(40) % 2 == 0  # shorter than the scores: the rest is not allowed

    batch = Batch(Own(), ())
    batch.add([7, 44], Sampling(most=9, temperature=1.0, seed=0), allowed=even)
    free = batch.add([7, 44], Sampling(most=9))
    made = [one for _ in range(5) for one in batch.step()]
    mine = [one for one in made if one.number != free]
    assert all(one.token % 2 == 0 and one.token < 40 for one in mine[:3])
    assert [one.ended for one in mine] == ["", "", "", "", "stop"] and mine[-1].token == NOTHING
    assert seen == [[one.token for one in mine[:n]] for n in range(5)]
    assert [one.token for one in made if one.number == free] == [45, 46, 47, 48, 49]


SETTINGS = [
    {"temperature": 0.7, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("asked", SETTINGS, ids=lambda asked: " ".join(asked))
def test_every_share_that_is_drawn_from_equals_that_of_transformers_warpers(asked: dict[str, float]) -> None:
    scores = torch.randn(50, 97, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(asked["temperature"])])
    if "top_k" in asked:
        theirs.append(TopKLogitsWarper(int(asked["top_k"])))
    if "top_p" in asked:
        theirs.append(TopPLogitsWarper(asked["top_p"]))
    if "min_p" in asked:
        theirs.append(MinPLogitsWarper(asked["min_p"]))
    expected = theirs(torch.zeros(50, 1, dtype=torch.int64), scores.clone()).softmax(dim=1)
    counts = set()
    for row, wanted in zip(scores, expected, strict=True):
        shares, order = shares_of(row, asked["temperature"], asked.get("top_k"), asked.get("top_p"), asked.get("min_p"))  # type: ignore[arg-type]
        ours = torch.zeros(97, dtype=torch.float64).index_copy(0, order[: len(shares)], shares / shares.sum())
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
        counts.add(len(shares))
    assert min(counts) >= 1 and max(counts) < 97


def test_the_repetition_penalty_equals_that_of_transformers_elementwise() -> None:
    scores = torch.randn(8, 97, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.randint(97, (8, 30), generator=torch.Generator().manual_seed(4))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    ours = torch.stack([penalised(row, said.tolist(), 1.3) for row, said in zip(scores, ids, strict=True)])
    assert torch.equal(ours, theirs) and not torch.equal(ours, scores)
    model = build("llama", torch.float64)
    plain, tired = (list(generate(model, PROMPTS[0], most=30, stops=(), repetition_penalty=penalty)) for penalty in (1.0, 50.0))
    assert len(set(tired)) > len(set(plain))


def test_a_step_that_raises_leaves_every_text_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, failing = build("llama", torch.float64), []

    def choosy(made: Sequence[int]) -> None:
        if len(made) == 3 and not failing:
            failing.append(1)
            raise ValueError("not this one")

    batch = Batch(model, ())
    numbers = [batch.add(ids, Sampling(most=9, temperature=1.0, seed=5), allowed=choosy) for ids in PROMPTS[:3]]
    made = [one for _ in range(3) for one in batch.step()]
    with pytest.raises(ValueError, match="not this one"):
        batch.step()
    scores = model.scores

    def broken(states: Tensor) -> Tensor:
        failing.append(2)
        return scores(states) * (torch.nan if len(failing) == 2 else 1.0)

    monkeypatch.setattr(model, "scores", broken)
    with pytest.raises(NumbersError, match="the model's scores are no numbers; its weights may be broken: fetch or train it anew"):
        batch.step()
    made += [one for _ in range(6) for one in batch.step()]
    assert failing[:2] == [1, 2] and len(batch) == 0
    for number, ids in zip(numbers, PROMPTS, strict=False):
        alone_tokens = [one.token for one in alone(model, ids, Sampling(most=9, temperature=1.0, seed=5))]
        assert [one.token for one in made if one.number == number] == alone_tokens


def test_where_all_texts_of_a_cache_need_room_it_is_widened_and_none_is_copied() -> None:
    batch = Batch(build("llama", torch.float32), ())
    for _ in range(3):
        batch.add([5] * 63, Sampling(most=4))
    batch.step()
    (shelf,) = batch._shelves.values()
    kept, room = shelf.cache, shelf.cache.room
    batch.step()
    batch.step()
    (shelf,) = batch._shelves.values()
    assert shelf.cache is kept and kept.room == 2 * room and len(kept.texts) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_next_tokens_of_several_texts_attend_as_exactly_as_the_type_allows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in ((4, 6, 32), (4, 2, 50, 32), (4, 2, 50, 32)))
    q, seen = q * 4, torch.arange(50) < torch.tensor([50, 7, 31, 1])[:, None, None, None]  # scores far apart
    wide = (q.double().view(4, 2, 3, 32) @ k.double().transpose(-1, -2) / 32**0.5).masked_fill(~seen, -torch.inf)
    exact = (wide.softmax(-1) @ v.double()).flatten(1, 2)
    apart = (Attend(causal=True)._next(q, k, v, seen).double() - exact).abs().max()
    assert apart < (0.01 if dtype == torch.bfloat16 else 2e-6)
