#!/usr/bin/env bash
# OpenVINO computes an ONNX graph's 64-bit integers in 32 bits: ids and times above two thousand million come out wrong.
#
# Versions: openvino 2026.4.1 (CPU), onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6.
# Behaviour: the CPU plugin converts int64 and uint64 inputs and constants to int32 and the result back; what does not
#   fit loses its upper bits, and a remainder goes through float32. Inputs and outputs still bear int64, and nothing is
#   raised or logged.
# Output: x + 1 for x = 2147483647, 2**40 and 1700000000123 (a time in ms): onnxruntime as expected, openvino
#   -2147483648, 1 and -807049092; x % 1000: onnxruntime 647, 776 and 123, openvino 640, 0 and 896.
# Wrong guess: a tensor that says int64 holds int64. A hash that picks a row of a table picks another one there.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

x = np.array([2**31 - 1, 2**40, 1_700_000_000_123], dtype=np.int64)


def both(kind, constant):
    """The results of x (kind) constant by ONNX Runtime and by OpenVINO."""
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "c"], ["y"])],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [3])],
        [helper.make_tensor("c", TensorProto.INT64, [1], [constant])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, f"{kind}.onnx")
    session = onnxruntime.InferenceSession(f"{kind}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], openvino.compile_model(f"{kind}.onnx", "CPU")([x])[0]


for kind, constant, right in (("Add", 1, x + 1), ("Mod", 1000, x % 1000)):
    one, other = both(kind, constant)
    print(kind, constant, "| onnxruntime", one.tolist(), "| openvino", other.dtype, other.tolist())
    assert (one == right).all(), "onnxruntime is wrong"
    assert other.dtype == np.int64 and (other != right).all(), "openvino computes in 64 bits"
EOF
