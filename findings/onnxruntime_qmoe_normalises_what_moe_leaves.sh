#!/usr/bin/env bash
# ONNX Runtime's QMoE makes the weights of the chosen experts sum to 1 on a CPU even if told not to; MoE obeys.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2 (CPU).
# Behaviour: both operators of com.microsoft have normalize_routing_weights, 0 if not given. With 0, MoE weighs an
#   expert by its share in the softmax over all experts; QMoE by its share among the chosen ones, whatever the attribute
#   says. A model without that division (OLMoE, and what else has norm_topk_prob false) changes when it is quantised.
# Output: the shares by which each weighs, with one and the same 8-bit experts: MoE 0 "all", MoE 1 "chosen", QMoE 0
#   "chosen", QMoE 1 "chosen"; the answers of QMoE 0 are up to 1.8 times as large as those of MoE 0.
# Wrong guess: QMoE is MoE with integer weights, so a difference of their answers is an error of rounding.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat > "$dir/route.py" <<'EOF'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

ROWS, WIDTH, EXPERTS, K, STEP = 6, 32, 8, 2, 1 / 512
rng = np.random.default_rng(0)
x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
logits = rng.standard_normal((ROWS, EXPERTS)).astype(np.float32)
codes = {name: rng.integers(0, 256, (EXPERTS, WIDTH, WIDTH), dtype=np.uint8) for name in ("up", "down")}
experts = {name: (code.astype(np.float32) - 128) * np.float32(STEP) for name, code in codes.items()}
kinds = {"QMoE": (codes, TensorProto.UINT8), "MoE": (experts, TensorProto.FLOAT)}
inputs = {"QMoE": ["x", "logits", "up", "steps", "", "down", "steps"], "MoE": ["x", "logits", "up", "", "down"]}


def run(operator, normalise):
    values, kind = kinds[operator]
    stored = [helper.make_tensor(name, kind, v.shape, v.tobytes(), raw=True) for name, v in values.items()]
    flags = {"k": K, "activation_type": "relu", "normalize_routing_weights": normalise}
    if operator == "QMoE":
        flags["expert_weight_bits"] = 8
        stored.append(helper.make_tensor("steps", TensorProto.FLOAT, (EXPERTS, WIDTH), [STEP] * (EXPERTS * WIDTH)))
    graph = helper.make_graph(
        [helper.make_node(operator, inputs[operator], ["y"], domain="com.microsoft", **flags)],
        "route",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in (("x", x), ("logits", logits))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        stored,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "logits": logits})[0]


def by_hand(divided):
    y = np.zeros_like(x)
    for row, score in enumerate(np.exp(logits)):
        chosen = np.argsort(-score)[:K]
        for e in chosen:
            hidden = np.maximum(experts["up"][e] @ x[row], 0)
            y[row] += score[e] / score[chosen if divided else slice(None)].sum() * (experts["down"][e] @ hidden)
    return y


formulas = {"all": by_hand(False), "chosen": by_hand(True)}
found = {}
for operator in ("MoE", "QMoE"):
    for normalise in (0, 1):
        y = run(operator, normalise)
        found[operator, normalise] = [n for n, right in formulas.items() if np.allclose(y, right, rtol=1e-3, atol=1e-4)]
        print(operator, normalise, *found[operator, normalise])
ratio = np.abs(run("QMoE", 0)).max(axis=1) / np.abs(run("MoE", 0)).max(axis=1)
print(f"QMoE 0 over MoE 0: up to {ratio.max():.1f}")
assert found["MoE", 0] == ["all"] and found["MoE", 1] == ["chosen"], "MoE does not obey the attribute"
assert found["QMoE", 1] == ["chosen"], "QMoE does not divide where it is told to"
assert found["QMoE", 0] == ["chosen"], "QMoE obeys the attribute, or follows another formula"
EOF
"$dir/venv/bin/python" "$dir/route.py"
