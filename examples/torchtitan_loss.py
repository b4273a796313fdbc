"""Fused losses in torchtitan: what its trainer does with a loss, on its Llama 3 made tiny.

``python examples/torchtitan_loss.py``. The trainer itself wants accelerators, so its step is
written out here: `forward_backward` is the body of ``Trainer._forward_backward_body``.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, llama3_configs

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.torchtitan import FusedCrossEntropy, FusedDistillation, teacher_rows
from examples.tiny import ANSWER_TOKENS, VOCABULARY, Pair, make_pairs, step_of

LENGTH = 17 + ANSWER_TOKENS[1]
"""Tokens of the longest sequence; torchtitan's chunked loss cuts it into eight."""


def tiny_titan(seed: int = 0, tied: bool = False) -> Llama3Model:
    """Two layers of torchtitan's debug model, with attention that a CPU has."""
    config = llama3_configs["debugmodel"](attn_backend="flex")
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.tok_embeddings.num_embeddings = config.lm_head.out_features = VOCABULARY
    config.vocab_size, config.enable_weight_tying = VOCABULARY, tied
    torch.manual_seed(seed)
    model = config.build()
    model.init_weights()
    for matrix in (p for p in model.layers.parameters() if p.ndim == 2):
        matrix.data *= 10  # far enough from the start that what was read before makes a difference
    return model


def batch(pairs: list[Pair], key: str) -> tuple[Tensor, Tensor]:
    """Tokens and labels, padded on the right; a label is the token that follows, or -100."""
    tokens = torch.zeros(len(pairs), LENGTH, dtype=torch.long)
    labels = torch.full((len(pairs), LENGTH), -100)
    for row, pair in enumerate(pairs):
        prompt, answer = pair[key], pair["answer_ids"]
        ids = torch.tensor(prompt + answer[:-1])
        tokens[row, : len(ids)] = ids
        labels[row, len(prompt) - 1 : len(ids)] = torch.tensor(answer)
    return tokens, labels


def distillation(model: Llama3Model, teacher: Llama3Model, **options: float) -> FusedDistillation:
    """The loss as the trainer builds it, and hands it the head."""
    loss = FusedDistillation.Config(options=options).build(compile_config=None)
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    loss.set_teacher(teacher)
    return loss


def cross_entropy(model: Llama3Model, fused: bool = True) -> ChunkedLossWrapper:
    """Cross-entropy by the fused loss, or by torchtitan's own."""
    config = FusedCrossEntropy.Config() if fused else ChunkedLossWrapper.Config(num_chunks=8)
    loss = config.build(compile_config=None)
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return loss


def forward_backward(
    model: Llama3Model, teacher: Llama3Model, loss_fn: FusedDistillation, pairs: list[Pair]
) -> Tensor:
    """One forward and backward of distillation; the mean over answer tokens, nats."""
    tokens, labels = batch(pairs, "prompt_ids")
    rows = teacher_rows(teacher, *batch(pairs, "teacher_prompt_ids"))
    pred = model(tokens)  # hidden states
    loss, _ = loss_fn(pred, labels, (labels != -100).sum(), teacher_hidden=rows)
    loss.backward()
    return loss.detach()


def eager_kl(model: Llama3Model, teacher: Llama3Model, pairs: list[Pair]) -> Tensor:
    """The same loss from full logits."""
    sides = []
    for side, key in ((model, "prompt_ids"), (teacher, "teacher_prompt_ids")):
        tokens, labels = batch(pairs, key)
        skips, side._skip_lm_head = side._skip_lm_head, False
        sides.append(side(tokens)[labels != -100].log_softmax(-1))
        side._skip_lm_head = skips
    s, t = sides[0], sides[1].detach()
    return (0.5 * (t.exp() - s.exp()) * (t - s)).sum(-1).mean()


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the fused loss, to be called again and again."""
    model, pairs = tiny_titan(), make_pairs()
    teacher = copy.deepcopy(model)
    loss_fn = distillation(model, teacher)
    return lambda: forward_backward(model, teacher, loss_fn, pairs)


def eager_step() -> Callable[[], Tensor]:
    """The same from full logits."""
    model, pairs = tiny_titan(), make_pairs()
    teacher = copy.deepcopy(model).requires_grad_(False)
    return step_of(lambda: eager_kl(model, teacher, pairs))


def main() -> None:
    """Train for a few steps."""
    model, pairs = tiny_titan(), make_pairs()
    teacher = copy.deepcopy(model)
    loss_fn = distillation(model, teacher)
    expected = eager_kl(model, teacher, pairs).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(forward_backward(model, teacher, loss_fn, pairs).item())
        optimizer.step()
    assert abs(losses[0] - expected) < 1e-5 * expected, (losses[0], expected)
    assert losses[-1] < losses[0], losses
    print(f"nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")

    tokens, labels = batch(pairs, "prompt_ids")
    count = (labels != -100).sum()
    ours, theirs = (cross_entropy(model, fused)(model(tokens), labels, count)[0].item()
                    for fused in (True, False))  # fmt: skip
    assert abs(ours - theirs) < 1e-5 * theirs, (ours, theirs)
    print(f"cross-entropy: {ours:.6f}, torchtitan's own {theirs:.6f}")


if __name__ == "__main__":
    main()
