#!/usr/bin/env bash
# A float32 model that OpenVINO saved and read again is a float16 model, though it still says float32 everywhere.
#
# Versions: openvino 2026.4.1.
# Behaviour: save_model stores constants as float16 followed by a conversion unless compress_to_fp16=False is given;
#   parameters and results stay float32, so shapes, types and a quick look at the answers show nothing.
# Output: largest error of a product of width 64 against NumPy: before saving 5e-6, after saving 5e-3, saved with
#   compress_to_fp16=False 5e-6; the weights' file has half the bytes.
# Wrong guess: saving a model and loading it changes nothing that INFERENCE_PRECISION_HINT=f32 asks for.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 openvino==2026.4.1
cat > "$dir/save.py" <<'EOF'
import sys
from pathlib import Path

import numpy as np
import openvino
from openvino import opset15 as op

folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (8, 64)))
data = op.parameter([8, 64], np.float32)
model = openvino.Model([op.result(op.matmul(data, op.constant(weight), False, False))], [data], "product")


def error(model):
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return float(np.abs(compiled([x])[0] - x @ weight).max())


def saved(name, **options):
    path = folder / f"{name}.xml"
    openvino.save_model(model, path, **options)
    return path.with_suffix(".bin").stat().st_size, error(openvino.Core().read_model(path))


before, (half_bytes, half), (whole_bytes, whole) = error(model), saved("half"), saved("whole", compress_to_fp16=False)
print(f"before {before:.1e}, saved {half:.1e} ({half_bytes} bytes), uncompressed {whole:.1e} ({whole_bytes} bytes)")
assert before < 1e-4 and whole < 1e-4, "the product is not float32 before saving or when saved uncompressed"
assert half > 1e-3 and half_bytes < 0.6 * whole_bytes, "save_model keeps float32 without being asked"
EOF
"$dir/venv/bin/python" "$dir/save.py" "$dir"
