#!/usr/bin/env bash
# Eight bits a weight can be worse than four: GGUF's Q8_0 loses weights of 1e-6 altogether, Q4_0 keeps them.
#
# Versions: gguf 0.19.0, numpy 2.4.6.
# Behaviour: every block of 32 weights has one scale in float16. Q8_0's is the largest weight over 127, Q4_0's over 8, so
#   that Q8_0's is the first to fall among float16's subnormal numbers, below 6e-5, and then to 0. That begins at blocks
#   whose largest weight is 0.008. Nothing is raised, and the file's size says nothing.
# Output: root mean square error over that of the weights, at weights of standard deviation 1e-2, 1e-4, 1e-5 and 1e-6:
#   Q8_0 0.005, 0.011, 0.095, 0.998; Q5_0 0.043, 0.043, 0.045, 0.126; Q4_0 0.086, 0.086, 0.086, 0.105; BF16 0.002 each.
# Wrong guess: a block's scale makes the error relative, so Q8_0 is the safe choice whatever the weights' size. Experts
#   that were seldom visited, products before a large norm and the small factor of an adapter hold such weights.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 gguf==0.19.0
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

KINDS = (Type.Q8_0, Type.Q5_0, Type.Q4_0, Type.BF16)
weights = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
errors = {}
for spread in (1e-2, 1e-4, 1e-5, 1e-6):
    scaled = weights * np.float32(spread)
    for kind in KINDS:
        lost = dequantize(quantize(scaled, kind), kind) - scaled
        errors[kind, spread] = float(np.sqrt((lost.astype(np.float64) ** 2).mean()) / spread)
    print(spread, *(f"{kind.name} {errors[kind, spread]:.3f}" for kind in KINDS))
assert errors[Type.Q8_0, 1e-2] < 0.01 < errors[Type.Q4_0, 1e-2], "Q8_0 is not the finer one for common weights"
assert errors[Type.Q8_0, 1e-5] > errors[Type.Q4_0, 1e-5], "Q8_0 is the finer one for weights of 1e-5 too"
assert errors[Type.Q8_0, 1e-6] > 0.9 and errors[Type.Q4_0, 1e-6] < 0.2, "Q8_0 keeps weights of 1e-6"
EOF
