"""Files that lie where a file was meant to be: named as what they are, not as what they fail to parse as."""


def stand_in(data: bytes) -> str | None:
    """What a file is that begins so, and what to do: a Git LFS pointer or a web page; None for any other."""
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file: run `git lfs pull` in that folder"
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "this is a web page, not the file: download the file itself (on the hub, `resolve` instead of "
            "`blob`)"
        )
    return None
