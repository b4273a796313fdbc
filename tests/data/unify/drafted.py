"""Drafts for tests."""

from bidistill.data.unify.drafts import Draft


def draft(id, question, role="neighbor", *, entity=None, **rest):
    """A draft that is an entity of its own unless the test says otherwise."""
    return Draft(
        id=id, role=role, question=question, entity=entity or id, source=f"{id}.jsonl:1", **rest
    )
