"""Statistics over two processes equal those of one process with the joint batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import activation_quantizer
from torch import Tensor

from qsam2.recipe.quantizer_specs import EntropySpec, LSCSpec, LSQPlusSpec, LSQSpec, MinMaxSpec, PACTSpec

SPECS = [
    MinMaxSpec(bits=4, momentum=0.9),
    MinMaxSpec(bits=4, range="percentile", percentile=99.0),
    EntropySpec(bits=4),
    LSQPlusSpec(bits=4),
    PACTSpec(bits=4),
    LSQSpec(bits=4),
    LSQSpec(bits=4, range="mean_abs"),
    LSCSpec(bits=4, momentum=0.9),
    LSCSpec(bits=4, granularity="channel", symmetric=True),
]


def batches() -> list[list[Tensor]]:
    """Three batches a rank, of different sizes and scales; one is empty."""
    generator = torch.Generator().manual_seed(0)
    ranks = [[(7, 1.0), (0, 1.0), (300, 3.0)], [(50, 10.0), (20, 0.5), (4, 2.0)]]
    return [[scale * torch.randn(n, 4, generator=generator) + 0.3 for n, scale in rank] for rank in ranks]


def statistics(run: list[Tensor]) -> list[dict[str, Tensor]]:
    """The first batch is for calibration, the others for training."""
    ends = []
    for spec in SPECS:
        quantizer = activation_quantizer(spec, run[0], num_channels=4, channel_dim=1)
        for batch in run[1:]:
            quantizer.train()(batch)
        quantizer.freeze()
        ends.append(quantizer.state_dict())
    return ends


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(statistics(batches()[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_with_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    joint = statistics([torch.cat(pair) for pair in zip(*batches(), strict=True)])
    for ours, theirs, expected in zip(first, second, joint, strict=True):
        for name, value in expected.items():
            assert torch.equal(ours[name], theirs[name]), name
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
