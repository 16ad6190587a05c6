"""Moto's server, with no more to do than answer, and its conditional puts atomic, as those of S3 are."""

import sys
from threading import Lock

from moto import backends
from moto.s3.responses import S3Response
from moto.server import main
from werkzeug.serving import WSGIRequestHandler

WSGIRequestHandler.protocol_version = "HTTP/1.1"
WSGIRequestHandler.disable_nagle_algorithm = True
WSGIRequestHandler.log_request = lambda *_: None
SERVICES = list(backends.list_of_moto_modules())
backends.list_of_moto_modules = lambda: SERVICES  # it reads a folder for each request


def one_at_a_time(answer):
    """Moto looks for the object and then stores it: two threads may both find none."""
    lock = Lock()

    def answered(*args, **kwargs):
        with lock:
            return answer(*args, **kwargs)

    return answered


S3Response.put_object = one_at_a_time(S3Response.put_object)

if __name__ == "__main__":
    main(sys.argv[1:])
