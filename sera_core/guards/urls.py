"""Keep credentials out of URLs, because configurations are recorded, shown and stored by Prefect.

A URL with a password or signature is refused in settings, and its credentials are removed from other texts.
"""

import re
from typing import Any
from urllib.parse import unquote

from sera_core.errors import InputError

REMEDY = (
    "URLs are recorded and shown, so they must not contain credentials. Put these into the environment "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, HF_TOKEN for hub:) or into fsspec's "
    "configuration (~/.config/fsspec/conf.json), or download the file and give its path"
)
_START = re.compile(r"(?:^|::)[a-z][a-z0-9+.-]*:/+|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NAMES = (
    *("sign", "token", "secret", "pass", "pwd", "cred", "auth(?!or)", "key(?!word)", "session", "access"),
    *("jwt", "bearer", "hmac", "ticket", "x-amz-", "x-goog-", r"\bsig\b", r"\bsas\b", r"\bcode\b", r"\bpw\b"),
)
_SECRET_NAME = re.compile("|".join(_NAMES), re.IGNORECASE)
_USER_IS_A_PLACE = {"abfs", "abfss", "az", "wasb", "wasbs", "sftp", "ssh", "smb", "hdfs", "webhdfs"}
"""Schemes in which `name@` is a container or an account, not a credential."""
_REFERENCES = {"github", "git"}
"""Schemes in which `owner:repository@` names a repository."""
_IN_TEXT = re.compile(
    r"(?<![a-z0-9+.-])[a-z0-9+.-]+(?::|%(?:25)*3a)(?:/|%(?:25)*2f)+[^\s'\"<>]+", re.IGNORECASE
)
_UNQUOTINGS = 10
"""Maximum number of times percent-encoding is undone to find a credential."""


def _any_case(pattern: str) -> str:
    """A case-insensitive pattern without a flag: JavaScript has no inline flags."""
    return re.sub(r"(?<!\\)[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", pattern)


def _also_encoded(codes: str, plain: str) -> str:
    """A pattern of characters, plain or percent-encoded one or more times."""
    return f"(?:{plain}|%(?:25)*(?:{codes}))"


_COLON, _SLASH = _also_encoded("3[aA]", ":"), _also_encoded("2[fF]", "/")
_AT, _EQUALS = _also_encoded("40", "@"), _also_encoded("3[dD]", "=")
_QUERY = "3[fF]|23|26|3[bB]"
_UNRESERVED = "%(?:25)*(?:2[dDeE]|3[0-9]|[46][1-9a-fA-F]|[57][0-9aA]|5[fF]|7[eE])"
"""Percent-encoded letters, digits and -._~, which need no encoding: a sign of a hidden parameter name."""
CLEAN_PATTERN = (
    f"^(?!(?!git(?:hub)?:).*{_COLON}{_SLASH}+[^/?#]*{_COLON}[^/?#]*{_AT})"
    + _any_case(r"(?!(?:.*::)?(?:https?|s3|gs|ftp)")
    + rf"{_COLON}{_SLASH}+(?:[^/?#]*|[^/?#:\[]*{_COLON}(?![0-9]+/)[^?#]*){_AT})"
    + f"(?!.*{_COLON}{_SLASH}.*{_also_encoded(_QUERY, '[?#&;]')}[^=&;]*"
    + f"(?:{_any_case('|'.join(_NAMES).replace('-', '[-_]'))}|{_UNRESERVED})[^=&;]*{_EQUALS})"
    + f"(?!.*{_COLON}{_SLASH}.*%(?:25)*(?:{_QUERY}){_any_case('(?:sig|sas|code|pw)')}{_EQUALS})"
)
"""Matches most URLs without credentials; for JSON schemas, so that Prefect's server rejects the others."""


def secret_in(url: str) -> str | None:
    """Kind of credentials in a URL (never their value); None for a URL without any, or a path."""
    for form in _forms(url):
        if _user_infos(form):
            return "a user or password"
        if name := _secret_parameter(form):
            return f"the parameter {name!r}"
    return None


def without_secrets(url: str) -> str:
    """The URL without user and password, and without its query if a parameter is a credential."""
    for form in _forms(url):
        spans, secret = _user_infos(form), _secret_parameter(form)
        if spans or secret:
            for start, end in reversed(spans):
                form = form[:start] + form[end:]
            return re.split(r"[?#;]", form, maxsplit=1)[0] if secret else form
    return url


def without_secrets_in(text: str) -> str:
    """A text with `without_secrets` applied to every URL in it."""
    return _IN_TEXT.sub(lambda found: without_secrets(found[0]), text)


def clean_sources(value: Any, key: str = "") -> Any:
    """A recorded configuration with credentials removed from every name of a source."""
    if isinstance(value, dict):
        return {name: clean_sources(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [clean_sources(item) for item in value]
    return without_secrets(value) if key in ("path", "source", "sft") and isinstance(value, str) else value


def refuse_secrets(url: str, what: str = "the URL") -> str:
    """Return the URL if it contains no credentials.

    Args:
        url: a URL, or any other name of a source.
        what: what it is, for the message.

    Raises:
        InputError: it contains some; the message says which kind, but not their value.
    """
    if (held := secret_in(url)) is None:
        return url
    raise InputError(f"{what} {without_secrets(url)} contains {held}; {REMEDY}")


def _forms(url: str) -> list[str]:
    """The URL as given, and with its percent-encoding undone one or more times."""
    forms = [url]
    while len(forms) <= _UNQUOTINGS and (plain := unquote(forms[-1])) != forms[-1]:
        forms.append(plain)
    return forms if any(map(_START.search, forms)) else []


def _user_infos(url: str) -> list[tuple[int, int]]:
    """Span of user and password, including the @, of each URL in a chain such as `zip://a::http://b`."""
    found = []
    for match in _START.finditer(url):
        scheme, start = match[0].lstrip(":").split(":", 1)[0].lower(), match.end()
        host = re.split(r"[/?#]|::", url[start:], maxsplit=1)[0]
        user, at, _ = host.rpartition("@")
        if not at and re.search(r":(?!\d*$)", re.sub(r"^\[[^\]]*\]", "", host)) and "@" in url[start:]:
            user, at, _ = url[start:].rpartition("@")  # a password with a slash in it
        if not at or scheme in _REFERENCES or (scheme in _USER_IS_A_PLACE and ":" not in user):
            continue
        found.append((start, start + len(user) + 1))
    return found


def _secret_parameter(url: str) -> str | None:
    """Name of the first parameter (of query, fragment or path) whose name suggests a credential."""
    for part in re.split(r"[?#&;]", url)[1:]:
        name, equals, _ = part.partition("=")
        if equals and _SECRET_NAME.search(re.sub("_", "-", name)):
            return name if len(name) <= 40 else name[:40] + "…"
    return None
