"""The C interface itself: refusals, and random sizes, strides and threads between guard values."""

import ctypes
from ctypes import byref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bidistill_kernels import (
    bidirectional_kl_reference,
    cross_entropy_reference,
    jsd_reference,
    kl_to_probs_reference,
)
from bidistill_kernels._native.library import Model, call
from tests.kernels.native.conftest import ISAS
from tests.support import assert_close

OK, BAD_SIZE, BAD_STRIDE, NULL, NO_ISA, BAD_NAME = range(6)
GUARD = -7.5


def model(rows: Tensor, stride: int | None = None) -> Any:
    return byref(Model(rows.data_ptr(), rows.stride(0) if stride is None else stride, None, 1, 0))


def arguments(**changed: Any) -> dict[str, tuple[Any, ...]]:
    """Arguments of every row function, good ones but for what is changed."""
    s, t, gradient = (torch.zeros(2, 4) for _ in range(3))
    out, ids = torch.full((10,), GUARD), torch.zeros(2, 3, dtype=torch.int64)
    target = torch.zeros(2, dtype=torch.int64)
    good = {
        "student": model(s),
        "teacher": model(t),
        "target": target.data_ptr(),
        "rows": 2,
        "cols": 4,
        "gradient": gradient.data_ptr(),
        "stride": 4,
        "base": out.data_ptr(),
        "out": out.data_ptr(),
        "k": 3,
        "ids": ids.data_ptr(),
        "threads": 1,
        "keep": (s, t, gradient, out, ids, target),
        **changed,
    }
    names = {
        "bd_transform_f32": "student rows cols threads",
        "bd_bidirectional_kl_f32": (
            "student teacher target rows cols 1 1 1 gradient stride out threads"
        ),
        "bd_jsd_f32": "student teacher rows cols 0.5 gradient stride out threads",
        "bd_kl_to_probs_f32": "student teacher rows cols 0.1 gradient stride out threads",
        "bd_cross_entropy_f32": "student target rows cols gradient stride out threads",
        "bd_log_sum_exp_f32": "student rows cols out threads",
        "bd_softmax_gradient_f32": "student base base 0 rows cols gradient stride threads",
        "bd_top_ids_f32": "student rows cols k ids threads",
    }
    filled = {
        name: tuple(good[word] if word in good else float(word) for word in words.split())
        for name, words in names.items()
    }
    return {name: (words, good["keep"]) for name, words in filled.items()}


FUNCTIONS = tuple(arguments())
# what is wrong: the change, the status, the functions that have no such argument
WRONG = {
    "rows": ({"rows": -1}, BAD_SIZE, ()),
    "cols": ({"cols": -1}, BAD_SIZE, ()),
    "1 row if cut to 32 bits": ({"rows": 1 - 2**32}, BAD_SIZE, ()),
    "threads": ({"threads": 0}, BAD_SIZE, ()),
    "k": ({"k": 5}, BAD_SIZE, FUNCTIONS[:-1]),
    "k < 0": ({"k": -1}, BAD_SIZE, FUNCTIONS[:-1]),
    "more ids than 31 bits": ({"cols": 2**31, "rows": 1}, BAD_SIZE, FUNCTIONS[:-1]),
    "rows that overlap": ({"student": model(torch.zeros(2, 4), 3)}, BAD_STRIDE, ()),
    "no model": ({"student": None}, NULL, ()),
    "no logits": ({"student": byref(Model(None, 4, None, 1, 0))}, NULL, ()),
    "no teacher": ({"teacher": None}, NULL, (FUNCTIONS[0], *FUNCTIONS[4:])),
    "no target": (
        {"target": None},
        NULL,
        [name for name in FUNCTIONS if "entropy" not in name and "bidirectional" not in name],
    ),
    "no result": (
        {"out": None, "base": None, "ids": None},
        NULL,
        ("bd_transform_f32",),
    ),
    "gradients that overlap": (
        {"stride": 3},
        BAD_STRIDE,
        ("bd_transform_f32", "bd_log_sum_exp_f32", "bd_top_ids_f32"),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_arguments_are_taken(library, name):
    words, keep = arguments()[name]
    assert getattr(library, name)(*words) == OK
    del keep


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused_untouched(library, wrong):
    change, status, without = WRONG[wrong]
    for name in FUNCTIONS:
        if name not in without:
            words, keep = arguments(**change)[name]
            assert getattr(library, name)(*words) == status, name
            assert (keep[3] == GUARD).all()


def test_no_rows_and_no_columns(library):
    empty = byref(Model(None, 0, None, 1, 0))
    out = torch.full((3,), GUARD)
    for rows in (0, 3):
        assert library.bd_log_sum_exp_f32(empty, rows, 0, out.data_ptr(), 1) == OK
        assert (out == (GUARD if rows == 0 else -torch.inf)).all()
    assert library.bd_log_sum_exp_f32(empty, 0, 5, None, 1) == OK


def test_a_refusal_is_a_value_error(library):
    with pytest.raises(ValueError, match=r"^bd_log_sum_exp_f32: got rows that overlap, expected"):
        call("bd_log_sum_exp_f32", model(torch.zeros(2, 4), 3), 2, 4, 0, 1)
    with pytest.raises(ValueError, match="bd_elementary_f32: got a name that does not exist"):
        call("bd_elementary_f32", b"sin", None, 0, None)


def test_status_of_names(library):
    assert library.bd_set_isa(b"sse9") == NO_ISA
    assert library.bd_elementary_f32(b"exp2", None, 0, None) == BAD_NAME
    assert library.bd_elementary_f32(None, None, 0, None) == NULL
    assert library.bd_elementary_f32(b"exp", None, -1, None) == BAD_SIZE
    assert library.bd_elementary_f32(b"exp", None, 1, None) == NULL


class Guarded(NamedTuple):
    """Rows in the middle of memory that nobody may touch."""

    memory: Tensor
    rows: Tensor

    @classmethod
    def of(cls, values: Tensor, gap: int, lead: int) -> "Guarded":
        C, V = values.shape
        memory = torch.full((lead + C * (V + gap) + 9,), GUARD, dtype=values.dtype)
        rows = memory.as_strided((C, V), (V + gap, 1), lead)
        return cls(memory, rows.copy_(values))

    def is_intact(self) -> bool:
        memory = self.memory.clone()
        offset = self.rows.storage_offset()
        memory.as_strided(self.rows.shape, self.rows.stride(), offset).fill_(GUARD)
        return bool((memory == GUARD).all())


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_random_calls(library, data):
    """Whatever the sizes, strides and alignment: right results, and not a byte beside them."""
    before = library.bd_isa()
    try:
        random_call(library, data.draw)
    finally:
        library.bd_set_isa(before)


def random_call(library, draw):
    names = [isa for isa in ISAS if library.bd_set_isa(isa.encode()) == 0]
    library.bd_set_isa(draw(st.sampled_from(names)).encode())
    # of one id alone the loss is 0, and the reference's a rounding error
    V = draw(st.one_of(st.integers(2, 70), st.integers(250, 2100)))
    # short rows keep several threads busy only where there are many of them
    C = draw(st.integers(1, 9) if V > 70 else st.one_of(st.integers(1, 9), st.integers(200, 900)))
    gap, threads = draw(st.integers(0, 20)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 999)))
    sides = torch.randn(2, C, V) * 3
    target = torch.randint(V, (C,))
    kind = draw(st.sampled_from(["kl", "jsd", "probs", "ce", "top"]))
    if kind == "probs":
        sides[1] = sides[1].softmax(-1)
    student, teacher = (Guarded.of(side, gap, draw(st.integers(0, 5))) for side in sides)
    in_place = draw(st.booleans())
    apart = Guarded.of(torch.full((C, V), torch.nan), draw(st.integers(0, 20)), 3)
    gradient = student if in_place else apart
    out = Guarded.of(torch.full((5, C), torch.nan), 0, 1)
    g, stride, o = gradient.rows.data_ptr(), gradient.rows.stride(0), out.rows.data_ptr()
    if kind == "top":
        K = draw(st.integers(1, V))
        ids = Guarded.of(torch.zeros(C, K, dtype=torch.int64), 0, 2)
        assert not library.bd_top_ids_f32(
            model(student.rows), C, V, K, ids.rows.data_ptr(), threads
        )
        expected = sides[0].sort(dim=-1, descending=True, stable=True).indices[:, :K]
        assert torch.equal(ids.rows, expected)
        assert ids.memory[:2].eq(int(GUARD)).all()
        assert torch.equal(student.rows, sides[0])
    else:
        names = model(student.rows), model(teacher.rows), target.data_ptr()
        status, function = {
            "kl": lambda: (
                library.bd_bidirectional_kl_f32(*names, C, V, 0.3, 0.5, 0.2, g, stride, o, threads),
                lambda s, t: bidirectional_kl_reference(
                    s, t, target, forward=0.3, reverse=0.5, cross_entropy=0.2
                ),
            ),
            "jsd": lambda: (
                library.bd_jsd_f32(*names[:2], C, V, 0.3, g, stride, o, threads),
                lambda s, t: jsd_reference(s, t, beta=0.3),
            ),
            "probs": lambda: (
                library.bd_kl_to_probs_f32(*names[:2], C, V, 0.01, g, stride, o, threads),
                lambda s, q: kl_to_probs_reference(s, q, eps=0.01),
            ),
            "ce": lambda: (
                library.bd_cross_entropy_f32(names[0], names[2], C, V, g, stride, o, threads),
                lambda s, t: cross_entropy_reference(s, target),
            ),
        }[kind]()
        assert status == OK
        both = []
        for dtype in (torch.float64, torch.float32):
            s, t = (side.to(dtype) for side in sides)
            loss = function(s.requires_grad_(), t)
            both.append((loss.detach(), *torch.autograd.grad(loss.sum(), s)))
        assert_close("loss", out.rows[0], both[0][0], both[1][0])
        torch.testing.assert_close(gradient.rows.double(), both[0][1], rtol=1e-5, atol=5e-6)
    assert all(memory.is_intact() for memory in (student, teacher, apart, out))


def test_random_calls_would_see_a_stray_write():
    rows = Guarded.of(torch.zeros(2, 5), 3, 1)
    assert rows.is_intact()
    rows.memory[6] = 0  # between the rows
    assert not rows.is_intact()


def test_the_structure_is_that_of_the_header():
    assert ctypes.sizeof(Model) == 3 * 8 + 2 * 4
