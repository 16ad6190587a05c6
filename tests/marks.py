"""An object that acts when it is unpickled, as a planted pickle would."""

import os
from pathlib import Path


class Marks:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)
