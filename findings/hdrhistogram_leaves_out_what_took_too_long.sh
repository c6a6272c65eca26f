#!/usr/bin/env bash
# The Python HdrHistogram drops times above its range without an error: the slowest answers are missing from its p99.
#
# Versions: hdrhistogram 0.10.8.
# Behaviour: record_value returns False for a value above the largest that the histogram was made for, and counts it
#   nowhere, not even in the total; the original in Java raises. Values are not put into the last bucket.
# Output: 900 answers of 100 ms, 100 of 70 s, range up to a minute: count 900, p99 100 ms, largest 100 ms.
# Wrong guess: what lies beyond the range counts as the range's end, as in a histogram of Prometheus, or is an error. An
#   overloaded server looks as fast as an idle one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check hdrhistogram==0.10.8
"$dir/venv/bin/python" - <<'EOF'
from hdrh.histogram import HdrHistogram

LEAST_MS, LARGEST_MS, DIGITS = 1, 60_000, 3
histogram = HdrHistogram(LEAST_MS, LARGEST_MS, DIGITS)
told = {histogram.record_value(taken_ms) for taken_ms in [100] * 900 + [70_000] * 100}
p99_ms, largest_ms = histogram.get_value_at_percentile(99), histogram.get_max_value()
print(f"count {histogram.get_total_count()}, p99 {p99_ms} ms, largest {largest_ms} ms, record_value returned {told}")
assert told == {True, False}, "a value beyond the range is accepted"
assert histogram.get_total_count() == 900, "values beyond the range are counted"
assert p99_ms == largest_ms == 100, "they show in p99"
EOF
