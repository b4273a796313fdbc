"""What the CPU driver's choices are worth, each against its alternatives, timed in turn.

    python -m bench.cpu_products

Products alone, for 1024 tokens of SmolLM2-135M's head in fp32 and in chunks of so many rows; the
outcome is discussed in kernels/README.md. Shapes: N tokens, C rows of a chunk, S ids of a slice, V
vocabulary, D width, K ids a row.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bench.cases import HEADS

N, (D, V), K = 1024, HEADS["SmolLM2-135M"], 20
TURNS = 9
CHUNK_BYTES = 88 << 20
HUGE = 2 << 20  # bytes of a large page
MADV_HUGEPAGE = 14
Step = Callable[[], object]


def chunks(C: int) -> Iterator[slice]:
    return (slice(at, at + C) for at in range(0, N, C))


def slices(S: int) -> Iterator[slice]:
    return (slice(at, at + S) for at in range(0, V, S))


def projection(x_ND: Tensor, w_VD: Tensor, out_CV: Tensor, C: int, S: int = V) -> Step:
    """hidden @ head.T, S ids at a time."""

    def step() -> None:
        for rows in chunks(C):
            x_CD = x_ND[rows]
            for ids in slices(S):
                torch.mm(x_CD, w_VD[ids].T, out=out_CV[: len(x_CD), ids])

    return step


def head_gradient(g_NV: Tensor, x_ND: Tensor, dw_VD: Tensor, C: int, S: int = V) -> Step:
    """gradient.T @ hidden, summed over chunks."""

    def step() -> None:
        for rows in chunks(C):
            for ids in slices(S):
                dw_VD[ids].addmm_(g_NV[rows, ids].T, x_ND[rows])

    return step


def hidden_gradient(g_NV: Tensor, w_VD: Tensor, C: int) -> Step:
    """gradient @ head."""
    return lambda: [torch.mm(g_NV[rows], w_VD) for rows in chunks(C)]


def first_touch(*, huge: bool) -> Step:
    """Write a fresh chunk, in pages of 4 KiB or, where the kernel has some left, of 2 MiB."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def step() -> None:
        chunk = torch.empty(CHUNK_BYTES // 4)
        if huge:
            begin = -(-chunk.data_ptr() // HUGE) * HUGE
            end = (chunk.data_ptr() + chunk.nbytes) // HUGE * HUGE
            advise(begin, end - begin, MADV_HUGEPAGE)
        chunk.zero_()

    return step


def steps() -> dict[str, Step]:
    """Return all alternatives by name."""
    torch.manual_seed(0)
    x_ND, w_VD, g_NV = torch.randn(N, D), torch.randn(V, D), torch.randn(N, V)
    out_CV, dw_VD = torch.empty(512, V), torch.zeros(V, D)
    ids_CK, values_CK = torch.randint(V, (208, K)), torch.randn(208, K)
    found: dict[str, Step] = {"project, 512 rows": projection(x_ND, w_VD, out_CV, 512)}
    for C in (171, 208, 256, 512):
        found[f"project, {C} rows, 2048 ids"] = projection(x_ND, w_VD, out_CV, C, 2048)
    for C in (171, 204, 205, 206, 208, 256, 512):
        found[f"dW, {C} rows"] = head_gradient(g_NV, x_ND, dw_VD, C)
    found["dW, 208 rows, 2048 ids"] = head_gradient(g_NV, x_ND, dw_VD, 208, 2048)
    for C in (171, 208, 256, 512):
        found[f"dX, {C} rows"] = hidden_gradient(g_NV, w_VD, C)
    found["sparse dX, gathered, 208 rows"] = lambda: torch.bmm(values_CK[:, None], w_VD[ids_CK])
    found["sparse dX, embedding_bag, 208 rows"] = lambda: embedding_bag(
        ids_CK, w_VD, per_sample_weights=values_CK, mode="sum"
    )
    found["first touch of 88 MiB"] = first_touch(huge=False)
    found["first touch of 88 MiB, large pages"] = first_touch(huge=True)
    return found


def main() -> None:
    """Print a line an alternative: minimum, median, maximum."""
    known = steps()
    samples: dict[str, list[float]] = {name: [] for name in known}
    for turn in range(TURNS + 1):
        for name, step in known.items():
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                samples[name].append((time.perf_counter() - start) * 1e3)
    print(f"ms, {TURNS} turns, {torch.get_num_threads()} threads; minimum, median, maximum")
    for name, each in samples.items():
        print(f"{name:36} {min(each):7.2f} {median(each):7.2f} {max(each):7.2f}")


if __name__ == "__main__":
    main()
