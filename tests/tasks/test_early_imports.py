"""bitsandbytes is imported without torch's code generator, and torch.compile still works afterwards."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, os, sys
import tasks.engines.early_imports
loaded = [name for name in ("bitsandbytes", "torch._inductor.compile_fx") if name in sys.modules]

import torch
compiled = []

def backend(graph, inputs):
    compiled.append(len(inputs))
    return graph.forward

assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2]
told = {"loaded": loaded, "compiled": compiled, "variable": os.environ.get("TORCHDYNAMO_DISABLE")}
print(json.dumps(told))
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_importing_it_compiles_nothing_and_leaves_the_compiler_on():
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"loaded": ["bitsandbytes"], "compiled": [1], "variable": None}
