#!/usr/bin/env bash
# MXFP4 takes up to a quarter off the largest weight of a block, the one that Q4_0 keeps exactly.
#
# Versions: gguf 0.19.0, numpy 2.4.6.
# Behaviour: a block of 32 weights shares a power of two, which the MX standard's recipe takes from the largest weight
#   rounded down. On that scale the largest weight lies from 4 up to 8, while the largest of the 4-bit values is 6:
#   what is above is cut to 6, and below it 4 comes next. Q4_0's scale is any float16 number, and the largest fits.
# Output: largest weight of a block 4, 5, 5.1, 6, 7, 7.9, 8: MXFP4 4 4 6 6 6 6 8, Q4_0 as it was. Normal weights, what
#   is left of the largest: MXFP4 0.937 on average and 0.75 at least, Q4_0 1; of all, along themselves: 0.981 and 0.998.
# Wrong guess: a block's scale is made for its largest weight, so the small ones pay for four bits; and errors of rounding
#   have no direction. Here outliers lose most, and products come out 2 % smaller on average.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 gguf==0.19.0
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

BLOCK, LARGEST = 32, (4, 5, 5.1, 6, 7, 7.9, 8)


def kept(weights, kind):
    """The weights, blocks of 32 each, as a file of that kind gives them back."""
    return dequantize(quantize(weights, kind), kind)


blocks = np.tile(np.linspace(-1, 1, BLOCK, dtype=np.float32), (len(LARGEST), 1))
blocks[:, 5] = LARGEST
normal = np.random.default_rng(0).standard_normal((4096, BLOCK)).astype(np.float32)
rows, largest = np.arange(len(normal)), np.abs(normal).argmax(1)
left, along = {}, {}
for kind in (Type.MXFP4, Type.Q4_0):
    ends, after = kept(blocks, kind)[:, 5], kept(normal, kind)
    left[kind], along[kind] = after[rows, largest] / normal[rows, largest], (after * normal).sum() / (normal**2).sum()
    print(kind.name, *(f"{end:g}" for end in ends.round(2)), end="; normal weights: ")
    print(f"largest {left[kind].mean():.3f} (least {left[kind].min():.2f}), all {along[kind]:.3f}")
    if kind == Type.MXFP4:
        assert np.array_equal(ends, [4, 4, 6, 6, 6, 6, 8]), "the largest weights are kept"
    else:
        assert np.allclose(ends, LARGEST, rtol=1e-3), "Q4_0 cuts them too"
mxfp4, q4_0 = left[Type.MXFP4], left[Type.Q4_0]
assert 0.92 < mxfp4.mean() < 0.95 and 0.75 <= round(float(mxfp4.min()), 3) < 0.76, "outliers lose more or less"
assert q4_0.min() > 0.999, "Q4_0 loses outliers"
assert 0.975 < along[Type.MXFP4] < 0.985 and along[Type.Q4_0] > 0.995, "weights shrink otherwise"
EOF
