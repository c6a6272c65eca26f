#!/usr/bin/env bash
# OpenVINO's TopK over equal scores returns another set of places than "the lower index first", not only another order.
#
# Versions: openvino 2026.4.1 (CPU), torch 2.13.0 (CPU), onnxruntime 1.30.0.
# Behaviour: of rows with equal values, OpenVINO's TopK and torch.topk keep other places than ONNX Runtime, which takes
#   the lower ones; only `stable=True` makes OpenVINO do so, and torch has no such argument. A router of a mixture of
#   experts whose scores were rounded to 8 bits of mantissa has such rows, and its tokens visit other experts.
# Output: of 200 rows of 16 scores with 3 distinct values, sets that differ from the lower-index rule: onnxruntime 0,
#   openvino 81, openvino with stable=True 0, torch 160 (numbers vary with the processor's vector width).
# Wrong guess: ties are broken alike in runtimes that read the same graph, or differ in the order of the result alone.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 openvino==2026.4.1 \
    onnxruntime==1.30.0 onnx==1.23.1
cat > "$dir/ties.py" <<'EOF'
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper
from openvino import opset15 as op

ROWS, WIDTH, K = 200, 16, 8
rows = np.random.default_rng(0).integers(0, 3, (ROWS, WIDTH)).astype(np.float32)


def by_openvino(stable):
    data = op.parameter([ROWS, WIDTH], np.float32)
    found = op.topk(data, op.constant(np.int64(K)), -1, "max", "value", stable=stable)
    model = openvino.Model([op.result(found.output(1))], [data], "ties")
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([rows])[0]


def by_onnxruntime():
    node = helper.make_node("TopK", ["x", "k"], ["values", "places"], axis=-1)
    graph = helper.make_graph(
        [node],
        "ties",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, WIDTH])],
        [helper.make_tensor_value_info("places", TensorProto.INT64, [ROWS, K])],
        [helper.make_tensor("k", TensorProto.INT64, [1], [K])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["places"], {"x": rows})[0]


lower = [set(row) for row in np.argsort(-rows, axis=-1, kind="stable")[:, :K].tolist()]
found = {
    "onnxruntime": by_onnxruntime(),
    "openvino": by_openvino(False),
    "openvino_stable": by_openvino(True),
    "torch": torch.topk(torch.from_numpy(rows), K).indices.numpy(),
}
others = {name: sum(set(a.tolist()) != b for a, b in zip(places, lower)) for name, places in found.items()}
print(others)
assert others["onnxruntime"] == others["openvino_stable"] == 0, "the lower index does not win any more"
assert others["openvino"] > 0 and others["torch"] > 0, "ties go to the lower index without being asked"
EOF
"$dir/venv/bin/python" "$dir/ties.py"
