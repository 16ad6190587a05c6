"""A module that opens a GPU when it is imported, as far as torch can tell."""

import torch.cuda
from childwork import describe_process

__all__ = ["describe_process"]
torch.cuda._is_in_bad_fork = lambda: True
