#!/usr/bin/env bash
# Outputs that ONNX Runtime's IOBinding was asked to allocate are allocated once: a run of another length then fails.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2.
# Behaviour: bind_output(name) without shape and buffer lets the runtime allocate the result of the next run; the binding
#   then holds that value, and the run after it takes it for a buffer that the caller gave. Results of the first length
#   are overwritten in place, also those that get_outputs() returned before; another length is an error. Only binding the
#   output again before each run allocates again.
# Output: the value of the first run, after the second one: 2.0 instead of 1.0; a third run of another length: "The output
#   OrtValue provided ... has shape {4} but the computed output shape for this run is {6}"; bound again: shape (6,).
# Wrong guess: an output bound by its name alone is allocated anew in every run, as by session.run.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat > "$dir/bound.py" <<'EOF'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negate", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
binding = session.io_binding()
binding.bind_output("y")


def run(length, value):
    data = np.full(length, -value, np.float32)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(data))
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0]


first = run(4, 1.0)
before = float(first.numpy()[0])
run(4, 2.0)
after = float(first.numpy()[0])
try:
    run(6, 3.0)
    fault = ""
except RuntimeError as error:
    fault = str(error)
binding.clear_binding_outputs()
binding.bind_output("y")
again = run(6, 3.0).numpy()
where = fault.find("The output OrtValue")
print(f"first result {before}, after the second run {after}; longer: {fault[where : where + 130]!r}; bound again: {again.shape}")
assert before == 1.0 and after == 2.0, "the first result keeps its values"
assert "shape" in fault, "a longer run allocates a longer output"
assert again.shape == (6,) and (again == 3.0).all(), "binding again does not help"
EOF
"$dir/venv/bin/python" "$dir/bound.py"
