"""Rows on disk: the same step as with the teacher at hand, whole or not at all, and found again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from bidistill import cli, models, train
from bidistill.config import ObjectiveConfig, as_dict
from bidistill.data.build import build_store
from bidistill.data.loader import Batch
from bidistill.data.records import ROLES
from bidistill.data.store import Selection
from bidistill.data.views import Example, View, build_examples
from bidistill.errors import UserError
from bidistill.loading import load_base
from bidistill.models import adapters_off, hidden_rows
from bidistill.teacher import build as teacher_build
from bidistill.teacher import compute as teacher
from bidistill.teacher import forms as teacher_forms
from bidistill.teacher import store as teacher_store
from bidistill.teacher.build import build_rows
from bidistill.teacher.cache import main, place, selected
from bidistill.teacher.compute import HiddenCache, frozen_head
from bidistill.teacher.rows import TeacherRows
from bidistill.teacher.store import (
    FORMAT,
    HEAD,
    HEADER,
    INDEX,
    TeacherStore,
    key_of,
    problem_of,
)
from bidistill.world import World
from bidistill_kernels import linear_bidirectional_kl
from tests.trainer.test_step import CONTEXTS, fused_step, gradients, make_student
from tests.trainer.test_train import full, in_folder, weights_of

ROOT = Path(__file__).parents[2]
WIDTH = 32  # of the tiny model
ROUNDING = 2.0**-8  # largest relative error of a number in bf16
KINDS = ["lora", "full, tied", "full, untied"]


@pytest.fixture
def examples(records, tokenizer) -> list[Example]:
    return build_examples(records, tokenizer, CONTEXTS)


MADE_OF = {"made": "by a test"}


def built(model, examples, folder) -> TeacherStore:
    build_rows(model, examples, folder, MADE_OF)
    return TeacherStore(folder, verify=True)


@pytest.fixture
def small_files(monkeypatch):
    """A few rows a file."""
    monkeypatch.setattr(teacher_build, "FILE_BYTES", 20 * 2 * WIDTH)


def move(model):
    """Train a step, as it were: what requires a gradient changes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.add_(0.05 * noise)


def live_rows(model, batch) -> TeacherRows:
    """The teacher's rows as a step computes them, and the head they need."""
    with torch.no_grad(), adapters_off(model):
        hidden = hidden_rows(model, batch.teacher())
    return TeacherRows(hidden, *frozen_head(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_step_equals_that_of_the_rounded_live_teacher_to_the_bit(examples, kind, dtype, tmp_path):
    model = make_student(kind).to(dtype)
    (order,) = teacher.chunks(examples)  # one pack, the same one: fp32 sums in the same order
    batch = Batch(tuple(order if dtype == torch.float32 else examples))
    live = live_rows(model, batch)
    rounded = TeacherRows(live.hidden.bfloat16().to(dtype), live.weight, live.bias)
    stored = built(model, examples, tmp_path / "rows").for_batch(batch)
    assert stored.hidden.dtype == dtype
    assert (stored.weight is None) == (kind == "lora")
    move(model)
    found = []
    for rows in (stored, rounded, live):
        model.zero_grad()
        loss = fused_step(model, batch, rows)[1].loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, ours), (expected_loss, expected), (unrounded, _) = found
    assert torch.equal(loss, expected_loss)
    assert loss != unrounded, "rounding must show, or equal bits prove nothing"
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(ours[name], gradient), name


def test_rounding_moves_a_number_by_at_most_its_256th():
    numbers = torch.linspace(1, 2, 100_001, dtype=torch.float64)
    error = ((numbers.bfloat16().double() - numbers) / numbers).abs().max().item()
    assert ROUNDING * 0.99 < error <= ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("forward", "reverse"), [(1.0, 0.0), (0.0, 1.0)])
def test_loss_moves_within_the_bound(examples, kind, forward, reverse, tmp_path):
    """The bound in the docstring of `TeacherStore`, row by row, against unrounded fp32 rows."""
    model = make_student(kind).float()
    batch = Batch(tuple(examples))
    exact = live_rows(model, batch)
    stored = built(model, examples, tmp_path / "rows").for_batch(batch)
    move(model)
    with torch.no_grad():
        student_head = model.get_output_embeddings().weight.double()
        head = student_head if exact.weight is None else exact.weight.double()
        student = hidden_rows(model, batch.student()).double()

    def losses(hidden):
        sides = student, student_head, hidden.double(), head
        return linear_bidirectional_kl(*sides, forward=forward, reverse=reverse, reduction="none")

    change = (ROUNDING * exact.hidden.double().abs() @ head.abs().T).amax(-1)
    gap = exact.hidden.double() @ head.T - student @ student_head.T
    spread = gap.amax(-1) - gap.amin(-1)
    bound = forward * change * (spread + change) / 2 + reverse * 2 * change
    moved = (losses(stored.hidden) - losses(exact.hidden)).abs()
    assert (moved <= bound).all()
    assert moved.mean() > 1e-4 * bound.mean(), "a bound that far off says nothing"
    wrong = (losses(stored.hidden.roll(1, 0)) - losses(exact.hidden)).abs()
    assert (wrong > bound).any(), "rows of another token must break the bound"


@pytest.mark.parametrize("half", [0, 1])
def test_both_halves_of_a_key_count(examples, tmp_path, monkeypatch, half):
    store = built(make_student("lora"), examples, tmp_path / "rows")
    key = key_of(examples[3]).copy()
    monkeypatch.setattr(teacher_store, "key_of", lambda _: key)
    assert len(store.for_batch(Batch((examples[3],))).hidden) == len(examples[3].answer_ids)
    key[half] ^= 1
    with pytest.raises(ValueError, match="of which the store has no rows"):
        store.for_batch(Batch((examples[3],)))


def test_an_example_may_come_twice(examples, tmp_path):
    twice = [*examples, replace(examples[0], id="again")]
    store = built(make_student("lora"), twice, tmp_path / "rows")
    same = [store.for_batch(Batch((twice[i],))).hidden for i in (0, -1)]
    assert torch.equal(*same)


@pytest.mark.usefixtures("small_files")
def test_rows_are_those_in_memory_whatever_the_files(examples, tmp_path):
    model = make_student("lora")
    store = built(model, examples, tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("rows-*"))) > 3
    memory = HiddenCache(model, examples)
    for numbers in ([0, 7, 3, 1, 9, 6, 4], [9], range(10)):
        batch = Batch(tuple(examples[i] for i in numbers))
        expected = memory.for_batch(batch).hidden.bfloat16().double()
        assert torch.equal(store.for_batch(batch).hidden, expected)


@pytest.mark.usefixtures("small_files")
def test_two_bytes_a_number_and_little_else(examples, tmp_path):
    store = built(make_student("lora"), examples, tmp_path / "rows")
    tokens = sum(len(example.answer_ids) for example in examples)
    assert (store.tokens, store.bytes_per_token) == (tokens, 2 * WIDTH)
    sizes = [path.stat().st_size for path in (tmp_path / "rows").glob("rows-*")]
    assert 0 < sum(sizes) - tokens * 2 * WIDTH <= 100 * len(sizes)
    assert max(sizes) <= teacher_build.FILE_BYTES + 100
    assert (tmp_path / "rows" / INDEX).stat().st_size <= 24 * len(examples) + 250


def test_an_example_longer_than_a_file_has_one_of_its_own(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_build, "FILE_BYTES", 2 * WIDTH)
    store = built(make_student("lora"), examples, tmp_path / "rows")
    assert len(list((tmp_path / "rows").glob("rows-*"))) == len(examples)
    assert len(store.for_batch(Batch((examples[0],))).hidden) == len(examples[0].answer_ids) > 1


def test_head_is_kept_as_it_was_where_it_trains(examples, tmp_path):
    built(make_student("lora"), examples, tmp_path / "lora")
    assert not (tmp_path / "lora" / HEAD).exists()
    model = make_student("full, untied")
    model.lm_head.bias = nn.Parameter(torch.randn(258, dtype=torch.float64))
    before = model.lm_head.weight.detach().clone(), model.lm_head.bias.detach().clone()
    store = built(model, examples, tmp_path / "full")
    move(model)
    rows = store.for_batch(Batch((examples[0],)))
    assert rows.weight is not None
    assert rows.bias is not None
    assert torch.equal(rows.weight, before[0])
    assert torch.equal(rows.bias, before[1])
    assert not torch.equal(model.lm_head.weight, before[0])


def test_found_by_what_the_teacher_reads(examples, tmp_path):
    store = built(make_student("lora"), examples, tmp_path / "rows")
    renamed = replace(examples[0], id="another")
    same = [store.for_batch(Batch((e,))).hidden for e in (examples[0], renamed)]
    assert torch.equal(*same)
    told = replace(examples[0], teacher=View((*examples[0].teacher.prompt_ids, 5), "teacher/x"))
    cut = replace(examples[0], answer_ids=examples[0].answer_ids[:-1])
    for stranger in (told, cut):
        with pytest.raises(ValueError, match=f"example '{stranger.id}', of which the store has no"):
            store.for_batch(Batch((stranger,)))


def test_the_teacher_knows_no_dropout(examples, monkeypatch):
    model = make_student("lora").train()
    modes = []

    def watched(*given):
        modes.append(model.training)
        return hidden_rows(*given)

    monkeypatch.setattr(models, "hidden_rows", watched)
    teacher.teacher_rows(model, examples[:2])
    assert modes == [False]
    assert model.training


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_resident_memory_does_not_grow_with_what_was_read(tmp_path, monkeypatch):
    width, length, count = 4096, 128, 64  # 64 MiB of rows
    monkeypatch.setattr(teacher_build, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(
        teacher_forms, "teacher_rows", lambda _, pack: [torch.ones(length, width) for _ in pack]
    )
    head = nn.Linear(width, 2, bias=False).requires_grad_(False)
    model: Any = SimpleNamespace(get_output_embeddings=lambda: head, modules=head.modules)
    view = View((1,), "student")
    examples = [
        Example(str(i), "retain", view, view, tuple(range(i, i + length))) for i in range(count)
    ]
    build_rows(model, examples, tmp_path / "rows", {})
    store = TeacherStore(tmp_path / "rows")
    read = [Batch((example,)) for example in examples]
    assert store.for_batch(read[0]).hidden.sum() == width * length
    before = resident_bytes()
    for batch in read:
        store.for_batch(batch)
    assert resident_bytes() - before < 12 << 20


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flip(path, at):
    """Change one bit of a file, not its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.usefixtures("small_files")
def test_a_flipped_byte_is_found_wherever_it_is(examples, tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    built(make_student("full, tied"), examples, folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert {INDEX, HEAD} < set(names)
    monkeypatch.setenv("BIDISTILL_VERIFY", "1")
    for name in names:
        size = (folder / name).stat().st_size
        for at in (0, 20, size // 2, size - 1):
            flip(folder / name, at)
            with pytest.raises(UserError) as caught:
                TeacherStore(folder)
            assert str(caught.value).startswith(f"{folder / name}: got ")
            assert str(caught.value).endswith("; run bidistill teacher-cache, which makes it again")
            assert "\n" not in str(caught.value)
            flip(folder / name, at)
    TeacherStore(folder)


@pytest.mark.usefixtures("small_files")
def test_sizes_and_headers_are_always_checked(examples, tmp_path, monkeypatch):
    monkeypatch.delenv("BIDISTILL_VERIFY", raising=False)
    folder = tmp_path / "rows"
    built(make_student("lora"), examples, folder)
    rows = folder / "rows-000001.safetensors"
    whole = rows.read_bytes()
    damages = {
        "cut": lambda: rows.write_bytes(whole[:-2]),
        "empty": lambda: rows.write_bytes(b""),
        "missing": rows.unlink,
        "retyped": lambda: rows.write_bytes(whole.replace(b'"BF16"', b' "F16"')),
        "no length": lambda: rows.write_bytes(b"\xff" * 8 + whole[8:]),
    }
    for name, damage in damages.items():
        damage()
        with pytest.raises(UserError, match=r"rows-000001.safetensors: got .*, expected "):
            TeacherStore(folder)
        assert name == "missing" or rows.read_bytes() != whole
        rows.write_bytes(whole)
    flip(rows, len(whole) - 1)  # the price of not reading everything
    TeacherStore(folder)
    header = json.loads((folder / HEADER).read_text())
    for change in ({"format": 0}, {"files": {}, "format": None}):
        (folder / HEADER).write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=f"{HEADER}: got format"):
            TeacherStore(folder)
    for text in ("", "[]", "{}", f'{{"format": {FORMAT}, "files": 3}}'):
        (folder / HEADER).write_text(text)
        with pytest.raises(UserError, match=f"{HEADER}: got nothing that can be read"):
            TeacherStore(folder)


@pytest.mark.usefixtures("small_files")
def test_a_build_that_fails_leaves_nothing(examples, tmp_path, monkeypatch):
    save, calls = teacher_build.save_file, []

    def full_disk(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(teacher_build, "save_file", full_disk)
    message = r"rows: cannot be written \(.*No space left.*\); make room there, or choose another "
    with pytest.raises(UserError, match=message):
        build_rows(make_student("lora"), examples, tmp_path / "rows", {})
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_caller(examples, tmp_path):
    model = make_student("lora")
    with pytest.raises(ValueError, match="examples: got none"):
        build_rows(model, [], tmp_path / "rows", {})


OTHER_RANK = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from bidistill.teacher import build as teacher_build
from bidistill.data.loader import Batch
from bidistill.data.store import TokenStore
from bidistill.loading import load_base
from bidistill.teacher.store import TeacherStore
from bidistill.world import World

meet, threads, file_bytes, model, tokens, folder = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=1, world_size=2)
torch.set_num_threads(int(threads))
teacher_build.FILE_BYTES = int(file_bytes)
examples = TokenStore(Path(tokens))
teacher_build.build_rows(load_base(model), examples, Path(folder), {}, World(1, 2))
rows = TeacherStore(Path(folder)).for_batch(Batch(tuple(examples)))
assert rows.hidden.isfinite().all() and rows.weight is not None
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_files")
def test_two_ranks_make_the_bytes_of_one(config, tokenizer, model_dir, tmp_path, monkeypatch):
    """This process is rank 0; the time goes into the other one's imports."""
    cache, meet, folder = (tmp_path / name for name in ("tokens", "meet", "two"))
    examples = build_store(config.data.train, tokenizer, CONTEXTS, folder=cache)
    (tokens,) = cache.iterdir()
    model = load_base(model_dir)
    single = built(model, examples, tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "one").glob("rows-*"))
    wrote = []
    save = teacher_build.save_file
    monkeypatch.setattr(
        teacher_build, "save_file", lambda t, path: (wrote.append(path.name), save(t, path))
    )
    shared = meet, torch.get_num_threads(), teacher_build.FILE_BYTES, model_dir, tokens, folder
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_RANK, *map(str, shared)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meet}",
            rank=0,
            world_size=2,
            timeout=timedelta(minutes=2),  # a rank that died must not hold the other up
        )
        try:
            build_rows(model, examples, folder, MADE_OF, World(0, 2))
            both = [s.for_batch(Batch(tuple(examples))) for s in (single, TeacherStore(folder))]
        finally:
            torch.distributed.destroy_process_group()
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    assert wrote == [*names[::2], INDEX, HEAD], "the rest must be the other rank's"
    assert len(names) > 3
    assert files_of(folder) == files_of(tmp_path / "one")
    assert torch.equal(both[0].hidden, both[1].hidden)
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_disk(config):
    """The same recipe with its teacher on disk."""
    folder = config.output.with_name("teacher")
    return replace(config, teacher=replace(config.teacher, cache="disk", cache_folder=folder))


class TeacherRan(Exception):
    """Somebody asked for the teacher."""


@pytest.fixture
def no_teacher(monkeypatch):
    """From now on neither the teacher's views nor a forward without gradients can be had."""

    def forbid():
        def raising(*args, **kwargs):
            raise TeacherRan

        def student_only(*given):
            return hidden_rows(*given) if torch.is_grad_enabled() else raising()

        monkeypatch.setattr(Batch, "teacher", raising)
        monkeypatch.setattr(models, "adapters_off", raising)
        monkeypatch.setattr(models, "own_rows", raising)
        monkeypatch.setattr(models, "hidden_rows", student_only)

    return forbid


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_training_never_runs_a_teacher_that_is_on_disk(config, make, tmp_path, no_teacher):
    config = on_disk(make(config))
    first = train.main(config)
    again = in_folder(config, tmp_path / "again")
    no_teacher()
    assert weights_of(train.main(again)) == weights_of(first)
    # and whoever has no store needs the teacher
    memory = replace(config.teacher, cache="memory")
    elsewhere = replace(config.teacher, cache_folder=tmp_path / "elsewhere")
    for number, settings in enumerate((memory, elsewhere)):
        other = replace(in_folder(config, tmp_path / f"other{number}"), teacher=settings)
        with pytest.raises(TeacherRan):
            train.main(other)


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_a_run_resumes_from_the_store(config, make, tmp_path, no_teacher):
    """The base model is gone by then where all weights train; its rows are not."""
    config = on_disk(make(config))
    whole = train.main(in_folder(config, tmp_path / "whole"))
    no_teacher()
    half = config.output
    original = train.train_step

    def stopping(*arguments):
        if arguments[6] == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    assert (half / "checkpoints").exists()
    assert weights_of(train.main(config, resume=True)) == weights_of(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_and_memory_train_alike(config, tmp_path, dtype):
    config = replace(full(config), model=replace(full(config).model, dtype=dtype))
    memory = in_folder(config, tmp_path / "memory")
    for one in (on_disk(config), memory):
        train.main(one)
    logs = [(folder / "train_log.jsonl").read_text() for folder in (config.output, memory.output)]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0][-1] < 0.9 * losses[0][0]


def folder_of(config, tokenizer):
    tokens = build_store(
        config.data.train,
        tokenizer,
        teacher.contexts_of(config.teacher),
        max_answer_tokens=config.data.max_answer_tokens,
        folder=config.data.cache,
    )
    return place(config, selected(config, tokens))[0]


CHANGES = {
    "context": lambda c: replace(c, teacher=replace(c.teacher, contexts={})),
    "cut": lambda c: replace(c, data=replace(c.data, max_answer_tokens=3)),
    "roles": lambda c: replace(c, data=replace(c.data, per_step={"forget": 1})),
    "head": full,
    "dtype": lambda c: replace(c, model=replace(c.model, dtype="bfloat16")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_changes_the_rows_changes_the_key(config, tokenizer, change):
    config = on_disk(config)
    assert folder_of(config, tokenizer) != folder_of(change(config), tokenizer)


def test_the_models_content_is_in_the_key_and_nothing_else(config, tokenizer, tmp_path):
    config = on_disk(config)
    before = folder_of(config, tokenizer)
    source = Path(config.model.path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    moved = replace(config, model=replace(config.model, path=str(copy)))
    assert folder_of(moved, tokenizer) == before
    optim = replace(config.optim, lr=0.5)
    assert folder_of(replace(config, optim=optim, steps=99, seed=3), tokenizer) == before
    for name in ("model.safetensors", "config.json"):
        flip(copy / name, -2)
        assert folder_of(moved, tokenizer) != before
        flip(copy / name, -2)


def test_selection_is_a_part_of_the_store(config, tokenizer):
    tokens = build_store(config.data.train, tokenizer, CONTEXTS, folder=config.data.cache)
    some = Selection(tokens, ["retain", "forget"])
    expected = [example for example in tokens if example.role in ("forget", "retain")]
    assert list(some) == some[:] == expected
    assert some[-1] == expected[-1]
    assert len(Selection(tokens, ROLES)) == len(tokens) > len(some) == 4
    assert Selection(tokens, ["forget", "retain"]).digest == some.digest
    assert Selection(tokens, ["forget"]).digest != some.digest


@pytest.fixture
def recipe(config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_dict(on_disk(config))))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ema", "cache": "off"}, r"^teacher\.kind: got ema, whose rows change with every"),
        ({}, r"^objectives: got none that compares with a teacher, expected one"),
    ],
)
def test_the_command_refuses_where_there_is_nothing_to_keep(config, changes, message):
    config = replace(config, teacher=replace(config.teacher, **changes))
    if not changes:
        alone = dict.fromkeys(config.objectives, ObjectiveConfig(loss="cross_entropy"))
        config = replace(config, objectives=alone)
    with pytest.raises(UserError, match=message):
        main(config)


def test_the_command_makes_checks_and_mends(recipe, config, tmp_path, capsys, monkeypatch):
    assert cli.main(["teacher-cache", recipe, "--check"]) == 2
    assert "store.json: got nothing that can be read (No such file" in capsys.readouterr().err
    assert cli.main(["teacher-cache", recipe]) == 0
    (folder,) = (tmp_path / "teacher").iterdir()
    out = capsys.readouterr().out
    assert f"wrote {folder} in " in out
    tokens = TeacherStore(folder).tokens
    assert f"{tokens} answer tokens, 64 bytes each" in out
    before = files_of(folder)
    assert cli.main(["teacher-cache", recipe, "--check"]) == 0
    assert f"{folder}: whole" in capsys.readouterr().out
    rows = folder / "rows-000000.safetensors"
    flip(rows, -1)
    assert cli.main(["teacher-cache", recipe, "--check"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {rows}: got sha256 ")
    assert err.endswith("run bidistill teacher-cache without --check to make it again\n")
    assert err.count("\n") == 1
    assert cli.main(["teacher-cache", recipe]) == 0
    assert files_of(folder) == before
    # training mends it too, when asked to compare checksums
    flip(rows, -1)
    train.main(in_folder(on_disk(config), tmp_path / "trusting"))
    assert files_of(folder) != before
    monkeypatch.setenv("BIDISTILL_VERIFY", "1")
    train.main(in_folder(on_disk(config), tmp_path / "careful"))
    assert files_of(folder) == before


def test_the_command_makes_what_training_reads(recipe, config, tmp_path, no_teacher, capsys):
    assert cli.main(["teacher-cache", recipe, "teacher.cache=memory", "optim.lr=1e-3"]) == 0
    assert "bidistill train uses it with teacher.cache=disk" in capsys.readouterr().out
    no_teacher()
    train.main(on_disk(config))
    assert len(list((tmp_path / "teacher").iterdir())) == 1


def test_a_store_of_something_else_is_not_taken(config, tokenizer, tmp_path):
    config = on_disk(config)
    train.main(config)
    (folder,) = (tmp_path / "teacher").iterdir()
    header = json.loads((folder / HEADER).read_text())
    assert problem_of(folder, header["made_of"]) is None
    header["made_of"]["examples"] = "others"
    assert "made of something else" in str(problem_of(folder, header["made_of"]))


def test_a_run_of_the_time_before_resumes(config):
    """Its run.json says ``cache: true`` and knows no folder for rows."""
    train.main(replace(config, steps=2))
    path = config.output / "run.json"
    run = json.loads(path.read_text())
    run["config"]["teacher"]["cache"] = True
    del run["config"]["teacher"]["cache_folder"]
    path.write_text(json.dumps(run))
    assert train.main(replace(config, steps=2), resume=True).exists()
