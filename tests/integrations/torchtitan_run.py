"""What each rank does in the tests of bidistill.integrations.torchtitan."""

import copy

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed import utils as titan
from torchtitan.models.llama3 import parallelize_llama

from bidistill.distributed import whole
from bidistill.integrations.torchtitan import teacher_rows
from bidistill.world import World, join
from examples import torchtitan_loss as example
from examples.tiny import make_pairs

PAIRS = make_pairs(7)


def gradients(
    kind: str, tied: bool, accumulate: int, world: World | None = None, dtype: str = "float32"
) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of one step that the ranks share, as torchtitan takes it."""
    world = world or join()
    model = example.tiny_titan(tied=tied)
    teacher = copy.deepcopy(model)
    if world.size > 1:
        model, teacher = (_shared(each, world, dtype) for each in (model, teacher))
    if kind == "distillation":
        loss_fn = example.distillation(model, teacher)
    else:
        loss_fn = example.cross_entropy(model, fused=kind == "cross_entropy")
    mine = PAIRS[world.rank :: world.size]
    count = torch.tensor(sum(len(pair["answer_ids"]) for pair in PAIRS))
    total = 0.0
    for part in range(accumulate):
        pairs = mine[part::accumulate]
        tokens, labels = example.batch(pairs, "prompt_ids")
        inputs = {}
        if kind == "distillation":
            read = example.batch(pairs, "teacher_prompt_ids")
            inputs["teacher_hidden"] = teacher_rows(teacher, *read)
        loss, _ = loss_fn(model(tokens), labels, count, **inputs)
        loss.backward()
        total += loss.item()
    found = {name: whole(p.grad) for name, p in model.named_parameters()}
    return world.sum([total]).item(), found


def validate() -> tuple[float, bool]:
    """The sum over this rank's labels without a backward; and whether the head is shared after."""
    model = _shared(example.tiny_titan(), join())
    loss_fn = example.cross_entropy(model)
    tokens, labels = example.batch(PAIRS, "prompt_ids")
    with torch.no_grad():
        total, _ = loss_fn(model(tokens), labels)
    return total.item(), isinstance(model.lm_head.weight, DTensor)


def _shared(model, world: World, dtype: str = "float32"):
    """The model as torchtitan's own code shares it out."""
    parallel_dims.device_type = "cpu"  # torchtitan knows accelerators alone
    backend = "partial_dtensor"
    titan.set_spmd_backend(backend)
    size = {"dp_replicate": 1, "dp_shard": world.size, "cp": 1, "tp": 1, "pp": 1, "ep": 1}
    model = parallelize_llama(
        model,
        parallel_dims=ParallelDims(**size, world_size=world.size, spmd_backend=backend),
        training=TrainingConfig(mixed_precision_param=dtype),
        parallelism=ParallelismConfig(spmd_backend=backend),
        compile_config=CompileConfig(enable=False),
        ac_config=None,  # type: ignore
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds up
    return model
