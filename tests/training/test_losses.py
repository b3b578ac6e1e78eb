import copy

import pytest
import torch
from tiny import tiny_unet
from torch import nn

from diffusers_bitsfusion import prepare_qat
from diffusers_bitsfusion.training.batches import Batch
from diffusers_bitsfusion.training.losses import BlockFeatures, Distillation, NoisePrediction, predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 32, generator=generator)
    return Batch([0, 1], ["a", "b"], noisy, torch.tensor([3, 700]), states, target)


def block_outputs(unet, batch):
    """What each down and up block gave, read off the blocks by wrapping them."""
    outputs = []
    for block in [*unet.down_blocks, *unet.up_blocks]:

        def call(*args, _forward=block.forward, **kwargs):
            output = _forward(*args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            return output

        block.forward = call
    prediction = unet(batch.noisy, batch.timesteps, batch.states).sample
    for block in [*unet.down_blocks, *unet.up_blocks]:
        del block.forward
    return prediction, outputs


def test_distillation_is_noise_plus_weighted_features(batch, make_config):
    teacher = tiny_unet().requires_grad_(False)
    student = prepare_qat(copy.deepcopy(teacher).requires_grad_(True), make_config())
    with torch.no_grad():
        (prediction, features), (target, targets) = block_outputs(student, batch), block_outputs(teacher, batch)
    noise = float((prediction - target).square().mean())
    feature = sum(float((a - b).square().mean()) for a, b in zip(features, targets, strict=True))
    assert len(features) == 4  # two down, two up

    loss = Distillation(student, teacher, feature_weight=0.25)(student, batch)
    assert loss.total.item() == pytest.approx(noise + 0.25 * feature, rel=1e-5)
    assert float(loss.parts["noise"]) == pytest.approx(noise, rel=1e-5)
    assert float(loss.parts["feature"]) == pytest.approx(feature, rel=1e-5)

    plain = Distillation(student, teacher, feature_weight=0)(student, batch)
    assert plain.total.item() == pytest.approx(noise, rel=1e-5) and set(plain.parts) == {"noise"}


def test_only_the_student_gets_gradients(batch, make_config):
    teacher = tiny_unet()
    student = prepare_qat(copy.deepcopy(teacher), make_config())
    Distillation(student, teacher)(student, batch).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_nothing_is_kept_of_other_calls(batch):
    unet = tiny_unet()
    features = BlockFeatures(unet)
    with features.recording() as recorded:
        pass
    unet(batch.noisy, batch.timesteps, batch.states)
    assert recorded == []
    features.remove()
    with features.recording() as recorded:
        unet(batch.noisy, batch.timesteps, batch.states)
    assert recorded == []


def test_a_teacher_in_half_precision(batch, make_config):
    teacher = tiny_unet().requires_grad_(False)
    student = prepare_qat(copy.deepcopy(teacher), make_config())
    full = Distillation(student, teacher)(student, batch)
    objective = Distillation(student, copy.deepcopy(teacher).bfloat16())
    half = objective(student, batch)
    taught = predict(objective.teacher, batch.noisy, batch.timesteps, batch.states)
    assert taught.dtype == torch.bfloat16 and half.total.dtype == torch.float32
    assert half.total.item() == pytest.approx(full.total.item(), rel=0.1)


def test_noise_prediction(batch):
    unet = tiny_unet()
    with torch.no_grad():
        expected = (unet(batch.noisy, batch.timesteps, batch.states).sample - batch.target).square().mean()
    loss = NoisePrediction()(unet, batch)
    assert loss.total.item() == pytest.approx(float(expected), rel=1e-6)


def test_models_without_such_blocks_are_refused():
    with pytest.raises(ValueError, match="Linear has no down and up blocks"):
        Distillation(nn.Linear(1, 1), nn.Linear(1, 1))
