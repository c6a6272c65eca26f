#!/usr/bin/env bash
# The 99th percentile that river keeps of a stream falls from the largest of five times to the middle one at the sixth.
#
# Versions: river 0.26.1, numpy 2.4.6.
# Behaviour: stats.Quantile follows a stream by five markers (P2). Up to five values it says their largest at q = 0.99;
#   from the sixth on it says its middle marker, which starts as the median of the first five and moves by one place
#   a value. A hundred values or so bring it to where it belongs. RollingQuantile keeps the values and is right at once.
# Output: times of 1, 2, ... 12 ms, each slower than all before: 1 2 3 4 5 3 4 5 6 7 8 9 (their p99: 4.96 after five,
#   5.95 after six). Every fifth of 20 answers takes 100 ms, the others 10: 60.5, RollingQuantile 100.
# Wrong guess: a p99 estimate is rough at first but errs to the side of the largest value seen, and a slower answer
#   never lowers it; a guard that takes it for its bound lets the first answers through on the median.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check river==0.26.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from river import stats


def kept(values, estimate):
    """What an estimate says after each value."""
    said = []
    for value in values:
        estimate.update(value)
        said.append(estimate.get())
    return said


rising = [float(ms) for ms in range(1, 13)]
p99 = kept(rising, stats.Quantile(0.99))
print("slower and slower, river:", *(f"{ms:g}" for ms in p99))
print("slower and slower, numpy:", *(f"{np.quantile(rising[: n + 1], 0.99):.2f}" for n in range(12)))
fifth = [10.0, 10.0, 10.0, 10.0, 100.0] * 4
stream, window = (kept(fifth, one)[-1] for one in (stats.Quantile(0.99), stats.RollingQuantile(0.99, 1000)))
print(f"every fifth of 20 takes 100 ms: Quantile {stream:.1f}, RollingQuantile {window:g}")
assert p99[4] == 5.0 and p99[5] == 3.0, "the sixth value, the slowest so far, does not lower it"
assert stream < 70.0 and window == 100.0, "twenty values are enough"
EOF
