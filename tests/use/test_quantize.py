"""A speaker with quantised weights: it says what it loses, refuses to lose more, and says the same where nothing is lost."""

import io
import json
from pathlib import Path

import pytest
import torch

import fromzero as fz
from fromzero.errors import ModelError, UserError
from fromzero.models.decoder import Decoder
from fromzero.models.decoder_families import DECODERS
from fromzero.models.layers.packed import Packed
from fromzero.use.quantize import Cost, open_quick
from fromzero.use.speak import open_speaker
from fromzero.weights import to_theirs, write_folder
from tests.conftest import fromzero
from tests.use.conftest import FRANCE, PARIS, turns

ASKED = f"<|im_start|>user\n{FRANCE}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_was_learned_by_heart_is_said_in_8_and_4_bits(talker: Path, kind: str) -> None:
    assert fz.generate(str(talker), ASKED, quantize=kind) == PARIS
    assert fz.chat(str(talker), turns(FRANCE), quantize=kind) == PARIS


def test_the_cost_is_the_loss_of_a_fixed_text_before_and_after(talker: Path) -> None:
    speaker, cost = open_quick(str(talker), Path("runs"), "int8")
    assert cost is not None and cost.kind == "int8" and cost.plain > 0 and cost.quantised != cost.plain
    assert str(cost).startswith("int8: perplexity ") and f"{cost.plain:.3f} in float32" in str(cost)
    kinds = {module.kind for module in speaker.model.modules() if isinstance(module, Packed)}
    assert kinds == {"int8"}


def test_the_cost_of_a_broken_model_can_be_told() -> None:
    assert str(Cost("int4", 3.0, 5000.0)).startswith("int4: perplexity inf on a fixed text, 20.09 in float32")


def test_without_it_the_weights_are_the_same_numbers_in_another_order(talker: Path) -> None:
    plain, (quick, cost) = open_speaker(str(talker), Path("runs")), open_quick(str(talker), Path("runs"))
    assert cost is None and isinstance(quick.model, Decoder) and isinstance(plain.model, Decoder)
    ids = torch.tensor(plain.encode(ASKED))
    with torch.no_grad():
        torch.testing.assert_close(quick.model(ids, None), plain.model(ids, None), rtol=1e-5, atol=1e-5)
    assert {module.kind for module in quick.model.modules() if isinstance(module, Packed)} == {"float32"}


@pytest.fixture
def outlier(talker: Path, tmp_path: Path) -> Path:
    """The same function, one column of whose matrices is ten thousand times as large: what rounding shares a scale with it is lost."""
    speaker = open_speaker(str(talker), Path("runs"))
    model = speaker.model
    assert isinstance(model, Decoder)
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.before_attention, block.attention.qkv), (block.before_mlp, block.mlp.up)):
                norm.weight[::16] /= 1e4
                linear.weight[:, ::16] *= 1e4
    config = json.loads((talker / "config.json").read_text())
    tensors = to_theirs(model.state_dict(), DECODERS["llama"].names(config, ()))
    assert speaker.chat is not None
    write_folder(tmp_path / "outlier", config, tensors, tokenizer=speaker.tokenizer, chat_template=speaker.chat.template)
    return tmp_path / "outlier"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_that_becomes_another_is_refused(talker: Path, outlier: Path, kind: str) -> None:
    assert fz.generate(str(outlier), ASKED, max_tokens=8) == fz.generate(str(talker), ASKED, max_tokens=8)
    with pytest.raises(ModelError, match=f"is another model with {kind}: perplexity .* a change of more than [23]% is refused; .*leave"):
        fz.generate(str(outlier), ASKED, quantize=kind)


def test_another_kind_and_another_model_are_refused(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--quantize int5 is not known; .*int[48]"):
        fz.generate(str(talker), ASKED, quantize="int5")
    (tmp_path / "data.csv").write_text("a,b\n" + "".join(f"{i % 5},{i % 2}\n" for i in range(40)))
    data = {"train": str(tmp_path / "data.csv"), "target": "b"}
    fz.train(task="classify", model="mlp", data=data, steps=1, name="small", report=[], runs=tmp_path / "runs", quiet=True)
    done = fromzero("serve", "run:small", "--quantize", "int8", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and "does not go on with text; only such models are quantised; leave out --quantize" in done.stderr


def test_the_command_line_prints_the_loss_beside_the_speed(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fromzero("generate", str(talker), "--prompt", ASKED, "--quantize", "int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PARIS
    assert done.stderr.startswith("int8: perplexity ") and done.stderr.endswith(" tokens/s, reading the prompt included\n")
    done = fromzero("generate", str(talker), "--prompt", ASKED, "--quantize", "int8", "--engine", "llama.cpp", cwd=tmp_path)
    assert done.returncode == 2 and "--quantize int8 is of fromzero's own engine; --numbers q8_0 or q4_0" in done.stderr
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{FRANCE}\n"))
    done = fromzero("chat", str(talker), "--quantize", "int8", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["turns"][0]["answer"] == PARIS and "int8: perplexity " in done.stderr
