"""The loss never holds N x V: its peak memory is measured at two values of N.

The profiler reports every allocation and release of a forward and backward. Eager losses fail the
same test, which shows that it can.
"""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bidistill_kernels as bk

D, V = 32, 4096
ROWS = (256, 1024)
CHUNK_BYTES = 1 << 20
LOSSES = {
    "bidirectional_kl": bk.linear_bidirectional_kl,
    "jsd": bk.linear_jsd,
    "push_pull": bk.linear_push_pull,
    "bounded": lambda *args, **kw: bk.linear_push_pull(*args, reading="bounded", **kw),
    "cross_entropy": lambda x, w, y, v, t, **kw: bk.linear_cross_entropy(x, w, t, **kw),
}
OPTIONS = {"frozen head": {}, "none": {"reduction": "none"}}


def peak_bytes(run):
    """Largest sum of live allocations made by `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler  # torch declares less of it than there is
    events = results.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def growth(loss, *, trained_head=False):
    """Growth of the peak from the smaller to the larger number of rows."""
    peaks = []
    for N in ROWS:
        x, y = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
        w, v = torch.randn(V, D, requires_grad=trained_head), torch.randn(V, D)
        target = torch.randint(V, (N,))
        peaks.append(peak_bytes(lambda args=(x, w, y, v, target): loss(*args).sum().backward()))
    return peaks[1] - peaks[0]


# both models' hidden states and the gradient of the student's, and a few numbers a row
ALLOWED = (ROWS[1] - ROWS[0]) * (3 * D * 4 + 64) + 64_000


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_peak_does_not_grow_with_n_times_v(loss, options):
    grown = growth(lambda *args: loss(*args, chunk_bytes=CHUNK_BYTES, **options))
    # N x V would not pass at one byte an element
    assert grown < ALLOWED < (ROWS[1] - ROWS[0]) * V


def test_peak_with_a_trained_head():
    def loss(*args):
        return bk.linear_bidirectional_kl(*args, chunk_bytes=CHUNK_BYTES)

    assert growth(loss, trained_head=True) < ALLOWED


def test_one_gradient_of_the_hidden_states():
    """As above, of a frozen head; many rows of few logits."""
    N, V, D = 4096, 16, 256

    def peak(**options):
        x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
        settings = {"chunk_bytes": 1 << 12, "backend": "torch"}
        return peak_bytes(
            lambda: bk.linear_bidirectional_kl(x, w, x.detach(), w, **settings).backward(**options)
        )

    assert peak(retain_graph=True) > 2 * 4 * N * D
    assert 4 * N * D < peak() < 1.5 * 4 * N * D


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_one_gradient_of_the_head(factor):
    """It is multiplied by the upstream gradient where it is; a second backward needs a copy."""
    head_bytes = 4 * V * D

    def peak(**options):
        x, w = torch.randn(64, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        sides = x, w, x.detach(), w.detach()
        settings = {"chunk_bytes": 1, "backend": "torch"}
        return peak_bytes(
            lambda: (bk.linear_bidirectional_kl(*sides, **settings) * factor).backward(**options)
        )

    assert peak(retain_graph=True) > 2 * head_bytes
    # on PyTorch the gradient of one row takes five of logits
    assert head_bytes < peak() < 1.5 * head_bytes + 5 * 4 * V


def test_an_eager_loss_fails():
    def loss(x, w, y, v, target):
        return bk.bidirectional_kl_reference(x @ w.T, y @ v.T)

    assert growth(loss) > (ROWS[1] - ROWS[0]) * V * 4 > ALLOWED


def test_chunk_bytes_bounds_the_logits():
    def peak(chunk_bytes):
        x, w = torch.randn(512, D), torch.randn(V, D)
        run = bk.linear_bidirectional_kl
        return peak_bytes(lambda: run(x, w, x, w, chunk_bytes=chunk_bytes))

    # 512 rows of both models are 16 MiB; beside the chunk there are a few blocks of 1 MiB
    assert peak(1 << 20) < 8 << 20
    assert peak(16 << 20) > 16 << 20
