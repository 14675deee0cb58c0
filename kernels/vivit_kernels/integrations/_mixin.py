"""The base of classes that are mixed in before a class of a host library, which is known only where it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Mixin:
    """Adds no state: an instance becomes ours, and the host's again, by its class alone."""

    if TYPE_CHECKING:  # the attributes are those of the host's class, which comes next

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def __getattr__(self, name: str) -> Any: ...
