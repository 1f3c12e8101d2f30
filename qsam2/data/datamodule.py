"""The training stream: clips in one global order, cut among the ranks, that resumes at the next sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.errors import UserError


class StreamSampler(Sampler[list[int]]):
    """The sample indices of this rank's batches: at step s rank r takes B of the global order, from s * B * W + r * B.

    The order is that of the indices, so W ranks with batches of B see together what one process with W * B sees. Only
    whole steps are given. `start` is the step at which the next pass begins; the one after begins at 0 again.
    """

    def __init__(self, total_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size = batch_size
        self.rank = rank
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
    """A DataLoader whose position Lightning stores in its checkpoints and restores.

    `batches_done` gives the batches of this epoch that the trainer has finished: neither those that workers have read
    ahead nor one whose step failed.
    """

    def __init__(self, dataset: ClipDataset, sampler: StreamSampler, batches_done: Callable[[], int], **kwargs: Any):
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate_clips, **kwargs)
        self._stream = sampler
        self._batches_done = batches_done

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self._batches_done(), "global_batch": self._stream.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError where the checkpoint was made with another global batch: its steps count other samples."""
        if state["global_batch"] != self._stream.global_batch:
            raise UserError(
                f"the checkpoint was made with {state['global_batch']} samples a step, this run has "
                f"{self._stream.global_batch} (data.batch_size x devices); resume with the same number"
            )
        self._stream.start = state["batches_done"] % len(self._stream)  # a finished epoch is followed by the next one


class ClipDataModule(L.LightningDataModule):
    """Trains on the clips of a dataset, `batch_size` a rank and step; an epoch is all of them, over all ranks.

    The stream depends on the dataset alone, not on workers or ranks, and goes on exactly where a checkpoint was made.
    The Trainer needs `use_distributed_sampler=False`.
    """

    def __init__(self, dataset: ClipDataset, *, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> StreamLoader:
        """Raises UserError where the samples do not fill one step."""
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
            self._batches_done,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _batches_done(self) -> int:
        # not `completed`: Lightning raises it only after the hook in which checkpoints are saved
        assert self.trainer is not None  # checkpoints are made by a Trainer
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
