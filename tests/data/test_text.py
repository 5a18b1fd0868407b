"""Text: columns and corpora become tokens end to end, nothing is padded, cut or lost unsaid."""

import itertools
import json

import pytest
import torch

from fromzero.data import Request, TextAsked, TextExamples, TextFormat, corpus_again, load, load_again, load_corpus
from fromzero.data import tokens as tk
from fromzero.errors import DataError

SENTENCES = ["the cat sat on the mat", "dogs like to run in the park", "birds sing when the sun is up", "fish swim in the deep blue sea"]


def table(tmp_path, rows, name="t.csv", header="text,label"):
    path = tmp_path / name
    path.write_text("\n".join([header, *(f'"{text}",{label}' for text, label in rows)]) + "\n", encoding="utf-8")
    return str(path)


def rows(count=40):
    return [(f"{SENTENCES[i % 4]} number {i}", "ab"[i % 2]) for i in range(count)]


def test_characters_give_one_token_each_and_come_back_as_they_were():
    tokenizer = tk.characters(["hello\nworld", "héé 你好"])
    ids = tk.encode(tokenizer, ["hello 你\n"], special=True)[0]
    assert len(ids) == 8 and tk.decode(tokenizer, ids) == "hello 你\n"
    assert tk.vocabulary_size(tokenizer) == len(set("hello\nworldhéé 你好")) + 1
    assert tk.encode(tokenizer, ["Z"], special=False)[0] == [tk.unknown_id(tokenizer)]


def test_byte_pairs_know_every_text():
    tokenizer = tk.byte_pairs(SENTENCES * 10, 300)
    text = "Ünknown 文字 🙂\t\n  two  spaces"
    assert tk.decode(tokenizer, tk.encode(tokenizer, [text], special=False)[0]) == text
    assert tk.vocabulary_size(tokenizer) <= 300 and tk.unknown_id(tokenizer) is None


def framed():
    """A word tokenizer that frames, pads and cuts as published files do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    tokenizer.enable_padding(length=16, pad_id=3)
    tokenizer.enable_truncation(4)
    return tokenizer.to_str()


def test_a_published_tokenizer_neither_pads_nor_cuts_and_its_frame_is_found():
    assert tk.encode(framed(), ["a b c d e"], special=True) == [[1, 4, 5, 6, 7, 8, 2]]
    assert tk.frame(framed()) == ([1], [2])


def test_a_batch_is_tokens_end_to_end_with_offsets(tmp_path):
    loaded = load(Request(table(tmp_path, rows()), hold_out=0.2, text=TextAsked(tokenizer="characters")))
    assert isinstance(loaded.train, TextExamples) and loaded.facts.kind == "text"
    index = torch.tensor([5, 0, 3])
    (tokens, offsets), targets = loaded.train.take(index)
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == 4 and targets.shape == (3,)
    form = loaded.preparation.inputs
    for place, i in enumerate(index.tolist()):
        (alone, _), target = loaded.train.take(torch.tensor([i]))
        assert torch.equal(alone, tokens[offsets[place] : offsets[place + 1]]) and target[0] == targets[place]
        assert " number " in tk.decode(form.tokenizer, alone.tolist())


def test_a_text_is_cut_inside_its_frame_and_counted(tmp_path):
    path = table(tmp_path, [("a b c d e f g h", "x"), ("a b a", "y"), ("b c a d", "x"), ("d e a b f", "y")])
    loaded = load(Request(path, hold_out=0, columns=("text",), reads_text=True, text=TextAsked(framed(), max_tokens=6)))
    assert loaded.facts.text.cut == 2 and loaded.facts.text.longest == 6
    (tokens, _offsets), _ = loaded.train.take(torch.tensor([0]))
    assert tokens.tolist() == [1, 4, 5, 6, 7, 2]


def test_the_tokenizer_is_learned_from_the_training_rows_alone(tmp_path):
    path = table(tmp_path, [*rows(20), ("held zebra quagga xylophone", "a")])
    other = table(tmp_path, [("zzz qqq unseen letters ßß", "a"), ("the cat sat down too", "b")], name="v.csv")
    loaded = load(Request(path, validation=other, text=TextAsked("characters")))
    assert "ß" not in loaded.preparation.inputs.tokenizer


def test_texts_that_stand_in_both_files_are_left_out_of_validation_and_counted(tmp_path):
    spaced = [(f" {text.replace(' ', '  ')}", label) for text, label in rows(4)]  # the same texts to a tokenizer
    train, held = table(tmp_path, rows(20)), table(tmp_path, [*spaced, ("a text of its own here", "a")], name="v.csv")
    loaded = load(Request(train, validation=held))
    assert loaded.facts.shared == 4 and len(loaded.validation) == 1
    assert len(load(Request(train, validation=held, keep_shared=True)).validation) == 5
    with pytest.raises(DataError, match="every one of its 20 validation examples"):
        load(Request(train, validation=train))


def test_a_text_column_beside_numbers_must_be_named(tmp_path):
    lines = [(f"{text}", label) for text, label in rows(30)]
    path = tmp_path / "mixed.csv"
    path.write_text("text,size,label\n" + "\n".join(f"{t},{i % 7},{label}" for i, (t, label) in enumerate(lines)))
    loaded = load(Request(str(path)))
    assert loaded.facts.kind == "table" and "one such column" in loaded.facts.set_aside["text"]
    assert load(Request(str(path), columns=("text",))).facts.kind == "text"
    assert load(Request(str(path), reads_text=True)).facts.kind == "text"


def test_a_model_that_reads_text_and_finds_two_columns_asks_which(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("question,story,label\n" + "\n".join(f"what is {i} of it,once {i} upon a time,{i % 2}" for i in range(30)))
    with pytest.raises(DataError, match=r"does not say which column is the text: question, story"):
        load(Request(str(path), reads_text=True))


def test_an_empty_text_is_named_by_line(tmp_path):
    path = table(tmp_path, [*rows(3), ("  ", "a"), *rows(3)])
    with pytest.raises(DataError, match=r"t\.csv:5: column 'text' is empty"):
        load(Request(path, columns=("text",), reads_text=True))


def test_other_data_is_read_with_the_tokens_of_the_run(tmp_path):
    path = table(tmp_path, rows())
    loaded = load(Request(path, hold_out=0, text=TextAsked("characters")))
    again = load_again(path, loaded.preparation, Request(path))
    everything = torch.arange(40)
    for ours, theirs in zip(loaded.train.take(everything)[0], again.take(everything)[0], strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------ corpora


def test_every_token_but_a_documents_first_is_predicted_exactly_once(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = ["abcdefghij", "kl", "mnopqrs"]
    for i, text in enumerate(documents):
        (folder / f"{i}.txt").write_text(text)
    loaded = load_corpus(Request(str(folder), hold_out=0, text=TextAsked("characters", max_tokens=4)))
    form = loaded.preparation.inputs
    (tokens, offsets), targets = loaded.train.take(torch.arange(len(loaded.train)))
    assert len(tokens) == len(targets) == sum(len(d) - 1 for d in documents)
    assert sorted(tk.decode(form.tokenizer, targets.tolist())) == sorted("".join(d[1:] for d in documents))
    for begin, end in itertools.pairwise(offsets):
        said = tk.decode(form.tokenizer, [tokens[begin].item(), *targets[begin:end].tolist()])
        assert any(said in document for document in documents), "a piece runs into another document"
    assert int(offsets.diff().max()) == 4


def test_the_end_of_one_text_is_held_out(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a" * 900 + "b" * 100)
    loaded = load_corpus(Request(str(path), hold_out=0.1, text=TextAsked("characters", max_tokens=50)))
    assert loaded.facts.text.tokens == 899 and loaded.facts.train == 18
    unknown = tk.unknown_id(loaded.preparation.inputs.tokenizer)
    assert set(loaded.validation.take(torch.arange(2))[0][0].tolist()) == {unknown}


def test_rows_of_a_table_are_documents_and_several_are_held_out_by_content(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i} tells of {i * i}"}) + "\n" for i in range(50)))
    loaded = load_corpus(Request(str(path), hold_out=0.2))
    assert loaded.facts.validation == 10 and loaded.facts.shared == 0
    again = corpus_again(str(path), loaded.preparation.inputs, Request(str(path)))
    assert len(again) == 50


@pytest.mark.parametrize("content", ["", "   \n", "x"])
def test_a_corpus_without_text_is_refused(tmp_path, content):
    path = tmp_path / "t.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"holds no text|too short"):
        load_corpus(Request(str(path), hold_out=0, text=TextAsked("characters")))


def test_a_format_knows_that_its_samples_have_no_fixed_shape():
    assert TextFormat("{}").shape == ()
