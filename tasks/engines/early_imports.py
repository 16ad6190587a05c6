"""Imported before TRL and peft, which import bitsandbytes where it is installed.

At import bitsandbytes has torch compile two functions, which loads all of its compiler: two seconds of the
start of every process that trains. They are for devices without kernels of their own, where they now run
uncompiled.
"""

import contextlib
import os
from unittest.mock import patch

with patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"}), contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401
