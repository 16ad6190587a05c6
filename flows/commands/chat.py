"""`sera chat`: talk to a round's policy, beside another round's or the start policy."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows.commands.export import round_of
from flows.commands.output import check_positive, print_note, print_result, quiet_stdout
from flows.display.run_view import run_records
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.reading import Round
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.data.preferences import Message
from sera_core.errors import InputError
from sera_core.guards.shown import shown

START = "start"
NEW = "/new"


def add_chat(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera chat RUN[:N] [--against N]`."""
    sub = commands.add_parser(
        "chat",
        parents=[common],
        help="talk to a round's policy, beside another one",
        description=f"Talk to the policy of a round. Each line is a turn; {NEW} begins another conversation, "
        "Ctrl-D ends. With --against, another policy answers the same turns, in a conversation of its own.",
    )
    sub.add_argument("run", metavar="RUN[:N]", help="run, and number of a round (default: the best round)")
    sub.add_argument("--against", metavar="N", help=f"number of another round, or {START}: the start policy")
    sub.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    sub.add_argument("--system", metavar="TEXT", help="system message")
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: the most probable token each time (default: %(default)s)",
    )
    sub.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    sub.set_defaults(command=chat)


def chat(args: argparse.Namespace) -> int:
    """Talk, or answer one prompt."""
    _check(args)
    name, _, number = args.run.partition(":")
    records = run_records(open_store(args.store), name)
    policies = [_of_round(records, _number(args.run, number) if number else None)]
    if args.against is not None:
        against = START if args.against == START else _number("--against", args.against)
        policies.append(_of_round(records, against))
    with quiet_stdout():
        speakers = [_Speaker(records, args, label, folder) for label, folder in policies]
    if args.prompt is not None:
        return _answer_once(args, speakers)
    _talk(args, speakers)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "max_tokens")
    if not (args.temperature >= 0 and math.isfinite(args.temperature)):
        raise InputError(f"--temperature {args.temperature}: must be 0 or a number above it")
    if args.json and args.prompt is None:
        raise InputError("--json: only with --prompt; a conversation is text")


def _number(flag: str, given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise InputError(f"{flag}: {given!r} is no number of a round") from None


def _of_round(records: RunStore, number: int | str | None) -> tuple[str, Path]:
    """(name, policy folder) of a round, the best one, or the start policy."""
    if number == START:
        rounds = records.rounds()
        if not rounds:
            raise InputError(f"run {records.run!r} has no finished round yet")
        return START, Artifact(records.store, rounds[0].steps["model"]).folder("policy")
    manifest = round_of(records, None if number is None else int(number))
    return f"round {manifest.round}", Round(records, manifest).policy_path()


class _Speaker:
    """A policy and its conversation."""

    def __init__(self, records: RunStore, args: argparse.Namespace, label: str, folder: Path) -> None:
        from transformers import GenerationConfig

        from sera_core.data.rendering import Renderer
        from sera_core.models.devices import device_of
        from sera_core.models.policies import load_policy
        from tasks.engines.sampler import position_limit

        model = records.configs()[0].settings.model
        adapter = folder / "adapter_config.json"
        base = Path(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else None
        self.label, self.args = label, args
        self.renderer = Renderer(base or folder, model.chat_template, model.template_kwargs)
        self.model: Any = load_policy(folder, model.dtype, device_of("auto"), base=base)
        self.model.generation_config = GenerationConfig()  # a run samples without the model's own penalties
        self.positions = position_limit(base or folder)
        self.messages: list[Message] = []
        self.begin()

    def begin(self) -> None:
        """Begin another conversation."""
        system = self.args.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """The answer to a turn, written as it is sampled.

        Raises:
            InputError: the conversation leaves no room for an answer.
        """
        import torch
        from transformers import TextStreamer

        turns: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.renderer.prompt_ids(turns)
        room = self.args.max_tokens
        if self.positions is not None:
            room = min(room, self.positions - len(ids))
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids):,} tokens, and the model reads {self.positions:,} with its "
                f"answer; begin another one with {NEW}"
            )

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        greedy = self.args.temperature == 0
        torch.manual_seed(self.args.seed + len(turns))
        found = self.model.generate(
            torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
            do_sample=not greedy,
            **({} if greedy else {"temperature": self.args.temperature, "top_k": 0, "top_p": 1.0}),
            max_new_tokens=room,
            eos_token_id=list(self.renderer.stop_ids),
            pad_token_id=self.renderer.pad_id,
            streamer=Streamer(self.renderer.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        answer = self.renderer.text(found[0, len(ids) :].tolist())
        self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer


def _answer_once(args: argparse.Namespace, speakers: list[_Speaker]) -> int:
    with quiet_stdout():
        answers = {speaker.label: speaker.answer(args.prompt, lambda _: None) for speaker in speakers}
    lines = [f"{label}: {answer}" for label, answer in answers.items()]
    print_result(
        args, {"prompt": args.prompt, "answers": answers}, lines if len(lines) > 1 else answers.values()
    )
    return 0


def _talk(args: argparse.Namespace, speakers: list[_Speaker]) -> None:
    names = " and ".join(speaker.label for speaker in speakers)
    print_note(f"{args.run.partition(':')[0]}, {names}; {NEW} begins another conversation, Ctrl-D ends")
    for line in _turns():
        if line == NEW:
            for speaker in speakers:
                speaker.begin()
            continue
        for speaker in speakers:
            if len(speakers) > 1:
                _write(f"{speaker.label}: ")
            try:
                speaker.answer(line, _write)
            except InputError as error:
                print_note(f"sera: {error}")
            _write("\n")


def _turns() -> Iterator[str]:
    """What is typed, without empty lines."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _write(text: str) -> None:
    sys.stdout.write(shown(text))
    sys.stdout.flush()
