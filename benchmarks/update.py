"""One gradient step on dialogues already played, side by side.

    python -m benchmarks.update
    python -m benchmarks.update --device cuda --dtype bfloat16 --contenders ours plain \
        --hidden 1536 --layers 28 --heads 12 --kv-heads 2 --vocab 32768 --tflops 990

First it checks that `plain` takes the same gradient as `ours`. With `--tflops` the table tells
which share of the machine's limit is reached: 6 x weights x tokens of all dialogues over what it
could have computed in the measured time (weights without the input embeddings).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .contenders import PlainLearner, make_agent, samples_of
from .contest import (
    Column,
    contest_of,
    hold,
    over_ours,
    parser_of,
    say,
    show_conditions,
    table,
    tokens,
    value,
    write,
)
from .measure import Order, Step, update_mib, update_seconds
from .workload import WordDialogues, Workload

COLUMNS = {
    "update, s": value(update_seconds),
    "tokens/s": value(lambda step: step.tokens / update_seconds(step)),
    "update / ours": over_ours(update_seconds),
    "memory, MiB": value(update_mib),
    "memory / ours": over_ours(update_mib),
    "tokens: line; lines; all": tokens,
}


def main() -> None:
    """Measure and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--tflops", type=float, help="the device's peak at this dtype, TFLOP/s")
    options = parser.parse_args()
    contest = contest_of(options)
    say(f"gradients of plain and ours differ by {gradient_difference(contest.workload):.1e}")

    rounds = hold(contest, Order(rollout=False))
    columns: dict[str, Column] = dict(COLUMNS)
    if options.tflops:
        columns["share of peak"] = share_of_peak(contest.workload, options.tflops)
    show_conditions(contest)
    print(table(rounds, columns))
    write(contest, {f"{turns} turns": found for turns, found in rounds.items()})


def gradient_difference(workload: Workload) -> float:
    """Return |g - h| / |g| of our gradient g and plain's h, on one group, 3 turns, equal tokens."""
    torch.set_num_threads(1)
    small = replace(workload, dialogues=workload.group_size)
    agent = make_agent(small, WordDialogues(small, 3))
    learner = PlainLearner(small)
    batch = agent.collect()
    advantage_BT = agent.credited(batch)

    ours = gradient_of(agent.policy.model, lambda: agent.update(batch, advantage_BT))
    plain = gradient_of(learner.model, lambda: learner.update(samples_of(batch), advantage_BT))
    return float((ours - plain).norm() / ours.norm())


def gradient_of(model: torch.nn.Module, update: Callable[[], object]) -> torch.Tensor:
    """Return the gradient, before clipping, that all backward passes of `update` add up to."""
    sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]

    def add_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            total.add_(gradient)

        return add

    hooks = [
        parameter.register_hook(add_to(total))
        for parameter, total in zip(model.parameters(), sums, strict=True)
    ]
    update()
    for hook in hooks:
        hook.remove()
    return torch.cat([total.flatten() for total in sums])


def share_of_peak(workload: Workload, tflops: float) -> Column:
    """Return the column of computation at least needed / (seconds x peak)."""

    def share(step: Step) -> float:
        flop = 6 * workload.num_multiplied_weights * step.tokens
        return flop / (update_seconds(step) * tflops * 1e12)

    return value(share)


if __name__ == "__main__":
    main()
