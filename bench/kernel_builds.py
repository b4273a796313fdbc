"""Every Triton kernel that ships, compiled for every target: registers, spills, width of loads.

Needs no GPU: Triton compiles for any target, and its wheel carries NVIDIA's cuobjdump. Numbers of
kernels that are as they were come from build/kernels.

A launch compiles by its arguments: `aligned`, where pointers and integers (sizes, strides) are
multiples of 16, or `odd`, where only the pointers are, as with a vocabulary of 50257.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from bidistill_kernels import _triton
from bidistill_kernels._triton.launch import Variant
from bidistill_kernels._triton.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "build" / "kernels"
SELF = Path(__file__).read_text(encoding="utf-8")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# "odd" is one more third of the time: on one target for each assembler, of which there are three
ALIGNMENTS = {"aligned": tuple(TARGETS), "odd": ("sm_90", "sm_100", "gfx942")}


@dataclass
class Build:
    """What one compilation came to."""

    variant: str
    kernel: str
    target: str
    alignment: str
    warps: int
    error: str = ""
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread that are in memory, not in registers
    shared: int = 0  # bytes of a block
    loads: dict[str, int] = field(default_factory=dict)  # NVIDIA: bytes of one -> how many
    stores: dict[str, int] = field(default_factory=dict)


def kernel_name(kernel: Any) -> str:
    """Module and name, as in "jsd._jsd_kernel"."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def all_kernels() -> list[str]:
    """Every kernel in the modules of the back-end, whether a variant names it or not."""
    found = set()
    for info in pkgutil.iter_modules(_triton.__path__):
        module = importlib.import_module(f"{_triton.__name__}.{info.name}")
        found |= {
            kernel_name(value)
            for value in vars(module).values()
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
        }
    return sorted(found)


def options(variant: Variant, target: GPUTarget) -> dict[str, Any]:
    """What a launch asks of the compiler."""
    common = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    registers = {"maxnreg": variant.maxnreg} if target.backend == "cuda" else {}
    return {**common, **registers, "enable_fp_fusion": True}


def signature(variant: Variant) -> dict[str, str]:
    """The types of a launch: an integer has 32 bits where it fits, which every stride does."""
    kinds = {name: variant.signature[name] for name in variant.kernel.arg_names}
    return {name: "i32" if kind == "i64" else kind for name, kind in kinds.items()}


def attributes(variant: Variant, target: GPUTarget, alignment: str) -> dict[tuple[int], list]:
    """What else a launch finds out about its arguments, in the form the compiler takes."""
    backend, found = make_backend(target), {}
    kinds = signature(variant)
    for at, parameter in enumerate(variant.kernel.params):
        kind = kinds[parameter.name]
        if kind.startswith("*"):
            # S: the tensor is smaller than 2 GiB, which AMD's loads make use of
            found[(at,)] = backend.parse_attr("DS" if target.backend == "hip" else "D")
        elif kind == "i32" and alignment == "aligned" and not parameter.do_not_specialize:
            found[(at,)] = backend.parse_attr("D")
    return found


def widths(assembly: str, verb: str) -> dict[str, int]:
    """How many instructions of global memory move how many bytes a thread; verb: ld or st."""
    counts: Counter[str] = Counter()
    for vector, bits in re.findall(rf"\b{verb}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", assembly):
        counts[str(int(vector or 1) * int(bits) // 8)] += 1
    return dict(counts)


def numbers(pattern: str, text: str) -> list[int]:
    """The numbers at the group of a pattern; at least one, or the output is not what it was."""
    found = [int(number) for number in re.findall(pattern, text)]
    assert found, f"nothing like {pattern!r} in: {text[:500]}"
    return found


def described(variant: Variant) -> dict[str, Any]:
    """A variant as tests/kernels/triton/launches.py notes a launch."""
    target = TARGETS["sm_90"]
    return {
        "kernel": kernel_name(variant.kernel),
        "signature": list(signature(variant).values()),
        "divisible": [at for (at,) in attributes(variant, target, "aligned")],
        "constexprs": variant.constexprs,
        **options(variant, target),
    }


def measure(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """What there is to know about a compiled kernel, by the fields of `Build`."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        [registers] = numbers(r"\.vgpr_count:\s*(\d+)", text)
        [spilled] = numbers(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return {"registers": registers, "spilled": spilled, "shared": shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    [registers] = numbers(r"REG:(\d+)", usage)
    spilled = sum(numbers(r"(?:STACK|LOCAL):(\d+)", usage))
    loads, stores = (widths(compiled.asm["ptx"], verb) for verb in ("ld", "st"))
    moves = {"loads": loads, "stores": stores}
    return {"registers": registers, "spilled": spilled, "shared": shared, **moves}


def compile_one(at: int, target_name: str, alignment: str) -> Build:
    """Compile a variant, by its place in VARIANTS, for one target."""
    variant, target = VARIANTS[at], TARGETS[target_name]
    build = Build(
        variant.name, kernel_name(variant.kernel), target_name, alignment, variant.num_warps
    )
    try:
        source = ASTSource(
            variant.kernel,
            signature(variant),
            variant.constexprs,
            attributes(variant, target, alignment),
        )
        what = triton.__version__, source.hash(), target, options(variant, target), SELF
        known = KNOWN / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.json"
        if known.exists():
            return replace(build, **json.loads(known.read_text(encoding="utf-8")))
        compiled = triton.compile(source, target=target, options=options(variant, target))
    except Exception as error:
        # the message shows the source up to the place: its ends say what and where
        lines = str(error).strip().splitlines() or [""]
        build.error = " ".join(dict.fromkeys([type(error).__name__, lines[0], lines[-1].strip()]))
        return build
    measured = measure(compiled, target)
    known.write_text(json.dumps(measured), encoding="utf-8")
    return replace(build, **measured)


def compile_all() -> list[Build]:
    """All variants on all targets, on all processors."""
    KNOWN.mkdir(parents=True, exist_ok=True)
    places = [(target, name) for name, targets in ALIGNMENTS.items() for target in targets]
    work = [(at, *place) for at in range(len(VARIANTS)) for place in places]
    # forked, so that torch and Triton are imported once
    with (
        tempfile.TemporaryDirectory() as cache,  # Triton's own would grow by 1 MB a kernel
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache
        return list(pool.map(compile_one, *zip(*work, strict=True), chunksize=4))
