"""The processes of acts as worlds whose gradients are known exactly, and pilots sampled from them.

The policy is a table of logits by turn, state and act, so a turn's gradient is a row of numbers and
gradients of different turns are orthogonal. All persona kinds of a domain share the table.
"""

from __future__ import annotations

import numpy as np

from agents.credit import FullPlanning, parse_credit
from agents.turn_gradients import TurnGradients
from ppg_env import DOMAINS, ActProcess, bundled_personas
from ppg_env.process import turn_value


class ActWorld:
    """One domain with all its kinds of personas, each equally likely, and a softmax policy.

    The policy has taken `num_steps` steps along the expected full gradient from the uniform one.
    """

    def __init__(
        self, domain: str, num_turns: int = 4, noise: float = 0.1, num_steps: int = 0
    ) -> None:
        personas = bundled_personas(domain)
        kinds = dict.fromkeys(DOMAINS[domain].dynamics(persona) for persona in personas)
        self.processes = [ActProcess(kind, num_turns, noise) for kind in kinds]
        self.num_turns, self.noise = num_turns, noise
        acts, states = self.processes[0].acts, self.processes[0].states
        memories = [memory for memory, _ in states[::2]]  # state 2 m: attentive, 2 m + 1: not
        self.start = memories.index(self.processes[0].dynamics.start)
        self.reward_KSA = np.array(
            [
                [
                    [turn_value(p.dynamics, memory, act, heeds) for act in acts]
                    for memory, heeds in states
                ]
                for p in self.processes
            ]
        )
        self.next_KMA = np.array(
            [
                [
                    [memories.index(p.dynamics.advance(memory, act)) for act in acts]
                    for memory in memories
                ]
                for p in self.processes
            ]
        )
        self.policy_TSA = self.processes[0].uniform_policy()
        full_TT, logits_TSA = FullPlanning().weights(num_turns), np.zeros_like(self.policy_TSA)
        for _ in range(num_steps):
            logits_TSA += 5.0 * self.gradient(full_TT)
            self.policy_TSA = _softmax(logits_TSA)

    # -- exactly -----------------------------------------------------------------------------------

    def gradient(self, weight_TT: np.ndarray) -> np.ndarray:
        """Return the expected partial gradient, shape (T, S, A), mean over the kinds."""
        gradients = [p.expected_gradient(self.policy_TSA, weight_TT) for p in self.processes]
        return np.asarray(np.mean(gradients, axis=0))

    def group_variance(self, weight_TT: np.ndarray, group_size: int) -> float:
        """Return E ||Y - E Y||^2 of one group's gradient Y under leave-one-out; no sampling.

        A group is of one kind; given the kind its n members are independent. With s_t the gradient
        of turn t, R_t its partial return, d_t = R_t - E R_t, g = E sum_t R_t s_t,

            Var(Y | kind) = (E ||sum_t d_t s_t||^2 - |g|^2) / n
                            + (sum_t Var(R_t) E ||s_t||^2 + |g|^2) / (n (n - 1))
        """
        gradients, variances = [], []
        for kind, process in enumerate(self.processes):
            own, baseline = self._second_moments(kind, weight_TT)
            gradient = process.expected_gradient(self.policy_TSA, weight_TT)
            square = float((gradient**2).sum())
            n = group_size
            variances.append((own - square) / n + (baseline + square) / (n * (n - 1)))
            gradients.append(gradient.ravel())
        spread = np.var(gradients, axis=0).sum()
        return float(np.mean(variances) + spread)

    def _second_moments(self, kind: int, weight_TT: np.ndarray) -> tuple[float, float]:
        """Return E ||sum_t d_t s_t||^2 and sum_t Var(R_t) E ||s_t||^2."""
        policy_TSA, reward_SA = self.policy_TSA, self.reward_KSA[kind]
        square_TSA = 1 - 2 * policy_TSA + (policy_TSA**2).sum(axis=2, keepdims=True)
        after_SA = np.repeat(2 * self.next_KMA[kind], 2, axis=0)
        heeded_SAS = np.eye(len(reward_SA))[after_SA]
        next_SAS = (1 - self.noise) * heeded_SAS + self.noise * np.roll(heeded_SAS, 1, axis=2)
        visit_S = np.zeros(len(reward_SA))
        visit_S[2 * self.start : 2 * self.start + 2] = 1 - self.noise, self.noise
        own = baseline = 0.0
        for t in range(self.num_turns):
            mean_S, moment_S = np.zeros((2, len(reward_SA)))  # of what is credited from v on
            for v in reversed(range(t, self.num_turns)):
                credited_SA = weight_TT[t, v] * reward_SA
                ahead_SA = next_SAS @ mean_S
                mean_SA = credited_SA + ahead_SA
                moment_SA = credited_SA**2 + 2 * credited_SA * ahead_SA + next_SAS @ moment_S
                mean_S = (policy_TSA[v] * mean_SA).sum(axis=1)
                moment_S = (policy_TSA[v] * moment_SA).sum(axis=1)
            mean, moment = visit_S @ mean_S, visit_S @ moment_S
            flow_SA = visit_S[:, None] * policy_TSA[t]
            centred_SA = moment_SA - 2 * mean * mean_SA + mean**2
            own += float((flow_SA * centred_SA * square_TSA[t]).sum())
            baseline += float((moment - mean**2) * (flow_SA * square_TSA[t]).sum())
            visit_S = np.einsum("sa,san->n", flow_SA, next_SAS)
        return own, baseline

    def error(self, credit: str, group_size: int, update_episodes: int) -> float:
        """Return the expected squared error of the best-scaled update, a share of ||g||^2."""
        weight_TT = parse_credit(credit).weights(self.num_turns)
        full, own = self.gradient(FullPlanning().weights(self.num_turns)), self.gradient(weight_TT)
        noise = self.group_variance(weight_TT, group_size) * group_size / update_episodes
        toward = (full * own).sum() ** 2 / (full**2).sum()
        return float(1 - toward / ((own**2).sum() + noise))

    def dependence(self) -> np.ndarray:
        """Return ||E Cov(s_t, r_u | kind)||^2, shape (T, T): what turn t does to the reward r_u."""
        square_TT = np.zeros((self.num_turns, self.num_turns))
        for t, u in np.ndindex(*square_TT.shape):
            weight_TT = np.zeros_like(square_TT)
            weight_TT[t, u] = 1.0
            square_TT[t, u] = (self.gradient(weight_TT) ** 2).sum()
        return square_TT

    # -- by chance ---------------------------------------------------------------------------------

    def pilot(
        self, num_groups: int, rng: np.random.Generator, group_size: int = 8
    ) -> TurnGradients:
        """Return the gradients and rewards of sampled dialogues."""
        gradient_BTP, reward_BT, group_B = self.dialogues(num_groups, rng, group_size)
        return TurnGradients.from_vectors(gradient_BTP, reward_BT, group_B)

    def dialogues(
        self, num_groups: int, rng: np.random.Generator, group_size: int = 8
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return gradient_BTP, reward_BT and group_B of sampled dialogues."""
        num_turns, num_states, num_acts = self.policy_TSA.shape
        group_B = np.repeat(np.arange(num_groups), group_size)
        kind_B = rng.integers(len(self.processes), size=num_groups)[group_B]
        size = len(group_B)
        memory_B = np.full(size, self.start)
        gradient_BTTSA = np.zeros((size, num_turns, num_turns, num_states, num_acts))
        reward_BT, row_B = np.zeros((size, num_turns)), np.arange(size)
        for t in range(num_turns):
            state_B = 2 * memory_B + (rng.random(size) < self.noise)  # attentive comes first
            chance_BA = self.policy_TSA[t, state_B]
            act_B = (rng.random(size)[:, None] > chance_BA.cumsum(axis=1)[:, :-1]).sum(axis=1)
            reward_BT[:, t] = self.reward_KSA[kind_B, state_B, act_B]
            gradient_BTTSA[row_B, t, t, state_B] = -chance_BA
            gradient_BTTSA[row_B, t, t, state_B, act_B] += 1.0
            memory_B = self.next_KMA[kind_B, memory_B, act_B]
        return gradient_BTTSA.reshape(size, num_turns, -1), reward_BT, group_B


def _softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))
