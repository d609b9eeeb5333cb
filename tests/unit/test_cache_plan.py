"""Which trials each cache is for: none in both tiers, within the budget, training first."""

from __future__ import annotations

import pytest
from brain_to_text.config import DatasetConfig
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.streaming.cache_plan import plan_device, plan_ram
from hypothesis import given
from hypothesis import strategies as st

N_FEATURES = 4
SPLITS = ("train", "val", "test")


def manifest_of(trials: list[tuple[int, str, int]]) -> TrialManifest:
    """Trials of (bins, split, session)."""
    return TrialManifest(
        tuple(
            TrialRecord(
                session=f"t15.2023.08.{10 + session}",
                split=split,
                key=f"t15.2023.08.{10 + session}/data_{split}.hdf5",
                trial=f"trial_{i:04d}",
                n_time_steps=bins,
                n_features=N_FEATURES,
                dtype="<f4",
                offset=0,
                length=bins * N_FEATURES * 4,
            )
            for i, (bins, split, session) in enumerate(trials)
        ),
        {},
        N_FEATURES,
        1681,
        "self_loop",
    )


TRIALS = st.lists(
    st.tuples(st.integers(1, 400), st.sampled_from(SPLITS), st.integers(0, 3)),
    max_size=60,
)


@given(TRIALS, st.floats(0, 3e-4), st.sampled_from(["stored", "float16"]), st.integers(1, 4))
def test_a_training_trial_is_for_one_tier_and_the_gpus_budget_is_kept(
    trials: list[tuple[int, str, int]], gpu_cache_gb: float, cache_dtype: str, world_size: int
) -> None:
    manifest = manifest_of(trials)
    dataset = DatasetConfig(
        batch_size=4,
        gpu_cache_gb=gpu_cache_gb,
        cache_dtype=cache_dtype,  # type: ignore[arg-type]
    )
    device, ram = (
        plan_device(manifest, dataset, world_size),
        plan_ram(manifest, dataset, world_size),
    )
    train, val = set(manifest.select("train")), set(manifest.select("val"))
    assert set(device.n_time_steps) | set(ram.first) == train
    assert not set(device.n_time_steps) & set(ram.first)
    assert set(ram.rest) == val
    rows = 1 + sum(device.n_time_steps.values()) + device.scratch_rows
    itemsize = 2 if cache_dtype == "float16" else 4
    if device.n_time_steps:
        assert rows * N_FEATURES * itemsize <= gpu_cache_gb * 1e9
    assert all(n == trials[i][0] for i, n in device.n_time_steps.items())
    assert all(n == trials[i][0] * N_FEATURES * itemsize for i, n in ram.first.items())


def test_ram_that_several_gpus_share_keeps_their_trials_too_but_last() -> None:
    manifest = manifest_of([(100, "train", 0)] * 6 + [(100, "val", 0)] * 3)
    dataset = DatasetConfig(batch_size=1, gpu_cache_gb=(1 + 100 + 250) * N_FEATURES * 4 / 1e9)
    ours = plan_device(manifest, dataset, 2).n_time_steps
    ram = plan_ram(manifest, dataset, 2, shared=True)
    assert len(ours) == 2 and not set(ours) & set(ram.first)
    assert sorted(list(ram.rest)[:3]) == [6, 7, 8] and set(list(ram.rest)[3:]) == set(ours)


def test_what_the_run_leaves_out_takes_no_room() -> None:
    manifest = manifest_of([(100, split, session) for session in (0, 1) for split in SPLITS])
    ram = plan_ram(manifest, DatasetConfig(sessions=["t15.2023.08.11"]))
    assert list(ram.first) == [3] and list(ram.rest) == [4]


def test_the_beginning_of_the_plan_has_some_of_every_session() -> None:
    manifest = manifest_of([(100, "train", session) for session in range(4) for _ in range(50)])
    first = list(plan_ram(manifest, DatasetConfig()).first)[:40]
    by_session = [sum(i // 50 == session for i in first) for session in range(4)]
    assert by_session == pytest.approx([10] * 4, abs=3)
