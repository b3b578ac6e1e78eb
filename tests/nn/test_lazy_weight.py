"""The weight of a packed layer: a tensor to whoever reads it, decoded no earlier, and never written."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_lora, tiny_unet
from tiny_transformers import tiny_flux
from torch import nn
from transformers import T5Config, T5EncoderModel

from diffusers_bitsfusion import BitsFusionConfig, quantize_model
from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn import PackedWeight
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSAL = r"can neither be written to nor trained.*fuse_lora\(\).*dequantize\(\)"


def packed_layer(layer=None, dtype=torch.float32):
    torch.manual_seed(0)
    layer = layer or nn.Linear(10, 6)
    packed = packed_from_float(layer, 3, dtype)
    return pack_weight(packed, layer.weight, Rounding())


@pytest.fixture
def layer():
    return packed_layer()


@pytest.fixture
def dense(layer):
    """The same weight as an ordinary tensor."""
    return layer.dense_weight(torch.float32)


METADATA = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "shape": lambda w: (w.shape, w.size(0), len(w), w.dim(), w.ndim),
    "numel": lambda w: (w.numel(), w.nelement(), w.element_size(), w.nbytes),
    "layout": lambda w: (w.layout, w.stride(), w.is_contiguous(), w.is_cuda, w.is_meta, w.is_floating_point()),
    "gradient": lambda w: (w.requires_grad, w.grad, w.is_leaf, w.grad_fn),
    "kind": lambda w: (isinstance(w, torch.Tensor), isinstance(w, nn.Parameter), w.is_sparse, w.is_quantized),
    "data": lambda w: (w.data.dtype, w.data.shape, w.detach().shape),
    "views": lambda w: (w.T.shape, w.T.stride(), w[1:3].shape, w.flatten().shape, w.reshape(-1, 2).shape),
    "parts": lambda w: [part.shape for part in (*w.chunk(2), *w.split(4), *w)],
    "no cast": lambda w: (w.to(torch.float32).dtype, w.to("cpu").device, w.float().dtype, w.contiguous().shape),
}


@pytest.mark.parametrize("ask", METADATA.values(), ids=METADATA)
def test_what_a_tensor_knows_of_itself_is_known_without_decoding(layer, dense, ask, decodes):
    assert ask(layer.weight) == ask(dense)
    assert decodes == {"read": 0, "call": 0}


VALUES = {
    "sum": lambda w: w.sum(),
    "double": lambda w: w.to(torch.float64),
    "transposed": lambda w: w.T @ torch.ones(6, 2),
    "slice": lambda w: w[1:4, ::2] + 0,
    "element": lambda w: torch.tensor(w[2, 3].item()),
    "row": lambda w: list(w)[4] * 1,
    "part": lambda w: w.chunk(3)[1].T.reshape(-1) * 1,
    "unflattened": lambda w: w.unflatten(1, (2, 5)).permute(2, 0, 1).reshape(5, -1) + 0,
    "list": lambda w: torch.tensor(w.tolist()),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "array": lambda w: torch.from_numpy(np.asarray(w)),
    "dlpack": lambda w: torch.from_dlpack(w),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "clone": lambda w: w.clone(),
    "norm": lambda w: torch.linalg.norm(w),
    "representation": lambda w: torch.tensor(len(repr(w))),
    "where": lambda w: torch.where(w > 0, w, 0),
    "copied": lambda w: torch.zeros(6, 10).copy_(w),
    "added": lambda w: torch.ones(6, 10).add_(w),
    "data": lambda w: w.data * 2,
}


@pytest.mark.parametrize("read", VALUES.values(), ids=VALUES)
def test_whoever_reads_it_sees_an_ordinary_tensor(layer, dense, read):
    found = read(layer.weight)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, read(dense), rtol=0, atol=0)


def test_it_is_equal_to_its_values_and_one_operation_decodes_once(layer, dense, decodes):
    assert torch.equal(layer.weight, dense) and decodes["read"] == 1
    assert torch.allclose(dense, layer.weight) and decodes["read"] == 2


def test_files_hold_its_values(layer, dense, tmp_path):
    save_file({"w": layer.weight}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], dense)
    torch.save(layer.weight, tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt"), dense)


def write_index(w):
    w[0] = 1


def write_sliced_data(w):
    w.data[1:3] += 1


def assign_data(w):
    w.data = torch.zeros(6, 10)


def add_to_data(w):
    w.data += 1


def require_grad(w):
    w.requires_grad = True


WRITES = {
    "add_": lambda w: w.add_(1),
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(6, 10)),
    "zero_": lambda w: w.zero_(),
    "set_": lambda w: w.set_(torch.zeros(6, 10)),
    "resize_": lambda w: w.resize_(3),
    "transpose_": lambda w: w.t_(),
    "index": write_index,
    "data": add_to_data,
    "data.copy_": lambda w: w.data.copy_(torch.zeros(6, 10)),
    "data[]": write_sliced_data,
    "data=": assign_data,
    "detached": lambda w: w.detach().mul_(2),
    "transposed": lambda w: w.T.add_(1),
    "view": lambda w: w.view(-1).mul_(2),
    "reshaped": lambda w: w.reshape(12, 5)[0].fill_(1),
    "part": lambda w: w.chunk(2)[1].zero_(),
    "row": lambda w: next(iter(w)).zero_(),
    "no cast": lambda w: w.to(torch.float32).contiguous().add_(1),
    "out": lambda w: torch.add(torch.zeros(6, 10), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([torch.zeros(2), w], 1.0),
    "init": nn.init.normal_,
    "share_memory_": lambda w: w.share_memory_(),
    "requires_grad_": lambda w: w.requires_grad_(True),
    "requires_grad": require_grad,
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_it_refuses_to_be_written(layer, dense, write, grad):
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=REFUSAL):
        write(layer.weight)
    assert torch.equal(layer.weight, dense)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(6, 10)), torch.zeros(6, 10), None])
def test_the_layer_accepts_no_other_weight(layer, dense, value):
    with pytest.raises(RuntimeError, match=REFUSAL):
        layer.weight = value
    assert torch.equal(layer.weight, dense)


def test_functional_use_has_the_gradients_of_the_dense_weight(dense, layer, decodes):
    x = torch.randn(4, 10, requires_grad=True)
    found, expected = F.linear(x, layer.weight, layer.bias), F.linear(x, dense, layer.bias)
    assert torch.equal(found, expected)
    assert decodes["read"] == 1
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    conv = packed_layer(nn.Conv2d(4, 6, 3))
    image = torch.randn(1, 4, 7, 7, requires_grad=True)
    found, expected = (F.conv2d(image, w) for w in (conv.weight, conv.dense_weight(torch.float32)))
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), image)[0] for y in (found, expected)))


def test_torch_s_transforms_and_autocast_take_it(layer, dense):
    x = torch.randn(4, 10)
    found, expected = (torch.func.grad(lambda x, w=w: F.linear(x, w).pow(3).sum())(x) for w in (layer.weight, dense))
    assert torch.equal(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.linear(x, layer.weight), F.linear(x, dense))
    with torch.inference_mode():
        assert torch.equal(layer.weight.T.reshape(-1) * 1, dense.T.reshape(-1))


def test_it_is_that_of_the_moment_when_it_was_asked_for(layer, dense):
    before = layer.weight
    layer.extend_branch(torch.ones(2, 10), torch.ones(6, 2))
    assert torch.equal(before, dense)
    assert torch.equal(layer.weight, dense + 2)
    layer.set_codes(torch.zeros_like(layer.codes), torch.ones(6))
    assert torch.equal(before, dense)


def test_a_compiled_model_may_ask_for_its_metadata_and_its_values(layer, dense, decodes):
    torch._dynamo.reset()
    x = torch.randn(3, 10)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def ask(x):
        return layer(x).to(layer.weight.dtype)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def use(x):
        return F.linear(x, layer.weight)

    ask(x)
    decodes.update(read=0, call=0)
    assert torch.equal(ask(x), layer(x))
    assert decodes == {"read": 0, "call": 2}
    assert torch.equal(use(x), F.linear(x, dense))


# Whole models that look at weights.


def count_calls(model, decodes):
    called = []
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.register_forward_hook(lambda *_: called.append(1))
    decodes.update(read=0, call=0)
    return called


@pytest.mark.parametrize("gated", [True, False])
def test_t5_asks_for_dtypes_alone(gated, decodes):
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    encoder = quantize_model(T5EncoderModel(config).eval(), BitsFusionConfig(recipe=4), progress=False)
    called = count_calls(encoder, decodes)
    with torch.no_grad():
        encoder(torch.arange(6)[None])
    assert called and decodes == {"read": 0, "call": len(called)}


@pytest.mark.parametrize("build", [tiny_unet, tiny_flux])
def test_loading_a_lora_decodes_nothing(build, decodes):
    model = quantize_model(build(), BitsFusionConfig(recipe=4, time_embedding="keep"), progress=False)
    targets = ("to_q", "to_out.0", "conv1", "proj_in")
    lora = tiny_lora(model, targets, rank=2)
    decodes.update(read=0, call=0)
    model.load_lora_adapter(lora, prefix=None)
    model.set_adapters(["default_0"], [0.5])
    model.fuse_lora()
    model.unfuse_lora()
    assert decodes == {"read": 0, "call": 0}
