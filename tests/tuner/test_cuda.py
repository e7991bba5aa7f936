# SPDX-License-Identifier: Apache-2.0
"""What runs differently on a GPU: packing, the fused nodes, moves between devices, merging, files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from smn_peft import MaskConfig
from smn_peft.functional.masking import topk_mask
from smn_peft.functional.merging import merge_weight, unmerge_weight
from smn_peft.functional.packing import hamming, pack_bits, popcount, unpack_bits
from smn_peft.storage.adapter_file import WEIGHTS_NAME
from smn_peft.storage.fingerprint import tensor_digest

from .cases import BY_NAME, CASES, layer_of, mask_bits, masked_model, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*saved as bits", "ignore:Could not find a config file"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _exact():
    """fp32 products in fp32, so that they compare with the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@every_case
def test_forward_and_gradient_are_the_cpu_s(case):
    x, model = case.inputs(), masked_model(case, case.random())
    twin = copy.deepcopy(model).cuda()
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if case.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(twin(x.cuda()).cpu(), model(x), **tolerance)
    for net, inputs in ((model, x), (twin, x.cuda())):
        net(inputs).float().tanh().sum().backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        if theirs.requires_grad:
            size = float(theirs.grad.abs().max())
            torch.testing.assert_close(
                mine.grad.cpu(), theirs.grad, rtol=tolerance["rtol"], atol=tolerance["atol"] * size
            )


@every_case
@pytest.mark.parametrize("packed", [False, True], ids=["scores", "packed"])
def test_the_life_of_an_adapter(case, packed, tmp_path):
    x = case.inputs().cuda()
    model = masked_model(case, case.random(1, inference_mode=packed), "one")
    model.add_adapter("two", case.random(2, inference_mode=packed))
    masks = {name: mask_bits(model, name) for name in ("one", "two")}
    model.cuda()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    base = case.base().cuda()
    with torch.no_grad():
        for name in ("two", "one"):
            model.set_adapter(name)
            expected = model(x)
            assert all(torch.equal(mask.cpu(), masks[name][path]) for path, mask in mask_bits(model, name).items())
            model.merge_adapter()
            torch.testing.assert_close(model(x), expected, **case.tolerance)
            model.unmerge_adapter()
        for path in case.weights:
            assert torch.equal(layer_of(model).base_layer.get_parameter(path), base.body.get_parameter(path))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.base().cuda(), tmp_path / "one").eval()
        assert torch.equal(loaded(x), expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), base(x), **case.tolerance)
    on_cpu = masked_model(case, case.random(1, inference_mode=packed), "one")
    on_cpu.save_pretrained(tmp_path / "cpu")
    files = [(tmp_path / place / WEIGHTS_NAME).read_bytes() for place in ("one", "cpu/one")]
    assert files[0] == files[1]


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(case, dtype):
    model = masked_model(case).cuda()
    with torch.autocast("cuda", dtype):
        train(model, case.inputs().cuda())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters() if parameter.requires_grad)
    assert any(not mask.all() for mask in mask_bits(model).values())


def test_packing_and_counting_are_the_cpu_s():
    for shape in ((), (0,), (7,), (8,), (63, 65), (16, 3, 3, 3)):
        masks = [torch.rand(shape) < share for share in (0.3, 0.8)]
        packed = [pack_bits(mask.cuda()) for mask in masks]
        for mask, bits in zip(masks, packed, strict=True):
            assert torch.equal(bits.cpu(), pack_bits(mask))
            assert torch.equal(unpack_bits(bits, shape).cpu(), mask)
            assert popcount(bits) == int(mask.sum())
        assert hamming(*packed) == int((masks[0] != masks[1]).sum())


def test_topk_does_not_depend_on_the_device():
    scores = torch.randint(0, 9, (1000,)).float()
    for kept in (0.1, 0.5, 0.93):
        assert torch.equal(topk_mask(scores.cuda(), kept).cpu(), topk_mask(scores, kept))


def test_a_digest_does_not_depend_on_the_device():
    weight = torch.randn(30, 20)
    assert tensor_digest(weight.cuda()) == tensor_digest(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stash_can_wait_on_another_device(dtype):
    weight = torch.randn(50, 40).to(dtype).cuda()
    before = weight.clone()
    stash = merge_weight(weight, torch.rand(50, 40, device="cuda") < 0.6)
    unmerge_weight(weight, type(stash)(*(tensor.cpu() for tensor in stash)))
    assert torch.equal(weight, before)


def test_a_loader_s_bits_survive_a_move(tmp_path):
    case = BY_NAME["conv2d"]
    masked_model(case, case.random(4)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True).cuda().eval()
    reference = PeftModel.from_pretrained(case.base(), tmp_path).cuda().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(case.inputs().cuda()), reference(case.inputs().cuda()))


def test_an_evaluation_after_the_replay_of_a_recorded_step():
    case = BY_NAME["conv2d-bias"]
    x, model = case.inputs().cuda(), masked_model(case, case.random()).cuda()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 50.0, fused=True)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled before anything is recorded
        step()
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    with torch.no_grad():
        before = model(x)
        graph.replay()
        after = model(x)
        torch.testing.assert_close(after, copy.deepcopy(model)(x))
    assert not torch.equal(after, before)


def test_two_of_four_is_what_semi_structured_tensors_take():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(128, 128, bias=False)).cuda().half()
    model = get_peft_model(base, MaskConfig(target_modules=["0"], granularity="2:4", scale=False))
    weight = model.merge_and_unload()[0].weight.detach()
    x = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    torch.testing.assert_close(nn.functional.linear(x, sparse), nn.functional.linear(x, weight), rtol=1e-2, atol=1e-2)
