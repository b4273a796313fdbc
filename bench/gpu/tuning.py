"""A short sweep of our own settings, and how close the pieces come to the device's ceilings.

    python -m bench.gpu.tuning --records FILE [--dry-run]

Products alone, in the shapes of the driver, against a large product; row kernels alone, with the
blocks they ship with and with others (`launch.BLOCKS` is read at each launch), against a copy;
whole steps with chunks of other sizes. What belongs together is timed in turn. Started by
`bench.gpu`, which sets the time limit. Shapes: C rows of a chunk, V vocabulary, D width.
"""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch

from bench import cases
from bench.cases import Case, product
from bench.gpu.measure import arguments_of
from bench.measure import reason
from bench.meter import (
    Budget,
    Ceilings,
    CudaMeter,
    DryMeter,
    Meter,
    Step,
    forget,
    quantile,
    time_limit,
)
from bench.providers import ours
from bidistill_kernels.transform import LogitTransform

SETTING_S = 15.0  # to compile and try one setting
# bytes that a row kernel moves per logit of one model: fp32 logits of both read in each of its
# sweeps, a bf16 gradient written
TRAFFIC = {"bidirectional_kl": 8 + 8 + 2, "jsd": 8 + 8 + 8 + 2, "cross_entropy": 4 + 4 + 2}
PARAMS = {"bidirectional_kl": (0.5, 0.5, 0.0), "jsd": (0.5,), "cross_entropy": ()}
BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))
GIB = 1 << 30


class Trial(NamedTuple):
    """One setting: a step, and what it does against which ceiling."""

    what: str
    build: Callable[[], Step]
    work: float = 0.0
    """Bytes or operations of a step."""
    ceiling: str = ""
    """Field of `Ceilings` that the work is compared with."""
    weigh: bool = False


def in_turn(
    trials: list[Trial], meter: Meter, budget: Budget, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """Try each setting once, then time those that work in turn; yield a record each."""
    records, steps = [], {}
    for trial in trials:
        record: dict[str, Any] = {"kind": "tuning", "what": trial.what, "samples_ms": []}
        records.append(record)
        try:
            with time_limit(min(SETTING_S, budget.left() - 3)):
                step = trial.build()
                step()
                record["peak_bytes"] = meter.peak_bytes(step) if trial.weigh else None
                steps[trial.what] = step
        except Exception as error:
            record["status"], record["error"] = reason(error)
            error.__traceback__ = None
    for turn in range(min(2, meter.turns)):
        for record in records:
            # of a first turn nobody is left out
            if record["what"] in steps and (turn == 0 or budget.left() > 5):
                about_ms = quantile(record["samples_ms"], 0.5)
                record["samples_ms"] += meter.samples_ms(steps[record["what"]], about_ms)
    for trial, record in zip(trials, records, strict=True):
        median = quantile(record["samples_ms"], 0.5)
        record |= {"median_ms": median, "ceiling": trial.ceiling, "work": trial.work}
        top = getattr(ceilings, trial.ceiling) if trial.ceiling else None
        record["top"] = top
        record["share"] = trial.work / (median * 1e-3) / top if median and top else None
        yield record


def products(V: int, D: int, C: int, N: int, device: torch.device) -> list[Trial]:
    """The driver's products alone: projection, and gradients from a slab or from in place."""

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x_ND, w_VD = half(N, D), half(V, D) / D**0.5
    g_NV = torch.cat([half(C, V) for _ in range(N // C)])
    # a 16-bit gradient in place of fp32 logits: rows lie twice as far apart
    apart_CV = half(C, 2 * V)[:, :V]

    def trial(what: str, rows: int, step: Step) -> Trial:
        return Trial(f"product: {what}", lambda: step, 2.0 * rows * V * D, "mm_flops_per_s")

    def out32(a: torch.Tensor, b: torch.Tensor) -> Step:
        return lambda: product(a, b)

    return [
        trial(f"{C} rows of logits, fp32", C, out32(x_ND[:C], w_VD.T)),
        trial(f"dX of {C} rows, fp32", C, out32(g_NV[:C], w_VD)),
        trial(f"dX of {C} rows in place, fp32", C, out32(apart_CV, w_VD)),
        trial(f"dX of {N} rows, fp32", N, out32(g_NV, w_VD)),
        trial(f"dX of {N} rows, bf16", N, lambda: g_NV @ w_VD),
        trial(f"dW of {N} rows, bf16", N, lambda: g_NV.T @ x_ND),
        trial(f"dW of {N // 2} rows, fp32", N // 2, out32(g_NV[: N // 2].T, x_ND[: N // 2])),
    ]


class RowKernels:
    """Row kernels on one chunk of logits, without projection or gradient products."""

    def __init__(self, V: int, C: int, device: torch.device) -> None:
        self.launch: Any = import_module("bidistill_kernels._triton.launch")
        s_CV = torch.randn(C, V, device=device) * 4
        self.raw = s_CV, s_CV + 0.2 * torch.randn(C, V, device=device)
        self.target_C = torch.randint(V, (C,), device=device)
        self.gradient_CV = torch.empty(C, V, device=device, dtype=torch.bfloat16)
        self.right: dict[str, torch.Tensor] = {}

    def trial(self, loss: str, block: tuple[int, int] | None = None) -> Trial:
        """A kernel with the block it ships with, or another."""
        name = "as it ships" if block is None else f"{block[0]} ids, {block[1]} warps"
        work = float(TRAFFIC[loss] * self.raw[0].numel())
        build = lambda: self._build(loss, block)  # noqa: E731
        return Trial(f"row kernel: {loss}, {name}", build, work, "copy_bytes_per_s")

    def _build(self, loss: str, block: tuple[int, int] | None) -> Step:
        rows_module = import_module("bidistill_kernels._rows")
        rows = import_module(f"bidistill_kernels._triton.{loss}").rows
        shipped = self.launch.BLOCKS[loss]
        here = shipped if block is None else self.launch.Block(*block)
        logits = [self.launch.TritonLogits(raw, None, LogitTransform()) for raw in self.raw]
        teacher = None if loss == "cross_entropy" else logits[1]
        chunk = rows_module.Chunk(logits[0], teacher, self.target_C, self.gradient_CV, True)

        def step() -> None:
            self.launch.BLOCKS[loss] = here
            rows(chunk, PARAMS[loss])
            self.launch.BLOCKS[loss] = shipped

        self.gradient_CV.fill_(torch.nan)
        step()
        right = self.right.setdefault(loss, self.gradient_CV[:64].float())
        error = cases.relative_error(self.gradient_CV[:64].float(), right)
        if not error <= 0.01:
            raise ArithmeticError(f"wrong gradient, off by {error:.1e}")
        return step


def chunks(case: Case, meter: Meter, backend: str) -> list[Trial]:
    """Whole steps with chunks of other sizes."""
    problem = cases.make_problem(case, meter.device)

    def trial(gib: float) -> Trial:
        what = f"chunk of {gib:g} GiB: {case.name}"
        provider = ours(case, backend, chunk_bytes=int(gib * GIB))
        return Trial(what, lambda: provider.build(problem), weigh=True)

    return [trial(gib) for gib in (0.25, 0.5, 1, 2, 4)]


def groups(meter: Meter, backend: str) -> Iterator[Callable[[], list[Trial]]]:
    """Yield what is timed in turn, the most wanted first; built when its turn has come."""
    D, V, C, N = (64, 1000, 4, 8) if meter.dry else (4096, 128256, 1024, 8192)
    yield lambda: products(V, D, C, N, meter.device)
    for trained in (True, False):
        case = Case("bidirectional_kl", N, D, V, trained)
        yield lambda case=case: chunks(case, meter, backend)
    if backend == "triton":
        kernels = RowKernels(V, C, meter.device)
        yield lambda: [kernels.trial(loss) for loss in TRAFFIC]
        for loss in ("bidirectional_kl", "jsd"):
            yield lambda loss=loss: [kernels.trial(loss, block) for block in (None, *BLOCKS)]


def main() -> None:
    """Write the records."""
    arguments = arguments_of("Sweep our settings.").parse_args()
    meter = DryMeter() if arguments.dry_run else CudaMeter()
    budget = Budget(arguments.seconds)
    with arguments.records.open("a") as file:
        ceilings = meter.ceilings()
        file.write(json.dumps({"kind": "ceilings", "when": "tuning", **ceilings._asdict()}) + "\n")
        for make in groups(meter, arguments.backend):
            for record in in_turn(make(), meter, budget, ceilings):
                file.write(json.dumps(record) + "\n")
                file.flush()
            forget()


if __name__ == "__main__":
    main()
