"""A short run by a store of best ids, made and read whole or by the ranks of this process group."""

from pathlib import Path
from typing import Any
from unittest import mock

from bidistill.config import ObjectiveConfig
from bidistill.data.records import Role
from bidistill.data.views import build_examples
from bidistill.teacher.build import build_rows
from bidistill.teacher.forms import Best
from bidistill.teacher.kinds import Kept, Teacher
from bidistill.teacher.store import TeacherStore
from bidistill.world import World, join
from bidistill_kernels import LogitTransform
from tests.trainer import cut
from tests.trainer.cut import Case, Outcome
from tests.trainer.tiny import make_tokenizer

K = 8
MADE_OF = {"made": "by a test"}
OBJECTIVES: dict[Role, ObjectiveConfig] = {
    "forget": ObjectiveConfig(loss="topk_kl", options={"reverse": 0.5}, weight=0.5),
    "adversarial": ObjectiveConfig(
        loss="topk_kl", options={"reverse": 0.5}, positions="first", weight=2.0
    ),
    "neighbor": ObjectiveConfig(loss="topk_kl", options={"tail": "renormalize", "k": 5}),
    "retain": ObjectiveConfig(loss="cross_entropy"),
}


def run(case: Case, folder: Path, alone: bool = False) -> Outcome:
    """Make the store by the untrained student, a few rows a file, and train by it."""
    examples = build_examples(cut.records(), make_tokenizer(), cut.CONTEXTS)

    def make(model: Any, world: World) -> Teacher:
        form = Best(K, LogitTransform(scale=0.5))
        build_rows(model, examples, folder, MADE_OF, world, form=form)
        return Kept(TeacherStore(folder, verify=True))

    with (
        mock.patch("bidistill.teacher.build.FILE_BYTES", 50 * (4 * K + 2)),
        mock.patch.object(cut, "OBJECTIVES", OBJECTIVES),
    ):
        return cut.train(case, World() if alone else join(), make)
