"""Residual blocks of diffusers' models: norms in one pass over memory with what stands around them."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..ops.dispatch import why_no_compiled_norm
from ..ops.norms import group_norm


class FusedGroupNorm(nn.GroupNorm):
    """`GroupNorm` that may take the sum before it and the activation after it in the same pass over memory."""

    def forward(self, input: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """Return the norm of `input` [batch, channels, ...].

        Args:
            input: floating [batch, channels, ...].
            silu: whether SiLU follows.
            shift: [batch, channels], added to `input` before; None for nothing.
        """
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, silu, shift)


class FusedResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` with each norm, the time features before it and the activation after it in one operation.

    Blocks that are built otherwise (other activations, scales from the time features, resampling), and those with
    hooks on norms or activation, compute as diffusers' own.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output, as `ResnetBlock2D` does."""
        if args or kwargs or not self._fuses(temb):
            stock: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return stock
        hidden_states = self.conv1(self.norm1(input_tensor, silu=True))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden_states = self.dropout(self.norm2(hidden_states, silu=True, shift=temb))
        hidden_states = self.conv2(hidden_states)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        output: Tensor = input_tensor + hidden_states
        # Dividing by 1 would take a pass over memory and change nothing.
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor

    def _fuses(self, temb: Tensor | None) -> bool:
        parts = self.norm1, self.norm2, self.nonlinearity
        built = [type(part) for part in parts] == [FusedGroupNorm, FusedGroupNorm, nn.SiLU]
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
        timed = (temb is None) == (self.time_emb_proj is None)
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        return built and plain and timed and not hooked


def fuse_residual_blocks(model: nn.Module) -> None:
    """Make every `ResnetBlock2D` and `GroupNorm` compute in fewer passes over memory.

    Modules of other classes, norms without weights, and those whose forward another package has replaced are left
    alone.
    """
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = FusedGroupNorm
        elif type(module) is ResnetBlock2D:
            module.__class__ = FusedResnetBlock2D


def restore_residual_blocks(model: nn.Module) -> None:
    """Undo `fuse_residual_blocks`."""
    own: dict[type[nn.Module], Any] = {FusedGroupNorm: nn.GroupNorm, FusedResnetBlock2D: ResnetBlock2D}
    for module in model.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]


def norm_kernels(model: nn.Module) -> dict[str, str]:
    """How each norm of groups computes, and why, by name."""
    return {name: _kernel(module) for name, module in model.named_modules() if type(module) is FusedGroupNorm}


def _kernel(norm: FusedGroupNorm) -> str:
    obstacle = why_no_compiled_norm(norm.weight.device, norm.weight.dtype, norm.num_channels, norm.num_groups)
    if obstacle is not None:
        return f"by torch: {obstacle}"
    return "in compiled C, with the sum before and the activation after in the same pass"
