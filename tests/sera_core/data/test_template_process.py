"""A chat template takes so much time, memory and text and no more, and writes what transformers' would."""

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, tiny_policy, write_tokenizer

from sera_core.data import rendering, template_process
from sera_core.data.rendering import Renderer
from sera_core.data.template_process import Limits, TemplateError, TemplateLimitError, render
from sera_core.errors import InputError

SHORT = Limits(seconds=0.5)
USER = [{"role": "user", "content": "question"}]
DOUBLING = "{% set ns = namespace(v=START) %}{% for n in range(60) %}{% set ns.v = STEP %}{% endfor %}"
LARGE = {
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ ([0] * 10**10)|length }}",
    "width of a filter": "{{ 'x'|center(10**10) }}",
    "width of a method": "{{ 'x'.ljust(10**10) }}",
    "width of %": "{{ '%1000000000d' % 1 }}",
    "width of format": "{{ '{:1000000000}'.format(1) }}",
    "precision": "{{ '%.1000000000f' % 1.5 }}",
    "indent": "{{ 'a\nb'|indent(10**10) }}",
    "indent of JSON": "{{ [[1]]|tojson(indent=10**10) }}",
    "bytes of a number": "{{ (1).to_bytes(10**10, 'big') }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(10**9) }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**6) }}",
    "join": "{{ ('a' * 10**5)|join('b' * 10**6) }}",
    "batch": "{% for row in messages|batch(10**10, 'x') %}{% endfor %}",
    "doubled text": DOUBLING.replace("START", "'x'").replace("STEP", "ns.v + ns.v"),
    "doubled by ~": DOUBLING.replace("START", "'x'").replace("STEP", "ns.v ~ ns.v"),
    "doubled list": DOUBLING.replace("START", "[1]").replace("STEP", "ns.v + ns.v"),
    "many texts": "{% set ns = namespace(v=[]) %}{% for n in range(9999) %}"
    "{% set ns.v = ns.v + ['x' * 10**6 ~ n] %}{% endfor %}",
}
LONG = {
    "power": "{{ 9**(9**9) }}",
    "product": DOUBLING.replace("START", "9").replace("STEP", "ns.v * ns.v"),
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "list of lists shown": DOUBLING.replace("START", "[1]").replace("STEP", "[ns.v, ns.v]")
    + "{{ ns.v|string }}",
    "tuple of tuples hashed": DOUBLING.replace("START", "(1,)").replace("STEP", "(ns.v, ns.v)")
    + "{{ ns.v in {} }}",
    "rounding": "{{ 10.5|round(10**9, 'ceil') }}",
}


def variables(**more):
    return {"messages": USER, "tools": None, "documents": None, "add_generation_prompt": True, **more}


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_what_a_template_holds_is_limited(template):
    with pytest.raises((TemplateLimitError, TemplateError), match=r"needs more than 256 MiB|too large"):
        render(template, variables(), Limits())


@pytest.mark.parametrize("template", LONG.values(), ids=LONG)
def test_a_template_that_computes_without_end_is_ended(template):
    started = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"takes more than 0.5 s"):
        render(template, variables(), SHORT)
    assert time.monotonic() - started < 60


def test_a_template_that_writes_without_end_is_ended():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}some text{% endfor %}{% endfor %}"
    for template in (loops, loops.replace("some text", "{{ messages[0].content }}"), "{{ 'x' * 10**7 }}"):
        with pytest.raises(TemplateLimitError, match=r"writes more than 1,04\d,\d+ characters"):
            render(template, variables(), Limits())


def test_neither_the_process_nor_ours_grows_past_the_limit():
    attack = (
        "import resource, sys; from pathlib import Path; from sera_core.data.template_process import *\n"
        "for text in sys.argv[1:]:\n"
        '    try: render(text, {"messages": [1]}, Limits())\n'
        "    except (TemplateError, TemplateLimitError): continue\n"
        "    raise SystemExit(3)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", attack, *LARGE.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, its = (int(line) / 1024 for line in done.stdout.split())
    assert ours < 150 and its < 400


def test_it_is_told_of_a_model_in_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "TEMPLATE_LIMITS", SHORT)
    folder = tiny_policy(tmp_path / "policy")
    for template, said in [
        (LONG["loops"], r"policy takes more than 0.5 s .* set model\.chat_template"),
        (LARGE["repeated text"], r"policy needs more than 256 MiB .* set model\.chat_template"),
        ("{{ messages[0].content * 999999 }}", r"policy writes more than .* set model\.chat_template"),
    ]:
        with pytest.raises(InputError, match=said):
            Renderer(folder, template).prompt_ids(USER)
    (tmp_path / "long.jinja").write_text("{{ 1 }}" * 2**18)
    with pytest.raises(InputError, match=r"long\.jinja has 1,835,008 characters"):
        Renderer(folder, str(tmp_path / "long.jinja")).prompt_ids(USER)


def test_a_crash_is_an_error_and_the_next_conversation_goes_on():
    deep = "{% set ns = namespace(v=(1,)) %}{% for a in range(9) %}{% for b in range(99999) %}"
    deep += "{% set ns.v = (ns.v,) %}{% endfor %}{% endfor %}{{ ns.v in {} }}"
    with pytest.raises((TemplateLimitError, TemplateError)):
        render(deep, variables(), Limits())
    assert render("{{ messages[0].content }}", variables(), Limits()) == "question"


def test_a_process_that_somebody_ends_is_started_again():
    assert render("{{ 1 }}", {}, Limits()) == "1"
    held = template_process._shared.held
    assert held is not None
    held.process.kill()
    held.process.wait()
    assert render("{{ 1 }}", {}, Limits()) == "1"


def test_threads_and_forks_get_their_own_texts():
    told = {}

    def ask(number):
        told[number] = [render("{{ n }}", {"n": number}, Limits()) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    if (child := os.fork()) == 0:
        os._exit(0 if render("{{ n }}", {"n": "fork"}, Limits()) == "fork" else 1)
    assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert told == {number: [str(number)] * 20 for number in range(4)}


def test_no_process_outlives_the_one_it_works_for():
    command = (
        "from sera_core.data.template_process import *; from sera_core.data import template_process as t\n"
        "render('', {}, Limits()); print(t._shared.held.process.pid, flush=True); input()"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert ours.stdout is not None
    its = Path(f"/proc/{int(ours.stdout.readline())}")
    assert its.exists()
    ours.send_signal(signal.SIGKILL)
    ours.communicate()
    until = time.monotonic() + 30
    while its.exists() and "Z" not in (its / "stat").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not its.exists() or "Z" in (its / "stat").read_text()


def test_a_template_sees_no_credential(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "PL4NTED")
    template_process._shared.end()
    render("", {}, Limits())
    held = template_process._shared.held
    assert held is not None
    assert b"PL4NTED" not in Path(f"/proc/{held.process.pid}/environ").read_bytes()


def test_any_text_goes_through_as_it_is():
    text = "é数\U0001f600\ud800\udc00\x00\n\"'" + "x" * 300_000
    assert render("{{ text }}", {"text": text}, Limits()) == text


# ------------------------------------------------------------------------------------ as transformers does

TRL = find_spec("trl")
assert TRL is not None and TRL.origin is not None
SHIPPED = sorted((Path(TRL.origin).parent / "chat_templates").glob("*.jinja"))
FEATURES = [
    "{% generation %}{{ messages[0].content }}{% endgeneration %}\n  {% if true %}\nx\n  {% endif %}\n",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{{ messages|tojson }}{{ {'a': '<é>'}|tojson(indent=2) }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}",
    "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a + ns.b }}{{ tools }}{{ documents is none }}",
    "{{ absent }}{{ bos_token }}{{ eos_token }}{{ flag }}{{ add_generation_prompt }}",
    "{{ messages[1].thinking }}|{{ messages[1].reasoning_content }}|{{ messages[1].reasoning }}",
    "{{ raise_exception('no') }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ ''.__class__ }}{{ messages.append(1) }}",
    "{% if %}",
    "{{ absent.field }}",
    "{{ range(10**9)|list }}",
]
CHATS = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "Yes."}],
    [*USER, {"role": "assistant", "content": "42.", "reasoning_content": "6 times 7"}, *USER],
    [*USER, {"role": "assistant", "content": "<think>\nit is\n</think>\n\n42.", "thinking": "hm"}],
    [{"role": "tool", "content": "x"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CHATML)
    return folder


def outcome(write):
    """What is written, or why it is refused."""
    try:
        return write()
    except Exception as refused:
        return None, "underscore" if "namespace" in str(refused) else str(refused)[:2000]


@pytest.mark.parametrize(
    "template",
    [*FEATURES, *(path.read_text() for path in SHIPPED)],
    ids=[*map(str, range(len(FEATURES))), *(path.stem for path in SHIPPED)],
)
def test_the_text_is_that_of_transformers(folder, template):
    renderer = Renderer(folder, template, {"flag": "flag"})
    renderer.__dict__["template"] = template  # neither the check of arguments nor the fixed date
    settings: Any = {"chat_template": template, "tokenize": False, "flag": "flag"}
    for chat in CHATS:
        for more in (True, False):
            theirs = outcome(
                lambda: renderer.tokenizer.apply_chat_template(chat, add_generation_prompt=more, **settings)  # noqa: B023
            )
            assert outcome(lambda: renderer.chat_text(chat, more)) == theirs  # noqa: B023
