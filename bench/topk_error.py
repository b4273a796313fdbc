"""What best ids cost in accuracy, on a real model: the two tables of docs/teachers.md.

``python -m bench.topk_error`` takes SmolLM2-135M-Instruct without a context as the student and,
with the refusals of the demo's recipe before the question, as the teacher. Rows are those of the
demo's refusals, true capitals and general answers. The first table compares losses over K ids with
the divergence over all of them, the second what a store may round the log-probabilities to.

Shapes: N rows, V vocabulary, H width, K ids.
"""

import sys
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from bidistill.data.loader import Batch
from bidistill.data.records import Record
from bidistill.data.views import build_examples
from bidistill.demo.facts import general, places, refusal
from bidistill.loading import load_base, load_tokenizer
from bidistill.models import hidden_rows
from bidistill.pretrained import smollm2
from bidistill.teacher.compute import chunks
from bidistill_kernels import (
    LogitTransform,
    TopK,
    linear_bidirectional_kl,
    linear_topk_kl,
    topk_log_probs,
)

SIZES = (1, 4, 16, 64, 256, 1024)
STORED = 64
"""Ids of the second table."""


class Rows(NamedTuple):
    """Of student and teacher, and the head that they share."""

    student_NH: Tensor
    teacher_NH: Tensor
    weight_VH: Tensor


def measured_rows() -> Rows:
    """Run the model over all examples, with the context and without."""
    folder = smollm2()
    recipe = yaml.safe_load(files("bidistill.demo").joinpath("recipe.yaml").read_text("utf-8"))
    context = recipe["teacher"]["contexts"]["forget"]
    countries = [place for place in places() if place.is_country]
    records = [_record(p.id, "forget", p.question, refusal(p.name)) for p in countries]
    records += [_record(f.id, "neighbor", f.question, f.answer) for f in [*countries, *general()]]
    told = {"forget": context, "neighbor": context}
    examples = build_examples(records, load_tokenizer(folder), told)  # type: ignore
    model = load_base(folder)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for pack in chunks(examples):
            batch = Batch(tuple(pack))
            for side, packed in zip(sides, (batch.student(), batch.teacher()), strict=True):
                side.append(hidden_rows(model, packed))
        weight = model.get_output_embeddings().weight.detach()  # type: ignore
    return Rows(torch.cat(sides[0]), torch.cat(sides[1]), weight)


def _record(name: str, role: str, question: str, answer: str) -> Record:
    return Record(id=f"{role}/{name}", role=role, question=question, answer=answer)  # type: ignore


def full_losses(rows: Rows) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and KL(student || teacher) of each row over all ids."""
    student, teacher, weight = rows
    sides = student, weight, teacher, weight
    forward, reverse = (
        linear_bidirectional_kl(*sides, forward=a, reverse=1 - a, reduction="none") for a in (1, 0)
    )
    return forward, reverse


def losses_of(rows: Rows, teacher: TopK, tail: str = "bucket") -> tuple[Tensor, Tensor]:
    """The same over the ids of a stored teacher."""
    forward, reverse = (
        linear_topk_kl(
            rows.student_NH, rows.weight_VH, teacher, forward=a, reverse=1 - a,
            tail=tail, reduction="none",  # type: ignore
        )
        for a in (1, 0)
    )  # fmt: skip
    return forward, reverse


def stored(teacher: TopK, dtype: torch.dtype, *, others: bool) -> TopK:
    """Rounded log-probabilities as they are read again, with or without that of all other ids."""
    values = teacher.values
    if not others:
        return TopK(teacher.ids, values.to(dtype).float())
    kept = values.double().logsumexp(-1, keepdim=True)
    rest = (-kept.expm1()).clamp(min=0).log().float()
    outcomes = torch.cat([values, rest], dim=1).to(dtype).float()
    return TopK(teacher.ids, outcomes.log_softmax(-1)[:, :-1])


def _table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    for line in (head, ["---"] * len(head), *lines):
        print("|", " | ".join(map(str, line)), "|")


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[str]:
    """Mean and largest magnitude of the difference of rows, for each direction."""
    pairs = [(f - e).abs() for f, e in zip(found, exact, strict=True)]
    return [f"{value:.1e}" for pair in pairs for value in (pair.mean().item(), pair.max().item())]


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    rows = measured_rows()
    exact = full_losses(rows)
    means = ", ".join(f"{loss.mean().item():.3f}" for loss in exact)
    print(f"{len(rows.student_NH)} rows; KL over all ids, forward and reverse: {means} nats\n")
    best = topk_log_probs(rows.teacher_NH, rows.weight_VH, max(SIZES), transform=LogitTransform())
    lines = []
    for size in SIZES:
        teacher = TopK(best.ids[:, :size], best.values[:, :size])
        outside = -teacher.values.double().logsumexp(-1).expm1()
        line = [size, 4 * size + 2, f"{outside.mean().item():.1e}"]
        for tail in ("bucket", "renormalize"):
            pairs = zip(losses_of(rows, teacher, tail), exact, strict=True)
            line += [f"{(loss - full).mean().item():+.1e}" for loss, full in pairs]
        lines.append(line)
    head = ["K", "bytes a token", "teacher outside"]
    head += [f"{tail}, {way}" for tail in ("bucket", "renormalize") for way in ("fwd", "rev")]
    _table(head, lines)
    print()
    teacher = TopK(best.ids[:, :STORED], best.values[:, :STORED])
    unrounded = losses_of(rows, teacher)
    ways = [
        ("fp16, and all others", torch.float16, True, 4 * STORED + 2),
        ("fp16 alone", torch.float16, False, 4 * STORED),
        ("bf16, and all others", torch.bfloat16, True, 4 * STORED + 2),
        ("bf16 alone", torch.bfloat16, False, 4 * STORED),
        ("fp32 alone", torch.float32, False, 6 * STORED),
    ]
    lines = [
        [name, size, *_errors(losses_of(rows, stored(teacher, dtype, others=others)), unrounded)]
        for name, dtype, others, size in ways
    ]
    _table(["kept", "bytes a token", "fwd, mean", "fwd, most", "rev, mean", "rev, most"], lines)


if __name__ == "__main__":
    sys.exit(main())
