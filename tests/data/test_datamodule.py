"""The training stream: its order over ranks, workers and interruptions (with a real Trainer on the CPU)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from small_datasets import check, made

from qsam2.data.clips import ClipDataset
from qsam2.data.datamodule import ClipDataModule, StreamSampler

STEPS = 6


def data(total_samples: int = 2 * STEPS, batch_size: int = 2, num_workers: int = 0) -> ClipDataModule:
    clips = ClipDataset([made(frames=6)], num_frames=2, max_objects=2, image_size=16, length=total_samples, seed=5)
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


def trainer(folder: Path, saver: ModelCheckpoint | None = None, **options) -> L.Trainer:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    keep = dict(enable_checkpointing=saver is not None, callbacks=[saver] if saver else None)
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **keep, **({"max_epochs": 1} | options))


def fit(folder: Path, checkpoint: str | None = None, saver=None, workers=0, **options) -> list:
    """What a run sees."""
    module, path = Recorder(), checkpoint and folder / checkpoint
    trainer(folder, saver, **options).fit(module, datamodule=data(num_workers=workers), ckpt_path=path)
    return module.seen


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[tuple[list[int], float]]:
    return fit(tmp_path_factory.mktemp("whole"))


def test_the_whole_run_sees_each_sample_once(whole):
    assert [index for ids, _ in whole for index in ids] == list(range(2 * STEPS))
    assert len({total for _, total in whole}) > 1  # the clips differ


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_sees_exactly_the_remaining_batches(tmp_path, whole, workers):
    assert fit(tmp_path, saver=each_step(tmp_path), workers=workers, max_steps=4) == whole[:4]
    for done in (1, 4):
        assert fit(tmp_path, f"at-step={done}.ckpt", workers=workers) == whole[done:]


def test_a_step_that_failed_is_repeated(tmp_path, whole):
    module, interrupted = Recorder(fail_at=3), trainer(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted.fit(module, datamodule=data())
    interrupted.save_checkpoint(tmp_path / "rescue.ckpt")
    assert module.seen == whole[:3]
    assert fit(tmp_path, "rescue.ckpt") == whole[3:]


def test_a_second_epoch_follows_a_checkpoint_at_the_end_of_the_first(tmp_path, whole):
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1, save_on_train_epoch_end=True)
    assert fit(tmp_path, saver=saver) == whole
    assert fit(tmp_path, "end.ckpt", max_epochs=2) == whole


def test_accumulated_gradients_keep_the_count(tmp_path, whole):
    fit(tmp_path, saver=each_step(tmp_path), accumulate_grad_batches=2, max_steps=2)
    assert fit(tmp_path, "at-step=2.ckpt", accumulate_grad_batches=2) == whole[4:]


@given(total=st.integers(0, 60), batch_size=st.integers(1, 4), world_size=st.integers(1, 4), start=st.integers(0, 20))
def test_ranks_together_see_what_one_process_sees(total, batch_size, world_size, start):
    ranks = [StreamSampler(total, batch_size, rank, world_size) for rank in range(world_size)]
    alone = StreamSampler(total, batch_size * world_size)
    for sampler in [*ranks, alone]:
        sampler.start = start
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == list(alone)
    step = batch_size * world_size
    assert [i for batch in together for i in batch] == list(range(start * step, len(alone) * step))


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


def test_another_global_batch_and_too_few_samples_are_refused():
    other = {"batches_done": 1, "global_batch": 4}
    message = "made with 4 samples per step, this run has 2 .*same number"
    check(message, lambda: data().train_dataloader().load_state_dict(other))
    few = data(total_samples=1)
    check("1 samples do not fill one step of 2 x 1 devices", few.train_dataloader)
