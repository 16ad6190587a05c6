"""A process that renders chat templates and is ended by what it takes: time, memory, text.

    python -P -m sera_core.data.templating

A template is code of whoever made the model. Jinja's sandbox keeps it from files and from Python; nothing in
one Python process ends a single expression (`9**(9**9)`) or bounds what it allocates. So the kernel does,
here where nothing else is lost. Requests and answers are JSON behind eight bytes that hold its length, on
stdin and stdout; the process ends with stdin. It is started by `sera_core.data.template_process`.

The environment is that of transformers' `apply_chat_template`, so the text is the same; neither transformers
nor torch is imported.
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
"""Of what a template says when it refuses a conversation."""
_HEADER = 8
_STATM = Path("/proc/self/statm")


class TooMuchTextError(Exception):
    """The template writes more than it may."""


# --------------------------------------------------------------------------------------- the environment


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which a template marks what the assistant said: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call that gives back what the block writes."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

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
    """`dict` for templates, which is not the class."""

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
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def compiled(text: str) -> jinja2.Template:
    """A template that may use what transformers' `apply_chat_template` offers."""
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
    """What a template writes, of at most so many characters.

    Raises:
        TooMuchTextError: it writes more.
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
    except Exception as error:  # a template can raise whatever an expression in it raises
        return {"error": str(error)[:REASON_CHARACTERS] or type(error).__name__}


def _held() -> int | None:
    """Bytes of memory this process has mapped, where the system can limit them."""
    return int(_STATM.read_text().split()[0]) * resource.getpagesize() if _STATM.is_file() else None


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    templates: dict[int, str] = {}
    held, memory = _held(), 0
    while header := asked.read(_HEADER):
        data = asked.read(int.from_bytes(header))
        request = json.loads(data.decode("utf-8", "surrogatepass"))
        if held is not None and request["memory"] != memory:
            memory = request["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # unhandled, it ends the process even in C
        text = json.dumps(_answer(request, templates), ensure_ascii=False)
        data = text.encode("utf-8", "surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(len(data).to_bytes(_HEADER) + data)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, and its pipe tells
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
