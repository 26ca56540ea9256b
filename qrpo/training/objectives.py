"""What training minimises, loss by loss: the completions it uses, their loss, and its metrics.

| loss | trains on | term of the sum | divided by |
|---|---|---|---|
| `qrpo` | all K completions | one completion | completions |
| `dpo`, `rebel`, `simpo` | a chosen and a rejected one | one pair | pairs |
| `sft` | the chosen one | one completion | completion tokens of all terms |

All losses that need a pair use the same one, selected by `choose_pairs`: best and worst reward, two
at random, or the dataset's preference. A prompt without a usable pair (equal rewards, a single
completion) is skipped. After `select` a row of a pair loss has exactly two completions, the chosen
one first, so everything after it is the same code for all losses. The formulas are in
`qrpo.method.losses`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qrpo.method.losses import Pairs, choose_pairs, dpo_loss, qrpo_loss, rebel_loss, simpo_loss
from qrpo.method.transforms import get_transform, reference_scale
from qrpo.seeds import seeded_hash
from qrpo.training.arguments import QRPOSettings
from qrpo.training.rows import TrainingRow, select_completions, tensor_of

Columns = dict[str, Any]
Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """One loss over rows, as functions of log-probabilities (B,) and columns of flattened rows."""

    loss: Callable[[torch.Tensor, Columns], torch.Tensor]
    """The terms (B / group,) of the sum."""
    metrics: Callable[[torch.Tensor, Columns], Metrics]
    """Scalars; NaN if undefined."""
    needs: tuple[str, ...] = ()
    """Columns per completion that the loss cannot do without."""
    choose: Callable[[TrainingRow, int], Sequence[int] | None] | None = None
    """The completions of a row to train on at a step; None for none. Without it, all."""
    group: int = 1
    """Neighbouring completions that share one term."""
    by_token: bool = False
    """Whether the sum is divided by completion tokens instead of terms."""

    def select(self, rows: Sequence[TrainingRow], step: int) -> list[TrainingRow]:
        """The rows with only the completions that this loss uses, without rows that have none."""
        if self.choose is None:
            return list(rows)
        chosen = ((row, self.choose(row, step)) for row in rows)
        return [select_completions(row, indices) for row, indices in chosen if indices is not None]

    def count(self, rows: Sequence[TrainingRow]) -> int:
        """The divisor of the summed loss of these selected rows."""
        lengths = [len(ids) for row in rows for ids in row["completion_token_ids"]]
        return sum(lengths) if self.by_token else len(lengths) // self.group


def make_objective(settings: QRPOSettings, seed: int) -> Objective:
    """The objective that `settings.loss` names; `seed` decides random pairs."""
    if settings.loss == "qrpo":
        return _quantile_objective(settings)
    selector = PairSelector(settings.pairs, seed)
    if settings.loss == "sft":
        return sft_objective(selector)
    return _pair_objective(settings, selector)


def sft_objective(selector: "PairSelector | None" = None) -> Objective:
    """Maximum likelihood of completions: all of a row's, or with a selector the chosen one only.

    The metric is the mean negative log-likelihood of a whole completion, in nats.
    """
    return Objective(
        lambda logprob_B, columns: -logprob_B,
        lambda logprob_B, columns: {"completion_nll": -logprob_B.mean()} | _log_ratio(logprob_B, columns),
        selector.needs if selector else (),
        selector.chosen if selector else None,
        by_token=True,
    )


def _quantile_objective(settings: QRPOSettings) -> Objective:
    """QRPO's error of each completion (arXiv 2507.08068, equation 11)."""

    def compute(
        logprob_B: torch.Tensor, columns: Columns, index: Any = slice(None), mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Metrics]:
        """`qrpo_loss` of completions (B,), or of those at these indices, in their shape."""

        def column(name: str) -> Any:
            return tensor_of(columns[name], logprob_B)[index] if name in columns else None

        ref_std = column("ref_std") if get_transform(settings.transform).needs_scale else None
        return qrpo_loss(
            logprob_B[index],
            column("ref_logprob"),
            column("quantile_reward"),
            settings.beta,
            transform=settings.transform,
            partition=settings.partition,
            num_ref=column("num_ref"),
            scale=None if ref_std is None else reference_scale(ref_std, settings.mean_ref_std or 0.0),
            mask=mask,
            loss_type=settings.loss_type,
        )

    def metrics(logprob_B: torch.Tensor, columns: Columns) -> Metrics:
        """The metrics of `qrpo_loss` for (P, K) completions, masked if a prompt has fewer than
        K."""
        counts = list(Counter(columns["prompt_index"]).values())
        index_PK = torch.zeros(len(counts), max(counts), dtype=torch.long, device=logprob_B.device)
        mask_PK = torch.zeros_like(index_PK, dtype=torch.bool)
        for prompt, count in enumerate(counts):
            mask_PK[prompt, :count] = True
        index_PK[mask_PK] = torch.arange(sum(counts), device=logprob_B.device)
        _, found = compute(logprob_B, columns, index_PK, mask_PK)
        return found | {"quantile_reward": found["quantile_rewards/mean"]}

    needs = ("ref_logprob", "quantile_reward")
    return Objective(lambda logprob_B, columns: compute(logprob_B, columns)[0], metrics, needs)


def _pair_objective(settings: QRPOSettings, selector: "PairSelector") -> Objective:
    """DPO, REBEL or SimPO on one pair of completions of each prompt; metrics have TRL's names."""

    def compute(logprob_B: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, Metrics]:
        logprob_P2 = logprob_B.view(-1, 2)
        first_P = torch.zeros(len(logprob_P2), dtype=torch.long, device=logprob_B.device)
        pairs = Pairs(first_P, first_P + 1, torch.ones_like(first_P, dtype=torch.bool))

        def column(name: str) -> torch.Tensor:
            return tensor_of(columns[name], logprob_B).view(-1, 2)

        if settings.loss == "simpo":
            length_P2 = tensor_of(list(map(len, columns["completion_token_ids"])), logprob_B).view(-1, 2)
            margin = settings.gamma_beta_ratio
            return simpo_loss(logprob_P2, length_P2, pairs, settings.beta, gamma_beta_ratio=margin)
        if settings.loss == "dpo":
            return dpo_loss(logprob_P2, column("ref_logprob"), pairs, settings.beta)
        reward_P2 = column(settings.rebel_reward)
        if settings.rebel_reward == "quantile_reward":
            transform = get_transform(settings.transform)
            num_ref = column("num_ref") if "num_ref" in columns else None
            reward_P2 = transform(transform.clamp(reward_P2, num_ref))
            if transform.needs_scale:
                reward_P2 = reference_scale(column("ref_std"), settings.mean_ref_std or 0.0) * reward_P2
        return rebel_loss(logprob_P2, column("ref_logprob"), reward_P2, pairs, settings.beta)

    reference = () if settings.loss == "simpo" else ("ref_logprob",)
    regressed = (settings.rebel_reward,) if settings.loss == "rebel" else ()
    return Objective(
        lambda logprob_B, columns: compute(logprob_B, columns)[0],
        lambda logprob_B, columns: compute(logprob_B, columns)[1] | _log_ratio(logprob_B, columns),
        tuple(dict.fromkeys((*selector.needs, *reference, *regressed))),
        selector.pair,
        group=2,
    )


class PairSelector:
    """Selects each prompt's pair by `choose_pairs`; a random pair depends on the seed, the step and
    the prompt's tokens."""

    def __init__(self, choice: str, seed: int) -> None:
        self._choice, self._seed = choice, seed
        self.needs = () if choice == "dataset" else ("reward",)

    def pair(self, row: TrainingRow, step: int) -> list[int] | None:
        """Indices of the chosen and the rejected completion; None if there is no pair."""
        if len(row["completion_token_ids"]) < 2 or not self._has_dataset_completions(row, 2):
            return None
        pairs = self._choose(row, step)
        return [int(pairs.chosen_index), int(pairs.rejected_index)] if pairs.valid.item() else None

    def chosen(self, row: TrainingRow, step: int) -> list[int] | None:
        """Index of the chosen completion, the first of equally good ones; None if the dataset's is
        missing."""
        if not self._has_dataset_completions(row, 1):
            return None
        if self._choice == "dataset" or len(row["completion_token_ids"]) < 2:
            return [0]
        return [int(self._choose(row, step).chosen_index)]

    def _has_dataset_completions(self, row: TrainingRow, count: int) -> bool:
        """Whether the first completions are the dataset's, if they have to be and the row says
        so."""
        if self._choice != "dataset" or "origin" not in row:
            return True
        first = list(zip(row["origin"], row["sample_index"], strict=True))[:count]
        return first == [("offline", index) for index in range(count)]

    def _choose(self, row: TrainingRow, step: int) -> Pairs:
        count = len(row["completion_token_ids"])
        reward_1K = torch.as_tensor(np.asarray(row.get("reward", np.zeros(count)), dtype=np.float64))[None]
        generator = None
        if self._choice == "random":
            prompt = np.asarray(row["prompt_token_ids"], dtype=np.int64).tobytes()
            digest = seeded_hash("pairs", self._seed, step, prompt)
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return choose_pairs(reward_1K, self._choice, generator=generator)  # type: ignore[arg-type]


def _log_ratio(logprob_B: torch.Tensor, columns: Columns) -> Metrics:
    """The mean log ratio to the reference, if the rows have its log-probabilities."""
    if "ref_logprob" not in columns:
        return {}
    return {"log_ratio/mean": (logprob_B - tensor_of(columns["ref_logprob"], logprob_B)).mean()}
