"""The mode that counts: sizes, when they end, and which kind they are of."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bidistill.plan.tracker import Tracker

KIB = 1 << 10


@pytest.fixture
def tracker():
    return Tracker(FakeTensorMode(allow_non_fake_inputs=True))


def test_counts_what_lives(tracker):
    with tracker:
        one = torch.zeros(KIB)  # 4 KiB
        two = one + 1
        view = two[:4]
        assert tracker.live["activations"] == 8 * KIB
        del one
        assert tracker.live["activations"] == 4 * KIB
        del two
        assert tracker.live["activations"] == 4 * KIB  # the view holds it
        del view
    assert tracker.live["activations"] == 0
    assert tracker.peak["activations"] == 8 * KIB


def test_counts_what_autograd_keeps_until_the_backward(tracker):
    with tracker:
        x = torch.zeros(KIB, requires_grad=True)
        y = x.exp().exp().sum()
        held = tracker.live["activations"]
        y.backward()
        del y
        after = tracker.live["activations"]
    assert held == pytest.approx(12 * KIB, abs=64)
    assert after == pytest.approx(8 * KIB, abs=64)  # x and its gradient


def test_in_place_takes_nothing(tracker):
    with tracker:
        x = torch.zeros(KIB)
        x.add_(1).mul_(2)
        x.view(2, -1).t().requires_grad_()
    assert tracker.peak["activations"] == 4 * KIB


def test_kinds(tracker):
    with tracker, tracker.of("teacher"):
        x = torch.zeros(KIB)
    assert tracker.live["teacher"] == 4 * KIB
    tracker.hold(x, "gradients")
    assert (tracker.live["teacher"], tracker.live["gradients"]) == (0, 4 * KIB)
    assert tracker.most["teacher"] == tracker.most["gradients"] == 4 * KIB


def test_what_lies_on_the_host_is_apart(tracker):
    tracker.host = frozenset(["optimiser"])
    with tracker, tracker.of("optimiser"):
        moments = torch.zeros(KIB)
    with tracker:
        x = torch.zeros(KIB)
    assert tracker.most["optimiser"] == 4 * KIB
    assert sum(tracker.peak.values()) == x.nbytes == moments.nbytes


def test_a_storage_that_is_resized(tracker):
    with tracker:
        x = torch.zeros(KIB)
        x.untyped_storage().resize_(0)
        assert sum(tracker.live.values()) == 0
        x.untyped_storage().resize_(4 * KIB)
        assert tracker.live["gathered"] == 4 * KIB
    resize = torch.UntypedStorage.resize_
    assert resize.__name__ == "resize_"
    assert not hasattr(resize, "__code__")


def test_values_of_integers_are_known(tracker):
    with tracker:
        rows = (torch.tensor([3, 0, 5]) > 1).nonzero().squeeze(1)
        assert rows.tolist() == [0, 2]
        assert torch.zeros(4)[rows].shape == (2,)
        assert torch.zeros(()).item() == 0
