"""A chat template and conversations in, texts out, in a process of its own that may open nothing else: a script, not a module.

The template is text that a stranger wrote. It runs in jinja2's sandbox; should it ever get out of that, the process
around it can open no file and no socket, and its time, memory and output are bounded by the kernel.

usage: python -I render.py < jobs > texts     both JSON lines, in ASCII; the first of the jobs says template and bounds; it ends with them
a text is a string; ["fault", why] is a conversation that the template refuses; after ["stop", why] nothing more comes
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import textwrap  # noqa: F401  (as the next: what jinja2 imports when it is needed, and could not import any more)
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.constants
import jinja2.debug
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # not on this platform: the sandbox holds, and who started this waits for a bounded time
    resource = None  # type: ignore[assignment]

MEMORY = 2**26  # bytes beyond what the process has at its start and what one conversation takes
LONGEST = 2**20  # characters of one text, beyond eight times its conversation


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says. Its inside is rendered as it stands; the mark is not used."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Namespace(jinja2.utils.Namespace):
    """One that takes no name of Python's own."""

    def __init__(*given: Any, **named: Any) -> None:
        jinja2.utils.Namespace.__init__(given[0])
        for name, value in dict(*given[1:], **named).items():
            given[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")
        super().__setitem__(name, value)


def environment() -> ImmutableSandboxedEnvironment:
    """What the templates of published models are written for: source transformers, apply_chat_template."""

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.globals |= {"namespace": Namespace, "dict": lambda *given, **named: dict(*given, **named)}
    return made


def give_up(seconds: int, longest: int) -> None:
    used = Path("/proc/self/statm")
    pages = int(used.read_text().split()[0]) * resource.getpagesize() if used.exists() else 2**36
    limits = {"AS": pages + MEMORY + 16 * longest, "CPU": seconds, "FSIZE": 0, "CORE": 0, "NOFILE": 0, "NPROC": 0}
    for name, bound in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (bound, bound) if hard == resource.RLIM_INFINITY else (min(bound, hard),) * 2)


def rendered(template: jinja2.Template, job: dict[str, Any], special: dict[str, str], most: int) -> str:
    pieces, length = [], 0
    for piece in template.generate({**special, **job}):
        length += len(piece)
        if length > most:
            raise OverflowError(f"it wrote more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    def say(found: str | list[str]) -> None:
        print(json.dumps(found), flush=True)  # at once: how many lines came tells which conversation was the last

    def watch() -> None:
        if resource is not None:
            signal.setitimer(signal.ITIMER_PROF, asked["seconds"])  # at its end the kernel ends the process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for who started this, and ends this where that ends
    asked = json.loads(sys.stdin.readline())
    made = environment()
    datetime.now().strftime("%c")  # reads the time zone
    with contextlib.suppress(jinja2.UndefinedError):
        made.from_string(r"{{ '\n' + nobody.knows.this }}").render()  # for what quotes and errors import
    if resource is not None:
        give_up(asked["all_seconds"], asked["longest"])
    try:
        watch()
        template = made.from_string(asked["template"])
        say("")
        for line in sys.stdin:
            job = json.loads(line)
            watch()
            try:
                say(rendered(template, job, asked["special"], LONGEST + 8 * len(line)))
            except (jinja2.exceptions.SecurityError, MemoryError, OverflowError, RecursionError, OSError):
                raise
            except Exception as error:
                say(["fault", str(error)[:200] if type(error) is jinja2.TemplateError else f"{type(error).__name__}: {error}"[:200]])
    except jinja2.TemplateSyntaxError as error:
        say(["stop", f"is no template: {error} (line {error.lineno})"])
    except jinja2.exceptions.SecurityError as error:
        say(["stop", f"reaches for what a template may not have: {error}"])
    except (MemoryError, OverflowError, RecursionError) as error:
        say(["stop", f"takes too much room: {str(error) or 'memory'}"])


if __name__ == "__main__":
    main()
