"""QRPO finds the optimum: trained in the enumerable task of benchmarks/optimum.py, judged exactly."""

import numpy as np
import pytest
import torch

from benchmarks import optimum
from qrpo.method import optimum as method
from qrpo.method.partition import log_z


def test_the_world_is_enumerated_whole():
    world = optimum.make_world(3)
    assert world.prefix.shape[0] == 1 + 4 + 16 + 64 + 256
    torch.testing.assert_close(
        world.log_probabilities(world.ref_logits).exp().sum(1), torch.ones(3, dtype=torch.float64)
    )
    # sampling token by token gives the enumerated probabilities: P(empty completion) is P(end at once)
    ends = world.ref_logits.softmax(-1)[:, 0, optimum.END]
    torch.testing.assert_close(world.log_probabilities(world.ref_logits)[:, 0].exp(), ends)
    # quantiles as numbers: the best completion's is 1, and P(q <= t) <= t at every atom
    assert world.quantile.max(1).values.tolist() == pytest.approx([1, 1, 1])


def test_qrpo_with_exact_quantiles_and_partition_finds_the_optimum():
    (row,) = optimum.finds_the_optimum(prompts=4, steps=350, settings=(("identity", 0.1),))
    assert row["kl_optimum_to_policy"] < 1e-3
    assert row["objective_share"] > 0.999


@pytest.mark.slow
def test_every_transform_finds_its_own_optimum():
    for row in optimum.finds_the_optimum(prompts=6, steps=500):
        assert row["kl_optimum_to_policy"] < 1e-3, row
        assert row["objective_share"] > 0.999, row


def test_the_optimum_of_a_large_world_is_what_theory_promises():
    # no training: the exact pi* over enumerated completions against integrals over quantiles, up to the atoms' size
    judge = optimum.Judge(optimum.make_world(60, seed=5), "identity", 0.3)
    numbers, promise = judge(judge.optimum()), method.optimum("identity", 0.3)
    assert numbers["win_rate"] == pytest.approx(promise.win_rate, abs=0.02)
    assert numbers["kl_to_reference"] == pytest.approx(promise.kl, rel=0.15)
    ref = judge.world.log_probabilities(judge.world.ref_logits).exp()
    exact = np.log((ref * torch.exp(judge.transformed() / 0.3)).sum(1).numpy())
    assert exact.mean() == pytest.approx(log_z("identity", 0.3), abs=0.15)


@pytest.mark.slow
def test_more_reference_samples_come_nearer():
    rows = optimum.scales_with_references(prompts=16, steps=300)
    distances = [row["continuous"]["kl_optimum_to_policy"] for row in rows]
    shares = [row["finite"]["objective_share"] for row in rows]
    assert distances == sorted(distances, reverse=True)
    assert shares == sorted(shares)
    assert distances[-1] < 0.1
    assert shares[-1] > 0.95


@pytest.mark.slow
def test_the_exact_partition_is_nearer_where_rewards_are_discrete():
    rows = optimum.compares_partitions(prompts=32, steps=250)
    distance = {(row["quantiles"], row["partition"]): row["kl_optimum_to_policy"] for row in rows}
    assert distance["exact", "empirical"] < 1e-3
    assert distance["exact", "continuous"] > 0.02
    estimated = {
        partition: distance["50 samples", partition] for partition in ("empirical", "finite", "continuous")
    }
    assert estimated["empirical"] < 0.6 * min(estimated["finite"], estimated["continuous"])


@pytest.mark.slow
def test_the_finite_partition_is_nearer_where_quantiles_are_clamped():
    rows = optimum.compares_clamped(prompts=12, steps=300)
    distance = {(row["quantiles"], row["partition"]): row["kl_optimum_to_policy"] for row in rows}
    assert distance["10 samples", "finite"] < 0.8 * distance["10 samples", "continuous"]


@pytest.mark.slow
def test_methods_are_judged_by_the_objective():
    share = {row["method"]: row["objective_share"] for row in optimum.compares_methods(prompts=8, steps=350)}
    assert share.pop("QRPO, exact quantiles") > 0.999
    assert share["QRPO, 50 samples"] > 0.9
    assert share["REBEL on quantiles, 50 samples"] > 0.9
    assert all(value < 0.999 for value in share.values())
    assert share["SimPO"] < share["DPO"]  # no reference to stay near
