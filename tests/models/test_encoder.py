"""The encoder by itself: documents, pooling, stages, begin, and what its families refuse."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fromzero.errors import ModelError, ShapeError
from fromzero.models.encoder import POOLINGS, Encoder, EncoderConfig
from fromzero.models.encoder_families import ENCODERS, SIZES, encoder_config, outputs_in, written_config
from fromzero.models.inspect import inspect_model
from fromzero.models.layers.attention import choose_path

TINY = encoder_config(vocabulary=50, width=16, layers=2, heads=4, context=40)
MODERN = {
    "model_type": "modernbert",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 40,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "local_attention": 8,
}
LENGTHS = (5, 1, 30, 5, 12)


def built(config: dict[str, object], **options: object) -> Encoder:
    torch.manual_seed(0)
    model = ENCODERS[str(config["model_type"])].build(config, **options)
    assert isinstance(model, Encoder)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 50, (sum(LENGTHS),), generator=generator), torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("config", [TINY, MODERN], ids=["bert", "modernbert"])
def test_a_documents_outputs_and_gradients_do_not_depend_on_its_neighbours(config: dict[str, object], pooling: str) -> None:
    model = built(config, outputs=3, pooling=pooling)
    tokens, offsets = batch()
    together = model(tokens, offsets)
    assert together.shape == (len(LENGTHS), 3)
    begin = offsets[:-1].tolist()
    alone = torch.cat([model(tokens[b : b + n], torch.tensor([0, n])) for b, n in zip(begin, LENGTHS, strict=True)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    assert (together[0] - together[2]).abs().max() > 1e-3
    gradients = [torch.autograd.grad((out**2).sum(), list(model.parameters()), allow_unused=True) for out in (together, alone)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [TINY, MODERN], ids=["bert", "modernbert"])
def test_the_plain_path_equals_the_path_by_documents(config: dict[str, object]) -> None:
    model = built(config)
    by_documents = model.states(*batch())
    assert choose_path(model, "plain") == model.config.layers
    assert torch.allclose(model.states(*batch()), by_documents, rtol=0, atol=1e-12)


def test_poolings_are_the_mean_the_first_and_the_familys_own() -> None:
    tokens, offsets = batch()
    mean, first, pooler = (built(TINY, pooling=pooling) for pooling in POOLINGS)
    states = [model.states(tokens, offsets).split(LENGTHS) for model in (mean, first, pooler)]
    assert torch.allclose(mean(tokens, offsets), torch.stack([s.mean(0) for s in states[0]]))
    assert torch.allclose(first(tokens, offsets), torch.stack([s[0] for s in states[1]]))
    own = torch.stack([s[0] for s in states[2]]) @ pooler.pooler.dense.weight.T + pooler.pooler.dense.bias
    assert torch.allclose(pooler(tokens, offsets), own.tanh())
    unit = built(TINY, normalize=True)(tokens, offsets)
    assert torch.allclose(unit.norm(dim=1), torch.ones(len(LENGTHS), dtype=torch.float64))
    assert torch.allclose(unit * mean(tokens, offsets).norm(dim=1, keepdim=True), mean(tokens, offsets))


@pytest.mark.parametrize(
    ("config", "pooling", "outputs"), [(TINY, "mean", None), (TINY, "pooler", 2), (MODERN, "pooler", 2), (MODERN, "mean", 1)]
)
def test_each_parameter_lies_in_exactly_one_stage_and_stages_run_in_their_order(
    config: dict[str, object], pooling: str, outputs: int | None
) -> None:
    model = built(config, pooling=pooling, outputs=outputs)
    for name, _ in model.named_parameters():
        assert sum(name.startswith(stage + ".") for stage in model.stages) == 1, name
    order: list[str] = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(lambda *_, stage=stage: order.append(stage))
    model(*batch())
    assert tuple(order) == model.stages
    assert ("head" in model.stages) == (outputs is not None)


def test_inspection_finds_the_head_and_no_idle_layer() -> None:
    facts = inspect_model(built(TINY, outputs=3).float(), batch(), "encoder", samples=len(LENGTHS))
    assert facts.head == "head"
    assert facts.idle == ()
    assert facts.draws and not facts.random and not facts.coupled


def test_weights_begin_small_biases_at_zero_and_norms_at_one() -> None:
    torch.manual_seed(0)
    model = ENCODERS["bert"].build(encoder_config(vocabulary=500, **SIZES["encoder-4m"]), outputs=2, pooling="pooler")
    seen = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.numel() > 1000:
            assert abs(module.weight.std().item() - 0.02) < 0.002
            seen += 1
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
    assert seen == 2 + 2 * 4 + 1


def test_sizes_have_the_parameters_that_their_names_say() -> None:
    for name, millions in {"encoder-4m": 4.4, "encoder-14m": 14.3, "encoder-110m": 109.5}.items():
        with torch.device("meta"):
            model = ENCODERS["bert"].build(encoder_config(vocabulary=30522, **SIZES[name]), pooling="pooler")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert len(SIZES) == 3


def test_dropout_comes_from_the_config_or_the_option_and_only_in_training() -> None:
    rates = {m.p for m in ENCODERS["bert"].build(TINY).modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.1}
    head = ENCODERS["bert"].build({**TINY, "classifier_dropout": 0.4})
    assert head.dropout.p == 0.4 and head.embedding.dropout.p == 0.1
    model = built(TINY, dropout=0.5, outputs=2)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}
    assert torch.equal(model(*batch()), model(*batch()))
    drawn: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, out: drawn.append(len(out)))
    model(*batch())
    assert drawn == [sum(LENGTHS)] * (1 + 2 * 2) + [len(LENGTHS)]  # embedding, two for each block, head
    model.train()
    assert not torch.equal(model(*batch()), model(*batch()))


@pytest.mark.parametrize("config", [TINY, MODERN], ids=["bert", "modernbert"])
def test_half_precision_runs_by_autocast_and_by_weights(config: dict[str, object]) -> None:
    model = built(config, outputs=3).float()
    exact = model(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(*batch()).float(), exact, atol=0.1 * exact.abs().max().item())
    narrow = model.to(torch.bfloat16)(*batch())
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(narrow.float(), exact, atol=0.1 * exact.abs().max().item())


def test_a_document_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"41 tokens, the model reads 40"):
        built(TINY)(torch.zeros(41, dtype=torch.int64), torch.tensor([0, 41]))


def test_roberta_reads_fewer_tokens_than_its_table_has_rows() -> None:
    config = ENCODERS["roberta"].build({**TINY, "model_type": "roberta", "pad_token_id": 1}).config
    assert (config.first, config.context) == (2, 38)


@pytest.mark.parametrize(
    ("key", "value", "config"),
    [
        ("position_embedding_type", "relative_key", TINY),
        ("is_decoder", True, TINY),
        ("add_cross_attention", True, TINY),
        ("pruned_heads", {"0": [1]}, TINY),
        ("hidden_act", "swishy", TINY),
        ("norm_bias", True, MODERN),
        ("classifier_bias", True, MODERN),
        ("classifier_activation", "swishy", MODERN),
        ("rope_scaling", {"type": "yarn"}, MODERN),
        ("layer_types", ["full_attention", "linear_attention"] * 2, MODERN),
        ("layer_types", ["full_attention"], MODERN),
    ],
)
def test_what_would_be_another_model_is_refused_by_its_key(key: str, value: object, config: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        ENCODERS[str(config["model_type"])].build({**config, key: value})
    assert caught.value.faults[0].key == key
    assert str(value)[:20] in str(caught.value)


def test_another_kind_of_rope_and_missing_keys_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rope_type: is 'yarn'"):
        ENCODERS["modernbert"].build({**MODERN, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}})
    config = {key: value for key, value in TINY.items() if key not in ("hidden_size", "vocab_size")}
    with pytest.raises(ModelError, match=r"has no vocab_size, hidden_size"):
        ENCODERS["bert"].build(config)


def test_keys_that_a_config_leaves_out_have_their_published_defaults() -> None:
    modern = ENCODERS["modernbert"].build({k: v for k, v in MODERN.items() if not k.endswith("activation")}).config
    assert (modern.activation, modern.pooler_activation, modern.eps, modern.reaches[1]) == ("gelu", "gelu", 1e-5, 4)
    assert ENCODERS["bert"].build({k: v for k, v in TINY.items() if k != "type_vocab_size"}).config.types == 2


def test_unknown_poolings_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no pooling is called 'men'; did you mean 'mean'"):
        ENCODERS["bert"].build(TINY, pooling="men")
    with pytest.raises(ModelError, match="5 heads do not divide a width of 16"):
        Encoder(EncoderConfig(vocabulary=5, width=16, hidden=8, heads=5, layers=1, context=4))


def test_a_written_config_says_what_was_built() -> None:
    published = written_config(TINY, outputs=3, pooling="pooler")
    assert published["architectures"] == ["BertForSequenceClassification"]
    assert published["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert written_config({**TINY, "id2label": {"0": "no", "1": "yes"}}, outputs=2, pooling="pooler")["id2label"] == {"0": "no", "1": "yes"}
    for options in ({"pooling": "mean"}, {"pooling": "pooler", "normalize": True}):
        written = written_config(TINY, outputs=3, **options)
        assert written["architectures"] == ["BertModel"]
        again = ENCODERS["bert"].build(written, outputs=outputs_in(written, {"classifier.weight"}))
        assert (again.pooling, again.normalize, again.head.out_features) == (options["pooling"], options.get("normalize", False), 3)
    assert written_config({**TINY, "model_type": "xlm-roberta"}, outputs=None, pooling="mean")["architectures"] == ["XLMRobertaModel"]


def test_every_field_of_the_description_changes_a_model() -> None:
    """A field that no code reads would be a promise that is not kept."""
    base = EncoderConfig(vocabulary=9, width=8, hidden=6, heads=2, layers=2, context=8, types=1)
    other = {"vocabulary": 10, "width": 10, "hidden": 7, "layers": 3, "context": 9, "first": 2, "types": 2}
    other |= {"bias": False, "gated": True, "prenorm": True, "bases": (10.0, 10.0), "pooler_norm": True}
    silent = {"heads": 4, "eps": 0.1, "activation": "relu", "reaches": (1, 1), "pooler_over": "mean", "pooler_activation": "relu"}
    train = {"dropout": 0.5, "head_dropout": 0.5}
    assert {*other, *silent, *train} == {field.name for field in dataclasses.fields(EncoderConfig)}
    tokens, offsets = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 5])

    def run(config: EncoderConfig, training: bool = False) -> tuple[dict[str, torch.Size], Tensor]:
        torch.manual_seed(1)
        model = Encoder(config, 2, "pooler").train(training)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}, model(tokens, offsets)

    shapes, out = run(base)
    assert all(run(dataclasses.replace(base, **{field: value}))[0] != shapes for field, value in other.items())
    for field, value in silent.items():
        assert not torch.equal(run(dataclasses.replace(base, **{field: value}))[1], out), field
    for field, value in train.items():
        assert not torch.equal(run(dataclasses.replace(base, **{field: value}), training=True)[1], out), field
