"""A model with Liger's kernels beside itself without: run in a process of its own, for Liger
replaces a function of transformers' module. Without a GPU, by Triton's interpreter."""

from tempfile import TemporaryDirectory

import torch

from bidistill.config import LoraSettings, ModelConfig
from bidistill.data.packing import pack
from bidistill.data.views import View
from bidistill.loading import empty_model
from bidistill.models import add_adapter, attach_distill_step, hidden_rows
from bidistill.options import apply_liger
from tests.trainer.tiny import make_model, randomise_adapters

SEQUENCES = [
    (View((5, 6, 7, 8), "a"), (9, 10, 11)),
    (View((5, 6, 12), "a"), (13,)),
    (View((20, 21), "b"), (22, 23)),
]


def mend_interpreter() -> None:
    """Let the interpreter run what compiles: it hands floats over as they are, and libdevice's
    functions give nothing."""
    import liger_kernel.ops.rms_norm as rms_norm  # type: ignore
    import triton.language as tl
    from triton.runtime import interpreter

    class Scalar(float):
        def to(self, _):
            return self

    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda x: Scalar(x) if type(x) is float else convert(x)
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # type: ignore


def run(model):
    """Hidden rows, and gradients of all that trains."""
    rows = hidden_rows(model, pack(SEQUENCES))
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * upstream.to(rows)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"rows": rows.detach()} | gradients


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full, lora = make_model(), add_adapter(make_model(), LoraSettings(rank=2))
    randomise_adapters(lora)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.1  # a smooth model does not make much of rounding
    models = [model.to(device) for model in (full, lora)]
    plain = [run(model) for model in models]
    names = [list(model.state_dict()) for model in models]
    forward = full.forward
    for model in models:
        attach_distill_step(model)
        apply_liger(model)
    if device == "cpu":
        mend_interpreter()
    for model, expected, keys in zip(models, plain, names, strict=True):
        found = run(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = ((found[name] - tensor).norm() / tensor.norm()).item()
            assert error < 1e-5, f"{name}: {error}"
        assert not torch.equal(found["rows"], expected["rows"]), "nothing was replaced"
        assert list(model.state_dict()) == keys
    assert "LigerRMSNorm" in repr(full)
    assert full.forward == forward, "the model's own forward stays"
    with TemporaryDirectory() as folder:
        make_model().save_pretrained(folder)
        empty = empty_model(ModelConfig(path=folder, liger=True))
    assert "LigerRMSNorm" in repr(empty)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    print("equal")


if __name__ == "__main__":
    main()
