"""Objects that a recipe names by `package.module:NAME`: your own objectives and hooks.

A module is found on Python's search path, which the folder of the recipe belongs to.
"""

from __future__ import annotations

import importlib
from typing import TypeVar

from lopd_megatron.errors import UserError

Kind = TypeVar("Kind")


def is_own(name: str) -> bool:
    """Whether a name leads to an object of the user's own code."""
    return ":" in name


def load(name: str, kind: type[Kind], setting: str) -> Kind:
    """The object that `name` leads to, which must be an instance of `kind`."""
    found = _find(name, setting)
    if not isinstance(found, kind):
        raise UserError(f"{setting}={name} is a {type(found).__name__}; it must be a {kind.__name__}")
    return found


def load_class(name: str, base: type[Kind], setting: str) -> type[Kind]:
    """The class that `name` leads to, which must be a subclass of `base`."""
    found = _find(name, setting)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{setting}={name} is no subclass of {base.__module__}.{base.__name__}")
    return found


def _find(name: str, setting: str) -> object:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{setting}={name}: {error}; the module must lie beside the recipe or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(
            f"{setting}={name}: importing {module} failed with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, attribute):
        public = ", ".join(sorted(word for word in vars(found) if not word.startswith("_")))
        raise UserError(f"{setting}={name}: {module} has no {attribute!r}; it has {public}")
    return getattr(found, attribute)
