"""Models in training on several processes: replicated on each, or sharded over them (FSDP).

Of a sharded model every process holds a shard of each weight, gradient, moment and average; the weights of a block are
gathered while it computes. Sharding suits models whose training does not fit one GPU. Checkpoints hold whole tensors
in either case, so that a run can continue in the other.
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
    """Model of which every process holds a replica.

    Args:
        accelerator: accelerator of the processes.
        model: model on the device, not prepared by accelerate.
    """

    def __init__(self, accelerator: Accelerator, model: ModelMixin) -> None:
        self.accelerator, self.model = accelerator, model

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return the model to call for the forward pass, and the optimizer to step."""
        self._prepared, optimizer = self.accelerator.prepare(self.model, optimizer)
        return self._prepared, optimizer

    def whole(self) -> ModelMixin:
        """Return the model as it was before `prepare`, with the present weights."""
        return self.accelerator.unwrap_model(self._prepared, keep_fp32_wrapper=False, keep_torch_compile=False)


class ShardedModel:
    """Model that is sharded in place over the processes, and can be gathered again.

    Units are the modules that the model does not allow to split (diffusers' `_no_split_modules`), and the rest.

    Args:
        accelerator: accelerator of the processes.
        model: whole model on the device, not prepared by accelerate. Optimizer and average must be made from its
            parameters after this, not before.

    Raises:
        ValueError: there is only one process, or training is in fp16, whose gradient scaler does not support shards.
    """

    def __init__(self, accelerator: Accelerator, model: ModelMixin) -> None:
        if accelerator.num_processes == 1:
            raise ValueError("A model is sharded over several processes; launch them, or train without sharding.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("A sharded model does not train in fp16. Use bf16.")
        self.accelerator, self.model = accelerator, model
        self._empty = _meta_copy(model)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        units = set(DIFFUSERS_UNITS.read(model) or [])
        for module in reversed(list(model.modules())):  # Inner modules come before outer ones.
            if module is model or type(module).__name__ in units:
                # The outermost module reshards, too, since averages replace its weights between calls.
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return the model to call for the forward pass, and the optimizer to step, which saves whole tensors."""
        _save_whole(optimizer, keep=self.accelerator.is_main_process)
        # In evaluation mode accelerate adds autocast without wrapping the model in DDP.
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def whole(self) -> ModelMixin:
        """Return the model as it was before, with the present weights, on the CPU. Every process must call it."""
        self._empty.load_state_dict(gathered(self.model.state_dict()), assign=True)
        return self._empty.train(self.model.training)


def _meta_copy(model: ModelMixin) -> ModelMixin:
    """Return a copy of the model with its parameters on the meta device."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in copied.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, empty)
    return copied


def gathered(state: Any, keep: bool = True) -> Any:
    """Return nested dictionaries and lists with sharded tensors gathered, on the CPU. Every process must call it.

    Args:
        state: nested dictionaries and lists; values that are not sharded are returned unchanged.
        keep: whether this process needs the gathered tensors; else they are returned empty.
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
    """Return this process's shard of `whole` where `parameter` is sharded, else `whole`."""
    if not isinstance(parameter, DTensor):
        return whole
    # Every process has the whole tensor, so that none needs to send it (`src_data_rank=None`).
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def local(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: sliced_like(value, own[name]) for name, value in state.items()})


def _save_whole(optimizer: torch.optim.Optimizer, keep: bool) -> None:
    """Let `state_dict` of an optimizer over shards return whole tensors, and `load_state_dict` accept them.

    Args:
        optimizer: optimizer of the parameters of a sharded model.
        keep: see `gathered`.
    """

    def save(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = gathered(state, keep)
        return whole

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
