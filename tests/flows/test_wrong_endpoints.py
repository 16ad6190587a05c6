"""What answers where AWS_ENDPOINT_URL points is no S3, or another region's: one sentence, exit code 1."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

WELL_FORMED = b"<html><body><h1>404 Not Found</h1></body></html>"
AS_SERVERS_WRITE_IT = b"<!DOCTYPE html><html><head><meta charset=utf-8><title>404</title><hr>nginx</html>"
REDIRECT = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>PermanentRedirect</Code><Message>No.</Message>'
    b"<Endpoint>s3.eu-west-3.example</Endpoint><Bucket>bucket</Bucket></Error>"
)
NO_S3 = "not S3, or the bucket does not exist; check AWS_ENDPOINT_URL"
ELSEWHERE = "region or endpoint is wrong; set AWS_DEFAULT_REGION"
ANSWERS = {
    "a page": (404, WELL_FORMED, {}, NO_S3),
    "a page that is no XML": (404, AS_SERVERS_WRITE_IT, {}, NO_S3),
    "elsewhere": (301, REDIRECT, {}, ELSEWHERE),
    "another region": (301, REDIRECT, {"x-amz-bucket-region": "eu-west-3"}, ELSEWHERE),
}


@contextmanager
def answering(status, body, headers):
    """A server that gives everybody the same answer; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = b"" if self.command == "HEAD" else body
            self.send_response(status)
            for name, value in {"Content-Length": str(len(said)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.s3
@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("command", ["list", "gc"])
def test_an_endpoint_that_is_not_the_buckets_is_named_in_one_line(kind, command, monkeypatch, sera):
    *answer, expected = ANSWERS[kind]
    with answering(*answer) as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }.items():
            monkeypatch.setenv(name, value)
        said = sera(command, "--store", "s3://bucket/team", code=1).err
    assert said.startswith("sera: s3://bucket") and expected in said and said.count("\n") == 1
