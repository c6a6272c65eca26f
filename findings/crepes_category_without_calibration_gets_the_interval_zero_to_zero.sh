#!/usr/bin/env bash
# A category that crepes was not calibrated for gets the interval from 0 to 0 at every confidence, without a warning.
#
# Versions: crepes 0.9.1, scikit-learn 1.9.1, numpy 2.4.6.
# Behaviour: intervals by category (bins, Mondrian) start as zeros and are filled in for the categories of the
#   calibration; what is left stays, whatever was predicted. So do the percentiles of a predictive system. A category
#   with too few residuals, on the other hand, gets an infinite interval and a warning.
# Output: predictions of 500 ms at 90 %; residuals of up to 200 ms for PNG and JPEG, four for GIF, none for WebP. PNG
#   (319, 681), JPEG (318, 682), GIF (-inf, inf) with a warning, WebP (0, 0) without; a WebP's p95: 0.
# Wrong guess: no evidence gives an interval as wide as too little evidence does, or an error. A deadline set by the
#   upper bound is 0 ms for the first picture of a new kind. evaluate() counts it as one miss among all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check crepes==0.9.1 scikit-learn==1.9.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF'
import warnings

import numpy as np
from crepes import ConformalPredictiveSystem, ConformalRegressor

CONFIDENCE, PREDICTED_MS = 0.9, 500.0
residuals_ms = np.concatenate([np.arange(1.0, 201.0), np.arange(1.0, 5.0)])
calibrated = np.array(["png", "jpeg"] * 100 + ["gif"] * 4)
regressor = ConformalRegressor().fit(residuals_ms, bins=calibrated)
system = ConformalPredictiveSystem().fit(residuals_ms, bins=calibrated)


def bounds(kind):
    """The interval and the p95 in ms of a picture of this kind, and whether crepes warned of the kind."""
    predicted_ms, bins = np.array([PREDICTED_MS]), np.array([kind])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        least_ms, most_ms = regressor.predict_int(predicted_ms, bins=bins, confidence=CONFIDENCE)[0]
        p95_ms = np.ravel(system.predict_percentiles(predicted_ms, bins=bins, higher_percentiles=[95]))[0]
    warned = any(kind in str(one.message) for one in heard)
    print(f"{kind}: from {least_ms:g} to {most_ms:g} ms, p95 {p95_ms:g} ms, {'a' if warned else 'no'} warning")
    return least_ms, most_ms, p95_ms, warned


for kind in ("png", "jpeg"):
    least_ms, most_ms, p95_ms, warned = bounds(kind)
    assert least_ms < PREDICTED_MS < p95_ms <= 710 and most_ms < 710 and not warned, f"{kind}: other bounds"
assert bounds("gif") == (-np.inf, np.inf, np.inf, True), "too few residuals have a finite interval or no warning"
assert bounds("webp") == (0, 0, 0, False), "no residuals have another interval or a warning"
EOF
