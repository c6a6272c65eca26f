#!/usr/bin/env bash
# Triton's interpreter runs a kernel that its compiler refuses: an element type that is assigned in a pair.
#
# Versions: triton 3.7.1 (3.6.0 alike), torch 2.13.0, numpy 2.4.1 (CPU; the compiler needs no GPU).
# Behaviour: `kind = out_ptr.dtype.element_ty` is compiled. `kind, n = out_ptr.dtype.element_ty, 4` is not: the elements
#   of a tuple must have a type in the compiler's own sense, and a dtype has none. With TRITON_INTERPRET=1 both run.
# Output: the interpreter's sums are equal; the first kernel compiles for compute capability 9.0, the second one raises.
# Wrong guess: a kernel that passes its tests in the interpreter compiles, so that a machine without a GPU can test it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --disable-pip-version-check triton==3.7.1 numpy==2.4.1
cat >"$dir/kernels.py" <<'EOF'
import triton
import triton.language as tl


@triton.jit
def alone(x_ptr, out_ptr, N: tl.constexpr):
    kind = out_ptr.dtype.element_ty
    i = tl.arange(0, N)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) + 1).to(kind))


@triton.jit
def paired(x_ptr, out_ptr, N: tl.constexpr):
    kind, i = out_ptr.dtype.element_ty, tl.arange(0, N)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) + 1).to(kind))
EOF
cd "$dir"
TRITON_INTERPRET=1 "$dir/venv/bin/python" - <<'EOF'
import torch

from kernels import alone, paired

x = torch.arange(16, dtype=torch.float32)
made = [torch.zeros(16) for _ in range(2)]
alone[(1,)](x, made[0], 16)
paired[(1,)](x, made[1], 16)
assert torch.allclose(made[0], x + 1) and torch.allclose(made[1], x + 1)
print("interpreter: both kernels run")
EOF
"$dir/venv/bin/python" - <<'EOF'
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from kernels import alone, paired


def compiled(kernel):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "constexpr"}, {"N": 16})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


compiled(alone)
try:
    compiled(paired)
except CompilationError as error:
    print("compiler:", str(error).strip().splitlines()[-1])
else:
    raise SystemExit("the compiler takes both kernels")
EOF
