#!/usr/bin/env bash
# Locust's percentiles have two digits: where every answer takes 1449 ms, the p50, the p95 and the p100 are 1400.
#
# Versions: locust 2.47.0.
# Behaviour: response times are rounded before they are counted, above 100 ms to two digits and above 10 s to thousands;
#   percentiles are read from these counts. Mean, least and largest are exact. The report prints all to the millisecond.
# Output: 100 answers of 1449 ms: median 1400, p99 1400, p100 1400, mean 1449, largest 1449; 100 of 1451 ms: p99 1500.
# Wrong guess: a p99 of 1400 under a limit of 1430 ms says that the limit is kept; here no answer keeps it. Two settings
#   that differ by 3 % are equal or a step of 7 % apart.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check locust==2.47.0
"$dir/venv/bin/python" - <<'EOF'
from locust.stats import RequestStats


def entry_of(taken_ms, count=100):
    """What Locust knows of requests that all take equally long."""
    stats = RequestStats()
    for _ in range(count):
        stats.log_request("POST", "/v1/chat/completions", taken_ms, 10)
    return stats.get("/v1/chat/completions", "POST")


LEVELS = (0.5, 0.95, 0.99, 1.0)
found = {taken_ms: entry_of(taken_ms) for taken_ms in (1449.0, 1451.0, 14499.0)}
for taken_ms, entry in found.items():
    percentiles = [entry.get_response_time_percentile(level) for level in LEVELS]
    print(taken_ms, "percentiles", percentiles, "mean", entry.avg_response_time, "largest", entry.max_response_time)
    assert entry.max_response_time == entry.avg_response_time == taken_ms, "mean and largest are rounded too"
slow, slower, slowest = ([one.get_response_time_percentile(level) for level in LEVELS] for one in found.values())
assert slow == [1400] * 4 and slower == [1500] * 4 and slowest == [14000] * 4, "percentiles have more digits"
EOF
