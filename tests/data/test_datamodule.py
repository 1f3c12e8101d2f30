"""The training stream: its order over ranks, workers and interruptions (with a real Trainer on the CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from qsam2.data.clips import ClipDataset
from qsam2.data.datamodule import ClipDataModule, StreamSampler
from qsam2.data.video import Video
from qsam2.errors import UserError

STEPS = 6


class Squares(Video):
    """Six frames of a moving square."""

    name = "squares"
    frame_names = [f"{i:05d}" for i in range(6)]
    size = (24, 32)

    def frame(self, index: int) -> np.ndarray:
        return np.full((*self.size, 3), 40 * index, np.uint8)

    def masks(self, index: int) -> dict[int, np.ndarray]:
        mask = np.zeros(self.size, bool)
        mask[4:16, 2 * index : 2 * index + 12] = True
        return {1: mask}


def data(total_samples: int = 2 * STEPS, batch_size: int = 2, num_workers: int = 0) -> ClipDataModule:
    clips = ClipDataset([Squares()], num_frames=2, max_objects=2, image_size=16, length=total_samples, seed=5)
    return ClipDataModule(clips, batch_size=batch_size, num_workers=num_workers)


class Recorder(L.LightningModule):
    """Notes which samples it was given and what they held; may fail at one step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at and self.fail_at is not None:
            raise RuntimeError("interrupted")
        ids = batch.metadata.unique_objects_identifier[0, :, 0].tolist()
        self.seen.append((ids, float(batch.img_batch.double().sum())))
        return self.weight * batch.img_batch.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, callbacks: Sequence[L.Callback] = (), **settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **({"max_epochs": 1} | settings),
    )


def fit(folder: Path, checkpoint: Path | None = None, callbacks=(), workers=0, **settings) -> list:
    """What a run sees."""
    module = Recorder()
    trainer(folder, callbacks, **settings).fit(module, datamodule=data(num_workers=workers), ckpt_path=checkpoint)
    return module.seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[tuple[list[int], float]]:
    return fit(tmp_path_factory.mktemp("whole"))


def test_the_whole_run_sees_each_sample_once(whole):
    assert [index for ids, _ in whole for index in ids] == list(range(2 * STEPS))
    assert len({total for _, total in whole}) > 1  # the clips differ


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_sees_exactly_the_remaining_batches(tmp_path, whole, workers):
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)
    assert fit(tmp_path, callbacks=[saver], workers=workers, max_steps=4) == whole[:4]
    for done in (1, 4):
        assert fit(tmp_path, tmp_path / f"at-step={done}.ckpt", workers=workers) == whole[done:]


def test_a_step_that_failed_is_repeated(tmp_path, whole):
    module, interrupted = Recorder(fail_at=3), trainer(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted.fit(module, datamodule=data())
    interrupted.save_checkpoint(tmp_path / "rescue.ckpt")
    assert module.seen == whole[:3]
    assert fit(tmp_path, tmp_path / "rescue.ckpt") == whole[3:]


def test_a_second_epoch_follows_a_checkpoint_at_the_end_of_the_first(tmp_path, whole):
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1, save_on_train_epoch_end=True)
    assert fit(tmp_path, callbacks=[saver]) == whole
    assert fit(tmp_path, tmp_path / "end.ckpt", max_epochs=2) == whole


def test_accumulated_gradients_keep_the_count(tmp_path, whole):
    saver = ModelCheckpoint(tmp_path, filename="acc-{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, callbacks=[saver], accumulate_grad_batches=2, max_steps=2)
    assert fit(tmp_path, tmp_path / "acc-step=2.ckpt", accumulate_grad_batches=2) == whole[4:]


@given(total=st.integers(0, 60), batch_size=st.integers(1, 4), world_size=st.integers(1, 4), start=st.integers(0, 20))
def test_ranks_together_see_what_one_process_sees(total, batch_size, world_size, start):
    ranks = [StreamSampler(total, batch_size, rank, world_size) for rank in range(world_size)]
    alone = StreamSampler(total, batch_size * world_size)
    for sampler in [*ranks, alone]:
        sampler.start = start
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == list(alone)
    assert [i for batch in together for i in batch] == list(
        range(start * batch_size * world_size, len(alone) * batch_size * world_size)
    )


def test_a_rank_reads_its_own_samples():
    module = data(batch_size=1)
    module.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert [b.metadata.unique_objects_identifier[0, :, 0].tolist() for b in module.train_dataloader()] == [
        [2 * step + 1] for step in range(STEPS)
    ]


def test_a_resumed_loader_starts_the_next_epoch_anew():
    loader = data().train_dataloader()
    loader.load_state_dict({"batches_done": 4, "global_batch": 2})
    assert list(loader.batch_sampler) == [[8, 9], [10, 11]]
    assert next(iter(loader.batch_sampler)) == [0, 1]


def test_another_global_batch_is_refused():
    with pytest.raises(UserError, match="made with 4 samples per step, this run has 2 .*same number"):
        data().train_dataloader().load_state_dict({"batches_done": 1, "global_batch": 4})


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="1 samples do not fill one step of 2 x 1 devices"):
        data(total_samples=1).train_dataloader()
