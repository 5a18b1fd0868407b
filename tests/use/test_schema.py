"""JSON held to a schema: whatever an untrained model would say, what it writes parses and validates; what cannot be kept is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.use.schema import LONGEST, Rule, read_schema, rule_of
from fromzero.use.speak import Speaker, complete, speak
from tests.conftest import fromzero


def needed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        pytest.skip(f"NOT CHECKED: {name} is not installed")


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """Knows nothing, and every byte"""
    needed("llguidance")
    tokenizer = tk.byte_pairs(['{"name": "x", "age": 12, "tags": ["a", "b"]}, true, false, null, déjà vu 東京'] * 3, 300)
    torch.manual_seed(0)
    model = DECODERS["llama"].build(decoder_config(vocabulary=320, width=24, layers=1, heads=2, context=1024)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return Speaker("tiny", model, tokenizer, (), None, frozenset({0}))


def array(items: Any, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": array({"enum": ["a", 'b\n"c\\', "東京 🎉"]}, 3),
        "likes": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": {"x": [1, None]}}]},
    },
    "required": ["name", "age", "tags", "likes"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "list of objects": array(PERSON, 2),
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
    "bounds": array({"type": "integer", "exclusiveMinimum": -5, "maximum": 5, "multipleOf": 2}, 4),
    "date": {"type": "string", "format": "date"},
    "references": {"$defs": {"leaf": {"enum": [1, 2.5, "x"]}}, **array({"$ref": "#/$defs/leaf"}, 3)},
    "all of": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 12}]},
    "many names": {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(12)}, "additionalProperties": False},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_an_untrained_model_writes_parses_and_validates(name: str, speaker: Speaker) -> None:
    validate = needed("jsonschema").validate
    speeches = [
        complete(speaker, "Now:", schema=SCHEMAS[name], max_tokens=600, temperature=warm, seed=seed)
        for seed, warm in enumerate((0.0, 0.7, 1.0, 1.0, 2.0))
    ]
    free = complete(speaker, "Now:", max_tokens=40)
    for _ in speak([*speeches, free]):
        pass
    texts = {speech.text for speech in speeches}
    for text in texts:
        validate(json.loads(text), SCHEMAS[name])
    assert {speech.stopped for speech in speeches} == {"stop"} and len(texts) > 1
    alone = complete(speaker, "Now:", max_tokens=40)
    assert "".join(alone) == free.text, "a neighbour that is held to a schema changes nothing"


def test_a_text_that_is_cut_before_the_json_is_whole_is_an_error_and_its_neighbours_are_made(speaker: Speaker) -> None:
    cut, whole = (complete(speaker, "a", schema=SCHEMAS["object"], max_tokens=most, seed=1, temperature=1.0) for most in (4, 600))
    with pytest.raises(fz.ModelError, match=r"is no whole JSON of the schema; it ends in the midst, after 4 tokens; raise max_tokens"):
        list(speak([cut, whole]))
    assert cut.stopped == "length" and json.loads(whole.text)


NESTED: Any = {"type": "string"}
for _ in range(3000):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ([1], r"a schema is list, no object; write \{\"type\": \"object\""),
        ({"const": float("nan")}, "a schema is no JSON"),
        ({"const": {1, 2}}, "a schema is no JSON"),
        ({"enum": ["x" * LONGEST]}, r"a schema has 1,000,\d+ characters, more than 1,000,000; shorten it"),
        (NESTED, "a schema is (no JSON|refused)"),
        ({"$ref": "#"}, "a schema is refused"),
        ({"$ref": "http://example.com/x.json"}, "a schema is refused: Resource 'http://example.com/x.json' is not present"),
        ({"$ref": "file:///etc/passwd"}, "a schema is refused: Resource 'file:///etc/passwd' is not present"),
        ({"type": "strng"}, "a schema is refused: Invalid type: strng; what is written could not be held to it; leave that out"),
        ({"type": "array", "uniqueItems": True}, "a schema is refused: Unimplemented keys"),
        ({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}, "a schema is refused: Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "a schema is refused: regex parse error"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "a schema is refused: Unsatisfiable schema"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"enum": [i]}}} for c in "ab"]} for i in range(25)]},
            "a schema is refused: schema too large",
        ),
    ],
)
def test_hostile_schemas_are_refused_with_the_reason_before_anything_is_written(schema: Any, said: str, speaker: Speaker) -> None:
    with pytest.raises(fz.DataError, match=said):
        complete(speaker, "a", schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1,500}){1,500}){1,500}$"},
        {"type": "string", "pattern": "(x+x+)+y"},
        {"enum": [f"v{i}" for i in range(20_000)]},
        {"type": "array", "minItems": 10**7, "items": {"type": "integer"}},
        {"type": "string", "minLength": 10**8},
    ],
    ids=["nested counts", "backtracking", "many values", "many items", "long"],
)
def test_schemas_that_ask_for_endless_work_end_in_time_with_an_answer_or_an_error(schema: Any, speaker: Speaker) -> None:
    speech = complete(speaker, "a", schema=schema, max_tokens=60, temperature=1.0, seed=0)
    try:
        list(speech)
        assert isinstance(json.loads(speech.text), str)
    except fz.ModelError as error:
        assert "is no whole JSON of the schema" in str(error)
    assert len(speech.made) <= 60


def test_where_the_library_gives_up_nothing_is_allowed_and_the_reason_is_told() -> None:
    class Matcher:
        def consume_tokens(self, ids: list[int]) -> bool:
            return False

        def compute_logit_bias(self) -> bytes:
            return b"\xc8" * 5

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "it grew too large\nstate 7"

    rule = Rule(Matcher())
    assert rule([1]).tolist() == [False] * 5 and rule.fault([1]) == "it grew too large"


def test_models_that_cannot_be_held_to_a_schema_say_why(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        fz.ModelError, match="the model has no token that ends a text; the text would not end where the JSON does; take another model"
    ):
        rule_of({}, speaker.tokenizer, ())
    with pytest.raises(fz.ModelError, match="the model's tokenizer cannot be held to a schema: can't determine decoder type"):
        rule_of({}, tk.characters(["abc"], end=True), (1,))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(fz.MissingExtra, match=r"a schema needs the package llguidance; pip install 'fromzero\[schema\]'"):
        rule_of({}, speaker.tokenizer, (0,))


def test_a_schema_comes_from_a_file_at_the_command_line(talker: Path, tmp_path: Path) -> None:
    needed("llguidance")
    (tmp_path / "s.json").write_text(
        json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False})
    )
    done = fromzero("generate", str(talker), "--prompt", "a", "--schema", "s.json", "--json", cwd=tmp_path)
    assert json.loads(json.loads(done.stdout)["text"]) in ({"n": 1}, {"n": 2})
    assert fz.generate(str(talker), "a", schema={"const": True}) == "true"
    assert fz.chat(str(talker), [{"role": "user", "content": "a"}], schema={"const": [1, "é"]}) == '[1, "é"]'
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(fz.DataError, match=r"bad.json schema: is no JSON \("):
        read_schema(str(tmp_path / "bad.json"))
    done = fromzero("chat", str(talker), "--schema", "none.json", cwd=tmp_path)
    assert done.returncode == 2 and "none.json schema: cannot be read (No such file or directory)" in done.stderr
