"""The process that renders chat templates under limits on time, memory and output.

    python -P -m sera_core.data.templating

A template is untrusted code. Jinja's sandbox keeps it from files and from Python, but cannot stop a single
expression (`9**(9**9)`) or limit its memory. So the kernel enforces the limits on this separate process.
Requests and responses are JSON after an eight-byte length, on stdin and stdout; the process ends when stdin
closes. `sera_core.data.template_process` starts it.

The Jinja environment equals that of transformers' `apply_chat_template`, so the text is the same. Imports
neither transformers nor torch.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

REASON_CHARACTERS = 2000
"""Maximum length of a template's error message."""
_HEADER = 8
_STATM = Path("/proc/self/statm")


class TooMuchTextError(Exception):
    """The template's output is too long."""


# --------------------------------------------------------------------------------------- the environment


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text; renders its content unchanged."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call that returns its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=1)` works
        for name in (names := dict(*args[1:], **kwargs)):
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set one of its names, as `{% set ns.name = value %}` does."""
        _refuse_underscore(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: rename it")


class _Dict:
    """`dict` for templates; an object, so that templates cannot reach the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def compiled(text: str) -> jinja2.Template:
    """Compile a template with the filters and functions of transformers' `apply_chat_template`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=_Dict(),
        namespace=Namespace,
    )
    return environment.from_string(text)


# ------------------------------------------------------------------------------------------- the process


def rendered(text: str, variables: Mapping[str, Any], characters: int) -> str:
    """Render a template.

    Raises:
        TooMuchTextError: the output has more than `characters` characters.
    """
    pieces, written = [], 0
    for piece in compiled(text).generate(**variables):
        if (written := written + len(piece)) > characters:
            raise TooMuchTextError
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: dict[str, Any], templates: dict[int, str]) -> dict[str, str]:
    if "text" in request:
        templates[request["template"]] = request["text"]
    try:
        return {"text": rendered(templates[request["template"]], request["variables"], request["characters"])}
    except TooMuchTextError:
        return {"over": "characters"}
    except MemoryError:
        return {"over": "memory"}
    except Exception as error:  # expressions in a template can raise anything
        return {"error": str(error)[:REASON_CHARACTERS] or type(error).__name__}


def _held() -> int | None:
    """Bytes of memory this process has mapped; None if the system cannot limit them."""
    return int(_STATM.read_text().split()[0]) * resource.getpagesize() if _STATM.is_file() else None


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Serve requests until stdin closes."""
    templates: dict[int, str] = {}
    held, memory = _held(), 0
    while header := asked.read(_HEADER):
        data = asked.read(int.from_bytes(header))
        request = json.loads(data.decode("utf-8", "surrogatepass"))
        if held is not None and request["memory"] != memory:
            memory = request["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.RLIM_INFINITY))
        signal.setitimer(
            signal.ITIMER_PROF, request["seconds"]
        )  # the default action ends the process even in C code
        text = json.dumps(_answer(request, templates), ensure_ascii=False)
        data = text.encode("utf-8", "surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(len(data).to_bytes(_HEADER) + data)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
