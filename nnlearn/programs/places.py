"""Where an operation of a traced program is from: file, line and function, and the scope of its module."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

_JAX = str(Path(jax.__file__).parent)
_HERE = str(Path(__file__).parent.parent)
_PLUMBING = (_JAX, "<frozen", str(Path(_HERE) / "sharding"))
_LIBRARIES = (_HERE, str(Path(sys.prefix)), str(Path(sys.base_prefix) / "lib"), "site-packages", "<frozen")


class Place(NamedTuple):
    """Where an operation is written.

    Attributes:
      file: the path of the file; empty if it is unknown.
      line: the line of the file.
      function: the function that contains it.
      scope: the names of the enclosing modules and ``jax.named_scope``, such as ``Net/Dense_0``; may be empty.
    """

    file: str = ""
    line: int = 0
    function: str = ""
    scope: str = ""

    def __str__(self) -> str:
        written = f"{Path(self.file).name}:{self.line} in {self.function}" if self.file else "an unknown line"
        return f"{written} ({self.scope})" if self.scope else written


def trace_program(function: Callable[..., Any], *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """The program of a function, and the shapes of its output.

    ``place_of`` shows the lines that this call reaches, rather than those of the code that calls it.

    >>> program, shape = trace_program(lambda x: x + 1.0, 1.0)
    >>> program.jaxpr.eqns[0].primitive.name, shape.shape
    ('add', ())
    """

    def traced_here(*arguments):  # its name marks the frame at which ``place_of`` stops
        return function(*arguments)

    return jax.make_jaxpr(traced_here, return_shape=True)(*arguments)


def place_of(equation: JaxprEqn, caller: Place | None = None) -> Place:
    """The line of the user's code that made an equation, or of a library if no line of the user's code did.

    Args:
      equation: an equation of a program made by ``trace_program``.
      caller: the place of the call that contains the equation. JAX traces a jitted function once, so an equation in it
        may show the line of another call.

    >>> program, _ = trace_program(lambda x: x + 1.0, 1.0)
    >>> place_of(program.jaxpr.eqns[0]).function
    '<lambda>'
    """
    outer = caller.scope if caller else ""
    scope = "/".join(part for part in (outer, str(equation.source_info.name_stack)) if part)
    frames = list(getattr(equation.source_info.traceback, "frames", ()))
    ends = [at for at, frame in enumerate(frames) if frame.function_name.endswith("traced_here")]
    if not ends and caller is not None and caller.file:
        return caller._replace(scope=scope)
    found = _first_of_user(frames[: ends[0]] if ends else frames) or caller
    return (found or Place())._replace(scope=scope)


def _first_of_user(frames: Sequence[Any]) -> Place | None:
    """The innermost frame of the user's code, or else of a library other than JAX."""
    outside = [frame for frame in frames if not frame.file_name.startswith(_PLUMBING)]
    own = [frame for frame in outside if not any(part in frame.file_name for part in _LIBRARIES)]
    for frame in own or outside:
        line = getattr(frame, "line_num", None) or getattr(frame, "start_line", 0)
        return Place(frame.file_name, int(line), frame.function_name.split(".<locals>.")[-1])
    return None


__all__ = ["Place", "place_of", "trace_program"]
