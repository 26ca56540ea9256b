"""Does QRPO find the optimum? A world small enough to enumerate answers exactly.

    python -m benchmarks.optimum [--out optimum.json]

A completion is up to 4 tokens of a vocabulary of 4, or an end token sooner: 341 completions, all
enumerated. The reference is a random autoregressive policy, a row of logits for each prompt and
prefix; so is the policy that is trained, from the reference, on offline completions (half of them
the reference's, half uniform, drawn once) and nothing else. Distribution of the reference,
quantiles, Z and pi* are exact sums. Every method sees the same completions in the same order, and
is judged by the objective J = E[f(q)] - beta KL(policy || reference), exact, as a share of the way
from J(reference) = 0% to J(pi*) = 100%. DPO's and SimPO's own beta is swept and their best kept,
chosen by that judge: a generous comparison.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.harness import command_line, report
from qrpo.method import theory
from qrpo.method.losses import choose_pairs, dpo_loss, qrpo_loss, rebel_loss, simpo_loss
from qrpo.method.quantiles import quantile_rewards
from qrpo.method.transforms import get_transform

VOCABULARY, LENGTH = 4, 4
END = VOCABULARY
SETTINGS = (("identity", 0.1), ("identity", 1.0), ("log", 0.5), ("power", 0.1))


@dataclass(frozen=True)
class World:
    """Prompts P, all completions Y of each, and what is exactly true of them."""

    prefix: torch.Tensor
    """(Y, LENGTH): which prefix each step is taken from; 0 is the empty one."""
    token: torch.Tensor
    """(Y, LENGTH): which token each step takes."""
    steps: torch.Tensor
    """(Y, LENGTH): whether there is such a step."""
    ref_logits: torch.Tensor
    """(P, prefixes, VOCABULARY + 1)."""
    reward: torch.Tensor
    """(P, Y)."""
    quantile: torch.Tensor
    """(P, Y): P(s <= r), exact."""

    @cached_property
    def ref(self) -> torch.Tensor:
        """(P, Y): log ref(y|x)."""
        return self.log_probabilities(self.ref_logits)

    def log_probabilities(self, logits: torch.Tensor, completions: Any = ...) -> torch.Tensor:
        """log pi(y|x): (P, Y), or (P, K) of the completions given by number."""
        prompts = torch.arange(len(logits))[:, None, None]
        chosen = logits.log_softmax(-1)[prompts, self.prefix[completions], self.token[completions]]
        return (chosen * self.steps[completions]).sum(-1)

    def share(self, matches: torch.Tensor) -> torch.Tensor:
        """(P, Y): the reference's probability of the completions that match, of (P, Y, Y)."""
        return (matches * self.ref.exp()[:, None, :]).sum(-1)


def make_world(prompts: int, *, grades: int | None = None, seed: int = 0) -> World:
    """A random world; `grades` makes rewards discrete, 0 to grades - 1, as pass rates are."""
    sequences: list[tuple[int, ...]] = [()]
    for _ in range(LENGTH):
        sequences += [(*s, t) for s in sequences if len(s) == len(sequences[-1]) for t in range(VOCABULARY)]
    number = {prefix: i for i, prefix in enumerate(s for s in sequences if len(s) < LENGTH)}
    prefix, token, steps = (np.zeros((len(sequences), LENGTH), dtype=np.int64) for _ in range(3))
    for y, sequence in enumerate(sequences):
        whole = sequence if len(sequence) == LENGTH else (*sequence, END)
        for t, taken in enumerate(whole):
            prefix[y, t], token[y, t], steps[y, t] = number[whole[:t]], taken, 1
    rng = np.random.default_rng(seed)
    ref_logits = torch.from_numpy(rng.normal(size=(prompts, len(number), VOCABULARY + 1)))
    ref_logits[..., END] -= 2.0  # most completions are long, so that no single one holds a large share
    # a reward with structure (tokens have worth) and detail (every completion its own)
    worth = rng.normal(size=(prompts, VOCABULARY + 1))
    reward = (worth[:, token] * steps).sum(-1) + rng.normal(size=(prompts, len(sequences)))
    if grades is not None:
        inner = np.quantile(reward, np.linspace(0, 1, grades + 1)[1:-1])
        reward = np.searchsorted(inner, reward).astype(float)
    arrays = (torch.from_numpy(array) for array in (prefix, token, steps))
    world = World(*arrays, ref_logits, torch.from_numpy(reward), torch.empty(0))
    at_most = world.reward[:, None, :] <= world.reward[:, :, None]
    return replace(world, quantile=world.share(at_most).clamp(0, 1))


@dataclass(frozen=True)
class Judge:
    """Exact judgement of a policy for one transform and beta."""

    world: World
    transform: str
    beta: float

    def transformed(self) -> torch.Tensor:
        """(P, Y): f(q) at the exact quantiles; f's infinite ends are not reached where a maximum is
        moved half an atom in."""
        q = self.world.quantile
        if get_transform(self.transform).open_ends[1]:
            q = torch.where(q > 1 - 1e-12, 1 - self.world.ref.exp() / 2, q)
        return get_transform(self.transform)(q)

    def optimum(self) -> torch.Tensor:
        """(P, Y): log pi*."""
        return (self.world.ref + self.transformed() / self.beta).log_softmax(-1)

    def objective(self, log_policy: torch.Tensor) -> torch.Tensor:
        """(P,): E[f(q)] - beta KL(policy || reference)."""
        log_ratio = log_policy - self.world.ref
        return (log_policy.exp() * (self.transformed() - self.beta * log_ratio)).sum(-1)

    def __call__(self, log_policy: torch.Tensor) -> dict[str, float]:
        """Means over prompts."""
        best, ref = self.optimum(), self.world.ref
        zero = self.objective(ref).mean()
        gain = (self.objective(log_policy).mean() - zero) / (self.objective(best).mean() - zero)
        policy = log_policy.exp()
        below = self.world.share(self.world.reward[:, None, :] < self.world.reward[:, :, None])
        wins = 0.5 * (self.world.quantile + below)
        return {
            "kl_optimum_to_policy": float((best.exp() * (best - log_policy)).sum(-1).mean()),
            "objective_share": float(gain),
            "win_rate": float((policy * wins).sum(-1).mean()),
            "kl_to_reference": float((policy * (log_policy - ref)).sum(-1).mean()),
        }


def offline_completions(world: World, number: int, seed: int = 1) -> torch.Tensor:
    """(P, number): completions by number, drawn once: half the reference's, half uniform."""
    generator = torch.Generator().manual_seed(seed)
    mixture = 0.5 * world.ref.exp() + 0.5 / world.ref.shape[1]
    return torch.multinomial(mixture, number, replacement=True, generator=generator)


def train(
    world: World, completions: torch.Tensor, loss_of: Any, *, steps: int, batch: int = 128, rate: float = 0.3
) -> torch.Tensor:
    """(P, Y) log-probabilities of the policy that `loss_of(logprob, completions)` -> (P, batch or
    1) trains, with Adam."""
    logits = world.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        some = completions[:, torch.randint(completions.shape[1], (batch,), generator=generator)]
        optimizer.zero_grad()
        loss_of(world.log_probabilities(logits, some), some).mean().backward()
        optimizer.step()
        schedule.step()
    return world.log_probabilities(logits.detach())


def train_qrpo(
    world: World, completions: torch.Tensor, beta: float, q: torch.Tensor, steps: int, **settings: Any
):
    """QRPO on (P, Y) quantile rewards `q`."""

    def loss_of(logprob: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
        return qrpo_loss(logprob, world.ref.gather(1, some), q.gather(1, some), beta, **settings)[0]

    return train(world, completions, loss_of, steps=steps)


def exact_partition(judge: Judge) -> dict[str, Any]:
    """Settings that make qrpo_loss use the world's own Z: every completion's quantile with its
    probability."""
    exact = {"ref_quantiles": judge.world.quantile, "ref_weights": judge.world.ref.exp()}
    return {"partition": "empirical", "num_ref": 10**9, **exact}


def estimated_quantiles(world: World, num_ref: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Y) quantile rewards from `num_ref` reference samples per prompt, and the samples' own (P,
    num_ref)."""
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.multinomial(world.ref.exp(), num_ref, replacement=True, generator=generator)
    ref_rewards = world.reward.gather(1, sampled).numpy()
    ours = quantile_rewards(world.reward.numpy(), ref_rewards)
    theirs = quantile_rewards(ref_rewards, ref_rewards)
    return torch.from_numpy(ours), torch.from_numpy(theirs)


def finds_the_optimum(
    prompts: int, steps: int, settings: tuple[tuple[str, float], ...] = SETTINGS
) -> list[dict[str, Any]]:
    """QRPO with exact quantiles and exact Z, for each transform and beta."""
    rows = []
    world = make_world(prompts)
    completions = offline_completions(world, 8192)
    for transform, beta in settings:
        judge = Judge(world, transform, beta)
        policy = train_qrpo(
            world, completions, beta, world.quantile, steps, transform=transform, **exact_partition(judge)
        )
        rows.append({"transform": transform, "beta": beta, **judge(policy)})
    return rows


def scales_with_references(prompts: int, steps: int, beta: float = 0.1) -> list[dict[str, Any]]:
    """QRPO with quantiles estimated from n reference samples, beside what theory says that fitting
    them attains."""
    rows = []
    world = make_world(prompts)
    completions, judge = offline_completions(world, 8192), Judge(world, "identity", beta)
    for n in (1, 3, 10, 50):
        q, _ = estimated_quantiles(world, n, seed=n)
        policies = {
            partition: judge(train_qrpo(world, completions, beta, q, steps, partition=partition, num_ref=n))
            for partition in ("finite", "continuous")
        }
        promise = theory.attained("identity", beta, n)
        expected = {
            "objective_share": promise.share,
            "win_rate": promise.win_rate,
            "kl_to_reference": promise.kl,
        }
        rows.append({"num_ref": n, "beta": beta, **policies, "theory": expected})
    return rows


def compares_partitions(prompts: int, steps: int, beta: float = 0.2) -> list[dict[str, Any]]:
    """Discrete rewards of 3 grades: the exact Z, and the two that suppose continuous rewards."""
    rows = []
    world = make_world(prompts, grades=3)
    completions, judge = offline_completions(world, 8192), Judge(world, "identity", beta)
    policy = train_qrpo(world, completions, beta, world.quantile, steps, **exact_partition(judge))
    rows.append({"quantiles": "exact", "partition": "empirical", **judge(policy)})
    policy = train_qrpo(world, completions, beta, world.quantile, steps, partition="continuous")
    rows.append({"quantiles": "exact", "partition": "continuous", **judge(policy)})
    for n in (10, 50):
        q, ref_quantiles = estimated_quantiles(world, n, seed=n)
        for settings in (
            {"partition": "empirical", "ref_quantiles": ref_quantiles},
            {"partition": "finite", "num_ref": n},
            {"partition": "continuous"},
        ):
            policy = train_qrpo(world, completions, beta, q, steps, **settings)
            rows.append({"quantiles": f"{n} samples", "partition": settings["partition"], **judge(policy)})
    return rows


def compares_clamped(prompts: int, steps: int, beta: float = 0.5) -> list[dict[str, Any]]:
    """normal-icdf, infinite at both ends: estimated quantiles are clamped, and only `finite` counts
    the clamp in."""
    rows = []
    world = make_world(prompts)
    completions, judge = offline_completions(world, 8192), Judge(world, "normal-icdf", beta)
    for n in (10, 50):
        q, _ = estimated_quantiles(world, n, seed=n)
        for partition in ("finite", "continuous"):
            policy = train_qrpo(
                world, completions, beta, q, steps, transform="normal-icdf", partition=partition, num_ref=n
            )
            rows.append({"quantiles": f"{n} samples", "partition": partition, **judge(policy)})
    return rows


def compares_methods(prompts: int, steps: int, beta: float = 0.1, num_ref: int = 50) -> list[dict[str, Any]]:
    """QRPO, REBEL, DPO and SimPO on the same completions; f is the identity.

    DPO, SimPO and REBEL on rewards compare exact rewards of pairs; what rests on `num_ref` samples
    says so.
    """
    world = make_world(prompts)
    completions, judge = offline_completions(world, 8192), Judge(world, "identity", beta)
    length = world.steps.sum(-1).to(torch.float64)
    q, _ = estimated_quantiles(world, num_ref, seed=num_ref)
    spread = world.reward / world.reward.std(1, keepdim=True)
    policy = train_qrpo(world, completions, beta, world.quantile, steps, **exact_partition(judge))
    rows = [{"method": "QRPO, exact quantiles", "beta": beta, **judge(policy)}]
    policy = train_qrpo(world, completions, beta, q, steps, partition="continuous")
    rows.append({"method": f"QRPO, {num_ref} samples", "beta": beta, **judge(policy)})

    def pairwise(
        method: str, own_beta: float, reward: torch.Tensor, simpo_gap: float = 0.5
    ) -> dict[str, Any]:
        def loss_of(logprob: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
            # the same completions, taken two by two: (P, batch) as (P * batch/2) prompts with 2
            # each
            two = logprob.reshape(-1, 2)
            rewards = reward.gather(1, some).reshape(-1, 2)
            pairs, ref_two = choose_pairs(rewards), world.ref.gather(1, some).reshape(-1, 2)
            if method == "DPO":
                return dpo_loss(two, ref_two, pairs, own_beta)[0]
            if method.startswith("REBEL"):
                return rebel_loss(two, ref_two, rewards, pairs, own_beta)[0]
            return simpo_loss(two, length[some].reshape(-1, 2), pairs, own_beta, gamma_beta_ratio=simpo_gap)[
                0
            ]

        return {"method": method, "beta": own_beta, **judge(train(world, completions, loss_of, steps=steps))}

    def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return max(rows, key=lambda row: row["objective_share"]) | {"swept": [row["beta"] for row in rows]}

    rows.append(pairwise(f"REBEL on quantiles, {num_ref} samples", beta, q))
    rows.append(best([pairwise("REBEL on rewards", b, spread) for b in (0.2, 0.5, 1.0)]))
    rows.append(best([pairwise("DPO", b, world.reward) for b in (1.0, 3.0, 10.0, 30.0)]))
    rows.append(best([pairwise("SimPO", b, world.reward) for b in (1.0, 3.0, 10.0, 30.0)]))
    return rows


if __name__ == "__main__":
    parser = command_line(__doc__, rounds=None)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    experiments = (
        finds_the_optimum,
        scales_with_references,
        compares_partitions,
        compares_clamped,
        compares_methods,
    )
    report(
        options,
        [{"experiment": run.__name__, "rows": run(options.prompts, options.steps)} for run in experiments],
    )
