"""Small GGUF files for tests: a tiny model of transformers, written as llama.cpp's converter writes it (with the gguf package)."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "gpt2": "GPT2"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OUTSIDE |= {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}


def _tiny(kind: str, tied: bool = False, **options):
    """A model of transformers with random weights, also in the norms and biases."""
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, "tie_word_embeddings": tied, **options}
    if kind != "gpt2":
        sizes.setdefault("num_key_value_heads", 2)
    config = getattr(transformers, f"{KINDS[kind]}Config")(**sizes)
    name = "GPT2LMHeadModel" if kind == "gpt2" else f"{KINDS[kind]}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _written(path: Path, model, *, quantise=None, tensors=None, **extra) -> Path:
    """The model as a GGUF file; quantise: GGUF name → ggml kind; tensors: further ones; extra: what else the writer is told."""
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd if kind == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(config, f"{name}_token_id"))
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head)
        writer.add_key_length(head)
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(value)
    for name, tensor in model.state_dict().items():
        stem, kind_of = name.rsplit(".", 1)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if stem in OUTSIDE:
            theirs = OUTSIDE[stem]
        else:
            number, part = stem.removeprefix("model.layers.").removeprefix("transformer.h.").split(".", 1)
            theirs = f"blk.{number}.{BLOCK[part]}"
            if kind == "gpt2" and array.ndim == 2:
                array = array.T
            if kind == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                array = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        theirs += f".{kind_of}"
        array = np.ascontiguousarray(array)
        if quantise and theirs in quantise:
            writer.add_tensor(theirs, gguf.quants.quantize(array, quantise[theirs]), raw_dtype=quantise[theirs])
        else:
            writer.add_tensor(theirs, array)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny():
    return _tiny


@pytest.fixture
def written():
    return _written
