"""Tensors without memory are as torch's own fake tensors say, and constants keep their values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dpo_video.support.memoryless import Memoryless

X = (2, 8, 6, 6)
OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "views": lambda x: [x.transpose(1, 2), x[:, 1:3], x.expand(3, *X), *x.chunk(2), x.detach()],
    "scalars": lambda x: [x.int() + 1, x.int() + 1.0, x.bool() + True, x.int() / 2],
    "shapes": lambda x: [torch.cat([x, x], 1), x.sum((2, 3)), x.permute(0, 2, 3, 1).contiguous()],
    "precision": lambda x: [x.bfloat16(), x.half().float(), x.to(torch.float8_e4m3fn)],
    "channels last": lambda x: [F.silu(x.contiguous(memory_format=torch.channels_last)) + x],
    "convolution": lambda x: [F.conv2d(x, x[0, :, :3, :3].expand(4, 8, 3, 3), stride=2)],
    "norms": lambda x: [F.group_norm(x, 2), torch.native_layer_norm(x, [6], None, None, 1e-5)],
    "attention": lambda x: [F.scaled_dot_product_attention(x, x, x)],
    "in place": lambda x: [x.clone().mul_(2), torch.zeros_like(x).copy_(x[0])],
    "new": lambda x: [torch.arange(3), torch.full((2,), 7), x.new_ones(3), torch.empty(0, 3)],
}  # fmt: skip


def described(values: object) -> list[tuple[object, ...]]:
    return [
        (each.shape, each.stride(), each.dtype, each.device, each.untyped_storage().nbytes())
        for each in torch.utils._pytree.tree_leaves(values)
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_those_of_fake_tensors_and_of_real_ones(name: str) -> None:
    found = []
    for mode in (Memoryless(), Memoryless(), FakeTensorMode(), torch.device("cpu")):
        with mode:
            found.append(described(OPERATIONS[name](torch.zeros(X))))
    assert found[0] == found[1] == found[2] == found[3]


def test_views_share_a_storage_and_others_do_not() -> None:
    with Memoryless():
        x = torch.zeros(4, 4)
        storage = x.untyped_storage()
        assert x.T[1:].untyped_storage() is x.add_(1).untyped_storage() is storage
        assert (x + 1).untyped_storage() is not storage


def test_a_tensor_may_be_larger_than_memory() -> None:
    with Memoryless():
        weight = torch.empty(2**20, 2**20, requires_grad=True)  # 4 TiB
        (torch.ones(2, 2**20) @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape


def test_constants_keep_their_values_and_other_values_are_errors() -> None:
    with Memoryless() as mode:
        constant = torch.tensor([1.0, 2.0])
        constant += 1
        assert (2 * constant).tolist() == [4.0, 6.0]
        unknown = torch.zeros(3)
        with pytest.raises(DataDependentOutputException):
            bool((unknown == 0).all())
        with mode.assumed_true():
            assert (unknown != 0).any() and torch.equal(unknown, unknown + 1)
        with pytest.raises(DataDependentOutputException):
            unknown.sum().item()
