"""Models of transformers, torch.hub and timm behind our interface: equal to what they are by themselves, and what is refused."""

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import transformers
from torch import Tensor, nn

from fromzero.errors import FromzeroError, MissingExtra, ModelError, SourceError
from fromzero.models import FAMILIES, Blueprint, inspect_model
from fromzero.models.foreign import FOREIGN, build_hub, build_timm, foreign_reads, hub_name, load_foreign, pixel_scale

VOCABULARY, OUTPUTS = 31, 3
LENGTHS = (1, 7, 12, 3, 7, 1, 5)
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SHAPE, "max_position_embeddings": 40, "pad_token_id": None},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 3},
}
WHOLE: dict[str, dict[str, Any]] = {
    "electra": {**SHAPE, "embedding_size": 8, "max_position_embeddings": 40},
    "mpnet": {**SHAPE, "max_position_embeddings": 42},
    "gpt_neox": CAUSAL["gpt_neox"],
    "bloom": CAUSAL["bloom"],
}
IMAGES: dict[str, dict[str, Any]] = {
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}
AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "whole": transformers.AutoModelForSequenceClassification,
    "image": transformers.AutoModelForImageClassification,
    "body": transformers.AutoModel,
}


def theirs_of(kind: str, task: str, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """A model of theirs with weights of some size, its config.json, and its tensors as a file would hold them"""
    torch.manual_seed(1)
    described = transformers.AutoConfig.for_model(kind, num_labels=OUTPUTS, **config)
    model = AUTO[task].from_config(described).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    first = {t.data_ptr(): n for n, t in reversed(model.state_dict().items())}  # a file holds a tied tensor once
    held = {n: t.clone() for n, t in model.state_dict().items() if first[t.data_ptr()] == n}
    written: dict[str, Any] = {"architectures": [type(model).__name__], **described.to_diff_dict()}
    return model, written, held


def documents() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    return tokens, torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize(("kind", "task"), [*((k, "causal") for k in CAUSAL), *((k, "whole") for k in WHOLE)])
def test_documents_end_to_end_equal_transformers_run_document_by_document_forward_and_backward(kind: str, task: str) -> None:
    assert kind not in FAMILIES
    theirs, config, held = theirs_of(kind, task, CAUSAL[kind] if task == "causal" else WHOLE[kind])
    model, misfit = load_foreign(held, config=config, per_token=task == "causal")
    assert misfit == ([], [], [])
    model.double(), theirs.double()
    tokens, offsets = documents()
    ours_out = model(tokens, offsets)
    theirs_out = torch.cat([theirs(input_ids=part[None]).logits.flatten(0, -2) for part in tokens.split(LENGTHS)])
    assert model.theirs.config.use_cache is False  # nothing here goes on from kept keys and values
    assert ours_out.shape == ((len(tokens), VOCABULARY) if task == "causal" else (len(LENGTHS), OUTPUTS))
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-9, atol=1e-10)
    (ours_out * torch.linspace(-1, 1, ours_out.numel()).view_as(ours_out)).sum().backward()
    (theirs_out * torch.linspace(-1, 1, ours_out.numel()).view_as(ours_out)).sum().backward()
    ours_grads = {n: p.grad for n, p in model.theirs.named_parameters()}
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours_grads[name], parameter.grad, rtol=1e-8, atol=1e-9)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("kind", IMAGES)
def test_images_equal_transformers_after_their_own_normalisation(kind: str) -> None:
    assert kind not in FAMILIES and foreign_reads(kind) == "image"
    theirs, config, held = theirs_of(kind, "image", IMAGES[kind])
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    model, misfit = load_foreign(held, config=config, per_token=False, **pixel_scale({"image_mean": mean, "image_std": std}))
    assert misfit == ([], [], [])
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    pixels = (y - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ours_out, theirs_out = model(x), theirs(pixel_values=pixels).logits
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-6, atol=1e-6)
    for out in (ours_out, theirs_out):
        out.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    assert "which gets (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.1]" in model.built_by


def test_pixels_are_scaled_as_the_preprocessor_says_and_by_a_half_where_nothing_does() -> None:
    assert pixel_scale({}) == {}
    assert pixel_scale({"do_normalize": False, "image_mean": [0.1] * 3, "image_std": [1] * 3}) == {"mean": 0.0, "std": 1.0}
    assert pixel_scale({"size": 224}) == {"mean": 0.0, "std": 1.0}
    _, config, held = theirs_of("convnext", "image", IMAGES["convnext"])
    model, _ = load_foreign(held, config=config, per_token=False)
    facts = inspect_model(model, (torch.rand(2, 3, 16, 16),), "folder")
    assert (
        facts.foreign == f"transformers {transformers.__version__}, which gets (pixels - 0.5) / 0.5, for want of a preprocessor_config.json"
    )
    assert facts.head == "theirs.classifier" and facts.output_shape == (OUTPUTS,)


def test_weights_arrive_in_float32_whatever_the_file_and_its_config_say() -> None:
    _, config, held = theirs_of("gpt_neox", "causal", CAUSAL["gpt_neox"])
    config["torch_dtype"] = "bfloat16"
    model, _ = load_foreign({n: t.bfloat16() for n, t in held.items()}, config=config, per_token=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in model.theirs.state_dict().items():
        assert torch.equal(tensor, held[name].bfloat16().float()), name


def test_without_a_fresh_head_every_tensor_must_be_there_and_have_a_place() -> None:
    _, config, held = theirs_of("electra", "whole", WHOLE["electra"])
    lost = held.pop("electra.encoder.layer.0.output.dense.weight")
    held["electra.encoder.layer.7.output.dense.weight"] = lost
    held["classifier.out_proj.weight"] = torch.zeros(5, 16)
    _, (missing, extra, shapes) = load_foreign(held, config=config, per_token=False)
    assert missing == ["electra.encoder.layer.0.output.dense.weight"] and extra == ["electra.encoder.layer.7.output.dense.weight"]
    assert shapes == ["classifier.out_proj.weight is (5, 16), not (3, 16)"]
    _, config, held = theirs_of("electra", "body", WHOLE["electra"])
    _, (missing, _, _) = load_foreign(held, config=config, per_token=False)
    assert {name.split(".")[0] for name in missing} == {"classifier"} and len(missing) == 4


@pytest.mark.parametrize("task", ["causal", "whole", "body"])
def test_a_fresh_head_forgives_the_other_head_and_nothing_of_the_body(task: str) -> None:
    _, config, held = theirs_of("gpt_neox", task, WHOLE["gpt_neox"])
    config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}  # in older versions they win
    model, misfit = load_foreign(held, config={**config, "num_labels": 5}, per_token=False, fresh=True)
    assert misfit == ([], [], []) and model.theirs.score.weight.shape == (5, 16)
    before = "" if task == "body" else "gpt_neox."
    assert torch.equal(model.theirs.gpt_neox.embed_in.weight, held[f"{before}embed_in.weight"])
    _, (missing, extra, shapes) = load_foreign(held, config={**config, "num_hidden_layers": 1}, per_token=False, fresh=True)
    assert len(extra) == 12 and all(name.startswith(f"{before}layers.1.") for name in extra) and not missing and not shapes
    _, (missing, extra, shapes) = load_foreign(held, config={**config, "num_hidden_layers": 3}, per_token=False, fresh=True)
    assert len(missing) == 12 and all(name.startswith("gpt_neox.layers.2.") for name in missing) and not extra and not shapes


def test_a_pooler_that_the_task_has_no_place_for_is_part_of_the_old_head() -> None:
    _, config, held = theirs_of("mpnet", "body", WHOLE["mpnet"])
    assert "pooler.dense.weight" in held
    assert load_foreign(held, config=config, per_token=False, fresh=True)[1] == ([], [], [])
    assert load_foreign(held, config=config, per_token=False)[1][1] == ["pooler.dense.bias", "pooler.dense.weight"]


def test_tensors_that_transformers_joins_when_it_loads_are_joined() -> None:
    """The file has a tensor for each expert, the model one for all of them."""
    config = {**SHAPE, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 40}
    theirs, config, held = theirs_of("olmoe", "causal", config)
    joined = held.pop("model.layers.0.mlp.experts.gate_up_proj")
    down = held.pop("model.layers.0.mlp.experts.down_proj")
    for expert, (both, back) in enumerate(zip(joined, down, strict=True)):
        place = f"model.layers.0.mlp.experts.{expert}"
        held |= {f"{place}.gate_proj.weight": both[:24], f"{place}.up_proj.weight": both[24:], f"{place}.down_proj.weight": back}
    model, misfit = load_foreign(held, config=config, per_token=True)
    assert misfit == ([], [], []) and "olmoe" not in FAMILIES
    tokens = torch.arange(6)
    torch.testing.assert_close(model(tokens, torch.tensor([0, 6])), theirs(input_ids=tokens[None]).logits[0])


def test_a_model_that_sees_the_next_token_is_not_taken_to_predict_it() -> None:
    _, config, held = theirs_of("electra", "causal", WHOLE["electra"])
    with pytest.raises(ModelError, match=r"ElectraForCausalLM sees the tokens after each one too; it can classify"):
        load_foreign(held, config=config, per_token=True)
    with pytest.raises(ModelError, match=r"transformers has no causal_lm of model_type 'mpnet'"):
        load_foreign({}, config={"model_type": "mpnet"}, per_token=True)


def test_a_document_longer_than_the_model_has_positions_is_refused_by_its_length() -> None:
    _, config, held = theirs_of("electra", "whole", WHOLE["electra"])
    model, _ = load_foreign(held, config=config, per_token=False)
    with pytest.raises(ModelError, match=r"a document has 41 tokens, the model reads 40; cut the documents with data.max_tokens"):
        model(torch.zeros(41, dtype=torch.int64), torch.tensor([0, 41]))


def test_a_config_that_names_a_kernel_or_makes_no_sense_runs_nothing() -> None:
    _, config, held = theirs_of("gpt_neox", "causal", CAUSAL["gpt_neox"])
    named = {**config, "attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel", "use_kernels": True}
    model, misfit = load_foreign(held, config=named, per_token=True)
    assert misfit == ([], [], []) and model.theirs.config._attn_implementation in ("sdpa", "eager")
    with pytest.raises(ModelError, match=r"cannot be built: \w+: .*"):
        load_foreign(held, config={**config, "num_attention_heads": 5}, per_token=True)


def test_transformers_says_nothing_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    _, config, held = theirs_of("electra", "body", WHOLE["electra"])
    capfd.readouterr()
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    try:
        load_foreign(held, config=config, per_token=False, fresh=True)
        assert capfd.readouterr().err == "" and heard == []
        logging.getLogger("transformers").warning("heard again")
        assert heard == ["heard again"]
    finally:
        logging.getLogger("transformers").removeHandler(listener)


def test_a_blueprint_builds_the_same_module_again() -> None:
    _, config, held = theirs_of("mpnet", "whole", WHOLE["mpnet"])
    model, _ = load_foreign(held, config=config, per_token=False)
    again = Blueprint("foreign", "mpnet", {"config": config, "per_token": False}).build()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(*documents()), model.eval()(*documents()))


@pytest.mark.parametrize(("package", "mend"), [("transformers", "pip install 'fromzero[hub]'"), ("timm", "pip install timm torchvision")])
def test_a_library_that_is_not_there_is_named_with_how_to_install_it(package: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        foreign_reads("electra") if package == "transformers" else build_timm("resnet18")
    assert caught.value.faults[0].mend == mend


# ------------------------------------------------------------------------------------------ torch.hub


def write_hub(folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "hubconf.py").write_text("import torch\n" + code)
    return folder


def test_a_name_of_torch_hub_is_read_as_tutorials_write_it(tmp_path: Path) -> None:
    write_hub(tmp_path / "mine", "")
    assert hub_name("hub:pytorch/vision:v0.6.0/resnet18", [tmp_path]) == "pytorch/vision:v0.6.0/resnet18"
    assert hub_name("hub:pytorch/vision/resnet18", [tmp_path]) == "pytorch/vision/resnet18"
    assert hub_name("hub:./mine/net", [tmp_path / "no", tmp_path]) == f"{(tmp_path / 'mine').resolve()}/net"
    for wrong in ("hub:resnet18", "hub:vision/resnet18", "hub:./absent/net", "hub:pytorch/vision/"):
        with pytest.raises(SourceError, match=r"is no entry of a repository; write hub:OWNER/REPOSITORY/ENTRY"):
            hub_name(wrong, [tmp_path])


def stub_load(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return answer()

    monkeypatch.setattr(torch.hub, "load", load)
    return calls


def test_torch_hub_gets_repository_entry_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 2)
    calls = stub_load(monkeypatch, lambda: net)
    built = Blueprint("hub", "pytorch/vision:v0.6.0/resnet18", {"pretrained": True, "weights": "DEFAULT"}).build()
    (args, kwargs), *others = calls
    assert built is net and not others and args == ("pytorch/vision:v0.6.0", "resnet18")
    assert kwargs == {"source": "github", "trust_repo": True, "verbose": False, "pretrained": True, "weights": "DEFAULT"}


def raising(error: Exception) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (URLError("no route"), SourceError, "check the network, or name a copy on this machine"),
        (RuntimeError("It looks like there is no internet connection"), SourceError, "check the network"),
        (RuntimeError("Cannot find callable net in hubconf"), ModelError, "RuntimeError: Cannot find callable net in hubconf"),
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), MissingExtra, "pip install torchvision"),
    ],
)
def test_what_torch_hub_raises_becomes_one_of_our_errors(
    error: Exception, kind: type[FromzeroError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_load(monkeypatch, raising(error))
    with pytest.raises(kind, match=said) as caught:
        build_hub("pytorch/vision/net")
    assert "hub:pytorch/vision/net cannot be built" in str(caught.value)


def test_a_folder_with_a_hubconf_builds_its_entry_with_options(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "mine", "def net(width=2): return torch.nn.Linear(3, width)\ndef other(): return 5\n")
    built = build_hub(f"{folder}/net", width=7)
    assert isinstance(built, nn.Linear) and built.out_features == 7
    with pytest.raises(ModelError, match=r"it gives int, not a torch.nn.Module"):
        build_hub(f"{folder}/other")
    with pytest.raises(ModelError, match=r"unexpected keyword argument 'height'"):
        build_hub(f"{folder}/net", height=1)


# ----------------------------------------------------------------------------------------------- timm


def test_timm_makes_its_model_without_weights_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stub = types.ModuleType("timm")

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        if name == "resnet8":
            raise RuntimeError("Unknown model (resnet8)")
        return nn.Linear(2, options["num_classes"])

    stub.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", stub)
    built = Blueprint("timm", "resnet10t", {"num_classes": 4, "in_chans": 1}).build()
    assert isinstance(built, nn.Linear) and calls == [("resnet10t", {"pretrained": False, "num_classes": 4, "in_chans": 1})]
    with pytest.raises(ModelError, match=r"timm:resnet8 cannot be built: RuntimeError: Unknown model"):
        build_timm("resnet8")
    with pytest.raises(ModelError, match=r"multiple values for keyword argument 'pretrained'"):
        build_timm("resnet10t", pretrained=True)
    assert set(FOREIGN) == {"foreign", "hub", "timm"}
