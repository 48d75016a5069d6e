"""AdamW and tensors in CPU memory. Block inputs and weights: the tests of those."""

from __future__ import annotations

import torch
from torch import nn

from dpo_video.memory.offload import HOST, HostAdamW, to_device, to_host


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.AdamW, first: int) -> None:
    for step in range(first, first + 3):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[:2]:  # the last one has no gradient
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3)]


def test_host_adamw_steps_as_adamw_and_shares_its_state() -> None:
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    mine, others = weights(), weights()
    host, plain = HostAdamW(mine, **options), torch.optim.AdamW(others, **options)
    stepped(mine, host, 0)
    stepped(others, plain, 0)
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
    swapped = torch.optim.AdamW(mine, **options)
    swapped.load_state_dict(host.state_dict())
    host = HostAdamW(others, **options)
    host.load_state_dict(plain.state_dict())
    stepped(mine, swapped, 3)
    stepped(others, host, 3)
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
    state = [value for of in host.state.values() for value in of.values()]
    assert len(state) == 6 and all(value.device == HOST for value in state)


def test_offloading_keeps_values_and_strides() -> None:
    tensor = torch.randn(3, 4).t()
    back = to_device(to_host(tensor), HOST)
    assert torch.equal(tensor, back) and back.stride() == tensor.stride()
    assert back.data_ptr() != tensor.data_ptr()
