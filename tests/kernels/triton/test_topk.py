"""Ids of the largest logits: those of a stable sort, whatever ties, NaN or infinities there are.

Shapes (C, V): (1, 1), (3, 50) within one tile of 64 ids, (7, 1423) odd, (4, 20000); single rows at
every number of tiles where the kernels change. Both ways are tested, the kernels and `torch.topk`
of the same keys.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton back-end needs Triton")

from bidistill_kernels import LogitTransform
from bidistill_kernels._triton import topk
from tests.kernels.cases import DEVICE

# the interpreter is NumPy, which warns of a soft-cap that is computed and not used
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
inf, nan = torch.inf, torch.nan
PLAIN = LogitTransform()


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request, monkeypatch):
    """Both ways to the ids."""
    monkeypatch.setattr(topk, "MAX_K", 10**6 if request.param == "kernels" else 0)


def sorted_ids(final_CV, k):
    """The specification; torch sorts NaN before inf, and -0 as +0."""
    return final_CV.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def check(raw_CV, k, *, bias_V=None, transform=PLAIN, final_CV=None):
    final_CV = raw_CV if final_CV is None else final_CV
    on_device = (None if x is None else x.to(DEVICE) for x in (raw_CV, bias_V))
    ids_CK = topk.top_ids(*on_device, transform, k)
    assert ids_CK.dtype == torch.int64
    assert ids_CK.cpu().tolist() == sorted_ids(final_CV, k).tolist()


@pytest.mark.parametrize(
    ("shape", "ks"),
    [
        ((1, 1), (1, 2)),
        ((3, 50), (1, 2, 10, 60)),
        ((7, 1423), (1, 2, 10)),
        ((1, 1423), (33, 128)),
        ((4, 20_000), (1, 16)),
    ],
    ids=str,
)
def test_a_stable_sort(shape, ks):
    for k in ks:
        check(torch.randn(shape), k)
    # some ten ids tie, or thousands
    check(torch.randint(-3, 4, shape).float(), 200 if shape[0] == 1 else max(ks))


@pytest.mark.parametrize("V", [63, 64, 65, 4096, 4097, 65_536, 65_537, 131_073, 262_144, 262_145])
def test_every_number_of_tiles(V):
    """The largest at both ends, and a tie between the first and the last tile."""
    raw_CV = torch.randn(1, V).clamp_(max=2)
    raw_CV[0, [0, V // 2, -1]] = torch.tensor([3.0, 4.0, 3.0])
    check(raw_CV, 4)


def test_all_equal():
    for value in (-7.5, -inf, nan):
        check(torch.full((1, 300), value), 70)


def test_order_of_the_special_values():
    """NaN of either sign, infinities, zeros of either sign, denormals, the largest numbers."""
    tiny, huge = 1e-45, 3.4028235e38
    values = [0.0, -0.0, tiny, -tiny, 1.0, -1.0, huge, -huge, inf, -inf, nan, -nan] * 6
    raw_CV = torch.tensor(values)[torch.randperm(72)][None]
    check(raw_CV, 72)
    # the smallest numbers become zeros of either sign, which tie
    transform = LogitTransform(scale=0.25)
    check(raw_CV, 72, transform=transform, final_CV=transform(raw_CV))


def test_ids_of_minus_infinity_fill_up():
    raw_CV = torch.full((2, 200), -inf)
    raw_CV[0, [150, 40]] = torch.tensor([1.0, 2.0])
    check(raw_CV, 5)
    ids_CK = topk.top_ids(raw_CV.to(DEVICE), None, PLAIN, 5)
    assert ids_CK.tolist() == [[40, 150, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_bias_scale_and_temperature():
    """A negative scale turns the order round; a bias shared by rows of a wider buffer."""
    raw_CV, bias_V = torch.randn(3, 400)[:, 50:350], torch.randint(-9, 9, (300,)).float()
    raw_CV[0, 7], bias_V[9] = nan, -inf
    for scale in (1.0, 0.25, -0.5):  # powers of two: final logits are the same in both
        transform = LogitTransform(scale=scale, temperature=2.0)
        final_CV = transform(raw_CV + bias_V)
        check(raw_CV, 12, bias_V=bias_V, transform=transform, final_CV=final_CV)


def test_softcap():
    """Far beyond the cap all ids tie; within it they keep their order."""
    transform = LogitTransform(scale=-1.0, softcap=30.0, temperature=0.7)
    raw_CV = torch.tensor([1e4, -2e4, 1e5, 0.0, -inf, inf])[torch.randint(6, (2, 200))]
    check(raw_CV, 70, transform=transform, final_CV=-raw_CV.sign())
    raw_CV = torch.stack([torch.randperm(400) for _ in range(2)]) * 0.1 - 20
    check(raw_CV, 30, transform=transform, final_CV=-raw_CV)


def test_strided_rows():
    """Rows that a 16-bit gradient shares with the logits, or every second row of a buffer."""
    wide = torch.randn(6, 500)
    for raw_CV in (wide[:, :300], wide[::2, :300], wide.as_strided((4, 300), (301, 1))):
        check(raw_CV, 7)


def test_no_ids():
    ids_CK = topk.top_ids(torch.empty(0, 50, device=DEVICE), None, PLAIN, 4)
    assert ids_CK.shape == (0, 4)


def test_rows_beyond_2_to_the_31(request):
    """Row 2 starts at element 2^31 + 2; only what is written takes memory."""
    if "torch" in request.node.callspec.id:
        pytest.skip("torch addresses its rows itself")
    store = torch.empty(2**31 + 512, device=DEVICE)
    raw_CV = store.as_strided((3, 300), (2**30 + 1, 1))
    raw_CV.copy_(torch.randn(3, 300))
    assert topk.top_ids(raw_CV, None, PLAIN, 3).tolist() == sorted_ids(raw_CV, 3).tolist()


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    st.lists(
        st.sampled_from([-inf, -1.0, -0.0, 0.0, 1.0, 2.0, inf, nan]), min_size=1, max_size=150
    ),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_ties(values, k, shift):
    """Few values, so that ties cross the border of the k and of the tiles."""
    row = torch.tensor(values).roll(shift * 37)
    check(torch.stack([row, row.flip(0)]), k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs ahead of its host")
def test_no_host_sync():
    raw_CV = torch.randn(4, 1000, device=DEVICE)
    topk.top_ids(raw_CV, None, PLAIN, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk.top_ids(raw_CV, None, PLAIN, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
