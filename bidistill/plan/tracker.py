"""Counting memory without any: a mode that follows the storages of fake tensors.

Fake tensors have shapes, dtypes and a device, and storages of the right size that nobody
allocated. Every operation of a step passes this mode, which notes the storages that come of it and,
by weak references, when the last holder lets them go. So the sum at any moment is what the
allocator would have given out, whatever the architecture.

Whatever a float or a byte is made of is faked; integers stay real, so that code which asks them for
values, such as which rows count, works as ever.
"""

import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bidistill.plan.losses import scratch_bytes

Kind = Literal[
    "parameters", "gradients", "optimiser", "activations", "loss buffers", "teacher", "gathered"
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Tracker(TorchDispatchMode):
    """Follows what is allocated inside its `with` block, by kind, and the largest sum of it.

    What backward leaves in ``.grad`` is of the kind ``gradients``: see `watch`.

    Args:
        fake: the mode that the tensors belong to; it allows real ones among them.
        host: kinds that lie in the host's memory, and take none of the device's.
    """

    def __init__(self, fake: FakeTensorMode, host: Collection[Kind] = ()) -> None:
        """Begin with nothing."""
        super().__init__()
        self.fake = fake
        self.host = frozenset(host)
        self.kind: Kind = "activations"
        self.live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        """Bytes at this moment."""
        self.peak: dict[Kind, int] = dict(self.live)
        """Bytes on the device when their sum was largest."""
        self.most: dict[Kind, int] = dict(self.live)
        """Bytes of each kind when it had most."""
        self._known: dict[int, tuple[weakref.ref[Any], Kind, int]] = {}
        self._patches = ExitStack()

    def __enter__(self) -> "Tracker":
        """Follow the units of FSDP too, which resizes their storages to free and refill them."""
        resize, unshard = torch.UntypedStorage.resize_, FSDPParam.init_unsharded_param

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._forget(storage._cdata)
            result = resize(storage, size)
            self._add(storage, "gathered")
            return result

        def init_unsharded_param(part: FSDPParam) -> None:
            before = getattr(part, "_unsharded_param", None)
            unshard(part)
            if part._unsharded_param is not before:
                self.watch(part._unsharded_param)

        # no mode sees a storage that is resized
        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
        replaced = mock.patch.object(FSDPParam, "init_unsharded_param", init_unsharded_param)
        self._patches.enter_context(replaced)
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:  # noqa: ANN401
        """Follow no more."""
        super().__exit__(*problem)
        self._patches.close()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run an operation on fakes and note what it allocates."""
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by again
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
            return func(*args, **kwargs)  # DTensor asks for shapes, in a mode of its own
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # nobody knows it, and no size may depend on it
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if given or kwargs.get("dtype") is torch.int64:
            out = func(*args, **kwargs)
        else:
            with self.fake:
                out = func(*args, **kwargs)
        kind = self.kind
        if func.namespace == "bidistill":
            kind = "loss buffers"
        elif func.namespace == "c10d":
            self._communicated(func, given)
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor):
                self._add(tensor.untyped_storage(), kind)
        if func.namespace == "bidistill":
            self._momentary("loss buffers", scratch_bytes(func, args))
        return out

    def hold(self, tensor: Tensor | None, kind: Kind) -> None:
        """Count a tensor as of a kind, whether it is known or not; its own part, if it is shared.

        Args:
            tensor: a fake one, or a DTensor of it; None and others are no concern.
            kind: what it is from now on.
        """
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            self._forget(storage._cdata)
            self._add(storage, kind)

    def watch(self, parameter: nn.Parameter) -> None:
        """Count the gradient of a parameter as such as soon as it is there."""
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: self.hold(p.grad, "gradients"))

    @contextmanager
    def of(self, kind: Kind) -> Iterator[None]:
        """Count what is allocated inside as of a kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def _communicated(self, func: Any, given: list[Tensor]) -> None:  # noqa: ANN401
        """Buffers of a collective; what a reduce-scatter writes are gradients."""
        for tensor in given:
            if self._known.get(tensor.untyped_storage()._cdata):
                self.hold(tensor, "gathered")
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.hold(given[0], "gradients")

    def _add(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        gone = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = gone, kind, size
        self.live[kind] += size
        self._look(kind)

    def _forget(self, key: int) -> None:
        _, kind, size = self._known.pop(key, (None, "activations", 0))
        self.live[kind] -= size

    def _momentary(self, kind: Kind, size: int) -> None:
        self.live[kind] += size
        self._look(kind)
        self.live[kind] -= size

    def _look(self, kind: Kind) -> None:
        self.most[kind] = max(self.most[kind], self.live[kind])
        on_device: dict[Kind, int] = {
            k: 0 if k in self.host else size for k, size in self.live.items()
        }
        if sum(on_device.values()) > sum(self.peak.values()):
            self.peak = on_device
