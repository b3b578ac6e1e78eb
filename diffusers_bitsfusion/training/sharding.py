"""How a model in training lies on the processes: whole on each, or shared out over them (FSDP).

Shared out, every process holds a slice of each weight, gradient, moment and average; a block's weights come together
while it computes. For models whose training does not fit one GPU. Checkpoints hold whole tensors either way, so that
a run can go on in the other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..utils.private_names import DIFFUSERS_UNITS


class ReplicatedModel:
    """A model of which every process holds all.

    Args:
        accelerator: its processes hold the model.
        model: on the device, not prepared by accelerate.
    """

    def __init__(self, accelerator: Accelerator, model: ModelMixin):
        self.accelerator, self.model = accelerator, model

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """What to call for the forward pass, and the optimizer to step."""
        self._prepared, optimizer = self.accelerator.prepare(self.model, optimizer)
        return self._prepared, optimizer

    def whole(self) -> ModelMixin:
        """The prepared model as it was before, with the present weights."""
        return self.accelerator.unwrap_model(self._prepared, keep_fp32_wrapper=False, keep_torch_compile=False)


class ShardedModel:
    """Shards a model in place, and gives it back whole.

    Units are the model's own that should not be split (diffusers' `_no_split_modules`), and what is left.

    Args:
        accelerator: its processes share the model.
        model: whole, on the device, not prepared by accelerate. Make optimizer and average from its parameters after
            this, not before.

    Raises:
        ValueError: there is one process only, or fp16, whose gradient scaler knows no slices.
    """

    def __init__(self, accelerator: Accelerator, model: ModelMixin):
        if accelerator.num_processes == 1:
            raise ValueError("A model is shared out over several processes; launch them, or train without sharding.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("A shared-out model does not train in fp16. Use bf16.")
        self.accelerator, self.model = accelerator, model
        self._empty = _empty_twin(model)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        units = set(DIFFUSERS_UNITS.read(model) or [])
        for module in reversed(list(model.modules())):  # the inner before the outer
            if module is model or type(module).__name__ in units:
                # The outermost, too, gives its weights back: averages are swapped in between calls.
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """As of `ReplicatedModel`; the optimizer saves whole tensors."""
        _save_whole(optimizer, keep=self.accelerator.is_main_process)
        # Autocast as ever, but no DDP around it.
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def whole(self) -> ModelMixin:
        """The model as it was before, with the present weights, on the CPU; every process calls it."""
        self._empty.load_state_dict(gathered(self.model.state_dict()), assign=True)
        return self._empty.train(self.model.training)


def _empty_twin(model: ModelMixin) -> ModelMixin:
    """A copy whose parameters hold no memory."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, empty)
    return twin


def gathered(state: Any, keep: bool = True) -> Any:
    """Nested dictionaries and lists with slices made whole, on the CPU; every process calls it.

    Args:
        state: other tensors and values in it come back as they are.
        keep: whether this process wants what it gathers; else whole tensors come back empty.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    return state


def sliced_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's slice of `whole`, if `parameter` is one; else `whole`."""
    if not isinstance(parameter, DTensor):
        return whole
    # Every process has the whole tensor: no need to send anything.
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: sliced_like(value, own[name]) for name, value in state.items()})


def _save_whole(optimizer: torch.optim.Optimizer, keep: bool) -> None:
    """Make `state_dict` of an optimizer over slices give whole tensors, and `load_state_dict` take them.

    Args:
        optimizer: over the parameters of a sharded model.
        keep: see `gathered`.
    """

    def save(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return gathered(state, keep)

    def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sliced = {
            index: {
                name: sliced_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        }
        return state | {"state": sliced}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
