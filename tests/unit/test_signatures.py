"""Parity of public signatures with FlashInfer: names, order and defaults of all parameters.

`signatures_manifest.json` holds FlashInfer's signatures of every name this package has; its `source` names the version.
Whoever adds a name to the package adds it there too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from enum import EnumMeta
from pathlib import Path
from typing import Any

import pytest

import flashinfer

SIGNATURES: dict[str, str] = json.loads(Path(__file__).with_name("signatures_manifest.json").read_text())["signatures"]
# A functools.partial in FlashInfer, whose signature the manifest's source does not list.
PARTIALS = {"single_prefill_with_kv_cache_return_lse": ("single_prefill_with_kv_cache", {"return_lse": True})}


def resolve(path: str) -> Any:
    """The object at a dotted path: `flashinfer.module.name`, `flashinfer.name`, and `.method` for classes."""
    parts = path.split(".")
    depth = 2 if len(parts) > 2 and parts[1].islower() else 1  # modules are lower case, classes are not
    found = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


def spelled(function: Any) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return plain(str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)))


def plain(text: str) -> str:
    """A signature with enum members by their names alone: how they are printed depends on Python."""
    return re.sub(r"<(\w+\.\w+): [^>]+>", r"\1", text)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path: str) -> None:
    assert spelled(resolve(path)) == plain(SIGNATURES[path])


@pytest.mark.parametrize("name", PARTIALS)
def test_partial(name: str) -> None:
    base, fixed = PARTIALS[name]
    ours = inspect.signature(getattr(flashinfer, name)).parameters
    base_parameters = inspect.signature(getattr(flashinfer, base)).parameters
    assert list(ours) == list(base_parameters)
    for parameter, value in base_parameters.items():
        assert ours[parameter].default == fixed.get(parameter, value.default)


def test_every_public_name_is_compared() -> None:
    compared = {path.split(".")[1] for path in SIGNATURES} | set(PARTIALS)
    # How an enum is constructed is Python's affair, not FlashInfer's.
    public = {
        name
        for name in flashinfer.__all__
        if callable(getattr(flashinfer, name)) and not isinstance(getattr(flashinfer, name), EnumMeta)
    }
    assert public - compared == set()


def test_the_comparison_can_fail() -> None:
    def wrong_default(input: int, out: object = 1, enable_pdl: object = None) -> None: ...

    assert spelled(wrong_default) == "(input, out=1, enable_pdl=None)"
    assert spelled(wrong_default) != SIGNATURES["flashinfer.silu_and_mul"]
