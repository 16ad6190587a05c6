"""Imported before TRL and peft, which import bitsandbytes where it is installed.

At import bitsandbytes has torch compile two functions, which loads torch's code generator (Inductor): some
seconds of the start of every process that trains. They are for devices without kernels of their own, where
they now run uncompiled. torch.compile works as always afterwards.
"""

import os

if "TORCHDYNAMO_DISABLE" not in os.environ:  # else the user has decided
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read by every call of torch.compile
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
