"""Servers of the tests' own, on this machine alone."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def serving(server: http.server.HTTPServer):
  """Yields a server, which answers while the block runs."""
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
