"""Which rows each process sees, and what becomes of a step that goes wrong."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo.errors import TrainingError
from qrpo.training.callbacks import FIRST_LOSSES
from qrpo.training.loader import ShuffledRows, is_idle, step_loader
from qrpo.training.runs import load_policy, train_policy
from qrpo.training.settings import PolicyConfig
from qrpo.training.trainer import QRPOConfig, QRPOTrainer

SETTINGS = {
    "beta": 0.5,
    "learning_rate": 1e-3,
    "prompts_per_step": 4,
    "warmup_steps": 0.0,
    "token_budget": 256,
}


def micro_batches(rows: int, batch_size: int, rank: int, world_size: int, epoch: int = 0) -> list[list[int]]:
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
def test_every_row_comes_once_for_any_number_of_processes_even_if_it_changes(
    rows: int, step: int, cut: tuple[int, int], changed_at: int
) -> None:
    """`step` rows a step, on one process and cut over processes and accumulation: the same rows in every step."""
    world_size, accumulation = cut
    if step % (world_size * accumulation):
        return
    alone = micro_batches(rows, step, 0, 1)
    shares = [
        micro_batches(rows, step // (world_size * accumulation), rank, world_size)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1, "all processes take equally many micro-batches"
    steps = [
        sorted(
            itertools.chain.from_iterable(
                batch for share in shares for batch in share[start : start + accumulation]
            )
        )
        for start in range(0, len(shares[0]), accumulation)
    ]
    assert steps == [sorted(batch) for batch in alone]
    seen = [*itertools.chain(*alone[:changed_at]), *itertools.chain(*steps[changed_at:])]
    assert sorted(seen) == list(range(rows))


def test_epochs_are_different_orders_that_repeat() -> None:
    orders = [list(itertools.chain(*micro_batches(50, 4, 0, 1, epoch))) for epoch in (0, 1, 1)]
    assert orders[0] != orders[1]
    assert orders[1] == orders[2]


class Seeks:
    """A reader of ten million rows that notes from where it was read."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 10_000_010

    def iterate(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Any:
        self.starts.append((epoch, start))
        yield from ({"number": number} for number in range(start + rank, len(self), world_size))


def test_a_resumed_epoch_reads_nothing_of_what_it_skips() -> None:
    from accelerate import skip_first_batches

    reader = Seeks()
    loader = step_loader(reader, 10, 0, 1, drop_last=False)
    resumed = iter(skip_first_batches(loader, 1_000_000))
    numbers = [row["number"] for row in next(resumed)["rows"]]

    assert numbers == list(range(10_000_000, 10_000_010))
    assert reader.starts == [(0, 10_000_000)]


def test_the_rest_of_an_epoch_is_one_stream() -> None:
    reader = Seeks()
    loader = iter(step_loader(reader, 2, 1, 2, drop_last=False))
    numbers = [row["number"] for _ in range(3) for row in next(loader)["rows"]]

    assert numbers == [1, 3, 5, 7, 9, 11]
    assert reader.starts == [(0, 0)]


# ------------------------------------------------------------------------------------------- bad steps


@pytest.fixture(scope="module")
def rows(make_rows: Callable[[int, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """60 prompts: 15 steps."""
    return make_rows(60, 2)


def with_bad_row(rows: list[dict[str, Any]], step: int, **change: Any) -> tuple[list[dict[str, Any]], str]:
    """The rows, one of `step` changed, and its prompt."""
    chosen = next(ShuffledRows(rows, seed=0).iterate(0, 4 * (step - 1)))
    return [{**row, **change} if row is chosen else row for row in rows], chosen["prompt_id"]


def weights_of(output: Path, step: int) -> bytes:
    return (output / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_a_bad_step_can_be_left_out(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    bad, _ = with_bad_row(rows, 3, quantile_reward=np.array([0.5, np.nan], dtype=np.float32))
    config = PolicyConfig(**SETTINGS, max_steps=5, bad_step="skip", save_steps=1, save_total_limit=5)
    train_policy(folder, bad, config, tmp_path)

    assert weights_of(tmp_path, 2) == weights_of(tmp_path, 3)
    assert weights_of(tmp_path, 3) != weights_of(tmp_path, 4)
    losses = polars.read_parquet(tmp_path / "metrics.parquet").drop_nulls("loss")["loss"].to_list()
    assert np.isnan(losses).tolist() == [False, False, True, False, False]


@pytest.mark.slow
def test_an_exploded_loss_stops_and_names_the_prompt(
    folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    far_off = np.array([-1e4, -1e4], dtype=np.float32)
    bad, name = with_bad_row(rows, FIRST_LOSSES + 2, ref_logprob=far_off)

    with pytest.raises(
        TrainingError, match=rf"step 12: the loss is .* more than 1000 times the largest.*losses: {name}, "
    ):
        train_policy(folder, bad, PolicyConfig(**SETTINGS), tmp_path / "stopped")
    train_policy(folder, bad, PolicyConfig(**SETTINGS, max_loss_growth=None), tmp_path / "allowed")


def test_a_gradient_that_is_not_finite_stops(
    folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = load_policy(folder)
    model.lm_head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    config = QRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, report_to="none", disable_tqdm=True
    )

    with pytest.raises(TrainingError, match="step 1: the gradient is not finite; the prompts"):
        QRPOTrainer(model, config, rows).train()
