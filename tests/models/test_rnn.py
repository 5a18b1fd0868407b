"""rnn: equal to the formulas written out position by position, forward and every gradient; no document sees another."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fromzero.errors import ModelError, ShapeError
from fromzero.models.layers.documents import documents_of
from fromzero.models.rnn import CELLS, RNN, pack

LENGTHS = (1, 70, 3, 17, 70, 2, 33, 1)  # longest, shortest and equal ones, in no order
V = 11


def batch(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(0, V, (int(offsets[-1]),), generator=draw), offsets


def build(seed: int = 0, **options: Any) -> RNN:
    torch.manual_seed(seed)
    model = RNN(**options).double()
    for parameter in model.parameters():  # not what the start is: biases and gates all different
        nn.init.uniform_(parameter, -0.6, 0.6)
    return model


# ------------------------------------------------------------------------- the formulas, written out


def step(kind: str, x: Tensor, h: Tensor, c: Tensor, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One position of one sequence, with the gates in torch's order."""
    from_x, from_h = p["weight_ih"] @ x + p["bias_ih"], p["weight_hh"] @ h + p["bias_hh"]
    if kind == "rnn":
        return torch.tanh(from_x + from_h), c
    if kind == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (xr, xz, xn), (hr, hz, hn) = from_x.chunk(3), from_h.chunk(3)
    z = (xz + hz).sigmoid()
    return (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h, c


def by_hand(model: RNN, kind: str, sequence: Tensor) -> Tensor:
    """(T, F) → (K,), or (T, K) per token, with nothing but the model's parameters and its head"""
    ends: list[Tensor] = []
    for block in model.blocks:
        named, width = dict(block.named_parameters()), block.hidden_size
        assert isinstance(width, int)
        directions, ends = [], []
        for suffix in ("_l0", "_l0_reverse") if block.bidirectional else ("_l0",):
            p = {name.removesuffix(suffix): tensor for name, tensor in named.items() if name.endswith(suffix)}
            h = c = sequence.new_zeros(width)
            states = []
            for x in reversed(sequence) if "reverse" in suffix else sequence:
                h, c = step(kind, x, h, c, p)
                states.append(h)
            directions.append(torch.stack(states[::-1] if "reverse" in suffix else states))
            ends.append(h)
        sequence = torch.cat(directions, dim=1)
    features = sequence if model.per == "token" else torch.cat(ends)
    return features @ model.head.weight.T + model.head.bias


def gradients(model: nn.Module, outputs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=outputs.dtype)
    model.zero_grad()
    (outputs * weights).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    assert ours.keys() == theirs.keys() and len(ours) >= 7
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


WAYS = [(cell, both, layers, "sequence") for cell in CELLS for both in (False, True) for layers in (1, 2)]
WAYS += [(cell, False, layers, "token") for cell in CELLS for layers in (1, 2)]


@pytest.mark.parametrize(("cell", "bidirectional", "layers", "per"), WAYS)
def test_texts_of_many_lengths_equal_the_formulas_forward_and_backward(cell: str, bidirectional: bool, layers: int, per: str) -> None:
    assert len(WAYS) == 18
    model = build(vocabulary=V, outputs=4, cell=cell, width=5, layers=layers, bidirectional=bidirectional, embedding=3, per=per)
    tokens, offsets = batch(LENGTHS)
    ours = model(tokens, offsets)
    assert model.embedding is not None
    each = [by_hand(model, cell, text) for text in model.embedding(tokens).split(LENGTHS)]
    theirs = torch.cat(each) if per == "token" else torch.stack(each)
    assert ours.shape == ((len(tokens), 4) if per == "token" else (len(LENGTHS), 4))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences_of_vectors_equal_the_formulas_forward_and_backward(cell: str, bidirectional: bool) -> None:
    model = build(inputs=(9, 3), outputs=2, cell=cell, width=4, layers=2, bidirectional=bidirectional)
    x = torch.randn(5, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = model(x), torch.stack([by_hand(model, cell, one) for one in x])
    assert ours.shape == (5, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model, ours), gradients(model, theirs))


# ---------------------------------------------------------------------------------- no neighbours


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_other_tokens_in_the_neighbours_change_no_bit_of_a_document(per: str) -> None:
    model = build(vocabulary=V, outputs=4, width=8, layers=2, bidirectional=per == "sequence", per=per).float()
    tokens, offsets = batch(LENGTHS)
    kept = 3
    mine = slice(kept, kept + 1) if per == "sequence" else slice(int(offsets[kept]), int(offsets[kept + 1]))
    changed = (tokens + 1) % V
    changed[offsets[kept] : offsets[kept + 1]] = tokens[offsets[kept] : offsets[kept + 1]]
    before, after = model(tokens, offsets), model(changed, offsets)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_document_alone_gives_what_it_gives_in_a_batch(per: str) -> None:
    model = build(vocabulary=V, outputs=4, width=8, layers=2, per=per)
    tokens, offsets = batch(LENGTHS)
    alone = [model(text, torch.tensor([0, len(text)])) for text in tokens.split(LENGTHS)]
    torch.testing.assert_close(model(tokens, offsets), torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("per", "bidirectional"), [("sequence", False), ("sequence", True), ("token", False)])
def test_the_dense_batch_of_equal_lengths_equals_the_packed_one_forward_and_backward(per: str, bidirectional: bool) -> None:
    model = build(vocabulary=V, outputs=4, width=6, layers=2, per=per, bidirectional=bidirectional)
    tokens, offsets = batch((13, 13, 13))
    more, further = batch((13, 13, 13, 5))  # the fourth has another length, so that all four are packed
    assert torch.equal(more[: len(tokens)], tokens)
    read: list[type] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: read.append(type(given[0])))
    ours = model(tokens, offsets)
    packed = model(more, further)[: len(ours)]
    assert read == [Tensor, nn.utils.rnn.PackedSequence]
    torch.testing.assert_close(ours, packed, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model, ours), gradients(model, packed))


def test_packing_equals_torch_s_own() -> None:
    lengths = (3, 1, 7, 2, 5)
    tokens, offsets = batch(lengths)
    values = torch.arange(len(tokens))
    ours, order = pack(values, documents_of(tokens, offsets))
    theirs = nn.utils.rnn.pack_sequence(list(values.split(lengths)), enforce_sorted=False)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None and other is not None and torch.equal(mine, other)
    assert torch.equal(ours.data[order.argsort()], values)


# ------------------------------------------------------------------------------- start and training


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_matrices_begin_orthogonal_and_forget_gates_open(cell: str) -> None:
    torch.manual_seed(0)
    model = RNN((5, 3), outputs=2, cell=cell, width=8, layers=2, bidirectional=True)
    seen = 0
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if name.startswith("weight_hh"):
                for gate in parameter.split(8):
                    torch.testing.assert_close(gate @ gate.T, torch.eye(8), atol=1e-5, rtol=0)
                    seen += 1
            elif name.startswith("weight_ih"):
                assert 0 < parameter.abs().max() <= 8**-0.5
        for suffix in ("", "_reverse") if cell == "lstm" else ():
            biases = getattr(block, f"bias_ih_l0{suffix}") + getattr(block, f"bias_hh_l0{suffix}")
            assert torch.equal(biases[8:16], torch.ones(8))
            assert biases[:8].abs().max() < 2 * 8**-0.5 and biases[16:].abs().max() < 2 * 8**-0.5
    assert seen == 4 * {"rnn": 1, "lstm": 4, "gru": 3}[cell]


def test_dropout_acts_between_layers_and_before_the_head_and_only_in_training() -> None:
    model = build(vocabulary=V, outputs=4, width=8, layers=2, dropout=0.5)
    tokens, offsets = batch(LENGTHS)
    entered: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, given: entered.append(given[0].data))
    model.head.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    assert not torch.equal(model(tokens, offsets), model(tokens, offsets))
    assert len(entered) == 4
    for hidden in entered:
        assert 0.2 < float((hidden == 0).double().mean()) < 0.8
    still = build(vocabulary=V, outputs=4, width=8, layers=2).eval()
    still.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens, offsets), still(tokens, offsets))


@pytest.mark.parametrize("options", [{"vocabulary": V, "layers": 3}, {"inputs": (5, 3), "bidirectional": True}])
def test_each_parameter_lies_in_one_stage_and_the_stages_run_in_their_order(options: dict[str, Any]) -> None:
    model = RNN(outputs=2, **options)
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{stage}.") for stage in model.stages) == 1, name
    ran: list[str] = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(lambda *_, name=stage: ran.append(name))
    if "inputs" in options:
        model(torch.zeros(2, 5, 3))
    else:
        model(*batch((4, 2)))
    assert tuple(ran) == model.stages


def test_it_can_be_built_without_memory_for_weights() -> None:
    with torch.device("meta"):
        model = RNN(vocabulary=50_000, outputs=50_000, width=512, per="token")
    assert all(p.is_meta for p in model.parameters())


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        ({"inputs": (5, 3), "cell": "lsmt"}, "model.cell", "no cell 'lsmt'; did you mean 'lstm'?"),
        ({"inputs": (5, 3), "cell": "x"}, "model.cell", "no cell 'x'; lstm, gru or rnn"),
        ({"vocabulary": 9, "per": "word"}, "model.per", "per sequence or per token, not per 'word'"),
        ({"vocabulary": 9, "layers": 0}, "model.layers", "at least one layer, not 0"),
        ({"inputs": (5, 3), "per": "token"}, "model.per", "only for texts"),
        ({"vocabulary": 9, "per": "token", "bidirectional": True}, "model.bidirectional", "it would see the answers"),
        ({}, "model.vocabulary", "either inputs or a vocabulary"),
        ({"inputs": (5, 3), "vocabulary": 9}, "model.vocabulary", "either inputs or a vocabulary"),
        ({"inputs": (1, 28, 28)}, "model.from", r"inputs of shape \(1, 28, 28\)"),
        ({"inputs": ()}, "model.from", r"inputs of shape \(\)"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_key(options: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        RNN(outputs=2, **options)
    assert caught.value.faults[0].key == key


def test_tokens_without_offsets_and_vectors_with_them_are_refused() -> None:
    tokens, offsets = batch((4, 2))
    with pytest.raises(ShapeError, match="tokens with offsets"):
        RNN(vocabulary=V, outputs=2)(tokens)
    with pytest.raises(ShapeError, match="vectors without"):
        RNN((3, 2), outputs=2)(torch.zeros(2, 3, 2), offsets)
    with pytest.raises(ShapeError, match="do not fit 6 tokens"):
        RNN(vocabulary=V, outputs=2)(tokens, torch.tensor([0, 5]))
