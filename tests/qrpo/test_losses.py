"""Losses against the published research code's own numbers, and against first principles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qrpo.errors import ConfigError
from qrpo.method.losses import (
    calibrated_targets,
    choose_pairs,
    dpo_loss,
    per_token_beta,
    qrpo_loss,
    rebel_loss,
    simpo_loss,
)
from qrpo.method.partition import log_z
from qrpo.method.quantiles import quantile_rewards
from qrpo.method.transforms import reference_scale
from tests.support.refusals import refuses

PUBLISHED = Path(__file__).parents[1] / "data" / "published_losses.json"


def published(loss: str) -> list[dict]:
    cases = [case for case in json.loads(PUBLISHED.read_text()) if case["loss"] == loss]
    assert cases
    return cases


def pair_columns(case: dict, chosen: str, rejected: str) -> torch.Tensor:
    return torch.tensor([case[chosen], case[rejected]], dtype=torch.float64).T


def published_qrpo(case: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(B, 2) losses of our qrpo_loss on the case, and what it was computed from."""
    ref_rewards = np.array(case["ref_rewards"])
    rewards = pair_columns(case, "chosen_rewards", "rejected_rewards").numpy()
    quantiles = torch.from_numpy(quantile_rewards(rewards, ref_rewards))
    scale = None
    if case["transform"] == "scaled-normal-icdf":
        scale = torch.from_numpy(reference_scale(ref_rewards.std(1, ddof=1), case["mean_std_ref_rewards"]))
    common = {"transform": case["transform"], "num_ref": ref_rewards.shape[1], "scale": scale}
    loss, _ = qrpo_loss(
        pair_columns(case, "chosen_logps", "rejected_logps"),
        pair_columns(case, "ref_chosen_logps", "ref_rejected_logps"),
        quantiles,
        case["beta"],
        loss_type=case["loss_type"],
        **common,
    )
    transformed, beta_log_z = calibrated_targets(quantiles, case["beta"], **common)
    return loss, {"transformed": transformed, "beta_log_z": beta_log_z}


def test_qrpo_equals_the_published_code_where_its_formula_is_exact():
    for case in published("qrpo"):
        loss, parts = published_qrpo(case)
        modified = pair_columns(
            case, "expected_modified_rewards_chosen", "expected_modified_rewards_rejected"
        )
        torch.testing.assert_close(parts["transformed"], modified, rtol=1e-5, atol=1e-6)
        if case["transform"] == "identity" and case["beta"] > 0.05:
            continue  # the published log Z is an approximation here: the next test
        expected = torch.tensor(case["expected_losses"], dtype=torch.float64)
        torch.testing.assert_close(loss.mean(1), expected, rtol=1e-5, atol=0)


def test_the_published_identity_log_z_differs_by_exactly_its_dropped_term():
    # published: log(beta e^(1/beta)); exact: log(beta (e^(1/beta) - 1)); the difference is log(1 - e^(-1/beta))
    differing = 0
    for case in published("qrpo"):
        if case["transform"] != "identity":
            continue
        beta = case["beta"]
        dropped = np.log1p(-np.exp(-1 / beta))
        ours = float(log_z("identity", beta))
        np.testing.assert_allclose(case["expected_log_Z"], ours - dropped, rtol=2e-7)
        # putting the term back into the published targets gives our losses
        _, parts = published_qrpo(case)
        target = parts["transformed"] - (parts["beta_log_z"] - beta * dropped)
        log_ratio = pair_columns(case, "chosen_logps", "rejected_logps") - pair_columns(
            case, "ref_chosen_logps", "ref_rejected_logps"
        )
        residual = target - beta * log_ratio
        theirs = residual.abs() if case["loss_type"] == "mae" else residual.square()
        expected = torch.tensor(case["expected_losses"], dtype=torch.float64)
        torch.testing.assert_close(theirs.mean(1), expected, rtol=1e-5, atol=0)
        differing += abs(dropped) > 1e-6
    assert differing  # beta = 0.1 and 1 are among the cases


def test_dpo_rebel_and_simpo_equal_the_published_code():
    for case in published("dpo") + published("rebel") + published("simpo"):
        logprob = pair_columns(case, "chosen_logps", "rejected_logps")
        ref_logprob = pair_columns(case, "ref_chosen_logps", "ref_rejected_logps")
        rewards = pair_columns(case, "chosen_rewards", "rejected_rewards")
        pairs = choose_pairs(rewards, "dataset")
        if case["loss"] == "dpo":
            loss, _ = dpo_loss(logprob, ref_logprob, pairs, case["beta"])
        elif case["loss"] == "rebel":
            loss, _ = rebel_loss(logprob, ref_logprob, rewards, pairs, case["beta"])
        else:
            normalized = pair_columns(case, "chosen_normalized_logps", "rejected_normalized_logps")
            length = torch.tensor([[7.0, 3.0]], dtype=torch.float64).expand_as(normalized)
            loss, _ = simpo_loss(
                normalized * length,
                length,
                pairs,
                case["beta"],
                gamma_beta_ratio=case["simpo_gamma_beta_ratio"],
            )
        expected = torch.tensor(case["expected_losses"], dtype=torch.float64)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def batch(b: int = 6, k: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logprob": (-40 + 5 * torch.randn(b, k, generator=generator)).to(dtype).requires_grad_(),
        "ref_logprob": (-40 + 5 * torch.randn(b, k, generator=generator)).to(dtype),
        "quantile_reward": torch.randint(0, 11, (b, k), generator=generator).to(dtype) / 10,
    }


def test_the_loss_is_zero_at_the_optimum_and_only_there():
    inputs = batch()
    beta = 0.3
    target = (inputs["quantile_reward"] - beta * float(log_z("identity", beta))) / beta
    at_optimum = (inputs["ref_logprob"] + target).requires_grad_()
    loss, metrics = qrpo_loss(at_optimum, inputs["ref_logprob"], inputs["quantile_reward"], beta)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-10, rtol=0)
    assert metrics["calibrated_rewards/sign_accuracy"] == 1
    loss.sum().backward()
    assert at_optimum.grad is not None
    assert at_optimum.grad.abs().max() < 1e-4


@pytest.mark.parametrize("partition", ["continuous", "finite"])
@pytest.mark.parametrize("transform", ["identity", "log", "normal-icdf", "power"])
def test_the_loss_is_its_definition_with_one_beta_per_completion(transform, partition):
    inputs = batch(dtype=torch.float64)
    beta = torch.linspace(0.05, 2, 24, dtype=torch.float64).reshape(6, 4)
    loss, metrics = qrpo_loss(**inputs, beta=beta, transform=transform, partition=partition, num_ref=10)
    for b, k in np.ndindex(6, 4):
        single = {name: tensor.detach()[b : b + 1, k : k + 1] for name, tensor in inputs.items()}
        one, _ = qrpo_loss(
            **single, beta=float(beta[b, k]), transform=transform, partition=partition, num_ref=10
        )
        assert float(one) == pytest.approx(float(loss[b, k].detach()), rel=1e-12)
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


def test_length_normalised_beta_regresses_the_mean_log_ratio():
    # with beta/|y| in both terms: (f(q) - (beta/|y|) log Z(beta/|y|) - beta * mean log-ratio)^2
    inputs = batch(dtype=torch.float64)
    length = torch.randint(1, 30, (6, 4), generator=torch.Generator().manual_seed(1))
    beta = per_token_beta(5.0, length)
    loss, _ = qrpo_loss(**inputs, beta=beta)
    mean_log_ratio = (inputs["logprob"] - inputs["ref_logprob"]) / length
    expected = inputs["quantile_reward"] - beta * log_z("identity", beta) - 5.0 * mean_log_ratio
    torch.testing.assert_close(loss, expected.square())


def test_gradients_flow_through_the_policy_only_and_have_the_expected_value():
    inputs = batch(dtype=torch.float64)
    inputs["ref_logprob"].requires_grad_()
    for loss_type, slope in (("mse", lambda r: -2 * 0.1 * r), ("mae", lambda r: -0.1 * r.sign())):
        loss, _ = qrpo_loss(**inputs, beta=0.1, loss_type=loss_type)
        (gradient,) = torch.autograd.grad(loss.sum(), inputs["logprob"])
        residual = (
            inputs["quantile_reward"]
            - 0.1 * float(log_z("identity", 0.1))
            - 0.1 * (inputs["logprob"] - inputs["ref_logprob"])
        )
        torch.testing.assert_close(gradient, slope(residual.detach()))
        assert inputs["ref_logprob"].grad is None


def test_bfloat16_log_probabilities_are_widened():
    inputs = batch(dtype=torch.bfloat16)
    loss, metrics = qrpo_loss(**inputs, beta=0.1)
    assert loss.dtype == torch.float32
    assert metrics["rewards/chosen"].dtype == torch.float32


def test_a_mask_takes_padding_out_of_losses_and_metrics():
    inputs = batch()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 3] = False
    mask[0, 1:] = False
    padded = {name: tensor.detach().masked_fill(~mask, 1e4) for name, tensor in inputs.items()}
    padded["quantile_reward"] = inputs["quantile_reward"].masked_fill(~mask, 0.0)
    loss, metrics = qrpo_loss(**padded, beta=0.1, mask=mask)
    assert (loss[~mask] == 0).all()
    without, metrics_without = qrpo_loss(**{name: t[1:, :3] for name, t in inputs.items()}, beta=0.1)
    torch.testing.assert_close(loss[1:, :3], without.detach())
    for name in ("rewards/chosen", "rewards/accuracies", "quantile_rewards/rejected"):
        torch.testing.assert_close(metrics[name], metrics_without[name])


def test_quantiles_at_an_infinite_end_need_the_number_of_references():
    inputs = batch()
    inputs["quantile_reward"][0, 0] = 0.0
    with pytest.raises(ConfigError, match="pass num_ref"):
        qrpo_loss(**inputs, beta=0.1, transform="log")
    loss, _ = qrpo_loss(**inputs, beta=0.1, transform="log", num_ref=10)
    assert torch.isfinite(loss).all()
    interior = inputs | {"quantile_reward": torch.full((6, 4), 0.3)}
    assert torch.isfinite(qrpo_loss(**interior, beta=0.1, transform="log")[0]).all()


def test_one_beta_and_one_number_of_references_per_prompt_are_broadcast_over_its_completions():
    inputs = batch(dtype=torch.float64)
    beta, num_ref = torch.linspace(0.1, 0.6, 6, dtype=torch.float64), torch.tensor([3, 3, 10, 10, 50, 50])
    settings = {"partition": "finite", "transform": "log"}
    loss, _ = qrpo_loss(**inputs, beta=beta, num_ref=num_ref, **settings)
    each, _ = qrpo_loss(**inputs, beta=beta[:, None].expand(6, 4), num_ref=num_ref, **settings)
    assert torch.equal(loss, each)
    for b in range(6):
        row = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
        one, _ = qrpo_loss(**row, beta=float(beta[b]), num_ref=int(num_ref[b]), **settings)
        torch.testing.assert_close(one[0], loss[b])


def test_the_empirical_partition_takes_padded_reference_quantiles():
    inputs = batch(b=2, dtype=torch.float64)
    ref_quantiles = torch.tensor([[0.25, 1.0, 1.0, 1.0], [0.5, 0.5, 1.0, torch.nan]], dtype=torch.float64)
    loss, _ = qrpo_loss(**inputs, beta=0.5, partition="empirical", ref_quantiles=ref_quantiles)
    for b, levels in enumerate(([0.25, 1, 1, 1], [0.5, 0.5, 1])):
        z = np.mean(np.exp(np.array(levels) / 0.5))
        log_ratio = (inputs["logprob"] - inputs["ref_logprob"])[b]
        expected = inputs["quantile_reward"][b] - 0.5 * np.log(z) - 0.5 * log_ratio
        torch.testing.assert_close(loss[b], expected.square())


def test_best_and_worst_are_paired_and_ties_are_not():
    rewards = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]])
    pairs = choose_pairs(rewards, "best-worst")
    assert pairs.chosen(rewards)[0] == rewards[0, 1]
    assert pairs.rejected(rewards)[0] == rewards[0, 0]
    assert pairs.valid.tolist() == [True, False]
    loss, metrics = dpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), pairs, 0.1)
    assert loss.tolist() == pytest.approx([np.log(2), 0.0])
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["pairs/valid"] == 0.5


def test_random_pairs_are_ordered_by_reward_and_cover_all_pairs():
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.7]).expand(4000, 4)
    mask = torch.ones(4000, 4, dtype=torch.bool)
    mask[:, 3] = False
    pairs = choose_pairs(rewards, "random", mask=mask, generator=torch.Generator().manual_seed(0))
    assert pairs.valid.all()
    assert (pairs.chosen(rewards) > pairs.rejected(rewards)).all()
    seen = torch.stack([pairs.chosen_index, pairs.rejected_index], 1).unique(dim=0)
    assert seen.tolist() == [[1, 0], [1, 2], [2, 0]]
    again = choose_pairs(rewards, "random", mask=mask, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.chosen_index, pairs.chosen_index)


def test_rebel_on_transformed_quantiles_shares_the_optimum_of_qrpo():
    inputs = batch(dtype=torch.float64)
    at_optimum = inputs["ref_logprob"] + inputs["quantile_reward"] / 0.3 - float(log_z("identity", 0.3))
    pairs = choose_pairs(inputs["quantile_reward"])
    loss, _ = rebel_loss(at_optimum, inputs["ref_logprob"], inputs["quantile_reward"], pairs, 0.3)
    torch.testing.assert_close(loss, torch.zeros_like(loss))


def test_wrong_settings_are_named():
    inputs = batch()
    for match, settings in (
        ("loss_type", {"loss_type": "huber"}),
        ("num_ref", {"partition": "finite"}),
        ("one scale per prompt", {"transform": "scaled-normal-icdf", "num_ref": 10}),
        (r"quantile_reward: got shape \(6, 1\)", {"quantile_reward": torch.zeros(6, 1)}),
    ):
        refuses(ConfigError, match, qrpo_loss, **inputs | {"beta": 0.1, **settings})
    refuses(ConfigError, "pairs", choose_pairs, inputs["quantile_reward"], "nearest")
    refuses(ConfigError, "K of at least 2", choose_pairs, inputs["quantile_reward"][:, :1])
