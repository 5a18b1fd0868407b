"""As people meet the server: the openai client against a process of its own, and the page in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.use.conftest import BLUE, FRANCE, JAPAN, PARIS, SKY, TEMPLATE, TOKYO, turns
from tests.use.serving import Server, trained_predictors

KEY = "sk-0123456789abcdefg"
TOOL: Any = {
    "type": "function",
    "function": {"name": "capital", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def server(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a copy of the talker whose template writes tools"""
    folder = tmp_path_factory.mktemp("client") / "talker"
    shutil.copytree(talker, folder)
    card = folder / "tokenizer_config.json"
    template = "{% for tool in tools or [] %}{{ tool.function | tojson }}\n{% endfor %}" + TEMPLATE
    card.write_text(json.dumps({**json.loads(card.read_text()), "chat_template": template}))
    (folder.parent / "keys").write_text(KEY + "\n")
    with Server(folder, key_file=folder.parent / "keys") as made:
        yield made
        assert made.stop() == 0 and "Traceback" not in made.said()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="NOT CHECKED: the server is asked by the openai client")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def test_the_openai_client_chats_whole_and_in_a_stream(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["talker"]
    said = client.chat.completions.create(model="talker", messages=turns(FRANCE), temperature=0)
    assert said.choices[0].message.content == PARIS and said.choices[0].finish_reason == "stop" and said.usage.completion_tokens > 5
    asked = {"model": "talker", "messages": turns(FRANCE, PARIS, JAPAN), "temperature": 0, "stream": True}
    pieces = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == TOKYO
    assert pieces[-1].usage.completion_tokens > 5 and pieces[-2].choices[0].finish_reason == "stop"
    plain = client.completions.create(
        model="talker", prompt=f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\n", temperature=0, max_tokens=40
    )
    assert plain.choices[0].text == BLUE
    told = client.chat.completions.create(model="talker", messages=turns(SKY), temperature=0, logprobs=True, top_logprobs=1)
    assert "".join(one.token for one in told.choices[0].logprobs.content) == BLUE


def test_the_openai_client_hands_tools_over_and_reads_an_answer(client: Any) -> None:
    plain, told = (
        client.chat.completions.create(model="talker", messages=turns(SKY), temperature=0, max_tokens=2, **more)
        for more in ({}, {"tools": [TOOL]})
    )
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 20 and told.choices[0].message.tool_calls is None
    long = [
        *turns(SKY),
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "capital", "arguments": "{}"}}]},
    ]
    answered = [*long, {"role": "tool", "tool_call_id": "1", "content": "Paris"}]
    assert client.chat.completions.create(model="talker", messages=answered, max_tokens=2).usage.completion_tokens == 2


def test_the_openai_client_raises_its_own_errors_with_the_field_that_is_wrong(client: Any, server: Server) -> None:
    import openai

    for more, kind, param in (
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"messages": turns("x" * 400)}, openai.BadRequestError, "messages"),
        ({"extra_body": {"chat_template": "x"}}, openai.BadRequestError, "chat_template"),
    ):
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(**{"model": "talker", "messages": turns(SKY), "stream": stream, **more})
            assert caught.value.param == param, "also where a stream was asked for"
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="sk-another-key-0000", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError) as refused:
            other.models.list()
        assert refused.value.code == "invalid_api_key"


class Browser:
    """Headless Chromium, spoken to in its own protocol over two pipes."""

    def __init__(self, program: str, home: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={home}",
            "--remote-debugging-pipe",
        ]
        shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out, self._held, self._asked = ours_in, ours_out, b"", 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._in), os.close(self._out)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                part = os.read(self._in, 65536)
                assert part, "the browser has ended"
                self._held += part
            one, _, self._held = self._held.partition(b"\0")
            if (found := json.loads(one)).get("id") == self._asked:
                assert "error" not in found, found
                return found["result"]

    def run(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", self.session, expression=script, returnByValue=True, awaitPromise=True)["result"].get("value")

    def until(self, script: str) -> Any:
        end = time.monotonic() + 30
        while not (found := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.1)
        return found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("NOT CHECKED: the page is opened in Chromium, and none is installed")
    made = Browser(program, tmp_path / "browser")
    try:
        yield made
    finally:
        made.close()


def test_in_a_browser_the_page_chats_with_a_key_and_shows_what_a_model_writes_as_text(server: Server, browser: Browser) -> None:
    known = base64.b64encode(f"me:{KEY}".encode()).decode()  # as a browser sends it after it asked for the password
    browser.ask("Network.enable", browser.session)
    browser.ask("Network.setExtraHTTPHeaders", browser.session, headers={"Authorization": f"Basic {known}"})
    browser.ask("Page.navigate", browser.session, url=f"{server.address}/")
    assert browser.until("document.getElementById('name')?.textContent.trim() === 'talker' && !document.getElementById('ask').hidden")
    for question, answer in ((FRANCE, PARIS), (JAPAN, TOKYO)):
        browser.run(f"at('text').value = {json.dumps(question)}; at('ask').requestSubmit()")
        browser.until("running === null && [...document.querySelectorAll('.assistant')].pop().textContent")
        assert browser.run("[...document.querySelectorAll('.assistant')].pop().textContent") == answer
    assert browser.run("document.querySelectorAll('.wrong').length") == 0 and browser.run("turns.length") == 4
    browser.run("say('assistant', '<img src=x onerror=alert(1)>')")
    assert browser.run("document.querySelectorAll('#said img').length") == 0
    browser.run(f"at('text').value = {json.dumps('x' * 400)}; at('ask').requestSubmit()")
    assert "tokens, the model reads 160" in browser.until("document.querySelector('.wrong')?.textContent")
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'not asked')") == "not asked"


def test_in_a_browser_a_table_is_dropped_and_its_predictions_are_shown(browser: Browser, tmp_path: Path) -> None:
    runs = trained_predictors(tmp_path, "prices")
    with Server(runs / "prices") as server:
        browser.ask("Page.navigate", browser.session, url=f"{server.address}/")
        assert browser.until("at('name').textContent === 'prices' && !at('drop').hidden && at('ask').hidden")
        browser.run("predict(new File(['kind,size\\na,0.5\\nb,0.25\\n'], 't.csv', { type: '' }))")
        cells = browser.until(
            "[...document.querySelectorAll('td')].length === 2 && [...document.querySelectorAll('th,td')].map((c) => c.textContent)"
        )
        assert cells[0] == "price" and all(float(cell) for cell in cells[1:])
        browser.run("predict(new File(['kind\\na\\n'], 't.csv'))")
        assert "has no column 'size'" in browser.until("document.querySelector('.wrong')?.textContent")
        assert server.stop() == 0
