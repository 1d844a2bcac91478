"""The process of acts behind an embedded world: what each policy class CAN reach, computed exactly.

With a scripted partner and the rule judge, a dialogue is a small Markov decision process: the state
is what the domain's dynamics remember of earlier acts plus whether the partner is attentive, the
action is the dialogue act of the reply. This module solves it by dynamic programming and follows
the EXPECTED partial policy gradient of a tabular softmax policy; expectations are sums, nothing is
sampled. `ppg limits` prints the table for all domains.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

DISTRACTED_FACTOR = 0.5
"""Share of a turn's value that is left when the partner is distracted."""


class Dynamics(Protocol):
    """How the acts of a dialogue turn into the value of its turns. Small, frozen, deterministic."""

    @property
    def acts(self) -> tuple[str, ...]:
        """Return the acts there are."""
        ...

    @property
    def start(self) -> Hashable:
        """Return the state in which a dialogue starts."""
        ...

    def value(self, state: Hashable, act: str, attentive: bool) -> float:
        """Return the worth in [0, 1] of speaking `act` in `state`, before the distracted factor."""
        ...

    def advance(self, state: Hashable, act: str) -> Hashable:
        """Return the state after `act`."""
        ...


def turn_value(dynamics: Dynamics, state: Hashable, act: str, attentive: bool) -> float:
    """Return the domain value in [0, 1] of one turn; the only place where distraction is priced."""
    value = dynamics.value(state, act, attentive)
    return value if attentive else DISTRACTED_FACTOR * value


@dataclass(frozen=True)
class Limit:
    """What ascent along an expected partial gradient reaches.

    `value` is the mean reward per turn, `share` the same as a share of the optimal value.
    """

    value: float
    share: float


class ActProcess:
    """The finite-horizon decision process of acts in one domain for one kind of persona.

    Args:
        dynamics: acts, start state, value and advance.
        num_turns: agent turns T.
        noise: probability in [0, 1] that the partner is distracted in a turn, independent of
            everything.

    A policy is an array policy_TSA of probabilities: turn, state, act. A state is a pair (what the
    dynamics remember, attentive), so a policy sees whether the partner is attentive, as a reader of
    the transcript does.
    """

    def __init__(self, dynamics: Dynamics, num_turns: int = 8, noise: float = 0.1) -> None:
        if num_turns < 1:
            raise ValueError(f"num_turns must be at least 1, got {num_turns}.")
        if not 0.0 <= noise <= 1.0:
            raise ValueError(f"noise is a probability in [0, 1], got {noise}.")
        self.dynamics, self.num_turns, self.noise = dynamics, num_turns, noise
        self.acts = dynamics.acts
        memories = _reachable(dynamics)
        self.states = [(memory, attentive) for memory in memories for attentive in (True, False)]
        self._reward_SA, self._next_SAS = self._tables()
        attention = np.array([1.0 - noise, noise])
        self._start_S = np.array(
            [
                attention[int(not att)] if memory == dynamics.start else 0.0
                for memory, att in self.states
            ]
        )

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        index = {state: i for i, state in enumerate(self.states)}
        reward_SA = np.zeros((len(self.states), len(self.acts)))
        next_SAS = np.zeros((len(self.states), len(self.acts), len(self.states)))
        for s, (memory, attentive) in enumerate(self.states):
            for a, act in enumerate(self.acts):
                reward_SA[s, a] = turn_value(self.dynamics, memory, act, attentive)
                after = self.dynamics.advance(memory, act)
                next_SAS[s, a, index[after, True]] += 1.0 - self.noise
                next_SAS[s, a, index[after, False]] += self.noise
        return reward_SA, next_SAS

    def uniform_policy(self) -> np.ndarray:
        """Return policy_TSA in which every act is equally likely."""
        shape = (self.num_turns, len(self.states), len(self.acts))
        return np.full(shape, 1.0 / len(self.acts))

    def optimal_policy(self) -> np.ndarray:
        """Return a deterministic optimal policy_TSA by backward induction."""
        policy_TSA = np.zeros_like(self.uniform_policy())
        future_S = np.zeros(len(self.states))
        for t in reversed(range(self.num_turns)):
            action_value_SA = self._reward_SA + self._next_SAS @ future_S
            best_S = action_value_SA.argmax(axis=1)
            policy_TSA[t, np.arange(len(self.states)), best_S] = 1.0
            future_S = action_value_SA.max(axis=1)
        return policy_TSA

    def rewards(self, policy_TSA: np.ndarray) -> np.ndarray:
        """Return the expected reward of every turn under the policy, shape (T,)."""
        visit_S, expected_T = self._start_S, np.zeros(self.num_turns)
        for t in range(self.num_turns):
            flow_SA = visit_S[:, None] * policy_TSA[t]
            expected_T[t] = (flow_SA * self._reward_SA).sum()
            visit_S = np.einsum("sa,san->n", flow_SA, self._next_SAS)
        return expected_T

    def value(self, policy_TSA: np.ndarray) -> float:
        """Return the policy's mean reward per turn."""
        return float(self.rewards(policy_TSA).mean())

    def optimal_value(self) -> float:
        """Return the largest mean reward per turn that any policy can reach."""
        return self.value(self.optimal_policy())

    def expected_gradient(self, policy_TSA: np.ndarray, weight_TT: np.ndarray) -> np.ndarray:
        """Return the expected partial gradient with respect to the softmax logits, shape (T, S, A).

            g[t,s,a] = P(s_t = s) pi(a|s) (Q[t,s,a] - sum_b pi(b|s) Q[t,s,b]),
            Q[t,s,a] = E[ sum_u weight_TT[t,u] r_u | s_t = s, a_t = a ],  u >= t

        Args:
            policy_TSA: softmax probabilities.
            weight_TT: which rewards a turn answers for; entries below the diagonal are constants
                with respect to the turn's act and drop out of the gradient.
        """
        credited_TSA = self._credited_values(policy_TSA, weight_TT)
        gradient_TSA = np.zeros_like(policy_TSA)
        visit_S = self._start_S
        for t in range(self.num_turns):
            baseline_S1 = (policy_TSA[t] * credited_TSA[t]).sum(axis=1, keepdims=True)
            flow_SA = visit_S[:, None] * policy_TSA[t]
            gradient_TSA[t] = flow_SA * (credited_TSA[t] - baseline_S1)
            visit_S = np.einsum("sa,san->n", flow_SA, self._next_SAS)
        return gradient_TSA

    def _credited_values(self, policy_TSA: np.ndarray, weight_TT: np.ndarray) -> np.ndarray:
        """Return Q[t,s,a]: expected credited reward, by one backward pass that carries every u."""
        num_turns, num_states = self.num_turns, len(self.states)
        flat_next = self._next_SAS.reshape(-1, num_states)
        credited_TSA = np.zeros_like(policy_TSA)
        ahead_SU = np.zeros((num_states, num_turns))  # E[r_u | s_{t+1} = s] for all u > t
        for t in reversed(range(num_turns)):
            expected_SAU = (flat_next @ ahead_SU).reshape(num_states, len(self.acts), num_turns)
            expected_SAU[:, :, t] = self._reward_SA
            credited_TSA[t] = expected_SAU @ weight_TT[t]
            ahead_SU = np.einsum("sa,sau->su", policy_TSA[t], expected_SAU)
        return credited_TSA

    def mean_credit(self, policy_TSA: np.ndarray, weight_TT: np.ndarray) -> np.ndarray:
        """Return E[R_t], the expected partial return of every turn under the policy, shape (T,)."""
        return np.asarray(np.triu(weight_TT) @ self.rewards(policy_TSA))

    def learned_from_log(
        self,
        behaviour_TSA: np.ndarray,
        weight_TT: np.ndarray,
        baseline_T: np.ndarray | None = None,
        resolution: int = 40,
    ) -> np.ndarray:
        """Return the policy_TSA that an endless log teaches where weights below 0 are cut off.

        It maximises E[ sum_t max(0, R_t - b_t) log pi(a_t|s_t) ] over dialogues in which
        `behaviour_TSA` spoke, R_t = sum_u weight_TT[t,u] r_u:

            pi[t,s,a] ~ behaviour[t,s,a] E[ max(0, R_t - b_t) | s_t = s, a_t = a ]

        So it is no policy that is best in anything: a class whose partial return is mostly the
        chance of later turns gives good and bad acts nearly equal weights, however long the log is.
        Where no act ever has a weight nothing is learned, and the behaviour stays.

        Args:
            behaviour_TSA: who spoke.
            weight_TT: which rewards a turn answers for; entries are at least 0, those below the
                diagonal are left out.
            baseline_T: b_t; None takes the mean of the log, `mean_credit`.
            resolution: credited rewards are whole multiples of 1/resolution; 40 is enough for the
                bundled worlds and weights of 0 and 1.

        Raises:
            ValueError: credited rewards are below 0 or no such multiples.
        """
        if baseline_T is None:
            baseline_T = self.mean_credit(behaviour_TSA, weight_TT)
        learned_TSA = np.array(behaviour_TSA, dtype=np.float64)
        for t, row_U in enumerate(np.triu(weight_TT)):
            chance_SAX = self._return_chances(behaviour_TSA, row_U, t, resolution)
            return_X = np.arange(chance_SAX.shape[2]) / resolution
            share_SA = behaviour_TSA[t] * (chance_SAX @ np.maximum(0.0, return_X - baseline_T[t]))
            total_S1 = share_SA.sum(axis=1, keepdims=True)
            np.divide(share_SA, total_S1, out=learned_TSA[t], where=total_S1 > 0.0)
        return learned_TSA

    def _return_chances(
        self, policy_TSA: np.ndarray, weight_U: np.ndarray, turn: int, resolution: int
    ) -> np.ndarray:
        """Return P(sum_u weight_U[u] r_u = x / resolution | s_turn = s, a_turn = a), (S, A, X)."""
        exact_USA = weight_U[:, None, None] * self._reward_SA * resolution
        ticks_USA = np.rint(exact_USA).astype(np.int64)
        if np.abs(ticks_USA - exact_USA).max() > 1e-6 or ticks_USA.min() < 0:
            raise ValueError(
                f"Credited rewards must be multiples of 1/{resolution} and at least 0; the weights "
                f"of turn {turn} are {weight_U.tolist()}. Take weights of 0 and 1, or a finer "
                "resolution."
            )
        ahead_SX = np.zeros((len(self.states), 1 + int(ticks_USA.max(axis=(1, 2)).sum())))
        ahead_SX[:, 0] = 1.0
        chance_SAX = np.zeros((0, 0, 0))
        for u in reversed(range(turn, 1 + int(np.flatnonzero(weight_U).max(initial=turn)))):
            later_SAX = np.einsum("san,nx->sax", self._next_SAS, ahead_SX)
            chance_SAX = np.zeros_like(later_SAX)
            for tick in np.unique(ticks_USA[u]):
                here_SA = ticks_USA[u] == tick
                chance_SAX[here_SA, tick:] = later_SAX[here_SA, : later_SAX.shape[2] - tick]
            ahead_SX = np.einsum("sa,sax->sx", policy_TSA[u], chance_SAX)
        return chance_SAX

    def ascend(
        self, weight_TT: np.ndarray, step_size: float = 50.0, num_steps: int = 4000
    ) -> np.ndarray:
        """Follow the expected partial gradient from the uniform policy; return the last policy_TSA.

        The step is divided by the window (the largest row sum of weight_TT), so that classes differ
        in direction and not in speed.
        """
        logits_TSA = np.zeros_like(self.uniform_policy())
        step = step_size / max(1.0, float(weight_TT.sum(axis=1).max()))
        for _ in range(num_steps):
            logits_TSA += step * self.expected_gradient(_softmax(logits_TSA), weight_TT)
        return _softmax(logits_TSA)

    def limit(self, weight_TT: np.ndarray) -> Limit:
        """Return the value that ascent along weight_TT's expected partial gradient reaches."""
        value = self.value(self.ascend(weight_TT))
        return Limit(value=value, share=value / self.optimal_value())


def _reachable(dynamics: Dynamics) -> list[Hashable]:
    found, frontier = [dynamics.start], [dynamics.start]
    while frontier:
        state = frontier.pop()
        for act in dynamics.acts:
            after = dynamics.advance(state, act)
            if after not in found:
                found.append(after)
                frontier.append(after)
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
