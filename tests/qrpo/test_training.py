"""Which rows each process sees, and what becomes of a step that goes wrong."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo.errors import TrainingError
from qrpo.training.callbacks import FIRST_LOSSES
from qrpo.training.loader import ShuffledRows, held_out, is_idle, step_loader
from qrpo.training.runs import load_policy
from qrpo.training.trainer import QRPOConfig, QRPOTrainer
from tests.support.training import metrics, train

SETTINGS = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "token_budget": 256}


def micro_batches(rows, batch_size, rank, world_size, epoch=0):
    """The numbers of the rows that one process gets, micro-batch by micro-batch."""
    reader = ShuffledRows([{"number": number} for number in range(rows)], seed=7)
    loader = step_loader(reader, batch_size, rank, world_size, drop_last=False)
    loader.set_epoch(epoch)
    batches = [batch["rows"] for batch in loader]
    assert len(batches) == len(loader)
    return [[] if is_idle(batch) else [row["number"] for row in batch] for batch in batches]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    step=st.sampled_from([2, 4, 8, 12]),
    cut=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    changed_at=st.integers(0, 20),
)
def test_every_row_comes_once_for_any_number_of_processes_even_if_it_changes(rows, step, cut, changed_at):
    """`step` rows a step, on one process and cut over processes and accumulation: the same rows in every step."""
    world_size, accumulation = cut
    if step % (world_size * accumulation):
        return
    alone = micro_batches(rows, step, 0, 1)
    per_rank = step // (world_size * accumulation)
    shares = [micro_batches(rows, per_rank, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "all processes take equally many micro-batches"
    starts = range(0, len(shares[0]), accumulation)
    cuts = [[batch for share in shares for batch in share[at : at + accumulation]] for at in starts]
    steps = [sorted(itertools.chain.from_iterable(batches)) for batches in cuts]
    assert steps == [sorted(batch) for batch in alone]
    seen = [*itertools.chain(*alone[:changed_at]), *itertools.chain(*steps[changed_at:])]
    assert sorted(seen) == list(range(rows))


def test_epochs_are_different_orders_that_repeat():
    orders = [list(itertools.chain(*micro_batches(50, 4, 0, 1, epoch))) for epoch in (0, 1, 1)]
    assert orders[0] != orders[1]
    assert orders[1] == orders[2]


class Seeks:
    """A reader of ten million rows that notes from where it was read."""

    def __init__(self):
        self.starts = []

    def __len__(self):
        return 10_000_010

    def iterate(self, epoch, start=0, rank=0, world_size=1):
        self.starts.append((epoch, start))
        yield from ({"number": number} for number in range(start + rank, len(self), world_size))


def test_a_resumed_epoch_reads_nothing_of_what_it_skips():
    reader = Seeks()
    resumed = iter(skip_first_batches(step_loader(reader, 10, 0, 1, drop_last=False), 1_000_000))

    assert [row["number"] for row in next(resumed)["rows"]] == list(range(10_000_000, 10_000_010))
    assert reader.starts == [(0, 10_000_000)]


def test_the_rest_of_an_epoch_is_one_stream():
    reader = Seeks()
    loader = iter(step_loader(reader, 2, 1, 2, drop_last=False))
    numbers = [row["number"] for _ in range(3) for row in next(loader)["rows"]]

    assert numbers == [1, 3, 5, 7, 9, 11]
    assert reader.starts == [(0, 0)]


def test_prompts_are_held_out_by_a_hash_of_the_seed_and_their_id():
    prompts = [f"prompt-{i}" for i in range(4000)]
    tenth, fifth, other = (
        {prompt for prompt in prompts if held_out(prompt, fraction, seed)}
        for fraction, seed in ((0.1, 0), (0.2, 0), (0.2, 1))
    )
    assert len(tenth) == pytest.approx(400, abs=80)
    assert tenth < fifth
    assert len(fifth & other) == pytest.approx(160, abs=50)
    assert not any(held_out(prompt, 0.0, 0) for prompt in prompts)


# ------------------------------------------------------------------------------------------- bad steps


@pytest.fixture(scope="module")
def rows(make_rows):
    """60 prompts: 15 steps."""
    return make_rows(60, 2)


def with_bad_row(rows, step, **change):
    """The rows, one of `step` changed, and its prompt."""
    chosen = next(ShuffledRows(rows, seed=0).iterate(0, 4 * (step - 1)))
    return [{**row, **change} if row is chosen else row for row in rows], chosen["prompt_id"]


def weights_of(output, step):
    return (output / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_a_bad_step_can_be_skipped(folder, rows, tmp_path):
    bad, _ = with_bad_row(rows, 3, quantile_reward=np.array([0.5, np.nan], dtype=np.float32))
    train(folder, bad, tmp_path, **SETTINGS, max_steps=5, bad_step="skip", save_steps=1, save_total_limit=5)

    assert weights_of(tmp_path, 2) == weights_of(tmp_path, 3)
    assert weights_of(tmp_path, 3) != weights_of(tmp_path, 4)
    assert np.isnan(metrics(tmp_path)["loss"]).tolist() == [False, False, True, False, False]


@pytest.mark.slow
def test_an_exploded_loss_stops_and_names_the_prompt(folder, rows, tmp_path):
    far_off = np.array([-1e4, -1e4], dtype=np.float32)
    bad, name = with_bad_row(rows, FIRST_LOSSES + 2, ref_logprob=far_off)

    reason = rf"step 12: the loss is .* more than 1000 times the largest.*losses: {name}, "
    with pytest.raises(TrainingError, match=reason):
        train(folder, bad, tmp_path / "stopped", **SETTINGS)
    train(folder, bad, tmp_path / "allowed", **SETTINGS, max_loss_growth=None)


def test_a_gradient_that_is_not_finite_stops(folder, rows, tmp_path):
    model = load_policy(folder)
    model.lm_head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    config = QRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none", disable_tqdm=True
    )

    with pytest.raises(TrainingError, match="step 1: the gradient is not finite; the prompts"):
        QRPOTrainer(model, config, rows).train()
