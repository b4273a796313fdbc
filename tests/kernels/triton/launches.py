"""Launches all kernels on CPU tensors as on a GPU, up to the compiler; run as a program.

Prints one JSON line a launch that would compile something: what `bench/kernel_builds.py` must
have compiled. The compiler is replaced by one that takes notes, the device by a name. Nothing runs.
"""

import json
from itertools import product

import torch

C, V, D, K = 16, 4096, 64, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Device:
    """As much of a driver as a launch asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def take_note(kernel, key, signature, device, constexprs, options, attrs, warmup):
    """In place of compiling; without a kernel there is no launch."""
    # an integer of 1 is compiled in like a constexpr, which makes no variant of its own
    ones = {path[0] for path in constexprs if not kernel.params[path[0]].is_constexpr}
    kinds = ["i32" if at in ones else kind for at, kind in enumerate(signature.values())]
    note = {
        "kernel": f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
        "signature": kinds,
        "divisible": sorted(ones | {at for (at,) in attrs if kinds[at] != "constexpr"}),
        "constexprs": {
            kernel.arg_names[path[0]]: value
            for path, value in constexprs.items()
            if path[0] not in ones
        },
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "maxnreg": options.maxnreg,
        "enable_fp_fusion": options.enable_fp_fusion,
    }
    print(json.dumps(note))


def launch_dense():
    """Losses with a gradient of the logits, and what sparse losses ask of logits."""
    from bidistill_kernels._rows import Chunk
    from bidistill_kernels._triton import bidirectional_kl, cross_entropy, jsd, kl_to_probs
    from bidistill_kernels._triton.launch import TritonLogits
    from bidistill_kernels.transform import LogitTransform

    target_C = torch.zeros(C, dtype=torch.int64)
    for softcap, bias, dtype in product((None, 30.0), (False, True), (None, *DTYPES)):
        gradient_CV = None if dtype is None else torch.zeros(C, V, dtype=dtype)
        bias_V = torch.zeros(V) if bias else None
        student, teacher = (
            TritonLogits(torch.zeros(C, V), bias_V, LogitTransform(softcap=cap))
            for cap in (softcap, None)
        )
        chunk = Chunk(student, teacher, target_C, gradient_CV, gradient_CV is not None)
        bidirectional_kl.rows(chunk, (0.5, 0.5, 0.1))
        jsd.rows(chunk._replace(target_C=None), (0.5,))
        probs = TritonLogits(torch.zeros(C, V), None, LogitTransform())
        kl_to_probs.rows(chunk._replace(teacher=probs, target_C=None), (1e-10,))
        cross_entropy.rows(chunk._replace(teacher=None), ())
        if gradient_CV is not None:
            student.softmax_gradient(torch.zeros(C), torch.zeros(C), gradient_CV)
        student.log_sum_exp()
        student.top(K)
    for columns in (2**17, 2**18):  # more tiles to merge
        TritonLogits(torch.zeros(2, columns), None, LogitTransform()).top(K)


def launch_sparse():
    """Products of heads with few ids a row, in all pairs of dtypes."""
    from bidistill_kernels._triton import sparse

    values_CK, ids_CK = torch.zeros(C, K), torch.zeros(C, K, dtype=torch.int64)
    for hidden, head, bias_V in product(DTYPES, DTYPES, (None, torch.zeros(V))):
        hidden_CD, head_VD = torch.zeros(C, D, dtype=hidden), torch.zeros(V, D, dtype=head)
        sparse.gather_dot(hidden_CD, head_VD, ids_CK, bias_V)
        sparse.sparse_dx(values_CK, ids_CK, head_VD, torch.zeros(C, D))
        sparse.sparse_dw(values_CK, ids_CK, hidden_CD, head_VD)
        sparse.sparse_dbias(values_CK, ids_CK, head_VD[:, 0])


def main():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Device())
    JITFunction._do_compile = take_note
    launch_dense()
    launch_sparse()


if __name__ == "__main__":
    main()
