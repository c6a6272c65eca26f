#!/usr/bin/env bash
# A gRPC server believes in a later deadline than its client: for 10.01 seconds it is told 10.1, for 1000.5 it is 1010.
#
# Versions: grpcio 1.85.3.
# Behaviour: the client sends its time-out as a short number, which grpcio rounds up: to milliseconds below a second,
#   then to 10 ms, 100 ms, seconds and ten seconds as the time-out grows tenfold. The client keeps the exact one, and
#   gives up while the server thinks that time is left.
# Output: time_remaining() at the server for 1.001, 10.01, 100.01 and 1000.5 s: about 1.01, 10.1, 101 and 1010.
# Wrong guess: client and server count down the same time but for the way in between, so that an answer in time at the
#   server is late by a network's delay at most. One that uses its deadline to the full misses it by up to a hundredth.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check grpcio==1.85.3
"$dir/venv/bin/python" - <<'EOF'
from concurrent.futures import ThreadPoolExecutor

import grpc


class Remaining(grpc.GenericRpcHandler):
    """Answers every call with the time that the server thinks is left."""

    def service(self, _):
        return grpc.unary_unary_rpc_method_handler(lambda _, context: repr(context.time_remaining()).encode())


server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Remaining(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    ask = channel.unary_unary("/clock/remaining")
    ask(b"", timeout=30)
    left_s = {timeout_s: float(ask(b"", timeout=timeout_s)) for timeout_s in (10.01, 100.01, 1000.5, 1.001)}
server.stop(None)
print(*(f"the client waits {timeout_s} s, the server has {found:.3f} s;" for timeout_s, found in left_s.items()))
for timeout_s, told_s in ((10.01, 10.1), (100.01, 101.0), (1000.5, 1010.0)):
    assert timeout_s < left_s[timeout_s] <= told_s, "the server has no more time than its client"
EOF
