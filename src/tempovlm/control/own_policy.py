"""Policies of your own: loads a class by name, checks scores, and takes those of fewer settings.

Shapes: `K` settings of the knob space.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tempovlm.control.policies import is_tuned
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.checks import finite, shown
from tempovlm.core.errors import PolicyError, UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import check_file, expanded

_NAMED = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)|.+\.py")


class Adapted(Policy):
    """A policy whose scores pass through a function."""

    def __init__(self, policy: Policy, change: Callable[[Any], Floats]) -> None:
        self._policy, self._change = policy, change
        self.name, self.scale, self.tie = policy.name, policy.scale, policy.tie
        self.sees_picture = policy.sees_picture

    @property
    def sees_glance(self) -> bool:
        """Whether the policy needs the question's glance."""
        return self._policy.sees_glance

    @property
    def usual(self) -> Floats | None:
        """(K,) the changed mean scores, where the policy knows them."""
        usual = self._policy.usual
        return None if usual is None else self._change(usual)

    def look(self, question: Question, left_ms: float) -> Floats:
        """Return the changed scores (K,)."""
        return self._change(self._policy.look(question, left_ms))

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        """Return the changed scores (K,)."""
        return self._change(self._policy.settle(question, sight, left_ms))


class _Checked(Adapted):
    """A policy of the user's, whose failures are told on one line."""

    @property
    def usual(self) -> Floats | None:
        """(K,) the checked mean scores, where the policy knows them."""
        with self._told("usual"):
            return super().usual

    def look(self, question: Question, left_ms: float) -> Floats:
        """Return the checked scores (K,)."""
        with self._told("look"):
            return super().look(question, left_ms)

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        """Return the checked scores (K,)."""
        with self._told("settle"):
            return super().settle(question, sight, left_ms)

    @contextmanager
    def _told(self, method: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            name = type(self._policy).__name__
            raise PolicyError(f"policy {name}: {method} failed ({_line(error)}); correct the method") from error


def narrowed(policy: Policy, whole: KnobSpace, space: KnobSpace) -> Policy:
    """Return the policy of a subset of the settings that a policy scores."""
    if space == whole:
        return policy
    places = np.array([whole.index(knobs) for knobs in space])
    return Adapted(policy, lambda scores: scores[places])


def is_own_policy(policy: object) -> bool:
    """Whether a policy's name is that of a class, as `module:Class` or `file.py:Class`, or of a Python file."""
    text = str(policy) if isinstance(policy, str | Path) else ""
    return _NAMED.fullmatch(text) is not None and not is_tuned(policy)


def own_policy(wanted: str, space: KnobSpace) -> Policy:
    """Make an object of a class that is named `module:Class` or `path/to/file.py:Class`.

    The class is called with the knob space as `space` if its constructor has a parameter of that name, else
    without arguments. Modules are also looked for in the working directory.

    Raises:
        UserError: there is no such class, it is no policy, or it cannot be made; names it.
    """
    found = _NAMED.fullmatch(wanted)
    assert found is not None
    if found["name"] is None:
        raise UserError(f"--policy {wanted}: name the class too, as {wanted}:CLASS")
    cls = getattr(_module(wanted, found["where"]), found["name"], None)
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        what = "there is no such class" if cls is None else "not a subclass of tempovlm.control.policy.Policy"
        raise UserError(f"--policy {wanted}: {what}; docs/adding.md has an example")
    if lacking := sorted(cls.__abstractmethods__):
        raise UserError(f"--policy {wanted}: has no method {lacking[0]}; docs/adding.md has an example")
    given = {"space": space} if "space" in inspect.signature(cls).parameters else {}
    try:
        policy = cls(**given)
    except (Exception, SystemExit) as error:  # code of the user's
        raise UserError(
            f"--policy {wanted}: {cls.__name__}({', '.join(given)}) failed ({_line(error)}); its constructor may "
            "take the knob space as `space`, and nothing else"
        ) from error
    return checked_policy(policy, space)


def _module(wanted: str, where: str) -> ModuleType:
    """Import a module by its name or by its file.

    Raises:
        UserError: it is not there, or its code fails.
    """
    try:
        if not where.endswith(".py"):
            if (here := str(Path.cwd())) not in sys.path:
                sys.path.append(here)
            return importlib.import_module(where)
        path = expanded(where)
        check_file(path, f"--policy {wanted}: give a file that defines the class")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--policy {wanted}: {where} cannot be imported ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}")


def checked_policy(policy: Policy, space: KnobSpace) -> Policy:
    """Return the same policy, whose scores are checked each time.

    Raises:
        UserError: the policy has no name; later, that scores are no numbers or not one for each setting.
    """
    name, shape = type(policy).__name__, (len(space),)
    if not isinstance(getattr(policy, "name", None), str):
        raise UserError(f"policy {name}: needs an attribute name, a text that answers report")
    if (tie := finite(policy.tie)) is None or tie < 0:
        raise UserError(f"policy {name}: its attribute tie is {shown(repr(policy.tie))}; give zero or more")
    if policy.scale not in ("accuracy", "logit"):
        raise UserError(
            f"policy {name}: its attribute scale is {shown(repr(policy.scale))}; give accuracy or logit"
        )

    def check(scores: Any) -> Floats:
        try:
            values: Floats = np.asarray(scores).astype(float, casting="same_kind")
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor with a gradient
            what = f"a {type(scores).__name__} that is no array of real numbers"
        else:
            what = f"an array of shape {values.shape}"
            if values.shape == shape and not np.isnan(values).any():
                return values
            if values.shape == shape:
                what = f"NaN for {space.settings[int(np.isnan(values).argmax())]}"
        raise PolicyError(f"policy {name}: scored {what}; expected numbers of shape {shape}, one for each setting")

    return _Checked(policy, check)
