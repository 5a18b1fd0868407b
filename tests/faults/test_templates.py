"""Fault 38: chat templates that break out, never end, or flood. Each ends soon in one message, and leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fromzero.data import template as module
from fromzero.data.template import Job, Renderer, render
from fromzero.errors import DataError, Fault

ASKED = [
    Job([{"role": "user", "content": "hello"}], where="talk.jsonl:1"),
    Job([{"role": "user", "content": "again"}], where="talk.jsonl:2"),
]
LOOP = "{% for a in range(100000) %}" * 3 + "{% set x = a %}" + "{% endfor %}" * 3
REFUSED = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "reaches for what a template may not have",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}": "reaches for what a template may not have",
    "{{ raise_exception.__globals__['sys'].exit(0) }}": "reaches for what a template may not have",
    "{{ '{0.__class__.__mro__}'.format(messages) }}": "reaches for what a template may not have",
    "{% set ns = namespace(__class__=1) %}": "reaches for what a template may not have",
    "{{ messages.append(1) }}": "reaches for what a template may not have",
    LOOP: "is still computing after 1 s",
    "{{ 10 ** (10 ** 10) }}": "is still computing after 1 s",  # before any conversation
    "{{ (messages | length * 10) ** (10 ** 10) }}": "is still computing after 1 s",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "takes too much room",
    "{{ 'a' * 10 ** 10 }}": "takes too much room: memory",
    "{% for a in range(10 ** 12) %}a{% endfor %}": "takes too much room",
    "{% for a in range(100000) %}{{ 'flood' * 10 }}{% endfor %}": "it wrote more than",
    "{% for a in messages %": "is no template",
    "{% for a in messages %}{% endif %}": "is no template",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_hostile_template_is_refused_soon_and_leaves_nothing_behind(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        render(template, {}, ASKED)
    said = str(caught.value)
    assert said.count("\n") == 0 and "data.template: the chat template " in said and REFUSED[template] in said
    assert time.monotonic() - start < 6 and not list(tmp_path.iterdir())


def test_the_conversation_at_which_a_template_went_wrong_is_named():
    hostile = "{% if messages[0].content == 'again' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"at talk.jsonl:2"):
        render(hostile, {}, ASKED)


@pytest.mark.parametrize("asked", ["{% include '/etc/hostname' %}", "{% import '/etc/hostname' as x %}", "{% extends 'base' %}"])
def test_no_file_is_read(asked):
    assert all(isinstance(one, Fault) and "no loader" in str(one) for one in render(asked, {}, ASKED))


def test_names_that_are_not_known_are_empty_and_what_hangs_on_them_is_a_fault_of_that_conversation():
    assert render("{{ nobody }}{{ messages[0].nothing }}{{ ''.__class__ }}", {}, ASKED) == ["", ""]
    found = render("{{ messages[0].content if messages[0].content == 'hello' else nobody.is.here }}", {}, ASKED)
    assert found[0] == "hello" and str(found[1]) == "talk.jsonl:2: the chat template refuses it: UndefinedError: 'nobody' is undefined"


ESCAPE = "{{ raise_exception.__globals__['sys'].modules['%s'].%s }}"


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """The second wall, alone: the script without jinja2's sandbox."""
    script = module.Path(module.__file__).with_name("render.py").read_text()
    broken = script.replace("made = ImmutableSandboxedEnvironment(", "made = jinja2.Environment(")
    assert broken != script
    (tmp_path / "render.py").write_text(broken)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "template.py"))


def test_a_renderer_whose_sandbox_is_broken_can_open_nothing(broken, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    refusals = {
        "open('/etc/hostname', 0)": "Too many open files",
        "pipe()": "Too many open files",
        "environ.__getitem__('SECRET')": "KeyError",
    }
    for call, said in refusals.items():
        try:
            found = str(render(ESCAPE % ("os", call), {}, ASKED[:1])[0])
        except DataError as error:
            found = str(error)
        assert said in found


def test_a_renderer_whose_sandbox_is_broken_can_neither_sleep_nor_flood(broken, monkeypatch):
    flood = "{% for a in range(100000) %}" + ESCAPE % ("sys", "stdout.write('x' * 1000000)") + "{% endfor %}"
    with pytest.raises(DataError, match="the chat template writes without end"):
        render(flood, {}, ASKED)
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    start = time.monotonic()
    with pytest.raises(DataError, match="the chat template does not end"):
        render("{% set time = raise_exception.__globals__['sys'].modules['time'] %}{{ time.sleep(8) }}", {}, ASKED)
    with pytest.raises(DataError, match="the chat template does not end"):  # while more is still to be sent than a pipe holds
        render(
            "{% set time = raise_exception.__globals__['sys'].modules['time'] %}{{ time.sleep(8) }}", {}, [Job([{"x": "x" * 2**18}])] * 2
        )
    assert time.monotonic() - start < 8


AGAIN = "{%% if messages[0].content == 'again' %%}%s{%% endif %%}{{ messages[0].content }}"
OVERRUNS = {template: said for template, said in REFUSED.items() if said != "is no template" and not template.startswith("{{ 10 **")}


@pytest.fixture
def children(monkeypatch):
    """Those that were started"""
    made, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: made.append(popen(*given, **named)) or made[-1])
    return made


def test_one_child_renders_for_all_calls_and_keeps_nothing_of_them(children):
    counted = "{% set n = namespace(of=0) %}{% set n.of = n.of + 1 %}{{ n.of }} {{ seen }}{% set seen = messages[0].content %}"
    renderer = Renderer(counted, {})
    assert [renderer.render([job]) for job in ASKED * 3] == [["1 "]] * 6 and renderer.render([]) == [] and len(children) == 1
    assert renderer.render([Job([{"content": "x" * 2**20}])] * 3) == ["1 "] * 3, "longer than it was made for"
    renderer.close()
    assert all(child.returncode is not None for child in children)


@pytest.mark.parametrize("template", OVERRUNS)
def test_after_a_conversation_that_ended_its_child_the_next_one_is_rendered(template, children):
    """The guard holds for a child that was used before as for a new one."""
    renderer = Renderer(AGAIN % template, {})
    assert renderer.render(ASKED[:1]) == ["hello"]
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        renderer.render(ASKED[1:])
    assert OVERRUNS[template] in str(caught.value) and "at talk.jsonl:2" in str(caught.value) and time.monotonic() - start < 12
    assert all(child.returncode is not None for child in children)
    assert renderer.render(ASKED[:1]) == ["hello"]
    renderer.close()


def test_what_ended_a_used_child_is_not_laid_at_the_door_of_the_next_conversation(children):
    renderer = Renderer("{{ messages[0].content }}", {})
    for _ in range(2):
        assert renderer.render(ASKED) == ["hello", "again"]
        children[-1].kill()
    assert renderer.render(ASKED) == ["hello", "again"] and len(children) == 3
    renderer.close()


def test_a_child_hears_no_ctrl_c_and_ends_with_who_started_it():
    code = """if True:
        import os, signal, sys
        from fromzero.data.template import Job, Renderer
        renderer, job = Renderer("{{ messages[0].content }}", {}), Job([{"content": "hello"}])
        renderer.render([job])
        os.kill(renderer._child.pid, signal.SIGINT)
        print(renderer._child.pid, renderer.render([job]), renderer._child.pid, flush=True)
        os._exit(0)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert said[1] == "['hello']" and said[0] == said[2]
    until = time.monotonic() + 5
    while Path(f"/proc/{said[0]}/cmdline").exists() and b"render.py" in Path(f"/proc/{said[0]}/cmdline").read_bytes():
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)
