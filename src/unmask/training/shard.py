"""Models that are split over the ranks (FSDP2): each keeps some rows of every weight, and a layer is whole as it runs.

A rank's rows are DTensors: its part of the float32 masters, of their gradients and of the optimizer's state. Before a
layer runs, forward or backward, its weights are gathered in the dtype that computes; after it they are dropped.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from unmask.model.decoder import Block, Decoder
from unmask.model.scorer import Scorer

# FSDP and DTensor are imported where something is sharded: it takes the better part of a second, at every start.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    return hasattr(tensor, "to_local")


def shard(model: nn.Module, dtype: torch.dtype) -> "FSDPModule":
    """Split every parameter of `model` by rows over all ranks, in place; it computes in `dtype` from here on.

    Gradients become the sum of all ranks' own, in float32 (float64 stays). Each block is gathered by itself. What else
    there is (embedding, last norm, head) is so together, and stays until backward has ended: the loss reads the head
    after the model's forward, and a tied one has its gradient from both.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    exact = torch.promote_types(dtype, torch.float32)
    model.to(exact)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (*blocks, model):  # the model last: it takes what the blocks left
        part = fully_shard(module, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)  # a micro-batch's loss is its share of the step's already
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way
    if isinstance(model, Decoder):
        register_fsdp_forward_method(model, "hidden")  # what objectives call
    return part


def unsharded(model: nn.Module) -> Any:
    """A plain model with the masters of a sharded one, on every rank; any other model itself."""
    if not any(map(sharded, model.parameters())):
        return model
    assert isinstance(model, Decoder | Scorer)
    with torch.device("meta"):
        plain = Scorer(model.config) if isinstance(model, Scorer) else Decoder(model.config)
    plain.load_state_dict({name: whole(p.detach()) for name, p in model.named_parameters()}, assign=True)
    return plain


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, which all ranks ask for together; any other tensor itself."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, not copied; any other tensor itself."""
    return tensor.to_local() if sharded(tensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Of a whole tensor, the rows that this rank has of the other; the tensor itself where that is not sharded."""
    if not sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # None: every rank has read it.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def dealt_out(work: Callable[[Tensor], Tensor], rows_NRC: Tensor, like_RC: Tensor) -> Tensor:
    """`work` on N whole matrices, of which a rank has rows as it has of `like_RC`; again the rows of each.

    Each rank gathers some of the matrices, works on them, and gives them back. Alone it works on all.
    """
    if not sharded(like_RC):
        return work(rows_NRC)
    from torch.distributed.tensor import DTensor, Shard

    mesh, rows, matrices = like_RC.device_mesh, [Shard(1)], [Shard(0)]
    height, width = like_RC.shape
    shape, stride = torch.Size((len(rows_NRC), height, width)), (height * width, width, 1)

    def split(tensor: Tensor, by: list[Shard]) -> DTensor:
        return DTensor.from_local(tensor.contiguous(), mesh, by, shape=shape, stride=stride)

    done = work(split(rows_NRC, rows).redistribute(placements=matrices).to_local())
    return split(done, matrices).redistribute(placements=rows).to_local()
