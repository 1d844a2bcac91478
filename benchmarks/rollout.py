"""Playing the dialogues of one training step, side by side.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --device cuda --dtype bfloat16 --contenders ours plain \
        --hidden 1536 --layers 28 --heads 12 --kv-heads 2 --vocab 32768 --bandwidth 4800

With `--bandwidth` the table tells which share of the machine's limit decoding reaches: the bytes
that must be read (all weights once per decoding step, and the keys and values of all earlier
tokens) over what memory could have delivered in the measured time. The time includes reading the
prompts.
"""

from __future__ import annotations

from .contest import (
    Column,
    contest_of,
    hold,
    over_ours,
    parser_of,
    show_conditions,
    table,
    tokens,
    value,
    write,
)
from .measure import Order, Step, rollout_mib, rollout_seconds
from .workload import Workload

COLUMNS = {
    "rollout, s": value(rollout_seconds),
    "new tokens/s": value(lambda step: step.new_tokens / rollout_seconds(step)),
    "rollout / ours": over_ours(rollout_seconds),
    "memory, MiB": value(rollout_mib),
    "memory / ours": over_ours(rollout_mib),
    "tokens: line; lines; all": tokens,
}


def main() -> None:
    """Measure and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s")
    options = parser.parse_args()
    contest = contest_of(options)

    rounds = hold(contest, Order(update=False))
    columns: dict[str, Column] = dict(COLUMNS)
    if options.bandwidth:
        columns["share of bandwidth"] = share_of_bandwidth(contest.workload, options.bandwidth)
    show_conditions(contest)
    print(table(rounds, columns))
    write(contest, {f"{turns} turns": found for turns, found in rounds.items()})


def share_of_bandwidth(workload: Workload, gigabytes_per_second: float) -> Column:
    """Return the column of bytes to be read / (seconds x bandwidth)."""

    def share(step: Step) -> float:
        seconds_at_least = decoding_bytes(workload, step) / (gigabytes_per_second * 1e9)
        return seconds_at_least / rollout_seconds(step)

    return value(share)


def decoding_bytes(workload: Workload, step: Step) -> float:
    """Return what decoding has to read: weights once per step of all dialogues, keys, values."""
    num_steps = step.new_tokens / workload.dialogues
    weights = workload.num_multiplied_weights * workload.itemsize
    per_key = 2 * workload.layers * workload.kv_heads * workload.head_width * workload.itemsize
    return num_steps * weights + step.keys_read * per_key


if __name__ == "__main__":
    main()
