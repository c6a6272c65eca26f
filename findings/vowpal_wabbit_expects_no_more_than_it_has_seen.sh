#!/usr/bin/env bash
# Vowpal Wabbit's linear predictor never says more than the largest label that it has seen, however large the input is.
#
# Versions: vowpalwabbit 9.11.9.
# Behaviour: predictions are clipped to the least and the largest label so far, with squared loss as with quantiles,
#   without a word. --max_prediction (and --min_prediction) set wider ends, and then the line goes on.
# Output: times learned at 1 to 4 tiles, 20 to 50 ms: at 8 and 13 tiles 50.0 and 50.0 ms; with --max_prediction 1000
#   53.1 and 74.6. The 0.9 quantile: 50.0 and 50.0.
# Wrong guess: a linear model extrapolates, so that an input larger than all in training is predicted to take longer, and
#   a deadline guard calibrated on small pictures is careful with large ones. It is told that they take as long as the
#   slowest one so far.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check vowpalwabbit==9.11.9
"$dir/venv/bin/python" - <<'EOF'
import vowpalwabbit

KNOWN_MS = {1: 20.0, 2: 30.0, 3: 40.0, 4: 50.0}


def predicted(*flags):
    """Learn what pictures of few tiles take; what is expected of 8 and of 13 tiles."""
    model = vowpalwabbit.Workspace(" ".join(("--quiet -l 0.5", *flags)))
    for _ in range(300):
        for tiles, ms in KNOWN_MS.items():
            model.learn(f"{ms} | tiles:{tiles}")
    return [model.predict(f"| tiles:{tiles}") for tiles in (8, 13)]


clipped, wide = predicted(), predicted("--max_prediction 1000")
quantile = predicted("--loss_function quantile --quantile_tau 0.9")
for name, (eight, thirteen) in {"squared": clipped, "squared, wider ends": wide, "0.9 quantile": quantile}.items():
    print(f"{name}: {eight:.1f} ms at 8 tiles, {thirteen:.1f} at 13")
largest = max(KNOWN_MS.values())
assert clipped[1] == quantile[0] == quantile[1] == largest, "it goes beyond the largest label"
assert wide[1] > 1.2 * largest, "with wider ends it does not either"
EOF
