"""Mixins put before the class of a module that exists, which keeps its name, copies and pickles."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def with_mixin(mixin: type, plain: type) -> Any:
    """Return the class of `mixin` before `plain`, under the name of `plain`; always the same one for the two."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), names)


class PutBefore(nn.Module):
    """Base of the mixins that `with_mixin` takes."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return what pickles and copies need, since the module has only the plain class under this class's name."""
        return _empty, type(self).__bases__, self.__dict__


def _empty(mixin: type, plain: type) -> nn.Module:
    kind = with_mixin(mixin, plain)
    module: nn.Module = kind.__new__(kind)
    return module
