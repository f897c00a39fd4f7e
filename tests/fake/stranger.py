#!/usr/bin/env python3
"""`stranger.py PORT`: somebody else's server on a port of ours. 200 to /health, JSON to all else; prints its port."""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Stranger(BaseHTTPRequestHandler):
    """Answers everything, knows nothing."""

    def do_GET(self) -> None:
        """An empty body for /health, a list of models that are not ours for the rest."""
        body = b"" if self.path == "/health" else b'{"object":"list","data":[{"id":"somebody-else","object":"model"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class has named it
        """Say nothing."""


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Stranger)
    print(server.server_address[1], flush=True)
    server.serve_forever()
