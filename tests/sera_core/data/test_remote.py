"""A remote model or file that cannot be read: one message with what to check, whatever was raised."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny import tiny_policy

from sera_core.data.sources import read_rows
from sera_core.errors import InputError
from sera_core.models.model_sources import materialise, source_digest

ANSWERS = {
    "403": (PermissionError("Forbidden"), r"cannot be read \(PermissionError\).*credentials"),
    "404": (
        FileNotFoundError("The specified bucket does not exist"),
        "no such (file|folder); correct the URL",
    ),
    "500": (OSError(5, "Internal Server Error"), r"cannot be read \(OSError\).*endpoint"),
    "301": (RecursionError("maximum recursion depth exceeded"), "endless redirects.*region"),
    "down": (RuntimeError("no route"), r"cannot be read \(RuntimeError\).*network"),
}


class Refusing(MemoryFileSystem):
    """Answers every request as the host of the URL says, or as memory holds it."""

    protocol = "refusing"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("refusing://", "memory://"))

    def _meet(self, path, *where):
        for code, (error, _) in ANSWERS.items():
            if any(f"{code}-{name}" in path for name in where):
                raise error

    def ls(self, path, detail=True, **kwargs):
        self._meet(path, "list")
        return super().ls(path, detail=detail, **kwargs)

    def open(self, path, *args, **kwargs):
        self._meet(path, "open")
        return super().open(path, *args, **kwargs)

    def get_file(self, path, *args, **kwargs):
        self._meet(path, "get")
        return super().get_file(path, *args, **kwargs)


@pytest.fixture(autouse=True)
def remote():
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("code", ANSWERS)
def test_a_file_of_rows_that_cannot_be_read(code):
    with pytest.raises(InputError, match=ANSWERS[code][1]) as refused:
        read_rows(f"refusing://{code}-open/pairs.jsonl?some=thing")
    assert "thing" not in str(refused.value)


@pytest.mark.parametrize("where", ["list", "open", "get"])
@pytest.mark.parametrize("code", ANSWERS)
def test_a_model_that_cannot_be_listed_hashed_or_copied(remote, tmp_path, code, where):
    remote.put(str(tiny_policy(tmp_path / "policy")) + "/", f"/{code}-{where}/model/", recursive=True)
    use = source_digest if where == "open" else lambda url: materialise(url, tmp_path / "copy")
    with pytest.raises(InputError, match=ANSWERS[code][1]) as refused:
        use(f"refusing://{code}-{where}/model")
    assert f"refusing://{code}-{where}/model" in str(refused.value)


def test_what_is_wrong_with_a_remote_model_itself_is_said_as_for_a_folder(remote):
    remote.pipe("/bucket/model/tokenizer.json", b"{}")
    with pytest.raises(InputError, match=r"has no config\.json"):
        source_digest("refusing://bucket/model")
