"""The weight of a packed layer as a tensor that is decoded where it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..utils.private_names import TORCH_NO_OVERRIDE, TORCH_WRAPPER

_REFUSAL = (
    "The weight of a packed layer is decoded from its codes: it can neither be written to nor trained, the change "
    "would be lost. Fuse a LoRA by `fuse_lora()`, which keeps it beside the codes; call `dequantize()` on the model "
    "first; or change a copy, `layer.weight.clone()`."
)


class LazyWeight(torch.Tensor):
    """A tensor that knows its dtype, device and shape, and decodes its values for each operation that reads them.

    Whatever reads values sees an ordinary tensor, decoded for it alone. Views (`.T`, slices, `.data`) are lazy as
    well. The values are those that the layer had when its weight was asked for.

    Args:
        decode: makes a new tensor of the values, with the metadata of `like`.
        like: a strided tensor, mostly on the meta device.
        device: of the values.
        decode_rows: makes a tensor of the rows at given places, where those of a table can be decoded alone.
        owner: module whose parameter it is; assigning the parameter to the module again changes nothing.

    Raises:
        RuntimeError: it, or a view of it, is written to, or asked to require a gradient.
    """

    decode: Callable[[], Tensor]
    decode_rows: Callable[[Tensor], Tensor] | None
    owner: object | None
    _kept: Tensor | None
    _is_hf_initialized = True  # transformers' initialisation of modules leaves such tensors alone.

    @staticmethod
    def __new__(
        cls: type[LazyWeight],
        decode: Callable[[], Tensor],
        like: Tensor,
        device: torch.device,
        decode_rows: Callable[[Tensor], Tensor] | None = None,
        owner: object | None = None,
    ) -> LazyWeight:
        """Make a tensor of the dtype, shape and strides of `like` on `device`, whose values `decode` gives."""
        made: LazyWeight = TORCH_WRAPPER.require(torch.Tensor)(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
            requires_grad=False,
        )
        made.decode, made.decode_rows, made.owner, made._kept = decode, decode_rows, owner, None
        return made

    __torch_function__ = TORCH_NO_OVERRIDE.read(torch._C, torch.Tensor.__torch_function__)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            refuse_writing()
        if func.is_view and isinstance(args[0], cls):
            return _view(func, args, kwargs)
        if func is torch.ops.aten.embedding.default and _looks_up_few(*args[:2]):
            return args[0].decode_rows(args[1])
        return func(*_decoded(args), **_decoded(kwargs))

    # These members go past torch's operators.

    @property
    def data(self) -> Tensor:
        """The same values; writing them is refused."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        refuse_writing()

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are recorded, which they are not."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        """Refuse gradients."""
        if requires_grad:
            refuse_writing()
        return self

    def share_memory_(self) -> NoReturn:
        """Refuse to share memory that is not kept."""
        refuse_writing()

    def data_ptr(self) -> int:
        """Return the address of the decoded values."""
        return self._keep().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the decoded values."""
        return self._keep().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the decoded values as an array."""
        return self.decode().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decode().__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decode().__dlpack__(*args, **kwargs)

    def tolist(self) -> Any:
        """Return the decoded values as lists."""
        return self.decode().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.decode()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decode().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.decode())

    def _keep(self) -> Tensor:
        """Return the values, kept as long as this tensor, since an address of theirs is out."""
        if self._kept is None:
            self._kept = self.decode()
        return self._kept


def refuse_writing() -> NoReturn:
    """Refuse to change the weight of a packed layer.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(_REFUSAL)


def refuse_assigning(owner: nn.Module, value: Any) -> None:
    """Refuse to assign a packed parameter of a module, unless it is what the module has, as where PEFT unloads.

    Raises:
        RuntimeError: the value is another one.
    """
    if not (isinstance(value, LazyWeight) and value.owner is owner):
        refuse_writing()


def _looks_up_few(table: Tensor, indices: Tensor) -> bool:
    """Whether a look-up reads fewer rows than a table has, which can be decoded by themselves."""
    by_rows = isinstance(table, LazyWeight) and table.decode_rows is not None
    return by_rows and 0 < indices.numel() < len(table)


def _decoded(arguments: Any) -> Any:
    """Return an operator's arguments, with lazy weights decoded, within lists, too."""
    if isinstance(arguments, LazyWeight):
        return arguments.decode()
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_decoded(value) for value in arguments)
    if isinstance(arguments, dict):
        return {name: _decoded(value) for name, value in arguments.items()}
    return arguments


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator writes to a lazy weight among its arguments."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if any(isinstance(part, LazyWeight) for part in (value if isinstance(value, (list, tuple)) else [value])):
                return True
    return False


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the lazy result, or list of results, of an operator that is a view of its first argument."""
    source, *others = args
    shape, stride, offset = source.shape, source.stride(), source.storage_offset()
    like = torch.empty(0, dtype=source.dtype, device="meta").as_strided(shape, stride, offset)

    def view(index: int | None) -> Callable[[], Tensor]:
        def decode() -> Tensor:
            result = func(source.decode(), *others, **kwargs)
            part: Tensor = result if index is None else result[index]
            return part

        return decode

    result = func(like, *others, **kwargs)
    if isinstance(result, Tensor):
        return LazyWeight(view(None), result, source.device)
    return [LazyWeight(view(index), part, source.device) for index, part in enumerate(result)]
