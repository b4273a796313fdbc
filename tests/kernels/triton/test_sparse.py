"""Products at chosen ids against dense formulas in float64, and equal bits on every run.

Shapes (N, V, D, K): (1, 1, 1, 1); one id a token; D = 300 and 1100, no multiples of the 256 and
1024 columns of a program; K = 20 and 5, none of the 4, 8 and 16 rows of one.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton back-end needs Triton")

from bidistill_kernels._triton import sparse
from tests.kernels.cases import DEVICE
from tests.support import assert_close

SHAPES = [(1, 1, 1, 1), (5, 30, 70, 1), (6, 50, 300, 20), (3, 9, 1100, 5)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# of hidden states and head
each_dtype = pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP16, BF16), (BF16, FP32)], ids=str
)


class Case:
    """Random operands; a tenth of the values is 0, and ids repeat within rows and over them."""

    def __init__(self, shape, dtypes=(FP32, FP32)):
        N, V, D, K = shape
        self.hidden_ND = torch.randn(N, D).to(DEVICE, dtypes[0])
        self.weight_VD = torch.randn(V, D).to(DEVICE, dtypes[1])
        self.bias_V = torch.randn(V).to(DEVICE)
        self.ids_NK = torch.randint(V, (N, K)).to(DEVICE)
        self.values_NK = torch.randn(N, K).to(DEVICE)
        if N * K > 1:
            self.values_NK[torch.rand(N, K) < 0.1] = 0

    def dense(self, dtype):
        """The sparse gradient as a full one, (N, V)."""
        N, V = len(self.ids_NK), len(self.weight_VD)
        dense_NV = torch.zeros(N, V, dtype=dtype, device=DEVICE)
        return dense_NV.scatter_add_(1, self.ids_NK, self.values_NK.to(dtype))

    def gather_dot(self, bias_V=None):
        return sparse.gather_dot(self.hidden_ND, self.weight_VD, self.ids_NK, bias_V)

    def dx(self):
        out_ND = torch.full(self.hidden_ND.shape, torch.nan, device=DEVICE)
        sparse.sparse_dx(self.values_NK, self.ids_NK, self.weight_VD, out_ND)
        return out_ND

    def dw(self):
        out_VD = torch.zeros_like(self.weight_VD)
        sparse.sparse_dw(self.values_NK, self.ids_NK, self.hidden_ND, out_VD)
        return out_VD

    def dbias(self, dtype=FP32):
        out_V = torch.zeros_like(self.bias_V, dtype=dtype)
        sparse.sparse_dbias(self.values_NK, self.ids_NK, out_V)
        return out_V

    def check_head(self):
        """Both gradients of the head, in its dtype."""
        dtype = self.weight_VD.dtype
        for name, actual, other in (
            ("dW", self.dw(), self.hidden_ND),
            ("dbias", self.dbias(dtype), torch.ones(len(self.ids_NK), device=DEVICE)),
        ):
            expected, own = (self.dense(p).T @ other.to(p) for p in (torch.float64, FP32))
            assert_close(name, actual, expected, own.to(dtype))


@each_shape
@each_dtype
def test_gather_dot(shape, dtypes):
    case = Case(shape, dtypes)
    for bias_V in (None, case.bias_V):
        expected, own = (
            torch.nn.functional.linear(
                case.hidden_ND.to(dtype),
                case.weight_VD.to(dtype),
                None if bias_V is None else bias_V.to(dtype),
            ).gather(1, case.ids_NK)
            for dtype in (torch.float64, FP32)
        )
        assert_close("logits", case.gather_dot(bias_V), expected, own)


@each_shape
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_dx(shape, dtype):
    case = Case(shape, (FP32, dtype))
    expected, own = (case.dense(p) @ case.weight_VD.to(p) for p in (torch.float64, FP32))
    assert_close("dX", case.dx(), expected, own)


@each_shape
@each_dtype
def test_head(shape, dtypes):
    Case(shape, dtypes).check_head()


def test_hot_id():
    """One id of 70 tokens that is in each row once, among others and next to them in the order."""
    case = Case((70, 12, 40, 3))
    case.ids_NK[:, 1] = 5
    case.check_head()


def test_every_id_the_same():
    case = Case((9, 4, 40, 7))
    case.ids_NK[:] = 3
    case.check_head()
    assert not case.dw()[:3].any()


def test_same_bits_on_every_run():
    case = Case((40, 6, 300, 5))
    for run in (case.gather_dot, case.dx, case.dw, case.dbias):
        assert torch.equal(run(), run())


def test_values_of_zero_are_not_read():
    """A rule-out leaves value 0 beside an infinite logit: its row adds nothing, not 0 * inf."""
    case = Case((4, 10, 30, 2))
    case.values_NK[:, 0], case.ids_NK[:, 0], case.ids_NK[:, 1] = 0, 7, 2
    case.values_NK[3] = 0
    case.weight_VD[7], case.hidden_ND[3] = torch.inf, torch.nan
    assert case.dx().isfinite().all()
    assert case.dw().isfinite().all()
    assert not case.dw()[7].any()


def test_nan_is_seen():
    case = Case((4, 10, 30, 2))
    case.ids_NK[1], case.values_NK[1, 0] = torch.tensor([7, 8]), torch.nan
    assert case.dx()[1].isnan().all()
    assert case.dw()[7].isnan().all()
    assert case.dbias()[7].isnan()


def test_strided_operands():
    """Rows of wider buffers, and a transposed hidden state."""
    case = Case((6, 20, 40, 3))
    expected = case.gather_dot(), case.dx(), case.dw()
    wide_VD = torch.full((40, 60), torch.nan, device=DEVICE)
    wide_VD[::2, 5:45] = case.weight_VD
    case.weight_VD = wide_VD[::2, 5:45]
    case.hidden_ND = case.hidden_ND.T.contiguous().T
    case.ids_NK, case.values_NK = (x.T.contiguous().T for x in (case.ids_NK, case.values_NK))
    for name, one, two in zip(
        ("logits", "dX", "dW"), expected, (case.gather_dot(), case.dx(), case.dw()), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("shape", [(0, 5, 8, 3), (4, 5, 8, 0)], ids=str)
def test_no_entries(shape):
    case = Case(shape)
    assert case.gather_dot().shape == case.ids_NK.shape
    assert not case.dx().any()
    assert not case.dw().any()
    assert not case.dbias().any()


def test_head_beyond_2_to_the_31():
    """Head row 2 starts at element 2^31; only what is written takes memory."""
    case = Case((3, 3, 20, 2), (FP32, BF16))
    case.ids_NK[:] = torch.tensor([2, 0])
    logits, dx, dw = case.gather_dot(), case.dx(), case.dw()
    store = torch.empty(2**31 + 64, dtype=BF16, device=DEVICE)
    far_VD = store.as_strided((3, 20), (2**30, 1)).copy_(case.weight_VD)
    case.weight_VD = far_VD
    assert torch.equal(case.gather_dot(), logits)
    assert torch.equal(case.dx(), dx)
    sparse.sparse_dw(case.values_NK, case.ids_NK, case.hidden_ND, far_VD.zero_())
    assert torch.equal(far_VD, dw)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs ahead of its host")
def test_no_host_sync():
    case = Case((6, 20, 40, 3))
    runs = case.gather_dot, case.dx, case.dw, case.dbias
    for run in runs:
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in runs:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
