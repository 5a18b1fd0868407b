"""Low-rank adapters: two paths that agree, a merged weight that is never stale, targets that are what was asked for."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fromzero as fz
from fromzero.tuning import LowRank, QuantizedLinear, add_adapters, choose_lowrank_path, choose_targets, merge_adapters

SIZES = {"0": (24, 8, 8), "2": (9,)}


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> nn.Sequential:
    """Two Linears, one fused and without bias, with adapters whose B is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 9)).to(dtype)
    add_adapters(model, SIZES, **({"rank": 4, "alpha": 6.0} | options))  # type: ignore[arg-type]
    for layer in adapters(model):
        nn.init.normal_(layer.b)
        if layer.magnitude is not None:
            nn.init.normal_(layer.magnitude)
    return model


def adapters(model: nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def outcome(model: nn.Module, x: Tensor, path: str) -> dict[str, Tensor]:
    """The output and every gradient"""
    assert choose_lowrank_path(model, path) == 2
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}  # type: ignore[dict-item]


def agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(11, 16), (2, 3, 16)])
def test_the_merged_path_equals_the_plain_one_in_values_and_gradients(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    model, x = adapted(dtype), torch.randn(shape, dtype=dtype)
    plain = outcome(model, x, "plain")
    assert len(plain) == 6
    merged = outcome(model, x, "merged")
    assert all(layer._tensor is not None for layer in adapters(model))  # the path was taken
    for name, theirs in plain.items():
        assert agree(merged[name], theirs, tolerance), name


def test_each_part_of_a_fused_linear_is_adapted_as_if_it_were_alone() -> None:
    layer, x = adapters(adapted(torch.float64))[0], torch.randn(5, 16, dtype=torch.float64)
    theirs = []
    for w, a, b in zip(layer.base.weight.split(layer.sizes), layer.a.split(4), layer.b.split(layer.sizes), strict=True):
        theirs.append(x @ w.T + 6.0 / 4 * (x @ a.T) @ b.T)
    assert agree(layer(x), torch.cat(theirs, 1), 1e-14)
    assert adapters(adapted(rank_stabilised=True))[0].scale == 6.0 / 4**0.5


def test_an_adapter_begins_as_the_layer_it_was_put_on_and_the_same_seed_draws_the_same() -> None:
    x, made = torch.randn(5, 16), []
    for dora in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 9)).eval()
        before = model(x)
        made.append(add_adapters(model, SIZES, rank=4, alpha=8, dora=dora, seed=3))
        assert agree(model(x), before, 1e-6) and not any(layer.training for layer in adapters(model))
    assert torch.equal(made[0][0].a, made[1][0].a) and float(made[0][0].a.detach().abs().max()) <= 0.25  # 1 / √16


def one_more(model: nn.Module) -> dict[str, Tensor]:
    """All values one larger, in new tensors that were changed as often as the old ones."""
    new = {}
    for name, tensor in model.state_dict().items():
        new[name] = tensor + 1
        while new[name]._version < tensor._version:
            new[name].add_(0)
    return new


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
        lambda model: model.load_state_dict(one_more(model)),
        lambda model: model.load_state_dict(one_more(model), assign=True),
        lambda model: model.double(),
    ],
    ids=["step", "load", "assign", "cast"],
)
def test_the_merged_weight_follows_every_change(change: Callable[[nn.Module], object]) -> None:
    model, x = adapted(), torch.randn(5, 16)
    outcome(model, x, "merged")
    with torch.no_grad():
        before = model(x)
    change(model)
    x = x.to(model[0].a.dtype)
    merged = model(x)
    choose_lowrank_path(model, "plain")
    assert agree(merged, model(x), 1e-5) and not torch.equal(merged, before)


@pytest.mark.parametrize(
    "step",
    [
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step(),
        lambda model: [layer.b.data.mul_(2) for layer in adapters(model)],
    ],
    ids=["fused", "data"],
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_step_that_torch_does_not_count_is_followed(step: Callable[[nn.Module], object], dora: bool) -> None:
    model, x = adapted(dora=dora), torch.randn(5, 16)
    outcome(model, x, "merged")
    versions = [p._version for p in model.parameters()]
    step(model)
    assert versions == [p._version for p in model.parameters()]
    merged = model(x)
    assert merge_adapters(model) < 1e-5
    assert agree(merged, model(x), 1e-5)


def test_the_merged_weight_is_made_once_for_all_pieces_of_a_step_and_in_place() -> None:
    model, x = adapted(), torch.randn(5, 16)
    choose_lowrank_path(model, "merged")
    with torch.inference_mode():
        model(x)
    first = adapters(model)[0]._tensor
    made = first._version
    for _ in range(2):
        model(x).sum().backward()
    assert first._version == made
    torch.optim.AdamW(model.parameters(), fused=True).step()
    model(x)
    assert adapters(model)[0]._tensor is first and first._version > made


def test_a_copy_computes_with_its_own_weights() -> None:
    model, x = adapted(), torch.randn(5, 16)
    choose_lowrank_path(model, "merged")
    model(x)
    twin = copy.deepcopy(model)
    assert all(layer._tensor is None for layer in adapters(twin))  # nor does it carry the merged ones along
    twin(x)
    with torch.no_grad():
        for layer in adapters(twin):
            layer.b.mul_(2)
    again = copy.deepcopy(twin)  # its versions begin at 0, where those of the kept weight began
    choose_lowrank_path(twin, "plain")
    assert agree(again(x), twin(x), 1e-5) and not agree(again(x), model(x), 1e-2)


def test_merged_layers_keep_only_what_they_read_for_the_backward_pass() -> None:
    layer, x = adapters(adapted())[0], torch.randn(64, 16)
    layer.path = "merged"
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (layer.a, layer.b, layer._tensor)}
    assert len(kept) == 4 and {t.data_ptr() for t in kept} - own == {x.data_ptr()}


def test_what_is_saved_is_the_base_and_the_adapter_alone() -> None:
    model = adapted(dora=True)
    choose_lowrank_path(model, "merged")
    model(torch.randn(5, 16))
    assert set(model.state_dict()) == {f"{i}.{n}" for i in "02" for n in ("a", "b", "magnitude", "base.weight")} | {"2.base.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{i}.{n}" for i in "02" for n in ("a", "b", "magnitude")}


def test_what_cannot_be_merged_exactly_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 16)
    dropping, autocast, training = adapted(dropout=0.5), adapted(), adapted()
    half = adapted().bfloat16()
    for layer in adapters(training):
        layer.base.requires_grad_()
    monkeypatch.setattr("fromzero.tuning.lowrank._Merged", None)  # to take it is an error
    for model in (dropping, autocast, training, half, adapted(dora=True), adapted(base="4bit")):
        choose_lowrank_path(model, "merged")
        with torch.autocast("cpu", torch.bfloat16, enabled=model is autocast):
            model(x.to(model[0].a.dtype)).float().sum().backward()
    assert training[0].base.weight.grad.any()


def test_dropout_takes_from_what_the_adapter_reads_only_while_training() -> None:
    layer, x = adapters(adapted(dropout=0.5).eval().requires_grad_(False))[0], torch.randn(16).expand(20_000, -1)
    still, base = layer(x)[0], layer.base(x)[0]
    drawn = layer.train()(x)
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - still).norm() < 0.05 * (still - base).norm()


def test_an_adapter_in_float32_goes_beside_a_base_in_bfloat16() -> None:
    linear = nn.Linear(16, 9).bfloat16()
    layer = LowRank(linear, (9,), rank=2, alpha=2)
    assert layer.a.dtype == torch.float32 and layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16
    assert layer.merged().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["full", "8bit", "4bit"])
@pytest.mark.parametrize("dora", [False, True])
def test_folding_in_gives_plain_linears_that_compute_the_same(base: str, dora: bool) -> None:
    model, x = adapted(dora=dora, base=base, dropout=0.1), torch.randn(5, 16)
    before = model.eval()(x)
    model.train()
    assert 0 < merge_adapters(model) < 1e-5
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear] and model[0].bias is None
    assert agree(model(x), before, 1e-5)


def test_folding_in_says_how_far_the_layers_are_from_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRank, "merged", lambda layer: nn.Linear(layer.a.shape[1], len(layer.b)))
    assert merge_adapters(adapted()) > 0.1
    assert merge_adapters(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"1": (9,)}, "'1' is Tanh, an adapter needs a Linear of 9 rows"),
        ({"2": (5, 3)}, "'2' is Linear of 9 rows, an adapter needs a Linear of 8 rows"),
        ({"head": (9,)}, "'head' is not there, .*; leave it out of the targets"),
    ],
)
def test_what_is_no_linear_of_these_rows_gets_no_adapter(parts: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(fz.ModelError, match=said):
        add_adapters(nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 9)), parts, rank=2, alpha=2)


LINEARS = [f"blocks.{i}.{n}" for i in range(4) for n in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")] + ["head"]
STAGES = ("embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head")


@pytest.mark.parametrize(
    ("targets", "last", "expected"),
    [
        ("attention", None, [n for n in LINEARS if ".attention." in n]),
        ("mlp", 1, ["blocks.3.mlp.up", "blocks.3.mlp.down"]),
        ("all-linear", None, LINEARS[:-1]),
        (["qkv", "*.1.mlp.d*"], 3, ["blocks.1.attention.qkv", "blocks.1.mlp.down", "blocks.2.attention.qkv", "blocks.3.attention.qkv"]),
        (["head", "attention"], 2, ["blocks.3.attention.qkv", "blocks.3.attention.out", "head"]),
    ],
)
def test_targets_are_kinds_globs_and_last_components_in_the_last_stages(
    targets: str | list[str], last: int | None, expected: list[str]
) -> None:
    assert list(choose_targets(LINEARS, stages=STAGES, head="head", targets=targets, last=last)) == expected


@pytest.mark.parametrize(
    ("targets", "stages", "said"),
    [
        (["attention", "q_kv"], STAGES, "adapter.targets: 'q_kv' matches no Linear of the model; did you mean 'qkv'"),
        ("atention", STAGES, "did you mean 'attention'"),
        ("zzz", STAGES, "they are blocks.0.attention.qkv, "),
        ("mlp", (), "adapter.layers: no target lies inside a stage of the model; its stages are not known"),
    ],
)
def test_targets_that_match_nothing_are_errors_with_the_nearest(targets: str | list[str], stages: tuple[str, ...], said: str) -> None:
    with pytest.raises(fz.RecipeError, match=said):
        choose_targets(LINEARS, stages=stages, head="head", targets=targets, last=1)


def test_quantised_bases_are_kept_for_the_adapters_alone() -> None:
    model = adapted(base="4bit")
    assert all(isinstance(layer.base, QuantizedLinear) for layer in adapters(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for layer in adapters(model) for p in (layer.a, layer.b)
    )
