#!/usr/bin/env bash
# schemathesis's filter_body keeps no body out of the coverage phase; the filtered requests are sent all the same.
#
# Versions: schemathesis 4.32.5, Python 3.11; the server is one of the standard library.
# Behaviour: with `schemathesis run`, a global hook filter_body that returns False for a body holds in the fuzzing phase
#   and not in the coverage phase, which is on by default and comes first. So a rule that JSON Schema cannot say, given
#   as filter_body, still ends in "Schema-valid request rejected". filter_failure, which drops what a check found,
#   holds in both.
# Output: for each hook, the requests by phase whose body the hook forbids, and the exit status of the run: 1 for filter_body in the coverage phase, else 0.
# Wrong guess: filter_body, documented as "drop generated `body` values that fail the predicate", holds for every
#   generated request, and one hook is enough.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check schemathesis==4.32.5
cd "$dir"
cat > filter_body_hook.py <<'PY'
import schemathesis


@schemathesis.hook
def filter_body(context, body):
    return not isinstance(body, dict) or body.get("from") != body.get("to")
PY
cat > filter_failure_hook.py <<'PY'
import schemathesis


@schemathesis.hook
def filter_failure(context, failure, case, response):
    return not isinstance(case.body, dict) or case.body.get("from") != case.body.get("to")
PY
"$dir/venv/bin/python" - <<'PY'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PLACE = {"enum": ["a", "b"]}
BODY = {"type": "object", "required": ["from", "to"], "properties": {"from": PLACE, "to": PLACE}, "additionalProperties": False}
RESPONSES = {status: {"description": "as it says"} for status in ("200", "400")}
POST = {"requestBody": {"required": True, "content": {"application/json": {"schema": BODY}}}, "responses": RESPONSES}
SPEC = {"openapi": "3.1.0", "info": {"title": "trips", "version": "1"}, "paths": {"/trip": {"post": POST}}}
forbidden = 0


class Trips(BaseHTTPRequestHandler):
    """Refuses a trip from a place to the same place, a rule between two fields."""

    protocol_version = "HTTP/1.1"

    def reply(self, status, data=b""):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, json.dumps(SPEC).encode())

    def do_POST(self):
        global forbidden
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(data)
        except ValueError:
            body = None
        is_valid = isinstance(body, dict) and sorted(body) == ["from", "to"] and {*map(str, body.values())} <= {"a", "b"}
        is_same = is_valid and body["from"] == body["to"]
        forbidden += is_same
        self.reply(200 if is_valid and not is_same else 400)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Trips)
threading.Thread(target=server.serve_forever, daemon=True).start()
tool = os.path.join(os.path.dirname(sys.executable), "schemathesis")
seen = {}
for hook in ("filter_body_hook", "filter_failure_hook"):
    for phase in ("coverage", "fuzzing"):
        forbidden = 0
        command = [tool, "run", f"http://127.0.0.1:{server.server_port}/openapi.json", "--phases", phase, "--seed", "1"]
        command += ["--max-examples", "50", "--checks", "positive_data_acceptance"]
        found = subprocess.run(command, env={**os.environ, "SCHEMATHESIS_HOOKS": hook, "PYTHONPATH": "."}, capture_output=True)
        print(f"{hook}, {phase}: {forbidden} requests that the hook forbids, exit status {found.returncode}")
        seen[hook, phase] = (forbidden, found.returncode)
assert seen["filter_body_hook", "fuzzing"] == (0, 0)
assert seen["filter_body_hook", "coverage"][0] and seen["filter_body_hook", "coverage"][1], "the hook holds there too"
PY
