"""Moto's server, with connections that stay open, as those of real servers do."""

import sys

from moto.server import main
from werkzeug.serving import WSGIRequestHandler

WSGIRequestHandler.protocol_version = "HTTP/1.1"
WSGIRequestHandler.disable_nagle_algorithm = True

if __name__ == "__main__":
    main(sys.argv[1:])
