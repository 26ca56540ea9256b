"""What training minimises, loss by loss: which of a prompt's completions it needs, their loss, and what it reports.

| loss | trains on | term of the sum | divided by |
|---|---|---|---|
| `qrpo` | all K completions | one completion | completions |
| `dpo`, `rebel`, `simpo` | a chosen and a rejected one | one pair | pairs |
| `sft` | the chosen one | one completion | its tokens, all terms' together |

The pair is the same for every loss that needs one, and is taken from the K completions by `choose_pairs`: the best and the worst
reward, two at random, or the dataset's own preference. A prompt without a usable pair (equal rewards, a single completion) is
passed over. After `select` a row of a pair loss has exactly two completions, the chosen one first, so everything that
follows is the same code for all losses. All losses are those of `qrpo.method.losses`; nothing here computes one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qrpo.method.losses import Pairs, choose_pairs, dpo_loss, qrpo_loss, rebel_loss, simpo_loss
from qrpo.method.transforms import get_transform, reference_scale
from qrpo.seeds import seeded_hash
from qrpo.training.rows import PER_COMPLETION, Row, tensor_of

if TYPE_CHECKING:
    from qrpo.training.trainer import QRPOConfig

__all__ = ["Objective", "PairObjective", "QuantileObjective", "SftObjective", "make_objective", "narrowed"]

Columns = dict[str, Any]
Metrics = dict[str, torch.Tensor]


class Objective:
    """One loss over rows. `group` completions in a row of flattened columns share one term of the sum."""

    group = 1
    needs: tuple[str, ...] = ()
    """Columns per completion without which there is no loss."""

    def select(self, rows: Sequence[Row], step: int) -> list[Row]:
        """The rows with just the completions that this loss trains on, without rows that have none."""
        return list(rows)

    def count(self, rows: Sequence[Row]) -> int:
        """By what the summed loss of these selected rows is divided."""
        return sum(len(row["completion_token_ids"]) for row in rows) // self.group

    def loss(self, logprob_B: torch.Tensor, columns: Columns) -> torch.Tensor:
        """The terms (B / group,) of the sum, of flattened selected rows."""
        raise NotImplementedError

    def metrics(self, logprob_B: torch.Tensor, columns: Columns) -> Metrics:
        """Scalars about flattened selected rows; NaN where one says nothing."""
        raise NotImplementedError


class SftObjective(Objective):
    """Maximum likelihood of completions: all of a row's, or with `pairs` the chosen one only."""

    def __init__(self, pairs: "Chooser | None" = None) -> None:
        self._pairs = pairs
        self.needs = pairs.needs if pairs else ()

    def select(self, rows: Sequence[Row], step: int) -> list[Row]:
        """Each row with its chosen completion alone; the first of equally good ones."""
        if self._pairs is None:
            return list(rows)
        chosen = ((row, self._pairs.one(row, step)) for row in rows)
        return [narrowed(row, [place]) for row, place in chosen if place is not None]

    def count(self, rows: Sequence[Row]) -> int:
        """The number of completion tokens."""
        return sum(len(ids) for row in rows for ids in row["completion_token_ids"])

    def loss(self, logprob_B: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Negative log-likelihood (B,) in nats."""
        return -logprob_B

    def metrics(self, logprob_B: torch.Tensor, columns: Columns) -> Metrics:
        """Mean negative log-likelihood of a whole completion, in nats."""
        return {"completion_nll": -logprob_B.mean()} | _log_ratio(logprob_B, columns)


class QuantileObjective(Objective):
    """QRPO's squared error of each completion (arXiv 2507.08068, equation 11)."""

    needs = ("ref_logprob", "quantile_reward")

    def __init__(self, args: "QRPOConfig") -> None:
        self._args = args

    def loss(self, logprob_B: torch.Tensor, columns: Columns) -> torch.Tensor:
        """The squared (or absolute) residual (B,)."""
        loss_B, _ = self._loss(logprob_B, columns)
        return loss_B

    def metrics(self, logprob_B: torch.Tensor, columns: Columns) -> Metrics:
        """What `qrpo_loss` reports of (P, K) completions, with a mask where prompts have fewer than K."""
        counts = list(Counter(columns["prompt_index"]).values())
        place_PK = torch.zeros(len(counts), max(counts), dtype=torch.long, device=logprob_B.device)
        mask_PK = torch.zeros_like(place_PK, dtype=torch.bool)
        for prompt, count in enumerate(counts):
            mask_PK[prompt, :count] = True
        place_PK[mask_PK] = torch.arange(sum(counts), device=logprob_B.device)
        _, metrics = self._loss(logprob_B, columns, place_PK, mask_PK)
        return metrics | {"quantile_reward": metrics["quantile_rewards/mean"]}

    def _loss(
        self,
        logprob_B: torch.Tensor,
        columns: Columns,
        place: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Metrics]:
        """`qrpo_loss` of completions (B,), or of the completions at these places, in their shape."""

        def column(name: str) -> Any:
            if name not in columns:
                return None
            values_B = tensor_of(columns[name], logprob_B)
            return values_B if place is None else values_B[place]

        args = self._args
        ref_std = column("ref_std") if get_transform(args.transform).needs_scale else None
        return qrpo_loss(
            logprob_B if place is None else logprob_B[place],
            column("ref_logprob"),
            column("quantile_reward"),
            args.beta,
            transform=args.transform,
            partition=args.partition,
            num_ref=column("num_ref"),
            scale=None if ref_std is None else reference_scale(ref_std, args.mean_ref_std or 0.0),
            mask=mask,
            loss_type=args.loss_type,
        )


class PairObjective(Objective):
    """DPO, REBEL or SimPO on one pair of completions for each prompt."""

    group = 2

    def __init__(self, args: "QRPOConfig") -> None:
        self._args = args
        self._pairs = Chooser(args)
        reference = () if args.loss == "simpo" else ("ref_logprob",)
        regressed = (args.rebel_reward,) if args.loss == "rebel" else ()
        self.needs = tuple(dict.fromkeys((*self._pairs.needs, *reference, *regressed)))

    def select(self, rows: Sequence[Row], step: int) -> list[Row]:
        """Each row with its chosen and its rejected completion, in this order."""
        pairs = ((row, self._pairs.two(row, step)) for row in rows)
        return [narrowed(row, pair) for row, pair in pairs if pair]

    def loss(self, logprob_B: torch.Tensor, columns: Columns) -> torch.Tensor:
        """The loss (B / 2,) of each pair."""
        return self._loss(logprob_B, columns)[0]

    def metrics(self, logprob_B: torch.Tensor, columns: Columns) -> Metrics:
        """Implicit rewards, margins and accuracy, under TRL's names."""
        return self._loss(logprob_B, columns)[1] | _log_ratio(logprob_B, columns)

    def _loss(self, logprob_B: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, Metrics]:
        args = self._args
        logprob_P2 = logprob_B.view(-1, 2)
        first_P = torch.zeros(len(logprob_P2), dtype=torch.long, device=logprob_B.device)
        pairs = Pairs(first_P, first_P + 1, torch.ones_like(first_P, dtype=torch.bool))

        def column(name: str) -> torch.Tensor:
            return tensor_of(columns[name], logprob_B).view(-1, 2)

        if args.loss == "simpo":
            length_P2 = tensor_of([len(ids) for ids in columns["completion_token_ids"]], logprob_B).view(
                -1, 2
            )
            return simpo_loss(logprob_P2, length_P2, pairs, args.beta, gamma_beta_ratio=args.gamma_beta_ratio)
        if args.loss == "dpo":
            return dpo_loss(logprob_P2, column("ref_logprob"), pairs, args.beta)
        reward_P2 = column(args.rebel_reward)
        if args.rebel_reward == "quantile_reward":
            transform = get_transform(args.transform)
            if transform.needs_scale:
                transform = transform.scaled(reference_scale(column("ref_std"), args.mean_ref_std or 0.0))
            num_ref = column("num_ref") if "num_ref" in columns else None
            reward_P2 = transform(transform.clamp(reward_P2, num_ref))
        return rebel_loss(logprob_P2, column("ref_logprob"), reward_P2, pairs, args.beta)


class Chooser:
    """Chooses each prompt's pair by `choose_pairs`; a random pair is a function of the seed, the step and the prompt's tokens."""

    def __init__(self, args: "QRPOConfig") -> None:
        self._choice, self._seed = args.pairs, args.seed
        self.needs = () if args.pairs == "dataset" else ("reward",)

    def two(self, row: Row, step: int) -> list[int] | None:
        """Places of the chosen and the rejected completion; None where there is no pair."""
        if len(row["completion_token_ids"]) < 2 or not self._is_dataset_s(row, 2):
            return None
        pairs = self._choose(row, step)
        return [int(pairs.chosen_index), int(pairs.rejected_index)] if pairs.valid.item() else None

    def one(self, row: Row, step: int) -> int | None:
        """The place of the chosen completion; None where the dataset's is not there."""
        if not self._is_dataset_s(row, 1):
            return None
        if self._choice == "dataset" or len(row["completion_token_ids"]) < 2:
            return 0
        return int(self._choose(row, step).chosen_index)

    def _is_dataset_s(self, row: Row, count: int) -> bool:
        """Whether the first completions are the dataset's chosen and rejected ones, where the row says what they are."""
        if self._choice != "dataset" or "origin" not in row:
            return True
        places = list(zip(row["origin"], row["sample_index"], strict=True))[:count]
        return places == [("offline", place) for place in range(count)]

    def _choose(self, row: Row, step: int) -> Pairs:
        count = len(row["completion_token_ids"])
        reward_1K = torch.as_tensor(np.asarray(row.get("reward", np.zeros(count)), dtype=np.float64))[None]
        generator = None
        if self._choice == "random":
            prompt = np.asarray(row["prompt_token_ids"], dtype=np.int64).tobytes()
            digest = seeded_hash("pairs", self._seed, step, prompt)
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return choose_pairs(reward_1K, self._choice, generator=generator)


def make_objective(args: "QRPOConfig") -> Objective:
    """The objective that `args.loss` names."""
    if args.loss == "qrpo":
        return QuantileObjective(args)
    return SftObjective(Chooser(args)) if args.loss == "sft" else PairObjective(args)


def narrowed(row: Row, places: Sequence[int]) -> dict[str, Any]:
    """The row with only these of its completions, in this order."""
    kept: Mapping[str, Any] = {
        name: [row[name][place] for place in places] for name in PER_COMPLETION if name in row
    }
    return {**row, **kept}


def _log_ratio(logprob_B: torch.Tensor, columns: Columns) -> Metrics:
    """How far the policy is from the reference, where the rows say what that thought."""
    if "ref_logprob" not in columns:
        return {}
    return {"log_ratio/mean": (logprob_B - tensor_of(columns["ref_logprob"], logprob_B)).mean()}
