"""Credentials in a URL are found in every form, cut from every text, and repeated in no message."""

import re
import time

import pytest

from sera_core.data.sources import read_rows, source_digest
from sera_core.errors import InputError
from sera_core.guards.urls import (
    CLEAN_PATTERN,
    refuse_secrets,
    secret_in,
    without_secrets,
    without_secrets_in,
)
from sera_core.models.model_sources import resolve_source

SECRET = "PL4NTED"
PLAIN = [
    f"http://alice:{SECRET}@host/p.jsonl",
    f"HTTPS://alice:{SECRET}@host/p.jsonl?X-Amz-Signature={SECRET}",
    f"https://{SECRET}@github.com/p.jsonl",
    f"https://host/p.jsonl?X-Amz-Signature={SECRET}",
    f"https://host/p.jsonl?X-AMZ-SECURITY-TOKEN={SECRET}",
    f"https://host/p.jsonl?sig={SECRET}&sv=2024",
    f"https://host/p.jsonl?sv=2024&SIG={SECRET}",
    f"https://host/p.jsonl?token={SECRET}",
    f"https://host/p.jsonl?AWSAccessKeyId={SECRET}",
    f"https://host/p.jsonl?api_key={SECRET}",
    f"https://host/p.jsonl#access_token={SECRET}",
    f"https://host/p.jsonl;token={SECRET}",
    f"s3://KEY:{SECRET}@bucket/p.jsonl",
    f"s3://KEY:a/{SECRET}/b@bucket/p.jsonl",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/p.jsonl",
    f"sftp://alice:{SECRET}@host/p.jsonl",
    f"simplecache::http://alice:{SECRET}@host/p.jsonl",
    f"zip://p.jsonl::https://alice:{SECRET}@host/p.zip",
]
ENCODED = [
    f"https://host/p.jsonl%3Ftoken%3D{SECRET}",
    f"https://host/p.jsonl?%58-Amz-Signature={SECRET}",
    f"http://alice%3A{SECRET}%40host/p.jsonl",
    f"http://alice%253A{SECRET}%2540host/p.jsonl",
    f"http:/alice:{SECRET}@host/p.jsonl",
    f"http%3A%2F%2Falice%3A{SECRET}%40host",
    f"HTTP%3a%2f%2falice%3a{SECRET}%40host%2Fp.jsonl",
    f"http://alice%3A{SECRET}@host/p.jsonl",
    f"http://alice:{SECRET}%40host/p.jsonl",
    f"http://alice%25252525253A{SECRET}%252525252540host/p.jsonl",
    f"https%3A%2F%2F{SECRET}%40github.com%2Fp.jsonl",
    f"s3%3A%2F%2FKEY%3A{SECRET}%40bucket%2Fp.jsonl",
    f"simplecache::http://alice%3A{SECRET}%40host/p.jsonl",
    f"https://host/p.jsonl?a=1&%73ig={SECRET}",
    f"https://host/p.jsonl?to%6Ben={SECRET}",
    f"https://host/p.jsonl?X%2DAmz%2DSignature={SECRET}",
    f"https://host/p.jsonl%3fsig%3d{SECRET}",
    f"https%3A%2F%2Fhost%2Fp.jsonl%3Fsig%3D{SECRET}%26sv%3D2024",
    f"https%253A%252F%252Fhost%252Fp.jsonl%253Ftoken%253D{SECRET}",
]
CLEAN = [
    "https://host/p.jsonl?download=true",
    "https://host/a@b.jsonl?keywords=x&author=b",
    "http://localhost:9000/a@b.jsonl",
    "http://[::1]:9000/a@b.jsonl",
    "s3://bucket/p.jsonl?versionId=3",
    "abfs://container@account.dfs.core.windows.net/p.jsonl",
    "sftp://alice@host/p.jsonl",
    "github://owner:repository@main/p.jsonl",
    "hf://datasets/owner/name@main/p.jsonl",
    "hub:owner/name@main",
    "package:name/file.gguf",
    "/data/a:b@c.jsonl",
    "/data/p?token=1.jsonl",
    "my folder/a%20b%25.jsonl",
    "https://host/o/folder%2Fp%20q.jsonl?alt=media&name=%C3%A9",
    "https://host/a%40b%3D1.jsonl",
    "/cache/http%3A%2F%2Fhost%2Fp.jsonl",
]


@pytest.mark.parametrize("url", PLAIN + ENCODED)
def test_credentials_are_found_cut_and_never_repeated(url):
    assert secret_in(url)
    assert SECRET not in without_secrets(url) and secret_in(without_secrets(url)) is None
    with pytest.raises(InputError, match=r"contains .*environment") as refused:
        refuse_secrets(url)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", CLEAN)
def test_a_url_without_credentials_stays_as_it_is(url):
    assert secret_in(url) is None
    assert refuse_secrets(url) == without_secrets(url) == url


def test_the_pattern_of_schemas_refuses_credentials_alone():
    assert not [url for url in PLAIN + ENCODED if re.search(CLEAN_PATTERN, url)]
    assert [url for url in CLEAN if re.search(CLEAN_PATTERN, url)] == CLEAN


def test_a_text_keeps_all_but_the_credentials():
    text = f"cannot open 'http://alice:{SECRET}@host/p' or https://h/p?sig={SECRET} (found)"
    assert without_secrets_in(text) == "cannot open 'http://host/p' or https://h/p (found)"


@pytest.mark.parametrize("url", PLAIN + ENCODED)
def test_no_text_keeps_credentials_in_whatever_form(url):
    assert SECRET not in without_secrets_in(f"cannot open {url}, sorry")


def test_a_long_text_without_urls_takes_no_long_time():
    text = "a" * 1_000_000
    started = time.monotonic()
    assert without_secrets_in(text) == text
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("read", [read_rows, source_digest, resolve_source])
@pytest.mark.parametrize("url", PLAIN)
def test_nothing_is_fetched_with_them(read, url):
    with pytest.raises(InputError, match="must not contain credentials") as refused:
        read(url)
    assert SECRET not in str(refused.value)
