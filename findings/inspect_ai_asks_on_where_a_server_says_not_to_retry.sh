#!/usr/bin/env bash
# inspect-ai sends a question again for ever where the server's 429 says x-should-retry: false.
#
# Versions: inspect-ai 0.3.285, openai 3.57.0; the server is one of the standard library.
# Behaviour: the openai package obeys the header and raises at once. inspect-ai turns off that package's retries and has
#   its own: every RateLimitError is asked again, whatever its headers and code, without a limit unless --max-retries or
#   --timeout is given. A run whose questions are all refused for good never ends.
# Output: openai with max_retries=5: 1 request. inspect-ai, stopped after 60 seconds: 4 requests or so, no result.
# Wrong guess: inspect-ai asks by the openai package, so x-should-retry: false ends a question there too, as a failed
#   sample; or --fail-on-error, which counts samples that fail, ends the run.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check inspect-ai==0.3.285 openai==3.57.0
cd "$dir"
cat > ask.py <<'EOF'
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes


@task
def ask():
    return Task(dataset=[Sample(input="yes?", target="yes")], scorer=includes())
EOF
"$dir/venv/bin/python" - <<'EOF'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai

posts = 0


class Refuse(BaseHTTPRequestHandler):
    def do_POST(self):
        global posts
        posts += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        error = {"message": "never", "type": "rate_limit_error", "param": None, "code": "budget_infeasible"}
        body = json.dumps({"error": error}).encode()
        self.send_response(429)
        self.send_header("x-should-retry", "false")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
try:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=5)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "yes?"}])
except openai.RateLimitError:
    pass
print(f"openai with max_retries=5: {posts} request")
assert posts == 1, "openai asks again"

posts = 0
command = [Path(sys.executable).with_name("inspect"), "eval", "ask.py", "--model", "openai-api/stub/m"]
command += ["--display", "plain", "--fail-on-error"]
env = {name: value for name, value in os.environ.items() if not name.startswith("INSPECT_")}
env |= {"STUB_BASE_URL": url, "STUB_API_KEY": "none"}
try:
    done = subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)
    raise SystemExit(f"inspect-ai ended by itself after {posts} requests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
except subprocess.TimeoutExpired:
    print(f"inspect-ai, stopped after 60 seconds: {posts} requests")
assert posts >= 2, "inspect-ai does not ask again"
EOF
