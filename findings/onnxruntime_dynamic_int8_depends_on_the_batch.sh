#!/usr/bin/env bash
# A model quantised by ONNX Runtime's quantize_dynamic answers differently beside another request in its batch.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6.
# Behaviour: DynamicQuantizeLinear has one scale for the whole tensor, all rows of the batch and all tokens of a prompt.
#   A neighbour with larger activations leaves a row few steps, or none: then it is rounded to zero.
# Output: relative error of the same row: alone 0.01; beside a row 10, 100 and 1000 times as large 0.06, 0.47 and
#   1.0 (every output 0).
# Wrong guess: a row of a batch is computed as it is alone, up to rounding, so that batching is a matter of speed; and
#   "dynamic" means a scale for every row or token. A score measured one by one says nothing about answers in company.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$dir"
"$dir/venv/bin/python" - <<'EOF' 2>/dev/null
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

WIDTH, OUTPUTS = 64, 16
rng = np.random.default_rng(0)
weight = rng.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])],
    [numpy_helper.from_array(weight, "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "plain.onnx")
quantize_dynamic("plain.onnx", "int8.onnx", weight_type=QuantType.QInt8)
session = onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
row, other = rng.standard_normal((2, 1, WIDTH)).astype(np.float32)
exact = row @ weight


def error(rows):
    """The relative error of the first row's outputs."""
    return float(np.linalg.norm(session.run(None, {"x": rows})[0][:1] - exact) / np.linalg.norm(exact))


alone = error(row)
beside = [error(np.vstack([row, times * other])) for times in (1, 10, 100, 1000)]
print(f"alone {alone:.3f}, beside a row 1, 10, 100, 1000 times as large", *(f"{one:.3f}" for one in beside))
assert alone < 0.03 and beside[0] < 0.03, "int8 is far off without large neighbours"
assert beside[1] > 3 * alone and beside[2] > 0.3 and beside[3] > 0.99, "a neighbour does not matter"
EOF
