"""Sharded gradients: two processes find the inner products and the direction that one finds."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bidistill import combine
from bidistill.gradients import gram, role_gradients
from bidistill.objectives import StepResult

pytestmark = pytest.mark.slow

WORLD = 2
ROLES = ("forget", "neighbor", "retain")


class Net(nn.Module):
    """Odd widths, so that shards differ; the loss of no role reaches `idle`, one reaches `late`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((3, 5), (5, 7), (7, 3)))
        self.late, self.idle = nn.Linear(3, 1), nn.Linear(3, 1)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        outputs = x.unbind(1)
        return dict(zip(ROLES, (outputs[0].mean(), -outputs[0].mean() + outputs[1].mean(),
                                self.late(x).square().mean()), strict=True))  # fmt: skip


def inputs():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def results(model, name, x):
    parameters = list(model.parameters())  # as the optimiser has them, before FSDP unshards any
    losses = model(x)
    result = StepResult(torch.stack(list(losses.values())).sum(), torch.zeros(4), losses)
    cosines = combine.backward([result], parameters, name, "seed")
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    model.zero_grad()
    gram_KK = gram(role_gradients(model(x).values(), parameters))
    return {"gradients": grads, "cosines": cosines, "gram": gram_KK}


def shards_and_copies(mesh):
    """Inner products of tensors that are cut, copied, and not distributed at all."""
    generator = torch.Generator().manual_seed(2)
    cut, copied, plain = (torch.randn(2, 5, 3, generator=generator) for _ in range(3))
    parts = [
        [distribute_tensor(cut[k], mesh, [Shard(0)]), distribute_tensor(copied[k], mesh,
         [Replicate()]), plain[k]] for k in range(2)
    ]  # fmt: skip
    rows = torch.stack([cut, copied, plain], 1).reshape(2, -1).double()
    return gram(parts), rows @ rows.T


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for name in ("sum", "pcgrad", "mgda", "ngdiff"):
        model = Net()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[name] = results(model, name, inputs()[3 * rank : 3 * rank + 3])
    found["mixed"] = shards_and_copies(mesh)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class Mean(nn.Module):
    """The mean of the losses of both shares, which is what FSDP's mean of gradients descends."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        shares = [self.net(share) for share in x.split(3)]
        return {role: (shares[0][role] + shares[1][role]) / 2 for role in ROLES}


@pytest.mark.parametrize("name", ["sum", "pcgrad", "mgda", "ngdiff"])
def test_two_processes_are_one(ranks, name):
    alone = results(Mean(), name, inputs())
    for found in (each[name] for each in ranks):
        torch.testing.assert_close(found["gram"], alone["gram"], rtol=1e-12, atol=1e-15)
        assert found["cosines"] == pytest.approx(alone["cosines"], abs=1e-12)
        for ours, expected in zip(found["gradients"], alone["gradients"], strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    if name != "sum":
        assert alone["cosines"]["forget", "neighbor"] < 0, "no conflict proves nothing"


def test_copies_count_once(ranks):
    for found, expected in (each["mixed"] for each in ranks):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
