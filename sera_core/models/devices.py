"""Where tensors live."""


def device_of(wanted: str) -> str:
    """The torch device for `execution.device`: auto takes an accelerator when there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
