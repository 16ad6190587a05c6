"""Choose the torch device."""


def device_of(wanted: str) -> str:
    """The torch device for `execution.device`; auto selects an accelerator if there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
