"""The training stream: clips in one global order, split among ranks, that resumes at the next sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.errors import UserError


class StreamSampler(Sampler[list[int]]):
    """Sample indices of this rank's batches: in step s, rank r of W takes B samples from s * B * W + r * B on.

    W ranks with batches of B thus see the same samples as one process with batches of W * B. Incomplete steps are
    dropped. `start` is the first step of the next pass; later passes start at 0.
    """

    def __init__(self, total_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size, self.rank = batch_size, rank
        self.global_batch = batch_size * world_size
        self.num_steps = total_samples // self.global_batch
        self.start = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        for step in range(start, self.num_steps):
            first = step * self.global_batch + self.rank * self.batch_size
            yield list(range(first, first + self.batch_size))


class StreamLoader(DataLoader):
    """A DataLoader whose position Lightning stores in checkpoints and restores.

    The position is the number of batches of this epoch that the trainer has finished, without those that workers have
    prefetched or whose step failed.
    """

    def __init__(self, dataset: ClipDataset, sampler: StreamSampler, trainer: L.Trainer | None, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate_clips, **kwargs)
        self._stream, self._trainer = sampler, trainer

    def state_dict(self) -> dict[str, int]:
        assert self._trainer is not None  # only a Trainer makes checkpoints
        # not `completed`: Lightning updates it only after the hook in which checkpoints are saved
        done = self._trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"batches_done": done, "global_batch": self._stream.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError if the checkpoint has another global batch size: its steps count other samples."""
        if state["global_batch"] != self._stream.global_batch:
            raise UserError(
                f"the checkpoint was made with {state['global_batch']} samples per step, this run has "
                f"{self._stream.global_batch} (data.batch_size x devices); resume with the same number"
            )
        self._stream.start = state["batches_done"] % len(self._stream)  # after a finished epoch the next one starts


class ClipDataModule(L.LightningDataModule):
    """Clips of a dataset for training, `batch_size` per rank and step; an epoch is all clips over all ranks.

    The stream depends on the dataset only, not on workers or ranks, and resumes exactly at a checkpoint.
    The Trainer needs `use_distributed_sampler=False`.
    """

    def __init__(self, dataset: ClipDataset, *, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers

    def train_dataloader(self) -> StreamLoader:
        """Raises UserError if the samples do not fill one step."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = StreamSampler(len(self.dataset), self.batch_size, rank, world_size)
        if len(sampler) == 0:
            raise UserError(
                f"{len(self.dataset)} samples do not fill one step of {self.batch_size} x {world_size} devices; "
                "lower data.batch_size or train for longer"
            )
        return StreamLoader(
            self.dataset,
            sampler,
            self.trainer,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
