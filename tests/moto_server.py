"""Moto's server, with no more to do than answer."""

import sys

from moto import backends
from moto.server import main
from werkzeug.serving import WSGIRequestHandler

WSGIRequestHandler.protocol_version = "HTTP/1.1"
WSGIRequestHandler.disable_nagle_algorithm = True
WSGIRequestHandler.log_request = lambda *_: None
SERVICES = list(backends.list_of_moto_modules())
backends.list_of_moto_modules = lambda: SERVICES  # it reads a folder for each request

if __name__ == "__main__":
    main(sys.argv[1:])
