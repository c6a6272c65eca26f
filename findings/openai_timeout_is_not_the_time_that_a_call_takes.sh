#!/usr/bin/env bash
# OpenAI(timeout=0.5) returns after four seconds: the client waits as long as a busy server asks for, twice.
#
# Versions: openai 3.57.0; the server is one of the standard library that answers 429 at once with `Retry-After: 2`.
# Behaviour: the time-out is one of reading, for each try. Between tries the client sleeps for what Retry-After says, up
#   to two minutes a time, and tries twice again by itself. A longer Retry-After than that ends the call at once.
# Output: timeout 0.5: 3 requests in 4 s; max_retries=0: 1 request at once; `Retry-After: 121`: 1 request at once.
# Wrong guess: a call ends within its time-out, or within one for each try; a server that asks for longer than the
#   client means to wait gets no second try. A deadline has to be set around the call.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check openai==3.57.0
"$dir/venv/bin/python" - <<'EOF'
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


class Busy(BaseHTTPRequestHandler):
    """Counts requests and answers that it is busy."""

    count, wait_s = 0, 2

    def do_POST(self):
        Busy.count += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"error": {"message": "busy"}}'
        self.send_response(429)
        self.send_header("Retry-After", str(Busy.wait_s))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()


def call(wait_s, **flags):
    """The number of requests that a call makes, and the seconds that it takes."""
    Busy.count, Busy.wait_s = 0, wait_s
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", timeout=0.5, **flags)
    began_s = time.monotonic()
    try:
        client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "what is this?"}])
    except openai.RateLimitError:
        return Busy.count, time.monotonic() - began_s
    raise SystemExit("no error")


usual, once, long = call(2), call(2, max_retries=0), call(121)
print(*(f"{count} requests in {taken_s:.1f} s;" for count, taken_s in (usual, once, long)))
assert usual[0] == 3 and usual[1] >= 4, "the time-out bounds the call"
assert once[0] == 1, "max_retries=0 asks again"
assert long[0] == 1 and long[1] < 60, "a longer Retry-After is waited for"
EOF
