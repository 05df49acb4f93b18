"""Torch custom ops of this package, in the namespace `flashinfer`: how an op looks to the dispatcher and torch.compile.

The pattern, in `ops/<op>/__init__.py`:

    @library.register("rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps) -> ()")
    def rmsnorm(out, input, weight, eps):
        ...choose an implementation, run it...

`rmsnorm` then is the registered op `torch.ops.flashinfer.rmsnorm.default`, called with the same positional arguments.
An op returns nothing and writes to the arguments its schema marks `Tensor(a!)` (a letter each); what it writes to the
facade allocates with `torch.empty`. So the kernel for fake tensors is the same for all ops: it does nothing. There are
no gradients: an implementation made of torch functions runs under `torch.no_grad()`.

Under `torch.compile` the facade is traced up to the op, so it may use shapes, strides, dtypes and devices only: no
`data_ptr`, no value of a tensor, no `functools.cache` around tensors, no `arch_of`. Everything else (the choice of an
implementation, caches, launches) belongs into the function that is registered: it is called with real tensors only.
`Library` rather than the `custom_op` decorator: 1.7 us a call against 11.5 (host of the H200 machine, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

NAMESPACE = "flashinfer"
DEVICES = ("CPU", "CUDA")
# A fragment: other libraries may add ops to the namespace.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Op = Callable[..., None]
P = ParamSpec("P")
R = TypeVar("R")


def _fake(*arguments: Any) -> None:
    """What any op does on fake tensors: it has no results, and the schema tells what it writes to."""


def register(schema: str) -> Callable[[Op], Op]:
    """Make a function a torch op on CPU and CUDA tensors; the decorated name becomes the op.

    schema: "name(Tensor(a!) out, Tensor input, ...) -> ()". Raises ValueError for a schema with results.
    """
    name, _, rest = schema.partition("(")
    if not rest.endswith(") -> ()"):
        raise ValueError(f"schema of {name}: got {schema!r}, expected results '-> ()'. Write to a Tensor(a!) argument.")

    def decorate(function: Op) -> Op:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in DEVICES:
            LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=LIBRARY)
        op: Op = getattr(getattr(torch.ops, NAMESPACE), name).default
        return op

    return decorate


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which `torch.compile` calls as it is, between two graphs: what keeps count of its calls is no op.

    torch.compiler.disable as a decorator would import the compiler with the package.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(function)
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return call
