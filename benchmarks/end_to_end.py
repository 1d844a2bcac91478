"""One whole training step side by side: rollout, credit, gradient, optimizer.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --turns 8 32 --rounds 5 --dtype bfloat16

Prints seconds, highest memory and ratios by number of turns, then how our own step grows between
two numbers of turns. workload.py, contenders.py and measure.py say what is played, by whom, and how
it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from .contenders import make_contender
from .contest import (
    Contest,
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
from .measure import (
    Order,
    Round,
    markdown,
    ratio,
    rollout_seconds,
    side_by_side,
    spread,
    step_mib,
    step_seconds,
    update_seconds,
)

COLUMNS = {
    "step, s": value(step_seconds),
    "rollout, s": value(rollout_seconds),
    "update, s": value(update_seconds),
    "step / ours": over_ours(step_seconds),
    "rollout / ours": over_ours(rollout_seconds),
    "update / ours": over_ours(update_seconds),
    "memory, MiB": value(step_mib),
    "tokens: line; lines; all": tokens,
}


def main() -> None:
    """Measure and print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=[8, 32],
        help="two numbers of turns between which our own step is compared; none: leave it out",
    )
    options = parser.parse_args()
    contest = contest_of(options)

    rounds = hold(contest, Order())
    show_conditions(contest)
    print(table(rounds, COLUMNS))

    grown = own_steps(contest, options.growth) if options.growth else []
    if grown:
        print(growth_table(grown))
    write(
        contest, {**{f"{turns} turns": found for turns, found in rounds.items()}, "growth": grown}
    )


def own_steps(contest: Contest, turns: Sequence[int]) -> list[Round]:
    """Return our own steps with few and with many turns, side by side."""
    say("our own growth")
    entries = {
        f"{number} turns": (make_contender("ours", contest.workload, number), Order(number))
        for number in turns
    }
    return side_by_side(entries, contest.rounds, say)


def growth_table(rounds: Sequence[Round]) -> str:
    """Return how many times longer each phase takes with the larger number of turns."""
    few, many = rounds[0]
    costs = {"step": step_seconds, "rollout": rollout_seconds, "update": update_seconds}
    rows = [
        [
            f"our {name}",
            str(spread([cost(steps[few]) for steps in rounds])),
            str(spread([cost(steps[many]) for steps in rounds])),
            str(ratio(rounds, many, few, cost)),
        ]
        for name, cost in costs.items()
    ]
    return markdown(["", f"{few}, s", f"{many}, s", "growth"], rows)


if __name__ == "__main__":
    main()
