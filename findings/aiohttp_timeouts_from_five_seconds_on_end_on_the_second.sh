#!/usr/bin/env bash
# A time-out of 5.1 seconds ends an aiohttp call after anything from 5.1 to 6.1 seconds; 4.9 seconds are 4.9.
#
# Versions: aiohttp 3.14.5; the server is one of the standard library that never answers.
# Behaviour: time-outs of 5 seconds or more end on the next whole second of the event loop's clock, so that many of
#   them fire together. ceil_threshold says from which length on; sock_read alone is not rounded.
# Output: five calls begun 0.2 s apart, seconds over the time-out: 4.9: 0.0 each; 5.1: spread between 0 and 1, and all
#   end on whole seconds; 5.1 with ceil_threshold=60: 0.0 each; sock_read=5.1: 0.0 each.
# Wrong guess: a time-out given as a float is kept to milliseconds, long or short. A load test whose limit is 5.1 s takes
#   answers after 6 s for answers in time, and calls begun one by one are given up, and tried again, all at once.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check aiohttp==3.14.5
"$dir/venv/bin/python" - <<'EOF'
import asyncio
import socket

from aiohttp import ClientSession, ClientTimeout

TIMEOUTS = {
    "total=4.9": ClientTimeout(total=4.9),
    "total=5.1": ClientTimeout(total=5.1),
    "total=5.1, ceil_threshold=60": ClientTimeout(total=5.1, ceil_threshold=60),
    "sock_read=5.1": ClientTimeout(total=None, sock_read=5.1),
}
CALLS, APART_S, SLACK_S = 5, 0.2, 0.15  # the slack is for a busy machine


async def given_up(session, url, timeout, wait_s):
    """Seconds over the time-out when a call is given up, and the clock's distance from a whole second then."""
    await asyncio.sleep(wait_s)
    clock = asyncio.get_running_loop().time
    begun = clock()
    try:
        async with session.get(url, timeout=timeout):
            raise AssertionError("the silent server answered")
    except asyncio.TimeoutError:
        ended = clock()
    return ended - begun - (timeout.total or timeout.sock_read), abs(ended - round(ended))


async def main():
    """What each call took; all run side by side, for seven seconds."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:  # connects, but nobody accepts or answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1/models"
        async with ClientSession() as session:
            calls = [given_up(session, url, TIMEOUTS[n], APART_S * i) for n in TIMEOUTS for i in range(CALLS)]
            results = await asyncio.gather(*calls)
    return {name: results[CALLS * i : CALLS * (i + 1)] for i, name in enumerate(TIMEOUTS)}


found = asyncio.run(main())
over = {name: [over_s for over_s, _ in results] for name, results in found.items()}
for name in TIMEOUTS:
    print(f"{name}: over by", *(f"{over_s:.2f}" for over_s in over[name]))
rounded = "total=5.1"
for name in TIMEOUTS.keys() - {rounded}:
    assert max(over[name]) < SLACK_S, f"{name} is rounded"
assert all(off_s < SLACK_S for _, off_s in found[rounded]), "the calls do not end on whole seconds"
assert max(over[rounded]) - min(over[rounded]) > 0.5, "the time-out is kept"
EOF
