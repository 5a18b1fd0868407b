"""all-MiniLM-L6-v2, real weights: our sentence embeddings against transformers' BertModel on the same files."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fromzero.models.encoder_families import ENCODERS, outputs_in
from fromzero.weights.translate import to_ours

SENTENCES = (
    "The cat sits on the mat.",
    "A cat is sitting on a rug.",
    "Yes",
    "Interest rates rose by half a point this morning, and the markets, which had expected less, fell before noon.",
    "How do I reset my password?",
    "I forgot my password and cannot log in; what should I do now?",
)


def compare_minilm(folder: Path) -> dict[str, float]:
    """The largest differences of token states and of embeddings, and the mean cosine of the pairs that mean the same."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    each = [torch.tensor(tokenizer.encode(sentence).ids) for sentence in SENTENCES]
    tokens, offsets = torch.cat(each), torch.tensor([0, *(len(ids) for ids in each)]).cumsum(0)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert outputs_in(config, tensors) is None
    family = ENCODERS[config["model_type"]]
    ours = family.build(config, normalize=True).eval()
    names = {name: entry for name, entry in family.names(config, tensors).items() if name in ours.state_dict()}
    ours.load_state_dict(to_ours(tensors, names, file="minilm", ignored=family.ignored))
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs_states = [theirs(ids[None]).last_hidden_state[0] for ids in each]
        theirs_vectors = F.normalize(torch.stack([states.mean(0) for states in theirs_states]), dim=-1)
        ours_vectors = ours(tokens, offsets)
        cosines = ours_vectors @ ours_vectors.T
        return {
            "states": (ours.states(tokens, offsets) - torch.cat(theirs_states)).abs().max().item(),
            "vectors": (ours_vectors - theirs_vectors).abs().max().item(),
            "alone": max(
                (ours(ids, torch.tensor([0, len(ids)]))[0] - v).abs().max().item() for ids, v in zip(each, ours_vectors, strict=True)
            ),
            "alike": (cosines[0, 1].item() + cosines[4, 5].item()) / 2,
            "unlike": cosines[0, 3].item(),
        }


def test_sentence_embeddings_of_minilm_equal_theirs(asset: Callable[[str], Path]) -> None:
    found = compare_minilm(asset("minilm-l6"))
    assert found["states"] < 1e-5 and found["vectors"] < 1e-5 and found["alone"] < 1e-5, found
    assert found["alike"] > 0.6 > 0.2 > found["unlike"], found
