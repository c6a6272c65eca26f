#!/usr/bin/env bash
# In a DDSketch whose weights sum to 1, every quantile is the smallest value; with less than 1 it is below zero.
#
# Versions: ddsketch 3.0.1, tdigest 0.5.2.2.
# Behaviour: add() takes any weight above 0. A quantile's place is quantile * (sum of weights - 1), right for weights of
#   1. With a sum of 1 the place is 0 for every quantile. Below 1 it is negative, and so it is looked for among the
#   negative values, of which there are none. A sum of 10 still gives the p89 for the p99. tdigest, which takes weights
#   as well, answers alike at every sum.
# Output: latencies of 1 to 1000 ms, each of the same weight; p50 and p99 of the sketch where the weights sum to 1000:
#   498 and 983; to 10: 450 and 889; to 1: 0.99 and 0.99; to 0.5: -0.99 and -0.99. tdigest: 500 and 990, four times.
# Wrong guess: only the ratios of weights matter, as in a weighted mean. Shares, probabilities of a policy's choices and
#   weights that fade with age are such weights; the relative accuracy of 1 % is promised and nothing is raised.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check ddsketch==3.0.1 tdigest==0.5.2.2
"$dir/venv/bin/python" - <<'EOF'
from ddsketch import DDSketch
from tdigest import TDigest

ACCURACY, LEVELS = 0.01, (0.5, 0.99)
LATENCIES_MS = range(1, 1001)


def quantiles(weights_sum):
    """p50 and p99 in ms of equally weighted latencies, by DDSketch and by tdigest."""
    sketch, digest = DDSketch(ACCURACY), TDigest()
    for latency_ms in LATENCIES_MS:
        sketch.add(latency_ms, weights_sum / len(LATENCIES_MS))
        digest.update(latency_ms, weights_sum / len(LATENCIES_MS))
    found = [sketch.get_quantile_value(level) for level in LEVELS]
    return found, [digest.percentile(100 * level) for level in LEVELS]


def close(found, *expected):
    return all(abs(value - right) < 2 * ACCURACY * abs(right) for value, right in zip(found, expected, strict=True))


expected = {1000: (500, 990), 10: (450, 890), 1: (1, 1), 0.5: (-1, -1)}
for weights_sum, right in expected.items():
    found, by_tdigest = quantiles(weights_sum)
    print(f"weights sum to {weights_sum}: DDSketch", *(f"{value:.4g}" for value in found), end="; tdigest ")
    print(*(f"{value:.4g}" for value in by_tdigest))
    assert close(by_tdigest, 500, 990), "tdigest depends on the sum of the weights"
    assert close(found, *right), f"weights that sum to {weights_sum} have other quantiles"
EOF
