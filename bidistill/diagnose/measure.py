"""From sampled texts to hidden states in every form, and to the gaps between roles."""

from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedTokenizerBase

from bidistill.data.records import Role
from bidistill.diagnose.corpus import Corpus, RoleTexts
from bidistill.diagnose.gap import Comparison, compare, median_distance2
from bidistill.diagnose.report import FORMS, pair_name
from bidistill.diagnose.states import chat_ids, raw_ids, read_out
from bidistill.loading import load_base

LEAST = 10
"""Items of a role below which no gap is measured."""

States = dict[str, dict[Role, Float64[np.ndarray, "n H"]]]
"""By form and role; row i of a role is the same item in every form."""


def hidden_states(
    model_dir: Path | str, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> States:
    """Run the sample of every role through the model, in every form it has.

    Args:
        model_dir: folder of the model, loaded in float32.
        tokenizer: of the model.
        corpus: roles with fewer than `LEAST` items are left out, and a remark says so.

    Raises:
        UserError: the model cannot be used.
    """
    sequences = {
        (form, role): ids
        for role, texts in corpus.roles.items()
        for form, ids in _sequences(tokenizer, texts).items()
    }
    for (form, role), ids in list(sequences.items()):
        if len(ids) < LEAST:
            corpus.remarks.append(
                f"Role {role} has {len(ids)} items as {FORMS[form]}, fewer than {LEAST}: no gap "
                "is measured to it."
            )
            del sequences[form, role]
    if not sequences:
        return {}
    model = load_base(model_dir)
    states: States = {}
    for form in FORMS:
        for role in corpus.roles:
            if ids := sequences.get((form, role)):
                rows = read_out(model, ids, label=f"{role}, {FORMS[form]}")
                states.setdefault(form, {})[role] = rows
    return states


def gaps(states: States, seed: int) -> dict[str, Comparison]:
    """Compare every pair of roles in the forms that both have; by name of the pair.

    The kernel of a form is as wide as the median distance between two of its points, whatever
    their roles, so that the pairs of a form compare.
    """
    widths = {
        form: median_distance2(np.concatenate(list(roles.values())))
        for form, roles in states.items()
    }
    comparisons = {}
    for first, second in combinations(dict.fromkeys(r for s in states.values() for r in s), 2):
        forms = {
            form: (roles[first], roles[second])
            for form, roles in states.items()
            if first in roles and second in roles
        }
        if forms:
            comparisons[pair_name(first, second)] = compare(forms, widths, seed)
    return comparisons


def _sequences(tokenizer: PreTrainedTokenizerBase, texts: RoleTexts) -> dict[str, list[list[int]]]:
    """Token ids of a role's sample by form."""
    sequences = {
        "after": [chat_ids(tokenizer, r.question, r.prefill) for r in texts.records.values()]
    }
    if texts.raw:
        sequences["before"] = [raw_ids(tokenizer, text) for text in texts.raw.values()]
        sequences["chat"] = [chat_ids(tokenizer, text) for text in texts.raw.values()]
    return sequences
