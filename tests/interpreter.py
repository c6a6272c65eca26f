"""Triton's interpreter, which stands in for a GPU, spared half of its time."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any


def spare_the_interpreter() -> None:
    """Find once what the interpreter finds anew at every call within a kernel; what it computes stays the same.

    Nothing happens where the interpreter is absent or another one.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    names = ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names):
        return
    _list_language_once(interpreter)
    _replace_language_once(interpreter)
    _look_types_up_once(interpreter)


def _list_language_once(interpreter: Any) -> None:
    """List what is replaced in Triton's language once; what is replaced, and when, stays the same."""
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, *rest: Any) -> None:
        for name in names(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch


def _replace_language_once(interpreter: Any) -> None:
    """Leave the language alone in calls within a kernel, which has replaced it until the kernel ends."""
    tl, replace = interpreter.tl, interpreter._patch_lang

    def patch(fn: Any) -> Any:
        used = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if used and not any(tl.core.is_builtin(one.load) for one in used):
            return interpreter._LangPatchScope()
        return replace(fn)

    interpreter._patch_lang = patch


def _look_types_up_once(interpreter: Any) -> None:
    """Keep numpy's type of each of Triton's, the name of each type of blocks, and the shapes of tensors."""
    block, find = interpreter.tl.core.block_type, interpreter._get_np_dtype
    check = block.__init__
    found: dict[str, Any] = {}
    checked: dict[Any, dict[str, Any]] = {}

    def get_np_dtype(of: Any) -> Any:
        if of.name not in found:
            found[of.name] = find(of)
        return found[of.name]

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in checked:
            check(self, element_ty, shape)
            checked[key] = dict(vars(self))
        vars(self).update(checked[key], element_ty=element_ty)

    tensor = interpreter.tl.core.tensor
    build, built = tensor.__init__, dict[tuple[int, ...], dict[str, Any]]()

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        if shape not in built:
            build(self, handle, type)
            built[shape] = dict(vars(self))
        vars(self).update(built[shape], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = get_np_dtype
    block.__init__ = init
    tensor.__init__ = init_tensor
