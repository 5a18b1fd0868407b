"""Fault 38: chat templates that break out, never end, or flood. Each ends soon in one message, and leaves nothing behind."""

import time

import pytest

from fromzero.data.template import Job, render
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
    "{{ 10 ** (10 ** 10) }}": "is still computing after 1 s",
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


def test_a_renderer_whose_sandbox_is_broken_can_open_nothing(monkeypatch, tmp_path):
    """The second wall, alone: the script without jinja2's sandbox."""
    from fromzero.data import template as module

    script = module.Path(module.__file__).with_name("render.py").read_text()
    broken = script.replace("made = ImmutableSandboxedEnvironment(", "made = jinja2.Environment(")
    assert broken != script
    (tmp_path / "render.py").write_text(broken)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "template.py"))
    escape = "{{ raise_exception.__globals__['sys'].modules['%s'].%s }}"
    monkeypatch.setenv("SECRET", "s3cret")
    refusals = {
        "open('/etc/hostname', 0)": "Too many open files",
        "pipe()": "Too many open files",
        "environ.__getitem__('SECRET')": "KeyError",
    }
    for call, said in refusals.items():
        try:
            found = str(render(escape % ("os", call), {}, ASKED[:1])[0])
        except DataError as error:
            found = str(error)
        assert said in found
