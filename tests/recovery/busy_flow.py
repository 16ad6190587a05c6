"""A healthy flow that holds the interpreter, as a long call into a library may: no other thread runs."""

import ctypes

from prefect import flow


@flow(name="sera", persist_result=False)
def busy(seconds: int) -> None:
    """Sleep without letting go of the interpreter's lock."""
    ctypes.PyDLL(None).sleep(seconds)
