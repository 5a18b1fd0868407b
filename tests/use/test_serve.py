"""Over HTTP a model says what it says here: whole and in pieces, one request and many; wrong requests hear which field is wrong."""

from __future__ import annotations

import base64
import hmac
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models.scores import scores_at
from fromzero.models.together import Batch, Made
from tests.conftest import fromzero
from tests.use.conftest import BLUE, FRANCE, JAPAN, PARIS, SKY, TEMPLATE, TOKYO, turns
from tests.use.serving import HI, in_process, random_encoder, random_talker, trained_predictors

from fromzero.use.serve.asked import Chat, check  # isort: skip
from fromzero.use.serve.choices import CALL, Choice, read_calls  # isort: skip
from fromzero.use.serve import limits  # isort: skip
from fromzero.use.speak import open_speaker  # isort: skip
from fromzero.use.spelling import Cut  # isort: skip

KEY = b"sk-0123456789abcdefg"


@pytest.fixture(scope="module")
def client(talker: Path) -> Any:
    with in_process(str(talker)) as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_predictors(tmp_path_factory.mktemp("predictors"))


def asked(*said: str, **more: Any) -> dict[str, Any]:
    return {"model": "talker", "messages": turns(*said), "temperature": 0, **more}


def streamed(answer: Any) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and lines.pop() == "data: [DONE]", answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_answer_is_what_the_model_says_here_with_its_counts(client: Any, talker: Path) -> None:
    answer = client.post("/v1/chat/completions", json=asked(FRANCE, PARIS, JAPAN)).json()
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": TOKYO}, "logprobs": None, "finish_reason": "stop"}
    speaker = open_speaker(str(talker), Path("runs"))
    prompt, made = len(speaker.encode_turns(turns(FRANCE, PARIS, JAPAN))), len(tk.encode(speaker.tokenizer, [TOKYO], special=False)[0])
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    assert (answer["object"], answer["model"]) == ("chat.completion", "talker") and answer["id"].startswith("chatcmpl-")
    short = client.post("/v1/chat/completions", json=asked(FRANCE, max_completion_tokens=2)).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 2


def test_a_stream_is_the_same_text_in_whole_characters(client: Any) -> None:
    events = streamed(client.post("/v1/chat/completions", json=asked(FRANCE, stream=True, stream_options={"include_usage": True})))
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0]["role"] == "assistant" and "".join(delta.get("content", "") for delta in deltas) == PARIS and len(deltas) > 5
    assert "\ufffd" not in str(events) and [e["choices"][0]["finish_reason"] for e in events[-3:-1]] == [None, "stop"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 5 and events[0]["usage"] is None
    assert len({event["id"] for event in events}) == 1
    plain = streamed(client.post("/v1/chat/completions", json=asked(FRANCE, stream=True)))
    assert all("usage" not in event for event in plain)


def test_plain_completions_go_on_with_a_text_with_ids_and_with_several(client: Any, talker: Path) -> None:
    prompt = f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\nIt"
    value = {"model": "talker", "prompt": prompt, "temperature": 0, "max_tokens": 50}
    answer = client.post("/v1/completions", json=value).json()
    assert answer["choices"][0]["text"] == BLUE[2:] == fz.generate(str(talker), prompt) and answer["object"] == "text_completion"
    ids = open_speaker(str(talker), Path("runs")).encode(prompt)
    assert client.post("/v1/completions", json={**value, "prompt": ids}).json()["choices"] == answer["choices"]
    several = client.post("/v1/completions", json={**value, "prompt": [prompt, prompt[:-2]]}).json()["choices"]
    assert [(one["index"], one["text"]) for one in several] == [(0, BLUE[2:]), (1, BLUE)]
    events = streamed(client.post("/v1/completions", json={**value, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == BLUE[2:]


def test_the_seed_fixes_what_is_drawn_and_several_answers_differ(client: Any) -> None:
    value = asked("q", temperature=2, seed=5, n=3, max_tokens=12)
    first, again = (client.post("/v1/chat/completions", json=value).json()["choices"] for _ in range(2))
    assert first == again and len({one["message"]["content"] for one in first}) == 3
    alone = client.post("/v1/chat/completions", json={**value, "n": 1, "seed": 6}).json()["choices"]
    assert alone[0]["message"] == first[1]["message"]


def test_logprobs_are_those_of_the_model(client: Any, talker: Path) -> None:
    (choice,) = client.post("/v1/chat/completions", json=asked(SKY, logprobs=True, top_logprobs=2)).json()["choices"]
    told, speaker = choice["logprobs"]["content"], open_speaker(str(talker), Path("runs"))
    prompt = speaker.encode_turns(turns(SKY))
    ids = tk.encode(speaker.tokenizer, [BLUE], special=False)[0]
    logs = scores_at(speaker.model, [[*prompt, *ids]], range(len(prompt) - 1, len(prompt) + len(ids) - 1)).double().log_softmax(dim=1)
    assert "".join(one["token"] for one in told) == BLUE and bytes(b for one in told for b in one["bytes"]).decode() == BLUE
    for token, row, one in zip(ids, logs, told, strict=True):
        assert abs(one["logprob"] - float(row[token])) < 1e-4 and len(one["top_logprobs"]) == 2
        assert abs(one["top_logprobs"][0]["logprob"] - float(row.max())) < 1e-4
    old = client.post("/v1/completions", json={"model": "talker", "prompt": "a", "max_tokens": 2, "logprobs": 1}).json()["choices"][0]
    assert len(old["logprobs"]["tokens"]) == len(old["logprobs"]["top_logprobs"]) == 2


def test_a_stop_string_ends_the_text_before_it_and_nothing_of_it_is_shown(client: Any) -> None:
    whole = client.post("/v1/chat/completions", json=asked(FRANCE, stop=["vu 🎉", "never"])).json()["choices"][0]
    assert whole["message"]["content"] == "Paris, déjà " and whole["finish_reason"] == "stop"
    events = streamed(client.post("/v1/chat/completions", json=asked(FRANCE, stop="vu 🎉", stream=True)))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Paris, déjà "


def test_text_is_held_back_only_while_it_may_begin_a_mark() -> None:
    text = "a STO b STOP c"
    for size in range(1, len(text)):
        cut, said = Cut(["STOP", "never"]), ""
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        for number, part in enumerate(parts):
            said += cut.add(part, last=number == len(parts) - 1)
            assert text.startswith(said)
        assert said == "a STO b " and cut.rest == "STOP c"
    cut = Cut(["STOP"])
    assert cut.add("x ST", last=False) == "x " and cut.add("ST", last=False) == "ST" and cut.add("O", last=True) == "STO"


def hear(choice: Choice, tokenizer: str, text: str) -> list[str]:
    ids = tk.encode(tokenizer, [text], special=False)[0]
    made = [Made(1, token, -0.5, (), "") for token in ids]
    return [choice.hear(one) for one in made] + [choice.hear(Made(1, 0, 0.0, (), "stop"))]


def test_calls_in_the_hermes_form_are_set_apart_and_others_stay_text() -> None:
    tokenizer = tk.byte_pairs(["end of it"], 258)
    written = 'I ask.\n<tool_call>\n{"name": "capital", "arguments": {"of": "日本"}}\n</tool_call>'
    choice = Choice(tokenizer, [], [], calls=True)
    pieces = hear(choice, tokenizer, written)
    assert "".join(pieces) == "I ask.\n" and choice.finish == "tool_calls"
    (call,) = choice.called
    assert call["function"]["name"] == "capital" and json.loads(call["function"]["arguments"]) == {"of": "日本"}
    for text in ("a <tool_cal", "<tool_call>{broken", "<tool_call>[1]</tool_call>"):
        choice = Choice(tokenizer, [], [], calls=True)
        assert "".join(hear(choice, tokenizer, text)) == text and (choice.finish, choice.called) == ("stop", [])
    assert "".join(hear(Choice(tokenizer, [], []), tokenizer, written)) == written
    assert len(read_calls(written.removeprefix("I ask.\n") * 2)) == 2


def test_arguments_of_earlier_calls_reach_the_template_as_objects() -> None:
    def seen(arguments: Any) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}}
        (made,) = check(Chat, asked(SKY, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])).messages
        return made.seen()["tool_calls"][0]["function"]["arguments"]

    assert seen('{"of": "日本"}') == {"of": "日本"} and seen({"of": 1}) == {"of": 1}
    assert seen("{broken") == "{broken" and seen("[" * 1000) == "[" * 1000
    assert (
        check(Chat, asked(SKY, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]))
        .messages[0]
        .content
        == "ab"
    )


def test_tools_go_through_the_template_and_calls_are_looked_for_only_in_its_own_form(talker: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}
    shutil.copytree(talker, tmp_path / "caller")
    card = tmp_path / "caller" / "tokenizer_config.json"
    template = "{% for tool in tools or [] %}" + CALL + "{{ tool.function | tojson }}\n{% endfor %}" + TEMPLATE
    card.write_text(json.dumps({**json.loads(card.read_text()), "chat_template": template}))
    with in_process(str(tmp_path / "caller")) as caller:
        plain, told = (
            caller.post("/v1/chat/completions", json={**asked(SKY, max_tokens=4), "model": "caller", "tools": tools}).json()
            for tools in ([], [tool])
        )
        assert told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 20
        none = {**asked(SKY, max_tokens=4), "model": "caller", "tools": [tool], "tool_choice": "none"}
        assert caller.post("/v1/chat/completions", json=none).json()["usage"] == plain["usage"]


def test_one_child_renders_for_all_requests_and_a_new_one_after_a_request_that_it_did_not_survive(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(talker, tmp_path / "talker")
    card = tmp_path / "talker" / "tokenizer_config.json"
    wild = "{% if messages[0].content == 'wild' %}{{ (messages | length * 10) ** (10 ** 10) }}{% endif %}"
    card.write_text(json.dumps({**json.loads(card.read_text()), "chat_template": wild + TEMPLATE}))
    started, popen = [], subprocess.Popen
    with in_process(str(tmp_path / "talker")) as client:
        monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: started.append(given) or popen(*given, **named))  # type: ignore[func-returns-value]
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=asked(SKY)).json()["choices"][0]["message"]["content"] == BLUE
        assert len(started) == 1
        refused = client.post("/v1/chat/completions", json=asked("wild"))
        assert refused.status_code == 400 and "is still computing after 1 s" in refused.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=asked(SKY)).json()["choices"][0]["message"]["content"] == BLUE
        assert len(started) == 3, "the request that ended the first was given to a second, and the next to a third"


def test_answers_of_many_at_once_are_those_of_each_alone_and_share_steps(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: sizes.append(len(self)) or step(self))  # type: ignore[func-returns-value]
    questions = [(FRANCE,), (SKY,), (FRANCE, PARIS, JAPAN)] * 4
    with ThreadPoolExecutor(len(questions)) as threads:
        said = list(threads.map(lambda one: client.post("/v1/chat/completions", json=asked(*one)).json(), questions))
    assert [one["choices"][0]["message"]["content"] for one in said] == [PARIS, BLUE, TOKYO] * 4
    assert max(sizes) > 1


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_a_schema_holds_whatever_the_model_would_say(client: Any) -> None:
    pytest.importorskip("llguidance", reason="NOT CHECKED: schemas need llguidance")
    for seed in range(3):
        value = asked(FRANCE, temperature=1, seed=seed, max_tokens=80, response_format=form(SCHEMA))
        (choice,) = client.post("/v1/chat/completions", json=value).json()["choices"]
        assert type(json.loads(choice["message"]["content"])["a"]) is bool and choice["finish_reason"] == "stop"
    value = asked(FRANCE, max_tokens=3, response_format={"type": "json_object"})
    assert client.post("/v1/chat/completions", json=value).json()["choices"][0]["message"]["content"].startswith("{")
    for wrong, said in (({"$ref": "http://127.0.0.1:9/x"}, "not fetch"), ({"type": "nothing"}, "nothing")):
        answer = client.post("/v1/chat/completions", json=asked(FRANCE, response_format=form(wrong)))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format" and said in answer.text


def test_without_its_package_a_schema_is_refused_with_the_line_that_installs_it(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = client.post("/v1/chat/completions", json=asked(FRANCE, response_format=form(SCHEMA)))
    assert answer.status_code == 400 and "pip install 'fromzero[schema]'" in answer.json()["error"]["message"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 10**9}, "n", "less than or equal to 8, not 1000000000"),
    ({"max_tokens": 10**9}, "max_tokens", "8192"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, not 0"),
    ({"max_tokens": 2.5}, "max_tokens", "integer, not 2.5"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0, not -1"),
    ({"temperature": "hot"}, "temperature", "number, not 'hot'"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"seed": 2**70}, "seed", "less than or equal to"),
    ({"logit_bias": {str(i): 100 for i in range(10_000)}}, "logit_bias", "is not known here beyond {}"),
    ({"frequency_penalty": 1}, "frequency_penalty", "repetition_penalty is there"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ["a" * 300]}, "stop[0]", "at most 256"),
    ({"stop": [""]}, "stop[0]", "at least 1"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": HI * 1025}, "messages", "at most 1024"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role", "'system'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9"}}]}]}, "messages[0].content", "'image_url'"),
    ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages", "tokens, the model reads 160; shorten it"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "the template comes with the model"),
    ({"template": "x"}, "template", "the template comes with the model"),
    ({"file": "/etc/passwd"}, "file", "no file is read"),
    ({"url": "http://127.0.0.1:9"}, "url", "no address fetched"),
    ({"max_token": 4}, "max_token", "did you mean 'max_tokens'?"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "messages", "writes no tools"),
    ({"tools": [{"type": "search"}]}, "tools[0].type", "'function'"),
    ({"tool_choice": "required"}, "tool_choice", "'auto'"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "is of a stream"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with a schema"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "param", "said"), WRONG, ids=[f"{i}-{param}" for i, (_, param, _) in enumerate(WRONG)])
def test_a_wrong_field_is_named_with_what_is_wrong(client: Any, more: dict[str, Any], param: str, said: str) -> None:
    answer = client.post("/v1/chat/completions", json={**asked(FRANCE), **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["type"]) == (param, "invalid_request_error") and said in error["message"]
    assert len(answer.text) < 1000 and "/tmp" not in answer.text and set(error) == {"message", "type", "param", "code"}


def test_a_number_is_whole_however_it_is_written(client: Any) -> None:
    """As JSON Schema has it, 2.0 is an integer; some clients have no other numbers"""
    whole, written = (
        client.post("/v1/chat/completions", json=asked(SKY, max_tokens=kind(2), seed=kind(1), n=kind(1))).json()["choices"]
        for kind in (int, float)
    )
    assert whole == written


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("", "is empty"), ([], "is empty"), ([[]], "is empty"), ({"a": 1}, "a list of token ids"), ([1, "a"], "a list of token ids"),
     ([10**9], "none of the"), ([-1], "none of the"), (["a"] * 9, "at most 8"), ("x" * 999, "the model reads 160")],
)  # fmt: skip
def test_a_prompt_that_is_none_is_named(client: Any, prompt: Any, said: str) -> None:
    answer = client.post("/v1/completions", json={"model": "talker", "prompt": prompt})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt" and said in answer.json()["error"]["message"]
    if said == "is empty":
        many = client.post("/v1/completions", json={"model": "talker", "prompt": ["a"] * 3, "n": 3})
        assert many.status_code == 400 and many.json()["error"]["param"] == "n" and "more than 8 texts" in many.text


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"{", "is not JSON"), (b"[1]", "list, not a JSON object"), (b"[" * 100_000, "nested more than 64 deep"), (b'{"n": 1, "n": 2}', "twice"),
     (b'{"temperature": NaN, "model": "talker", "messages": [{"role": "user"}]}', "finite"), (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
     (b"\xff", "byte 0 of the body is not UTF-8"), (b'{"model": "\\ud800"}', "half of a surrogate pair")],
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused(client: Any, body: bytes, said: str) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_other_models_types_routes_and_methods_are_refused_in_the_same_shape(client: Any) -> None:
    for method, path, value, status, said in (
        ("POST", "/v1/chat/completions", {**asked(SKY), "model": "gpt-4"}, 404, "no model is called 'gpt-4' here"),
        ("POST", "/v1/embeddings", {}, 404, "POST /v1/embeddings is not answered by this model"),
        ("GET", "/v1/chat/completions", None, 405, "GET /v1/chat/completions"),
        ("GET", "/../etc/passwd", None, 404, "is not answered"),
    ):
        answer = client.request(method, path, json=value)
        assert answer.status_code == status and said in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json={**asked(SKY), "model": "x"}).json()["error"]["code"] == "model_not_found"
    plain = client.post("/v1/chat/completions", content=json.dumps(asked(SKY)), headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and "Content-Type: application/json" in plain.text


def test_a_mistake_of_ours_tells_nothing_and_the_next_request_is_answered(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Batch) -> list[Made]:
        raise RuntimeError("the secret of /home/me")

    with in_process(str(talker), answer_seconds=15) as client:
        with monkeypatch.context() as patched:
            patched.setattr(Batch, "step", broken)
            answers = [client.post("/v1/chat/completions", json=asked(SKY, stream=stream)) for stream in (False, True)]
        for answer in answers:
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text
        assert "the secret of /home/me" in capfd.readouterr().err
        assert client.post("/v1/chat/completions", json=asked(SKY)).json()["choices"][0]["message"]["content"] == BLUE


def test_a_table_is_predicted_by_the_names_of_its_columns(runs: Path) -> None:
    table = "size,kind\n0.9,a\n0.1,b\n"
    with in_process("run:prices", runs) as client:
        rows = [{"size": 0.9, "kind": "a"}, {"kind": "b", "size": 0.1}]
        said = client.post("/v1/predict", json={"rows": rows}).json()
        values = [row["values"]["price"] for row in said["rows"]]
        ours = fz.predict("run:prices", rows, runs=runs).rows
        assert values == [row.values["price"] for row in ours] and said["task"] == "regress" and said["model"] == "run:prices"
        assert client.post("/v1/predict", content=table, headers={"content-type": "text/csv"}).json() == said
        for value, param, message in (
            ({"rows": [{"kind": "a", "siize": 1}]}, "size", "has no column 'size', which the model was trained with; is 'siize' the same?"),
            ({"rows": [{"kind": "a", "size": "big"}]}, "size", "'big' is not a number"),
            ({"rows": [{"kind": "a", "size": 1}, 5]}, "rows[1]", "is int, not an object of cells by column"),
            ({"rows": [{"kind": ["a"], "size": 1}]}, "rows[0].kind", "is list, not one cell"),
            ({"rows": []}, "rows", "at least 1"),
            ({"rows": rows * 5001}, "rows", "at most 10000"),
            ({"rows": rows, "path": "/etc/passwd"}, "path", "no file is read"),
        ):
            answer = client.post("/v1/predict", json=value)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]
        nan = client.post("/v1/predict", content=b'{"rows": [{"kind": "a", "size": NaN}]}', headers={"content-type": "application/json"})
        assert nan.status_code == 400 and "rows[0].size: is nan, no number of JSON" in nan.json()["error"]["message"]
        broken = client.post("/v1/predict", content="kind,size\na,1,2\n", headers={"content-type": "text/csv"})
        assert broken.status_code == 400 and broken.json()["error"]["message"].startswith("body:2") and "/tmp" not in broken.text
        flood = client.post("/v1/predict", content="kind,size\n" + "a,1\n" * 10_001, headers={"content-type": "text/csv"})
        assert flood.status_code == 400 and "more than 10000 lines" in flood.text
        other = client.post("/v1/predict", content=b"x", headers={"content-type": "application/x-parquet"})
        assert other.status_code == 415 and "text/csv" in other.text


def test_classes_come_with_their_probabilities_for_tables_texts_and_images(runs: Path) -> None:
    with in_process("run:kinds", runs) as client:
        (row,) = client.post("/v1/predict", json={"rows": [{"size": 0.5, "price": 1.0}]}).json()["rows"]
        assert row["class"] in "ab" and abs(sum(row["probabilities"].values()) - 1) < 1e-6
        assert row["probability"] == max(row["probabilities"].values())
    with in_process("run:weather", runs) as client:
        for rows in (["rain and wind 3", "bread and tea 4"], [{"text": "rain and wind 3"}, {"text": "bread and tea 4"}]):
            said = client.post("/v1/predict", json={"rows": rows}).json()["rows"]
            assert [row["class"] for row in said] == ["wet", "dry"]
        mixed = client.post("/v1/predict", json={"rows": ["/etc/passwd", {"text": "a"}]})
        assert mixed.status_code == 400 and "rows[1]: is dict, not a text" in mixed.json()["error"]["message"]
        assert client.post("/v1/predict", json={"rows": ["/etc/passwd"]}).json()["rows"][0]["class"] in ("wet", "dry"), "a text, no path"
    with in_process("run:shades", runs) as client:
        for shade, name in ((25, "dark"), (225, "light")):
            made = io.BytesIO()
            Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)).save(made, "PNG")
            said = client.post("/v1/predict", content=made.getvalue(), headers={"content-type": "image/png"}).json()
            assert [row["class"] for row in said["rows"]] == [name]
            grid = client.post("/v1/predict", json={"rows": [[[[shade / 255] * 8] * 8]]}).json()
            assert grid["rows"][0]["class"] == name
        broken = client.post("/v1/predict", content=made.getvalue()[:40], headers={"content-type": "image/png"})
        assert broken.status_code == 400 and "/tmp" not in broken.text and broken.json()["error"]["message"].startswith("body: is")
        for rows in ([[1, 2], [3]], ["a"], [[[[1.0]]]]):
            assert client.post("/v1/predict", json={"rows": rows}).status_code == 400


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_encoder(tmp_path_factory.mktemp("encoders") / "bert")


def test_an_encoder_gives_the_vectors_of_texts_as_numbers_and_as_openai_packs_them(encoder: Path) -> None:
    texts = ["some words", "of a text", "of"]
    with in_process(str(encoder)) as client:
        said = client.post("/v1/embeddings", json={"model": "bert", "input": texts}).json()
        packed = client.post("/v1/embeddings", json={"model": "bert", "input": texts, "encoding_format": "base64"}).json()
        model = fz.load(str(encoder))
        tokenizer = (encoder / "tokenizer.json").read_text()
        for text, one, other in zip(texts, said["data"], packed["data"], strict=True):
            ids = tk.encode(tokenizer, [text], special=True)[0]
            with torch.no_grad():
                ours = model(torch.tensor(ids), torch.tensor([0, len(ids)]))[0].tolist()
            assert max(abs(a - b) for a, b in zip(ours, one["embedding"], strict=True)) < 1e-5
            assert struct.unpack("<16f", base64.b64decode(other["embedding"])) == pytest.approx(one["embedding"], abs=1e-6)
        assert said["usage"]["prompt_tokens"] == sum(len(tk.encode(tokenizer, [text], special=True)[0]) for text in texts)
        for value, param in (("", "input"), ("x" * 300, "input[0]"), ([[10**6]], "input[0]"), (["a"] * 257, "input")):
            answer = client.post("/v1/embeddings", json={"model": "bert", "input": value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        assert client.get("/v1/models").json()["data"][0]["task"] == "embed"


def test_every_route_but_health_is_behind_the_key(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    equal = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or equal(a, b))  # type: ignore[func-returns-value]
    with in_process(str(talker), keys=(KEY, b"another-key-of-sixteen")) as client:
        assert client.get("/health").json() == {"status": "ok"} and not compared
        paths = [(method, path) for path, method in client.gate.routes.items() if path != "/health"] + [("GET", "/nowhere")]
        assert len(paths) >= 6
        for method, path in paths:
            for sent in (None, b"Bearer wrong", KEY, b"Basic !", b"Bearer \xe9", b"Bearer "):
                header = {} if sent is None else {"authorization": sent}
                answer = client.request(method, path, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (path, header)
                assert "Bearer" in answer.headers["www-authenticate"] and KEY.decode() not in answer.text
        compared.clear()
        basic = base64.b64encode(b"any:" + KEY).decode()
        for header in (f"Bearer {KEY.decode()}", f"Basic {basic}", "Bearer another-key-of-sixteen"):
            assert client.get("/v1/models", headers={"authorization": header}).status_code == 200
        assert compared == [KEY, b"another-key-of-sixteen"] * 3, "each key each time, by a comparison whose time tells nothing"


def test_without_keys_only_names_of_this_machine_are_answered_and_no_page_elsewhere_may_ask(client: Any) -> None:
    for host, status in (
        ("localhost:80", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
    ):
        answer = client.get("/v1/models", headers={"host": host})
        assert answer.status_code == status, host
    asking = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert client.options("/v1/chat/completions", headers=asking).status_code == 405
    for answer in (client.get("/v1/models", headers=asking), client.get("/", headers=asking)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"


def test_metrics_are_a_page_that_prometheus_reads(client: Any) -> None:
    client.post("/v1/chat/completions", json=asked(SKY))
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    seen = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r'([a-z_]+)(\{(?:[a-z]+="[^"\\]*",?)+\})? (\S+)', line).groups()  # type: ignore[union-attr]
            seen[name + (labels or "")] = float(value)
    assert seen['fromzero_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert seen['fromzero_tokens_total{kind="completion"}'] > 5 and seen["fromzero_running"] == seen["fromzero_waiting"] == 0
    assert seen['fromzero_request_seconds_sum{path="/v1/chat/completions"}'] > 0
    client.get("/nowhere"), client.get("/nowhere-else")
    assert "nowhere" not in client.get("/metrics").text, "a path that is made up takes no memory here"


def test_the_page_asks_nobody_but_this_server(client: Any) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?:|//[a-z]|<link|src=|@import|innerHTML|eval\(", answer.text)


def test_a_server_that_others_reach_needs_keys_and_keys_must_be_worth_the_name(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::"):
        done = fromzero("serve", "run:nothing", "--host", host, "--port", "0", cwd=tmp_path)
        assert done.returncode == 2 and f"--host {host} is reached by others; whoever reaches it could use the model" in done.stderr
        assert "give --key-file, or leave --host out" in done.stderr
    for text, said in (
        ("", "holds no key"),
        ("# mine\n\n", "holds no key"),
        ("short-secret", "keys:1: its key is shorter than 16"),
        ("é" * 20, "cannot be read as a file of keys"),
    ):
        (tmp_path / "keys").write_text(text)
        done = fromzero("serve", "run:nothing", "--key-file", str(tmp_path / "keys"), "--port", "0", cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "short-secret" not in done.stderr
    done = fromzero("serve", "run:nothing", "--key-file", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2 and "cannot be read as a file of keys (FileNotFoundError); a key a line, in ASCII; python -c" in done.stderr


def test_an_address_that_is_taken_and_a_model_that_cannot_be_served_are_said(encoder: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = fromzero("serve", "anything", "--port", str(other.getsockname()[1]), cwd=tmp_path)
        assert done.returncode == 2 and "Address already in use; choose another --host or --port" in done.stderr
    done = fromzero("serve", "run:nothing", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and "there is no run 'nothing'" in done.stderr
    import transformers

    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "scores")
    shutil.copy(encoder / "tokenizer.json", tmp_path / "scores")
    done = fromzero("serve", str(tmp_path / "scores"), "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and "ends in scores of classes that it does not name" in done.stderr


def test_without_the_packages_of_the_extra_the_line_that_installs_them_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else find(name, *more))
    for name in [name for name in sys.modules if name.startswith("fromzero.use.serve")]:
        monkeypatch.delitem(sys.modules, name)
    done = fromzero("serve", "anything", cwd=tmp_path)
    assert done.returncode == 2 and "the package uvicorn is not installed" in done.stderr and "pip install 'fromzero[serve]'" in done.stderr


def test_a_random_model_of_raw_text_is_no_chat_model(tmp_path: Path, talker: Path) -> None:
    folder = random_talker(tmp_path / "raw")
    card = json.loads((folder / "tokenizer_config.json").read_text())
    card.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(card))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with in_process(str(folder)) as client:
        assert client.get("/v1/models").json()["data"][0]["task"] == "generate"
        answer = client.post("/v1/chat/completions", json={"model": "raw", "messages": HI})
        assert (
            answer.status_code == 400
            and "has no chat template; POST /v1/completions goes on with text" in answer.json()["error"]["message"]
        )
        assert (
            client.post("/v1/completions", json={"model": "raw", "prompt": "a", "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2
        )


def test_the_limits_of_the_page_are_those_of_the_code(repository: Path) -> None:
    page, most = (repository / "docs" / "serve.md").read_text(), limits.Limits()
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .+? \|$", page, re.MULTILINE))
    assert len(rows) == 17
    for name, said in (
        ("body of a request", f"{most.body // 2**20} MiB"),
        ("head of a request", f"{most.header_seconds:g} s, 16 KiB"),
        ("body to arrive", f"{most.body_seconds:g} s"),
        ("an answer, waiting included", f"{most.answer_seconds:g} s"),
        ("connections", f"{most.connections}"),
        ("requests read, waiting or answered", f"{most.requests}"),
        ("`max_tokens`", f"{limits.MOST_TOKENS}"),
        ("messages, tools", f"{limits.MOST_MESSAGES}, {limits.MOST_TOOLS}"),
        ("prompts times `n`", f"{limits.MOST_TEXTS}"),
        ("stop strings", f"{limits.MOST_STOPS}, of {limits.LONGEST_STOP} characters"),
        ("`top_logprobs`", f"{limits.MOST_LIKELIEST}"),
        ("texts of an embeddings request", f"{limits.MOST_INPUTS}"),
        ("rows of a prediction", f"{limits.MOST_ROWS:,}"),
        ("open answers after SIGTERM", f"{most.drain_seconds:g} s"),
    ):
        assert rows[name] == said, name
    assert f"up to {most.together} texts at a time" in page
