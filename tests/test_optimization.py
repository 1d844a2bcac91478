"""One optimiser step: what is gathered, what is skipped, what low precision does not lose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Linear, Parameter

from agents.optimization import Optimization, Step, all_processes


def optimization(
    *groups: list[Parameter], rates: tuple[float, ...] = (), **more: Any
) -> Optimization:
    settings = {"adam_eps": 1e-8, "max_grad_norm": math.inf, "skip_grad_norm": 1e4, **more}
    rates = rates or (1e-2,) * len(groups)
    return Optimization(groups, rates, processes=all_processes(), **settings)


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(Linear(3, 5), torch.nn.Tanh(), Linear(5, 1))
    return layers.to(dtype)


def losses(model: torch.nn.Module, number: int = 3) -> list[torch.Tensor]:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 7, 3, generator=generator).to(dtype)
    return [(model(x).float() ** 2).mean() for x in inputs]


def flat(parameters: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def take_steps(model: torch.nn.Module, optimizer: Optimization, number: int) -> list[Step]:
    steps = []
    for _ in range(number):
        for loss in losses(model):
            optimizer.backward(loss)
        steps.append(optimizer.step())
    return steps


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_micro_batches_take_the_step_of_adamw_on_their_sum(max_grad_norm: float) -> None:
    own, plain = network(), network()
    steps = take_steps(own, optimization(list(own.parameters()), max_grad_norm=max_grad_norm), 3)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-8, weight_decay=0.0)
    for step in steps:
        sum(losses(plain)).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        adam.step()
        adam.zero_grad()
        assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert not step.skipped
    torch.testing.assert_close(flat(own.parameters()), flat(plain.parameters()), rtol=0, atol=1e-6)
    assert steps[0].grad_norm > 1e-3


def test_a_step_forgets_its_gradient() -> None:
    model = network()
    optimizer = optimization(list(model.parameters()))
    first = take_steps(model, optimizer, 1)[0]
    assert first.grad_norm > 0
    before = flat(model.parameters())
    optimizer.adam.state.clear()  # no momentum, so that a step without gradient goes nowhere
    assert optimizer.step() == Step(0.0, skipped=False)
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_error_left_behind_can_be_forgotten(dtype: torch.dtype) -> None:
    clean, other = network(dtype), network(dtype)
    optimizer = optimization(list(other.parameters()))
    optimizer.backward(100 * losses(other)[0])
    losses(other)[1].backward()  # the error came before it was gathered
    optimizer.forget()
    take_steps(other, optimizer, 1)
    take_steps(clean, optimization(list(clean.parameters())), 1)
    assert torch.equal(flat(other.parameters()), flat(clean.parameters()))


def test_groups_keep_their_own_learning_rates_and_frozen_parameters_stay() -> None:
    fast, slow, frozen = (Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = optimization([fast, frozen], [slow], rates=(1e-1, 1e-3))
    optimizer.backward((fast + slow + frozen).sum())
    optimizer.step()
    assert fast.tolist() == pytest.approx([0.9, 0.9])  # Adam's first step is the learning rate
    assert slow.tolist() == pytest.approx([0.999, 0.999])
    assert frozen.tolist() == [1.0, 1.0]
    for share, rates in ((0.5, (5e-2, 5e-4)), (0.2, (2e-2, 2e-4)), (1.0, (1e-1, 1e-3))):
        optimizer.scale_learning_rates(share)
        assert [group["lr"] for group in optimizer.adam.param_groups] == pytest.approx(rates)


def test_a_parameter_that_took_no_part_stays_where_it_is() -> None:
    used, unused = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = optimization([used, unused])
    optimizer.backward(used.sum())
    optimizer.step()
    assert unused.tolist() == [1.0, 1.0] != used.tolist()


# --- low precision --------------------------------------------------------------------------------


def test_steps_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    weight = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = optimization([weight], rates=(1e-3,))
    seen = []
    for _ in range(20):
        optimizer.backward(weight.sum())
        optimizer.step()
        seen.append(weight[0].item())
    assert seen[0] == 1.0  # 0.999 is no bfloat16 number
    assert seen[-1] == pytest.approx(0.98, abs=0.004)
    assert weight.dtype == torch.bfloat16


def test_micro_batches_add_up_in_float32() -> None:
    weight = Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = optimization([weight])
    for scale in (256.0, *[0.5] * 100):  # 256 + 0.5 is 256 in bfloat16
        optimizer.backward((scale * weight).sum())
    assert optimizer.step().grad_norm == pytest.approx(306.0)


def test_low_precision_follows_single_precision() -> None:
    low, single = network(torch.bfloat16), network()
    for model in (low, single):
        take_steps(model, optimization(list(model.parameters()), rates=(1e-3,)), 30)
    start = flat(network().parameters())
    moved = flat(single.parameters()) - start
    error = flat(low.parameters()).float() - flat(single.parameters())
    assert float(moved.norm()) > 0.05
    assert float(error.norm()) < 0.2 * float(moved.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_need_no_masters(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = optimization(list(model.parameters()))
    take_steps(model, optimizer, 1)
    (group,) = optimizer.adam.param_groups
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    assert not [name for name in optimizer.state()[0] if name.startswith("master")]


# --- what is skipped ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 1e8], ids=str)
def test_a_useless_gradient_is_skipped_counted_and_leaves_no_trace(
    factor: float, dtype: torch.dtype
) -> None:
    model, twin = network(dtype), network(dtype)
    optimizer = optimization(list(model.parameters()))
    twin_optimizer = optimization(list(twin.parameters()))
    take_steps(model, optimizer, 2)
    take_steps(twin, twin_optimizer, 2)
    for number in (1, 2):
        before, tensors = flat(model.parameters()), optimizer.state()[0]
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        optimizer.backward(factor * losses(model)[0])
        optimizer.backward(losses(model)[1])
        step = optimizer.step()
        assert step.skipped and not 0 < step.grad_norm <= 1e4
        assert optimizer.num_skipped == number
        assert torch.equal(flat(model.parameters()), before)
        after = optimizer.state()[0]
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    take_steps(model, optimizer, 2)
    take_steps(twin, twin_optimizer, 2)
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_a_gradient_is_skipped_above_the_limit_and_clipped_below_it() -> None:
    for scale, skipped in ((9.0, False), (11.0, True)):
        weight = Parameter(torch.zeros(1))
        optimizer = optimization([weight], max_grad_norm=1.0, skip_grad_norm=10.0)
        optimizer.backward((scale * weight).sum())
        assert optimizer.step() == Step(scale, skipped)
        assert (weight.item() == 0.0) == skipped


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def groups(model: Any) -> tuple[list[Parameter], ...]:
        return list(model[0].parameters()), list(model[2].parameters())

    model = network(dtype)
    optimizer = optimization(*groups(model), rates=(1e-2, 3e-3))
    take_steps(model, optimizer, 3)
    optimizer.backward(math.nan * losses(model)[0])
    optimizer.step()
    optimizer.scale_learning_rates(0.3)

    other = network(dtype)
    other.load_state_dict(model.state_dict())
    restored = optimization(*groups(other), rates=(1e-2, 3e-3))
    tensors, numbers = optimizer.state()
    restored.restore({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    assert restored.num_skipped == 1
    for one, two in ((model, optimizer), (other, restored)):
        take_steps(one, two, 3)
        two.scale_learning_rates(0.1)
        take_steps(one, two, 1)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    for one, two in zip(optimizer.state()[0].values(), restored.state()[0].values(), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_that_has_not_stepped_yet_can_be_restored() -> None:
    model, other = network(), network()
    optimizer = optimization(list(model.parameters()))
    restored = optimization(list(other.parameters()))
    restored.restore(*optimizer.state())
    take_steps(model, optimizer, 1)
    take_steps(other, restored, 1)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_alone_there_is_one_process_and_no_group() -> None:
    processes = all_processes()
    assert (processes.num_processes, processes.process_index) == (1, 0)
    assert processes.is_main_process and not torch.distributed.is_initialized()
