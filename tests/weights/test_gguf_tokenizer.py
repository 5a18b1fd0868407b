"""Tokenizers out of GGUF files: against the ones they were taken from, and sentencepiece itself."""

import io

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fromzero.weights.gguf_tokenizer import gguf_special, gguf_tokenizer

TEXTS = [
    "Hello, world! It's 12345 o'clock; we're DON'T-ing   it.\n\n\tnew  line \r\n end ",
    "你好，世界！今天是2024年。", "🙂 emoji 👩‍👩‍👧 and é, e\u0301, ﬁ, ²³¼ ٣", "", " ", "   a", "x = [1,22,333,4444]; // code\n    return x",
    "<|im_start|>user\nhi<|im_end|>\n", "a<tool>b", "\u2028 nbsp\u00a0here", "\x00\x7f",
]  # fmt: skip
CORPUS = [*TEXTS, *(" ".join(f"the number {i} and {i * 37} isn't there, says the house" for i in range(40)).split("there"))] * 3
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(cut):
    """A tokenizer trained here as the published ones of that name are set up."""
    made = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = {
        "gpt-2": whole,
        "default": whole,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pieces]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), pieces]),
    }[cut]
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = sorted(bytes_to_unicode().values())
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


def metadata(made, cut, **more):
    import json

    model = json.loads(made.to_str())["model"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    kinds = [3 if token.startswith("<|") else 4 if token == "<tool>" else 1 for token in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    found = {
        "model": "gpt2",
        "pre": cut,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("cut", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_comes_back_as_it_was(cut):
    theirs = byte_level(cut)
    text, reason = gguf_tokenizer(metadata(theirs, cut, add_bos_token=False))
    assert reason == ""
    ours = Tokenizer.from_str(text)
    for line in TEXTS:
        assert ours.encode(line).tokens == theirs.encode(line).tokens, line
        decoded = ours.decode(ours.encode(line).ids, skip_special_tokens=False)
        assert decoded == (normalizers.NFC().normalize_str(line) if cut == "qwen2" else line)
    assert ours.encode("hi<|im_end|>").ids[-1] == 2 and ours.decode([2]) == ""
    assert ours.encode("a<tool>b").tokens[1] == "<tool>" and ours.decode(ours.encode("<tool>").ids) == "<tool>"


def test_the_ways_of_cutting_differ_on_digits():
    lengths = {}
    for cut in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        pre = Tokenizer.from_str(gguf_tokenizer(metadata(byte_level(cut), cut))[0]).pre_tokenizer
        lengths[cut] = [piece for piece, _ in pre.pre_tokenize_str("1234")]
    assert lengths == {"gpt-2": ["1234"], "smollm": list("1234"), "llama-bpe": ["123", "4"], "qwen2": list("1234")}


def test_llama_3_takes_a_whole_word_that_no_merge_leads_to():
    meta = metadata(byte_level("llama-bpe"), "llama-bpe", add_bos_token=False)
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], "zqxj"]
    meta["tokenizer.ggml.token_type"] = [*meta["tokenizer.ggml.token_type"], 1]
    tokens = {
        cut: Tokenizer.from_str(gguf_tokenizer(meta | {"tokenizer.ggml.pre": cut})[0]).encode("zqxj").tokens
        for cut in ("llama-bpe", "qwen2")
    }
    assert tokens == {"llama-bpe": ["zqxj"], "qwen2": list("zqxj")}


def test_ends_are_added_where_the_file_says_so():
    made = byte_level("llama-bpe")
    first = Tokenizer.from_str(gguf_tokenizer(metadata(made, "llama-bpe"))[0])
    assert first.encode("hi").ids[0] == 1 and first.encode("hi", add_special_tokens=False).ids[0] != 1
    both = Tokenizer.from_str(gguf_tokenizer(metadata(made, "gpt-2", add_bos_token=True, add_eos_token=True))[0])
    assert both.encode("hi").ids[0] == 1 and both.encode("hi").ids[-1] == 2
    none = Tokenizer.from_str(gguf_tokenizer(metadata(made, "gpt-2"))[0])
    assert none.encode("hi").tokens == made.encode("hi").tokens


def test_special_tokens_are_named():
    meta = metadata(byte_level("smollm"), "smollm", unknown_token_id=0, padding_token_id=2, add_bos_token=False)
    assert gguf_special(meta) == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
        "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip
    assert gguf_special({"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.tokens": 3}) == {"add_bos_token": False, "add_eos_token": False}


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_is_followed_piece_by_piece(tmp_path, space):
    """The other side is sentencepiece itself, on a model that it trains here."""
    store = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=store, vocab_size=460, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=space, minloglevel=5, hard_vocab_limit=False,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=store.getvalue())
    pieces = range(theirs.get_piece_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in pieces]
    found = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(i) for i in pieces],
        "token_type": kinds,
        "scores": [theirs.get_score(i) for i in pieces],
    }
    found |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": space}
    text, reason = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in found.items()})
    assert reason == ""
    ours = Tokenizer.from_str(text)
    for line in TEXTS:
        if line:
            assert ours.encode(line).ids == [1, *theirs.encode(line)], line
            assert ours.decode(ours.encode(line).ids) == line


def test_the_best_score_is_merged_first_wherever_its_token_stands():
    found = {
        "model": "llama",
        "tokens": ["<unk>", "a", "b", "c", "ab", "bc"],
        "token_type": [2, 1, 1, 1, 1, 1],
        "add_space_prefix": False,
        "add_bos_token": False,
    }
    for scores, wanted in ([0, 0, 0, 0, -1.0, -2.0], ["ab", "c"]), ([0, 0, 0, 0, -2.0, -1.0], ["a", "bc"]):
        text, _ = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (found | {"scores": scores}).items()})
        assert Tokenizer.from_str(text).encode("abc").tokens == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "its kind of tokenizer is not known (bert, smollm)"),
        ({"pre": "dbrx"}, "its kind of tokenizer is not known (gpt2, dbrx)"),
        ({"model": None}, "is not known (None, smollm)"),
        ({"tokens": ["a", "a"]}, "a token stands twice"),
        ({"tokens": 3}, "its parts do not fit together (TypeError"),
        ({"tokens": [1, 2]}, "its parts do not fit together"),
        ({"merges": ["a b c"]}, "its parts do not fit together"),
        ({"merges": ["qq zz"]}, "its parts do not fit together"),
        ({"merges": None}, "its parts do not fit together"),
        ({"token_type": 3}, "its parts do not fit together"),
        ({"model": "llama"}, "its parts do not fit together (KeyError"),
        ({"model": "llama", "scores": [0.0]}, "its parts do not fit together"),
        ({"model": "llama", "scores": [0.0] * 2, "tokens": ["a" * 300, "b"], "token_type": [1, 1]}, "a token has more than 256 characters"),
    ],
)
def test_what_cannot_be_made_exactly_is_not_made_and_the_reason_is_said(changes, reason):
    meta = metadata(byte_level("smollm"), "smollm", **changes)
    text, said = gguf_tokenizer(meta)
    assert text is None and reason in said
