"""Packages whose names are imported when they are first used: torch alone takes seconds, and refusals need none
of it."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, homes: dict[str, list[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` (PEP 562) and `__all__` of a package.

    Args:
        package: its `__name__`.
        homes: the names that it offers, by the module below it that defines them.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return find, sorted(home)
