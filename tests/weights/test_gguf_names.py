"""GGUF's words and layouts become the field's: against transformers' models and its own way of reading such files."""

import gguf
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fromzero.errors import SourceError
from fromzero.weights import open_pretrained
from fromzero.weights.gguf import open_gguf

CASES = [("llama", {}), ("llama", {"attention_bias": True}), ("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 1})]
CASES += [("qwen2", {}), ("qwen3", {"head_dim": 16}), ("phi3", {}), ("gpt2", {}), ("gpt2", {"n_inner": 40})]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_file_becomes_the_model_it_was_written_from(tmp_path, tiny, written, kind, options, tied):
    model = tiny(kind, tied, **options)
    found = open_pretrained(str(written(tmp_path / "m.gguf", model)))
    wanted = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert found.tensors.shapes == {name: tuple(t.shape) for name, t in wanted.items()}
    for name, tensor in wanted.items():
        assert torch.equal(found.tensors[name], tensor), name
    config = transformers.AutoConfig.for_model(**found.config)
    again = getattr(transformers, found.config["architectures"][0])(config).eval()
    lost = again.load_state_dict(dict(found.tensors), strict=False)
    assert lost.missing_keys == (["lm_head.weight"] if tied else []) and not lost.unexpected_keys
    tokens = torch.tensor([[1, 5, 9, 33, 2]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt2"])
def test_transformers_own_reader_finds_the_same_tensors(tmp_path, tiny, written, kind):
    model = tiny(kind)
    path = written(
        tmp_path / "m.gguf", model, quantise={"blk.1.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0} if kind == "gpt2" else None
    )
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = open_pretrained(str(path)).tensors
    assert len(ours) > 10 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_rows_of_llama_lie_in_pairs_in_the_file_and_only_there(tmp_path, tiny, written):
    """The trap: with rows in the wrong order nothing fails, and words still come out."""
    model = tiny("llama")
    raw = open_gguf(written(tmp_path / "m.gguf", model))[1]["blk.0.attn_q.weight"]
    wanted = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]  # four heads of eight rows
    assert torch.equal(raw[:8:2], wanted[:4]) and torch.equal(raw[1:8:2], wanted[4:8]) and torch.equal(raw[8:16:2], wanted[8:12])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rope_factors_long.weight", "phi3 has no place for"),
        ("blk.0.attn_sub_norm.weight", "no place for"),
        ("blk.x.attn_q.weight", "no place"),
    ],
)
def test_a_tensor_without_a_place_is_named(tmp_path, tiny, written, name, said):
    with pytest.raises(SourceError, match=f"m.gguf {name}: has a tensor that .*{said}"):
        open_pretrained(str(written(tmp_path / "m.gguf", tiny("phi3"), tensors={name: torch.ones(4)})))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key_length": 0}, "turns 8 numbers of a head of 0"),
        ({"rope_dimension_count": 9}, "turns 9"),
        ({"head_count": [4, 4]}, "where one number is needed"),
        ({"head_count": 0}, "does not say hidden_size"),
        ({"head_count": 3}, "which is not 3 heads of pairs"),
        ({"block_count": 10**6}, "promises 1000000 blocks, and has 21 tensors"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, tiny, written, options, said, monkeypatch):
    add = gguf.GGUFWriter.add_key_value

    def changed(self, key, value, *kinds):
        name = key.removeprefix("llama.").replace("attention.", "").replace("rope.", "rope_")
        value = options.get(name, value)
        add(self, key, value, *([gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32] if isinstance(value, list) else kinds))

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", changed)
    path = written(tmp_path / "m.gguf", tiny("llama"))
    with pytest.raises(SourceError, match=said):
        open_pretrained(str(path))


def test_numbers_of_the_config_are_those_that_were_written(tmp_path, tiny, written):
    model = tiny("llama", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    config = open_pretrained(str(written(tmp_path / "m.gguf", model))).config
    assert config == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0, "vocab_size": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8,
    }  # fmt: skip


def test_bias_is_only_said_where_the_family_can_be_without(tmp_path, tiny, written):
    assert open_pretrained(str(written(tmp_path / "l.gguf", tiny("llama", attention_bias=True)))).config["attention_bias"] is True
    assert "attention_bias" not in open_pretrained(str(written(tmp_path / "q.gguf", tiny("qwen2")))).config


def test_scaling_of_positions_is_told(tmp_path, tiny, written):
    extra = {"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 4.0, "rope_scaling_orig_ctx_len": 16}
    found = open_pretrained(str(written(tmp_path / "m.gguf", tiny("qwen2"), **extra)))
    assert found.config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_are_recognised(tmp_path, tiny, written, factor):
    """The converter writes a tensor; transformers computes the same from four numbers."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = tiny("llama", rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq).clamp(1, factor)  # the quotient is off in the last bit
    assert len(factors.unique()) > 4
    path = written(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    found = open_pretrained(str(path))
    assert found.config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert "rope_freqs.weight" not in found.tensors and found.config["rope_theta"] == 500000.0
    written(path, model, tensors={"rope_freqs.weight": factors * torch.linspace(1, 1.1, 32)})
    with pytest.raises(SourceError, match=r"m.gguf rope_freqs.weight: has factors of rotary positions that are not llama 3's"):
        open_pretrained(str(path))


def test_a_mixture_of_experts_and_other_architectures_are_refused_by_name(tmp_path, tiny, written):
    model = tiny("llama")
    with pytest.raises(
        SourceError, match=r"m.gguf: is of the architecture 'llama', which is not read from GGUF; read are llama, .*, without experts"
    ):
        open_pretrained(str(written(tmp_path / "m.gguf", model, expert_count=8)))
    writer = gguf.GGUFWriter(tmp_path / "o.gguf", "mamba")
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="is of the architecture 'mamba', which is not read from GGUF"):
        open_pretrained(str(tmp_path / "o.gguf"))


def test_the_end_of_a_turn_ends_an_answer_too(tmp_path, tiny, written):
    path = written(tmp_path / "m.gguf", tiny("qwen2"), eot_token_id=7)
    found = open_pretrained(str(path))
    assert found.generation == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0} and found.config["eos_token_id"] == 2
