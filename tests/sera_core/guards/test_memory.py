"""The memory of a step: estimated before it, measured while it runs, and a warning above the estimate."""

import gc
import json
import logging
import subprocess
import sys
import time
from functools import partial

import pytest
import tinyrun
from commandline import process
from safetensors import safe_open
from tiny import tiny_policy

from flows.experiments import load_experiment
from flows.planning.estimates import refuse_what_cannot_fit
from flows.planning.plan import plan
from sera_core.artifacts.manifest import find_record
from sera_core.config import ExecutionConfig, TrainConfig
from sera_core.errors import InputError
from sera_core.guards import memory
from sera_core.guards.memory import MemoryWatch, count_again, count_without, used_memory
from sera_core.models import batch_sizes, memory_estimate
from sera_core.models.memory_estimate import (
    LIBRARIES,
    folder_shape,
    least_training_memory,
    sampling_memory,
    scoring_memory,
    shape_of,
    training_memory,
)


def test_a_watch_sees_what_its_block_holds():
    told = []
    gc.collect()
    with MemoryWatch(lambda *bytes: told.append(bytes), seconds=0.01) as watch:
        watch.planned = 100 * 2**20
        held = bytearray(b"x") * (300 * 2**20)
    assert len(held) and 300 * 2**20 <= watch.grown < 400 * 2**20
    ((grown, planned),) = told
    assert grown >= 300 * 2**20 and planned == 100 * 2**20


def test_children_count_from_the_start_of_the_block():
    """A server that ran before is not the step's; an engine that the step starts is."""
    code = "held = bytearray(b'x') * (200 * 2**20); print(flush=True); input()"
    start = partial(
        subprocess.Popen, [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    grown = []
    for early in (True, False):
        before = [start()] if early else []
        for child in before:
            child.stdout.readline()
            time.sleep(1.5)  # start times are known to a second
        with MemoryWatch(print, seconds=0.01) as watch:
            inside = [] if early else [start()]
            for child in inside:
                child.stdout.readline()
            time.sleep(0.3)
        grown.append(watch.grown)
        for child in before + inside:
            child.communicate(b"\n")
    assert grown[0] < 50 * 2**20 and grown[1] >= 200 * 2**20


HALF_IMPORTED = """
import sys, time, types
from sera_core.guards.memory import MemoryWatch
sys.modules["torch"], sys.modules["torch.cuda"] = types.ModuleType("torch"), types.ModuleType("torch.cuda")
with MemoryWatch(print, seconds=0.01) as watch:
    held = bytearray(b"x") * (100 * 2**20)
    time.sleep(0.05)
assert len(held) and watch.grown >= 100 * 2**20, watch.grown
"""


def test_a_watch_that_meets_a_torch_half_imported_goes_on():
    """Another thread imports torch: its modules are there before their names.

    In a process of its own, because what earlier tests left may be freed inside the block.
    """
    done = subprocess.run([sys.executable, "-c", HALF_IMPORTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shape_is_read_from_the_headers(tmp_path):
    folder = tiny_policy(tmp_path / "policy")
    found = folder_shape(folder)
    total, width = 0, 0
    with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            dims = tensors.get_slice(name).get_shape()
            size = 1
            for length in dims:
                size *= length
            total += size
            width += sum(dims) if len(dims) == 2 and "layers" in name else 0
    config = json.loads((folder / "config.json").read_text())
    heads = config["hidden_size"] // config["num_attention_heads"]
    assert found.parameters == total and found.width == width
    assert found.vocabulary == config["vocab_size"]
    assert found.widest * config["num_hidden_layers"] == width
    assert found.cached == 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * heads


def test_keys_and_values_in_one_matrix_with_the_queries_are_counted_too():
    """GPT-2 names: two layers of hidden size 8."""
    layer = {"attn.c_attn.weight": [8, 24], "attn.c_proj.weight": [8, 8], "mlp.c_fc.weight": [8, 32]}
    tensors = {f"h.{n}.{name}": dims for n in range(2) for name, dims in layer.items()}
    found = shape_of({"wte.weight": [100, 8], **tensors})
    assert (found.cached, found.width, found.widest, found.vocabulary) == (32, 176, 88, 100)
    assert found.boundaries == 2 * 8


def test_estimates_grow_with_what_they_depend_on(tmp_path):
    shape = folder_shape(tiny_policy(tmp_path / "policy"))
    weights, full, lora = 4 * shape.parameters, TrainConfig(), TrainConfig(method="lora", lora_rank=8)
    assert scoring_memory(shape, "float32", 0, 0) == LIBRARIES + 2 * weights
    assert scoring_memory(shape, "bfloat16", 0, 0) == LIBRARIES + 1.5 * weights
    assert training_memory(shape, "float32", full, 0, 0) == LIBRARIES + 5 * weights
    adapter = training_memory(shape, "float32", lora, 0, 0)
    assert adapter == LIBRARIES + 2 * weights + 16 * 8 * shape.width
    half = training_memory(shape, "bfloat16", lora, 0, 0)
    assert adapter - half == weights / 2  # the base has the dtype of the run
    assert shape.outside == 512 * 64 + 64  # embeddings, which are the output layer too, and the last norm
    four_bits = training_memory(shape, "nf4", lora, 0, 0)
    assert half - four_bits == int((2 - 0.5625) * (shape.parameters - shape.outside))
    whole = [training_memory(shape, "float32", full, 1000, 0, again) for again in (False, True)]
    assert whole[0] > whole[1]  # activations computed again
    small = full.model_copy(update={"optimizer": "adamw_8bit"})
    most, least = (least_training_memory(shape, "float32", train) for train in (full, small))
    assert most == 4 * weights and most - least == pytest.approx(
        5.97 * (shape.parameters - shape.outside), 1e-3
    )
    for estimate in (
        lambda n: scoring_memory(shape, "float32", 100 * n, 50),
        lambda n: scoring_memory(shape, "float32", 100, 50 * n),
        lambda n: sampling_memory(shape, "float32", n, 50),
        lambda n: sampling_memory(shape, "float32", 4, 50 * n),
        lambda n: training_memory(shape, "float32", lora, 100 * n, 50),
    ):
        assert estimate(1) < estimate(2) < estimate(20)


@pytest.mark.parametrize(
    ("name", "card", "chosen"),
    [("mistral-7b", 80e9, (8, 131072, 32)), ("mistral-7b-qlora", 24e9, (2, 32768, 8))],
)
def test_the_experiments_of_seven_billion_weights_fit_on_their_cards(monkeypatch, name, card, chosen):
    """Mistral-7B's matrices, with the longest pairs that the settings allow, and the batches for the card."""
    config = load_experiment(f"bundled:{name}")
    hidden, feed, heads = 4096, 14336, 1024
    sizes = {
        "q": (hidden, hidden),
        "k_proj": (heads, hidden),
        "v_proj": (heads, hidden),
        "o": (hidden, hidden),
    }
    sizes |= {"gate": (feed, hidden), "up": (feed, hidden), "down": (hidden, feed)}
    layers = {f"model.layers.{n}.{name}.weight": dims for n in range(32) for name, dims in sizes.items()}
    shape = shape_of({"embed": (32000, hidden), "head": (32000, hidden), **layers})
    assert shape.parameters == pytest.approx(7.24e9, rel=1e-3)
    dtype, execution = config.model.dtype, config.execution.model_copy(update={"device": "cuda"})
    monkeypatch.setattr(batch_sizes, "accelerator_here", lambda device: True)
    monkeypatch.setattr(batch_sizes, "device_memory", lambda device: (int(card), int(card)))
    prompt, answer = config.data.max_prompt_tokens, config.data.max_response_tokens
    pair, row, train = 2 * (prompt + answer), prompt + 2 * answer, config.train
    assert execution.gradient_checkpointing
    pairs = batch_sizes.micro_batch(execution, train, shape, dtype, [pair] * 32, row)
    needed = partial(training_memory, shape, dtype, train)
    assert needed(pairs * pair, row, True, "cuda") < card < needed(pairs * pair, row, False, "cuda")
    tokens = batch_sizes.tokens_per_batch(execution, shape, dtype, row)
    assert scoring_memory(shape, dtype, tokens, row, "cuda") < card
    assert least_training_memory(shape, dtype, TrainConfig()) > card
    longest = prompt + config.sampling.max_tokens
    responses = batch_sizes.sampling_batch(execution, shape, dtype, longest)
    assert sampling_memory(shape, dtype, responses, longest, "cuda") < card
    assert (pairs, tokens, responses) == chosen
    if dtype != "nf4":  # all weights, which the processes of eight such cards share
        whole, shared = (
            training_memory(shape, dtype, TrainConfig(), pair, row, True, "cuda", shares) for shares in (1, 8)
        )
        assert shared < card < whole


def test_batch_sizes_are_fixed_on_a_cpu_and_a_setting_is_kept(tmp_path):
    shape, cpu = folder_shape(tiny_policy(tmp_path / "policy")), ExecutionConfig(device="cpu")

    def sizes(execution: ExecutionConfig) -> tuple[int, ...]:
        return (
            batch_sizes.micro_batch(execution, TrainConfig(), shape, "float32", [5] * 8, 9),
            batch_sizes.tokens_per_batch(execution, shape, "float32", 9),
            batch_sizes.sampling_batch(execution, shape, "float32", 9),
        )

    assert sizes(cpu) == (1, 2048, 32)
    own = {"micro_batch": 3, "tokens_per_batch": 77, "sampling_batch": 5}
    for device in ("cpu", "cuda"):
        assert sizes(ExecutionConfig.model_validate({"device": device, **own})) == (3, 77, 5)


def test_a_plan_says_what_each_step_needs_and_warns_if_less_is_free(tmp_path, monkeypatch):
    experiment = tinyrun.experiment(tmp_path)
    done = process("plan", experiment, "--store", tmp_path / "none", check=True)
    assert "about 0.7 GiB of memory (estimated)" in done.stdout and "needs" not in done.stderr
    config = tinyrun.config(tmp_path)
    found = plan(config, "planned", str(tmp_path / "none"))
    needs = {row["step"]: row["memory"] for row in found["steps"]}
    assert {step for step, memory in needs.items() if memory} == {"logps", "sample", "train"}
    assert found["memory"] == max(row["memory"] or 0 for row in found["steps"]) and not _of_memory(found)
    assert not _of_memory(plan(config, "planned", str(tmp_path / "none")))
    monkeypatch.setattr(memory, "main_memory", lambda: (2**31, 2**29))
    (warning,) = _of_memory(plan(config, "planned", str(tmp_path / "none")))
    assert "may need 0.7 GiB of memory, but 0.5 GiB are free: lower execution." in warning


def test_on_a_cpu_each_process_of_a_training_needs_its_memory(tmp_path, monkeypatch):
    def train(processes: int) -> int:
        found = plan(
            tinyrun.config(tmp_path, execution={"processes": processes}), "planned", str(tmp_path / "none")
        )
        return next(row["memory"] for row in found["steps"] if row["step"] == "train")

    assert train(3) == 3 * train(1)
    config = tinyrun.config(tmp_path, execution={"processes": 3})
    shape = folder_shape(tmp_path / "policy")
    total = 3 * 16 * shape.parameters - 1
    monkeypatch.setattr(memory, "main_memory", lambda: (total, total))
    with pytest.raises(InputError, match=r"lower execution\.processes = 3, or set train\.method"):
        refuse_what_cannot_fit(config, shape)


@pytest.mark.parametrize(
    ("method", "remedy"), [("full", 'train.method = "lora"'), ("lora", 'model.dtype = "bfloat16"')]
)
def test_training_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, sera, method, remedy
):
    """Weights, gradients and two moments of 4 bytes each: of all weights, or beside them of an adapter."""
    experiment = tinyrun.experiment(tmp_path, train={"method": method})
    shape = folder_shape(tmp_path / "policy")
    trained = shape.parameters if method == "full" else shape.adapter(TrainConfig().lora_rank)
    least = 16 * trained + (4 * shape.parameters if method == "lora" else 0)
    monkeypatch.setattr(memory, "main_memory", lambda: (least - 1, least - 1))
    for command in ("plan", "run"):
        said = sera(command, experiment, "--store", tmp_path / "store", code=2).err
        assert "cannot fit" in said and remedy in said and "billion parameters" in said
    assert not (tmp_path / "store" / "runs").exists()
    monkeypatch.setattr(memory, "main_memory", lambda: (least, least))
    assert sera("plan", experiment, "--store", tmp_path / "store", "--json").json["warnings"]


@pytest.mark.parametrize("damaged", [b"", b"short", b"x" * 5000, b"\2" + bytes(7) + b"[]"])
def test_a_damaged_weight_file_is_named_before_anything_is_written(tmp_path, sera, damaged):
    experiment = tinyrun.experiment(tmp_path)
    (tmp_path / "policy" / "model.safetensors").write_bytes(damaged)
    for command in ("plan", "run"):
        said = sera(command, experiment, "--store", tmp_path / "store", code=2).err
        assert "model.safetensors: its header cannot be read" in said
    assert not (tmp_path / "store" / "runs").exists()


def _of_memory(found):
    return [warning for warning in found["warnings"] if "GiB" in warning]


def test_a_run_stays_within_its_plan_and_warns_above_it(tmp_path, monkeypatch, caplog):
    records = tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), tmp_path / "store")
    found = [find_record(records.store, ref.step, ref.key) for ref in records.rounds()[0].used]
    assert all(record.memory is not None for record in found) and not caplog.records
    monkeypatch.setattr(memory_estimate, "LIBRARIES", -(2**40))
    with caplog.at_level(logging.WARNING, "sera.step"):
        tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), tmp_path / "again")
    said = [record.getMessage() for record in caplog.records]
    assert sum("step train: holds" in line and "lower execution.micro_batch" in line for line in said) == 1
    assert any("step logps: holds" in line and "execution.tokens_per_batch" in line for line in said)


def test_a_process_whose_pages_its_children_share_is_left_out():
    code = "held = bytearray(200 << 20); print('up', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
    counted = used_memory(0.0)
    count_without(holder.pid)
    left_out = used_memory(0.0)
    count_again(holder.pid)
    again = used_memory(0.0)
    holder.communicate(b"\n")
    assert min(counted, again) - left_out > 150 << 20
