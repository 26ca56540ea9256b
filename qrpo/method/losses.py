"""QRPO's loss, and the losses to compare it with, on the same (B, K) batch: B prompts with K
completions each.

    QRPO    ( f(q) - beta log Z - beta log_ratio )^2                    pointwise, one term per
            completion
    DPO     -log sigmoid( beta (log_ratio_chosen - log_ratio_rejected) )
    REBEL   ( (r_chosen - r_rejected)/beta - (log_ratio_chosen - log_ratio_rejected) )^2
    SimPO   -log sigmoid( beta (logprob_chosen/length - logprob_rejected/length - gamma/beta) )

with log_ratio = log pi(y|x) - log ref(y|x). All are pure functions that return (loss per element,
metrics). Losses are at least float32; only the policy's log-probabilities carry a gradient. Metrics
are detached 0-d tensors, under TRL's names if TRL has one: `rewards/*` are the implicit rewards
beta * log_ratio, `logps/*` the policy's log-probabilities.

`beta` may be a number, one per prompt (B,), or one per completion (B, K). `per_token_beta` gives
the length-normalised beta of the Apertus models: beta / length, also inside log Z.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qrpo.errors import ConfigError
from qrpo.method.partition import Partition, log_z
from qrpo.method.transforms import Transform, get_transform

Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]
LossType = Literal["mse", "mae"]
PairChoice = Literal["best-worst", "random", "dataset"]


def qrpo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    quantile_reward: Tensor,
    beta: float | Tensor,
    *,
    transform: str | Transform = "identity",
    partition: Partition = "continuous",
    num_ref: int | Tensor | None = None,
    self_included: bool = False,
    ref_quantiles: Tensor | None = None,
    ref_weights: Tensor | None = None,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: LossType = "mse",
) -> Loss:
    """QRPO's pointwise regression to the optimum's log-ratio; arXiv 2507.08068, algorithm 1.

    `logprob`, `ref_logprob`: (B, K) or any shape, sums over each completion's tokens.
    `quantile_reward`: the same shape.
    `num_ref`: number of references that each quantile was estimated from (a number, (B,) or (B,
    K)). The `finite` partition needs it, and transforms that are infinite at 0 or 1: it clamps
    their quantiles as the partition assumes.
    `ref_quantiles`: (B, N), NaN-padded, for the `empirical` partition; with `ref_weights` (B, N)
    they are distinct levels with counts or probabilities. `scale`: (B,) or (B, K), for scaled
    transforms.
    `mask`: (B, K), False on padding, which has loss 0 and does not enter the metrics.
    `loss_type`: `mse` squares the residual, `mae` takes its absolute value.

    Returns the loss per element and the metrics. d loss / d logprob = -2 beta residual, so beta
    scales the gradient.
    """
    if loss_type not in ("mse", "mae"):
        raise ConfigError(f"loss_type: got {loss_type!r}, expected mse or mae")
    _same_shape(logprob, ref_logprob=ref_logprob, quantile_reward=quantile_reward, mask=mask)
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    log_ratio = logprob.to(dtype) - ref_logprob.detach().to(dtype)
    beta_BK = _per_completion(beta, log_ratio)
    with torch.no_grad():
        transformed, beta_log_z = calibrated_targets(
            quantile_reward.to(dtype),
            beta if isinstance(beta, (int, float)) else beta_BK,
            transform=transform,
            partition=partition,
            num_ref=num_ref,
            self_included=self_included,
            ref_quantiles=ref_quantiles,
            ref_weights=ref_weights,
            scale=scale,
        )
        target = transformed - beta_log_z
    residual = target - beta_BK * log_ratio
    loss = residual.square() if loss_type == "mse" else residual.abs()
    if mask is not None:
        loss = torch.where(mask, loss, torch.zeros_like(loss))

    def mean(values: Tensor) -> Tensor:
        return _mean(values.detach(), mask)

    reward = (beta_BK * log_ratio).detach()
    metrics = {
        "log_ratio/mean": mean(log_ratio),
        "log_ratio/target": mean(target / beta_BK),
        "quantile_rewards/mean": mean(quantile_reward.to(dtype)),
        "transformed_rewards/mean": mean(transformed),
        "calibrated_rewards/mean": mean(target),
        "calibrated_rewards/sign_accuracy": mean(((target > 0) == (reward > 0)).to(dtype)),
        "beta_log_z": mean(beta_log_z),
        "residual/abs": mean(residual.abs()),
        "rewards/mean": mean(reward),
        "logps/mean": mean(logprob.to(dtype)),
    }
    if logprob.ndim == 2 and logprob.shape[1] > 1:
        best_worst = choose_pairs(quantile_reward, "best-worst", mask=mask)
        metrics |= _pair_metrics(best_worst, reward, logprob.detach().to(dtype))
        values = {"quantile_rewards": quantile_reward.to(dtype), "calibrated_rewards": target}
        for name, value in values.items():
            metrics[f"{name}/chosen"] = _mean(best_worst.chosen(value), best_worst.valid)
            metrics[f"{name}/rejected"] = _mean(best_worst.rejected(value), best_worst.valid)
    return loss, metrics


def calibrated_targets(
    quantile_reward: Tensor,
    beta: float | Tensor,
    *,
    transform: str | Transform = "identity",
    partition: Partition = "continuous",
    num_ref: int | Tensor | None = None,
    self_included: bool = False,
    ref_quantiles: Tensor | None = None,
    ref_weights: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(f(q), beta log Z), in q's shape: beta * log_ratio's target is their difference."""
    resolved = get_transform(transform)
    if scale is not None:
        scale = _per_completion(scale, quantile_reward)
    if isinstance(num_ref, torch.Tensor):
        num_ref = _per_completion(num_ref, quantile_reward)
    if num_ref is None and any(resolved.open_ends):
        ends = (quantile_reward <= 0) & resolved.open_ends[0] | (quantile_reward >= 1) & resolved.open_ends[1]
        if ends.any():
            raise ConfigError(
                f"transform {resolved.name!r} is infinite at a quantile of 0 or 1, and {int(ends.sum())} of this batch are: "
                "pass num_ref, so that they are clamped by one reference sample"
            )
    transformed = resolved(resolved.clamp(quantile_reward, num_ref))
    if scale is not None:
        transformed = scale * transformed
    logarithm = log_z(
        resolved,
        beta,
        partition=partition,
        num_ref=num_ref,
        self_included=self_included,
        ref_quantiles=_per_prompt(ref_quantiles, quantile_reward),
        ref_weights=_per_prompt(ref_weights, quantile_reward),
        scale=scale,
    )
    beta_log_z = torch.as_tensor(beta * logarithm, dtype=quantile_reward.dtype, device=quantile_reward.device)
    return transformed, beta_log_z.expand(quantile_reward.shape)


def per_token_beta(beta: float, length: Tensor) -> Tensor:
    """beta / length: one beta per completion, (B, K) from the (B, K) numbers of completion tokens;
    Apertus."""
    return beta / length.clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """One pair of completions per prompt: indices (B,) into the K completions, and whether the
    prompt has a usable pair."""

    chosen_index: Tensor
    rejected_index: Tensor
    valid: Tensor

    def chosen(self, values_BK: Tensor) -> Tensor:
        """(B,): the chosen completions' values."""
        return values_BK.gather(1, self.chosen_index[:, None])[:, 0]

    def rejected(self, values_BK: Tensor) -> Tensor:
        """(B,): the rejected completions' values."""
        return values_BK.gather(1, self.rejected_index[:, None])[:, 0]


def choose_pairs(
    reward: Tensor,
    choice: PairChoice = "best-worst",
    *,
    mask: Tensor | None = None,
    generator: Generator | None = None,
) -> Pairs:
    """A chosen and a rejected completion for each prompt of a (B, K) batch of rewards.

    `best-worst`: highest and lowest reward. `random`: two completions at random (by `generator`),
    the better one chosen.
    `dataset`: columns 0 and 1, the dataset's preference, regardless of rewards. `mask`: (B, K),
    False on padding. A prompt is not valid if it has fewer than two completions, or if rewards
    decide and tie.
    """
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ConfigError(f"pairs need (B, K) rewards with K of at least 2, got shape {tuple(reward.shape)}")
    present = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    if choice == "dataset":
        zero = torch.zeros(reward.shape[0], dtype=torch.int64, device=reward.device)
        return Pairs(zero, zero + 1, present[:, 0] & present[:, 1])
    if choice == "best-worst":
        chosen = reward.masked_fill(~present, -torch.inf).argmax(1)
        rejected = reward.masked_fill(~present, torch.inf).argmin(1)
    elif choice == "random":
        draw = torch.rand(reward.shape, generator=generator, device=reward.device).masked_fill(~present, -1.0)
        first, second = draw.topk(2, dim=1).indices.unbind(1)
        swap = _at(reward, second) > _at(reward, first)
        chosen, rejected = torch.where(swap, second, first), torch.where(swap, first, second)
    else:
        raise ConfigError(f"pairs: got {choice!r}, expected best-worst, random or dataset")
    valid = (_at(reward, chosen) > _at(reward, rejected)) & (present.sum(1) > 1)
    return Pairs(chosen, rejected, valid)


def dpo_loss(logprob: Tensor, ref_logprob: Tensor, pairs: Pairs, beta: float | Tensor) -> Loss:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7): (B,) losses, 0 where the prompt has
    no valid pair."""
    _same_shape(logprob, ref_logprob=ref_logprob)
    reward = _implicit_reward(logprob, ref_logprob, beta)
    loss = -F.logsigmoid(pairs.chosen(reward) - pairs.rejected(reward))
    return _only_valid(loss, pairs), _pair_metrics(pairs, reward.detach(), logprob.detach())


def rebel_loss(
    logprob: Tensor, ref_logprob: Tensor, reward: Tensor, pairs: Pairs, beta: float | Tensor
) -> Loss:
    """REBEL (arXiv 2404.16767, eq. 8 with eta = 1/beta): regress differences of log-ratios to
    differences of `reward`.

    `reward`: (B, K), any absolute reward; with f(q) its optimum is QRPO's.
    """
    _same_shape(logprob, ref_logprob=ref_logprob, reward=reward)
    implicit = _implicit_reward(logprob, ref_logprob, beta)
    beta_BK = _per_completion(beta, implicit)
    scaled = (reward.to(implicit.dtype) - implicit) / beta_BK
    loss = (pairs.chosen(scaled) - pairs.rejected(scaled)).square()
    return _only_valid(loss, pairs), _pair_metrics(pairs, implicit.detach(), logprob.detach())


def simpo_loss(
    logprob: Tensor,
    length: Tensor,
    pairs: Pairs,
    beta: float | Tensor,
    *,
    gamma_beta_ratio: float = 0.5,
) -> Loss:
    """SimPO (arXiv 2405.14734, eq. 6): no reference; `length` (B, K) are the completions' numbers
    of tokens."""
    _same_shape(logprob, length=length)
    reward = _implicit_reward(logprob / length, None, beta)
    margin = gamma_beta_ratio * _per_completion(beta, reward)
    loss = -F.logsigmoid(pairs.chosen(reward) - pairs.rejected(reward) - pairs.chosen(margin))
    return _only_valid(loss, pairs), _pair_metrics(pairs, reward.detach(), logprob.detach())


def _implicit_reward(logprob: Tensor, ref_logprob: Tensor | None, beta: float | Tensor) -> Tensor:
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    log_ratio = logprob.to(dtype)
    if ref_logprob is not None:
        log_ratio = log_ratio - ref_logprob.detach().to(dtype)
    return _per_completion(beta, log_ratio) * log_ratio


def _per_completion(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, (B,) or (B, K) as a tensor that broadcasts against (B, K)."""
    dtype = like.dtype if not isinstance(value, torch.Tensor) or value.is_floating_point() else value.dtype
    tensor = torch.as_tensor(value, dtype=dtype, device=like.device).detach()
    if tensor.ndim == 1 and like.ndim == 2:
        tensor = tensor[:, None]
    return tensor.expand(like.shape)


def _per_prompt(values: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, N) as (B, 1, N), to broadcast against (B, K)."""
    if values is None:
        return None
    return values.reshape(values.shape[:1] + (1,) * (like.ndim - 1) + values.shape[1:])


def _pair_metrics(pairs: Pairs, reward: Tensor, logprob: Tensor) -> dict[str, Tensor]:
    chosen, rejected = pairs.chosen(reward), pairs.rejected(reward)
    margin = chosen - rejected
    # equal implicit rewards, as at step 0, count as half correct
    correct = (margin > 0).to(reward.dtype) + 0.5 * (margin == 0).to(reward.dtype)
    return {
        "rewards/chosen": _mean(chosen, pairs.valid),
        "rewards/rejected": _mean(rejected, pairs.valid),
        "rewards/margins": _mean(margin, pairs.valid),
        "rewards/accuracies": _mean(correct, pairs.valid),
        "logps/chosen": _mean(pairs.chosen(logprob), pairs.valid),
        "logps/rejected": _mean(pairs.rejected(logprob), pairs.valid),
        "pairs/valid": pairs.valid.to(reward.dtype).mean(),
    }


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the values with a true `mask`; NaN if there are none."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()


def _only_valid(loss: Tensor, pairs: Pairs) -> Tensor:
    return torch.where(pairs.valid, loss, torch.zeros_like(loss))


def _at(values_BK: Tensor, index: Tensor) -> Tensor:
    return values_BK.gather(1, index[:, None])[:, 0]


def _same_shape(logprob: Tensor, **others: Any) -> None:
    for name, other in others.items():
        if other is not None and other.shape != logprob.shape:
            raise ConfigError(
                f"{name}: got shape {tuple(other.shape)}, expected logprob's {tuple(logprob.shape)}"
            )
