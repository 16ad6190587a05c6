"""Shapes and types of this mathematics are checked in every test run."""

from jaxtyping import install_import_hook

_hook = install_import_hook("sera_core.method", "beartype.beartype")
