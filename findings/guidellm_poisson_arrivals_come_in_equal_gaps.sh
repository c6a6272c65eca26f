#!/usr/bin/env bash
# guidellm's "poisson" profile sends requests in runs of equal gaps: a steady stretch, then a burst.
#
# Versions: guidellm 0.8.1; the server is one of the standard library that answers at once.
# Behaviour: up to ten processes send. Each has a random generator of its own, all with the seed 42, and adds its next gap
#   to a clock that they share. So the first gap comes once from each process, then the second one, and so on.
# Output: guidellm: 6 lengths among 59 gaps of 60 arrivals at 20 a second, each about ten times; 51.0 ms, the first gap of
#   the seed, is among them. One generator of Python's has 59 lengths.
# Wrong guess: "poisson" is a Poisson process, so that queues and late answers are those of independent users. The mean
#   rate of a long run is right, so that a look at it shows nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check guidellm==0.8.1
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COUNT, RATE = 60, 20.0
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, record):
        body = json.dumps(record).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "stub", "object": "model"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "yes"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply({"id": "1", "object": "chat.completion", "model": "stub", "choices": [choice], "usage": USAGE})

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
Path("q.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(2 * COUNT)))
backend = {"kind": "openai_http", "target": f"http://127.0.0.1:{server.server_port}", "model": "stub", "stream": False}
command = [Path(sys.executable).with_name("guidellm"), "run", "--backend", json.dumps(backend)]
command += ["--data", "kind=json_file,path=q.jsonl", "--profile", f"kind=poisson,rate={RATE:g}"]
command += ["--constraint", f"kind=max_requests,count={COUNT}", "--disable-console", "--output", "kind=json,path=o.json"]
subprocess.run(command, check=True, timeout=240, capture_output=True)
requests = json.loads(Path("o.json").read_text())["benchmarks"][0]["requests"]["successful"]
starts = sorted(one["info"]["timings"]["targeted_start"] for one in requests)
assert len(starts) == COUNT, f"{len(starts)} requests were answered"


def lengths(gaps):
    return Counter(round(1e3 * gap, 1) for gap in gaps).most_common()


found = lengths(b - a for a, b in zip(starts, starts[1:]))
generator = random.Random(42)
right = lengths(generator.expovariate(RATE) for _ in range(COUNT))
print(f"guidellm: {len(found)} lengths among {COUNT - 1} gaps; (ms, times): {found[:4]}")
print(f"one generator: {len(right)} lengths; the first gap of the seed: {1e3 * random.Random(42).expovariate(RATE):.1f} ms")
assert len(right) > 45, "a Poisson process has few equal gaps"
assert len(found) < 25 and found[0][1] >= 6, "the gaps differ as those of a Poisson process do"
EOF
