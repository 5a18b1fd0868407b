"""Conversations become tokens as the model will see them, and what trains is what it must say itself: no more, no less.

templates/ holds the chat templates that published models bring along, from their public documentation; of GLM-4 without its tools.
"""

import itertools
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fromzero.data import tokens as tk
from fromzero.data.template import Job, Renderer, render, template_digest
from fromzero.data.turns import ChatFormat, Conversation, encode_conversations, encode_prompt
from fromzero.errors import DataError, Fault

TEMPLATES = Path(__file__).parent / "templates"
HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# family: (bos, terminator, other tokens of its own, takes a system message)
FAMILIES = {
    "chatml": ("", "<|im_end|>", ["<|im_start|>"], True),
    "smollm2": ("<|im_start|>", "<|im_end|>", ["<|endoftext|>"], True),
    "llama2": ("<s>", "</s>", [], True),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", HEADER, True),
    "llama3_first": ("<|begin_of_text|>", "<|eot_id|>", HEADER, True),  # as first published: every text ends in a header
    "mistral_v1": ("<s>", "</s>", [], False),
    "mistral_v3": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], True),
    "qwen2_5": ("", "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], True),
    "qwen3": ("", "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], True),
    "gemma2": ("<bos>", "<end_of_turn>", ["<start_of_turn>", "<eos>"], False),
    "phi3": ("<s>", "<|end|>", [*ROLES, "<|endoftext|>"], True),
    "glm4": ("", "<|user|>", ["[gMASK]", "<sop>", *ROLES, "<|endoftext|>"], True),
    "zephyr": ("<s>", "</s>", [], True),
}
EOS = {"gemma2": "<eos>", "phi3": "<|endoftext|>", "glm4": "<|endoftext|>"}
CASES = [(family, "bytes") for family in FAMILIES] + [
    (family, kind) for family in ("llama2", "mistral_v1", "zephyr") for kind in ("metaspace", "fallback")
]
SAID = ["What colour is the sky?", "Blue, as a rule.", "你好，四十二 🙂？", "四十二 🙂🎉 naïve\n\n  and so on!", "echo this", "echo this"]
SYSTEM = {"role": "system", "content": "Answer in one line."}
THINKING = "<think>\n\n</think>\n\n"


def chat(*said, system=False):
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
    return Conversation((*([SYSTEM] if system else []), *messages), "talk.jsonl:1")


@cache
def tokenizer_of(family, kind):
    bos, terminator, others, _ = FAMILIES[family]
    special = sorted({"<unk>", terminator, EOS.get(family, terminator), *others, *([bos] if bos else [])})
    special = [AddedToken(text, rstrip=text == "<|end|>", special=True, normalized=False) for text in special]
    if kind == "bytes":
        made = Tokenizer.from_str(tk.byte_pairs([" ".join(SAID)] * 3, 330))
        if family.startswith("llama3"):  # two line ends before an answer stay one token only with its own way of cutting
            cut = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.add_special_tokens(special)
        return made.to_str()
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    learned = [text for text in (*SAID, SYSTEM["content"], "[INST] <<SYS>>\n<|user|>") if kind == "metaspace" or text.isascii()]
    made.train_from_iterator(learned * 3, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    text = json.loads(made.to_str())
    if kind == "fallback":
        text["model"]["byte_fallback"] = True
        words = text["model"]["vocab"]
        words |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    return json.dumps(text)


def form_of(family, kind="bytes"):
    bos, terminator, _, _ = FAMILIES[family]
    tokenizer = tokenizer_of(family, kind)
    special = {"eos_token": EOS.get(family, terminator)} | ({"bos_token": bos} if bos else {})
    stops = tuple(Tokenizer.from_str(tokenizer).token_to_id(text) for text in {terminator, special["eos_token"]})
    return ChatFormat(tokenizer, (TEMPLATES / f"{family}.jinja").read_text().removesuffix("\n"), special, stops)


def runs(form, one):
    """The texts of the stretches of trained tokens."""
    pairs = itertools.groupby(zip(one.ids, one.trained, strict=True), key=lambda pair: pair[1])
    return [tk.decode(form.tokenizer, [token for token, _ in group]) for trained, group in pairs if trained]


def words(form, one, terminator):
    found = runs(form, one)
    assert all(run.rstrip().endswith(terminator) for run in found), found
    return [run.rstrip().removesuffix(terminator).strip() for run in found]


def only(form, conversation, **asked):
    [one] = encode_conversations(form, [conversation], **asked)
    assert not isinstance(one, Fault), str(one)
    return one


def test_thirteen_templates_of_twelve_families_are_walked():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES) and len(FAMILIES) == 13


@cache
def walked(family, kind):
    form = form_of(family, kind)
    talks = [chat(*SAID[:2]), chat(*SAID[:4]), *([chat(*SAID, system=True)] if FAMILIES[family][3] else []), chat(*SAID)]
    return form, talks, encode_conversations(form, talks)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_exactly_the_words_of_the_assistant_and_the_terminator_train(family, kind):
    form, talks, encoded = walked(family, kind)
    for talk, one in zip(talks, encoded, strict=True):
        answers = [message["content"] for message in talk.messages if message["role"] == "assistant"]
        if family == "qwen3":
            answers[-1] = THINKING + answers[-1]
        assert not isinstance(one, Fault), str(one)
        assert words(form, one, FAMILIES[family][1]) == answers
        assert one.crossing == (len(answers) if family == "phi3" else 0)  # its <|end|> takes white space along
        assert not one.empty


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_texts_and_ids_equal_those_of_transformers_and_the_prompt_is_what_was_trained_on(family, kind):
    form, talks, encoded = walked(family, kind)
    theirs = theirs_of(form)
    borrowed = "<|user|>" if family == "glm4" else ""
    for talk, ours in zip(talks, encoded, strict=True):
        assert ours.text == theirs.apply_chat_template(list(talk.messages), tokenize=False) + borrowed
        theirs_ids = theirs.apply_chat_template(list(talk.messages), return_dict=False)
        assert ours.ids[: len(ours.ids) - bool(borrowed)] == theirs_ids
    asked = list(talks[-1].messages[:-1])
    ours_prompt = encode_prompt(form, Renderer(form.template, form.special), asked)
    assert ours_prompt == theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ids, trained = encoded[-1].ids, encoded[-1].trained
    assert ids[: len(ours_prompt)] == ours_prompt and trained[len(ours_prompt)] and not trained[len(ours_prompt) - 1]


def theirs_of(form):
    transformers = pytest.importorskip("transformers")
    made = Tokenizer.from_str(form.tokenizer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=form.template, **form.special)


TOOLS = ({"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object", "properties": {}}}},)
CALL = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "mistral_v3"])
def test_a_turn_of_tool_calls_trains_like_any_other_and_results_do_not(family):
    form = form_of(family)
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "123456789"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    one = only(form, Conversation(tuple(messages), "t.jsonl:3", TOOLS))
    call, answer = words(form, one, FAMILIES[family][1])
    assert '"name": "weather"' in call and "Zürich" in call and answer.removeprefix(THINKING) == "It is sunny." and not one.empty
    assert one.text == theirs_of(form).apply_chat_template(messages, tools=list(TOOLS), tokenize=False)


def test_thoughts_train_where_the_template_keeps_them_and_earlier_ones_are_gone():
    form = form_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue."}
    for last in (thought, {"role": "assistant", "content": "Blue.", "reasoning": "hm"}):
        one = only(form, Conversation((*chat("sky?").messages, thought, *chat("sure?").messages, last), "t:1"))
        assert words(form, one, "<|im_end|>") == ["Blue.", "<think>\nhm\n</think>\n\nBlue."]


def test_the_last_turn_alone_and_weights_say_what_trains_and_no_weight_is_rendered():
    form, talk = form_of("chatml"), chat(*SAID)
    weighed = replace(talk, messages=tuple(m | ({"weight": i % 4 // 3} if i % 2 else {}) for i, m in enumerate(talk.messages)))
    assert words(form, only(form, talk, turns="last"), "<|im_end|>") == [SAID[5]]
    assert words(form, only(form, weighed), "<|im_end|>") == [SAID[3]]
    assert not any(only(form, weighed, turns="last").trained)
    telling = replace(form, template=form.template.replace("message['content']", "message['content'] ~ message.weight"))
    assert only(telling, weighed).text == only(form, weighed).text
    odd = replace(talk, messages=(*talk.messages[:1], talk.messages[1] | {"weight": 0.5}))
    bad, good = encode_conversations(form, [odd, talk])
    assert str(bad) == "talk.jsonl:1: message 2 has weight 0.5, which is neither 0 nor 1" and good == only(form, talk)


def test_an_answer_without_words_is_told():
    assert only(form_of("chatml"), chat("a", " \n")).empty and not only(form_of("chatml"), chat("a", "b")).empty


def test_a_template_without_a_terminator_is_refused():
    form = form_of("chatml")
    bare = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match=r"data.template: the chat template writes no terminator .* would never learn to stop"):
        encode_conversations(replace(form, template=bare), [chat("a", "b")])
    with pytest.raises(DataError, match=r"what follows an answer is <\|user\|>, which does not stop the model"):
        encode_conversations(replace(form_of("glm4"), stops=()), [chat("a", "b")])
    with pytest.raises(DataError, match="does not write a question and its answer"):
        encode_conversations(replace(form, template="{% for m in messages %}{{ m.text }}{% endfor %}"), [chat("a", "b")])


def test_an_end_that_cannot_be_found_names_the_conversation_and_the_message():
    form = form_of("chatml")
    once = form.template.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if loop.last or message.role != 'assistant' else '')")
    bad, good = encode_conversations(replace(form, template=once), [chat(*SAID[:4]), chat("a", "b")])
    assert str(bad).startswith("talk.jsonl:1: message 2: its end is not found in the rendered text") and any(good.trained)


def test_two_beginnings_are_refused():
    form = form_of("llama3")
    with pytest.raises(DataError, match=r"talk.jsonl:1 data.template: .* begins a text with <\|begin_of_text\|> twice"):
        encode_conversations(replace(form, template="{{ bos_token }}" + form.template), [chat("a", "b")])


def test_a_conversation_that_the_template_refuses_is_told_from_the_others():
    form = form_of("gemma2")
    fine, refused = encode_conversations(form, [chat("a", "b"), replace(chat("a", "b", system=True), where="talk.jsonl:7")])
    assert words(form, fine, "<end_of_turn>") == ["b"]
    assert str(refused) == "talk.jsonl:7: the chat template refuses it: System role not supported"
    with pytest.raises(DataError, match="System role not supported"):
        encode_prompt(form, Renderer(form.template, form.special), [SYSTEM])


def test_white_space_stays_with_its_answer_whatever_the_tokenizer_cuts_off_its_spans():
    made = Tokenizer.from_str(tokenizer_of("chatml", "bytes"))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    form = replace(form_of("chatml"), tokenizer=made.to_str())
    assert runs(form, only(form, chat("a", "  b  \n\n")))[0] == "  b  \n\n<|im_end|>"


def test_the_generation_mark_changes_no_text_and_a_digest_is_stable():
    messages = chat("a", "b").messages
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    assert render(marked, {}, [Job(messages)]) == ["ab"]
    assert render("{{ messages[0].content is defined }}", {}, [Job([{"role": "user", "content": None}])]) == ["False"]
    assert template_digest("{{ bos_token }}") == "38924663eb3df1cd5aca30e34168f06d9b884a78b5d25426b14f675456a66eec"


def test_two_thousand_conversations_take_seconds():
    talks = [replace(chat(*SAID[:4]), where=f"t:{i}") for i in range(2000)]
    start = time.monotonic()
    assert not any(isinstance(one, Fault) for one in encode_conversations(form_of("smollm2"), talks))
    assert time.monotonic() - start < 15  # 1.7 s on two busy cores
