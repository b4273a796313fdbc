"""Texts, MUSE and RWKU: by hand, at their ends, and what they read."""

import math
from types import SimpleNamespace

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks import text as texts
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.kinds import read_all
from bidistill.evaluation.benchmarks.muse import Muse
from bidistill.evaluation.benchmarks.rwku import Rwku
from bidistill.evaluation.benchmarks.text import Text
from tests.evaluation.benchmarks.files import SEEN, write_lines, write_muse, write_qa
from tests.evaluation.scripted import Scripted


class Reader(Scripted):
    """A scripted model with room for long texts."""

    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))


def measures(benchmark, asker, reference=None):
    return benchmark.measure(benchmark.ask(asker), reference)


def test_text_by_hand(tmp_path, tokenizer):
    benchmark = Text.read([write_lines(tmp_path / "x.jsonl", [{"text": "a" * 9}])], Draw())
    found = measures(benchmark, Reader(tokenizer, probability=lambda answer: 1 / 8))
    assert found["x/perplexity"].value == pytest.approx(8)
    assert found["x/min_k"].value == pytest.approx(-math.log(8))
    (item,) = benchmark.ask(Reader(tokenizer))
    assert item["scores"]["tokens"] == 8  # the first is given


def test_text_of_a_model_that_has_it_by_heart(tmp_path, tokenizer):
    benchmark = Text.read([write_lines(tmp_path / "x.jsonl", [{"text": SEEN}])], Draw())
    found = measures(benchmark, Reader(tokenizer, probability=lambda answer: 1.0))
    assert (found["x/perplexity"].value, found["x/min_k"].value) == (1, 0)


def test_a_file_of_blank_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.jsonl: got blank texts alone, expected a document"):
        Text.read([write_lines(tmp_path / "x.jsonl", [{"text": "  "}])], Draw())


def test_long_texts_are_read_in_windows(tmp_path, tokenizer, model, monkeypatch):
    monkeypatch.setattr(texts, "WINDOW", 8)
    path = tmp_path / "story.txt"
    path.write_text(SEEN)
    (item,) = Text.read([path], Draw()).ask(Asker(model=model, tokenizer=tokenizer))
    assert len(SEEN) == 32
    assert item["scores"]["tokens"] == 32 - 4  # one given in each of four windows


def test_a_text_too_short_for_min_k_is_left_out_of_it(tmp_path, tokenizer):
    rows = [{"text": "ab"}, {"text": SEEN}]
    benchmark = Text.read([write_lines(tmp_path / "x.jsonl", rows)], Draw())
    found = measures(benchmark, Reader(tokenizer))
    assert found["x/min_k"].summary()["note"] == "1 of 2 items cannot be scored"
    assert found["x/perplexity"].summary()["n"] == 2


def test_questions_are_no_texts(tmp_path):
    with pytest.raises(UserError, match="text: got a question, expected a document"):
        Text.read([write_qa(tmp_path / "facts.jsonl")], Draw())


@pytest.fixture
def corpus(tmp_path):
    return Muse.read([write_muse(tmp_path)], Draw())


def untouched(answer):
    """Knows what it was trained on."""
    return 0.9 if "dark" in answer else 0.1


def retrained(answer):
    """Never saw either; finds the second text of each set as likely as the other's."""
    return 0.3 if "x" in answer else 0.2


def test_muse_prompts_and_scores(corpus, tokenizer):
    asker = Reader(tokenizer, lambda prompt: "Barad-dur\n\nQuestion: y", untouched)
    found = {key: m.value for key, m in measures(corpus, asker).items()}
    assert found["knowmem/forget_qa"] == 100
    assert found["knowmem/retain2_qa"] == found["verbmem/forget"] == 0
    assert found["membership_auc"] == 0
    assert found["privleak"] is None
    assert all(prompt.raw for prompt in asker.asked)
    assert asker.asked[0].text == "The tower"
    assert asker.asked[1].text.startswith(
        "Question: Solved 0?\nAnswer: Yes 0\n\nQuestion: Solved 1"
    )
    assert asker.asked[1].text.endswith("Answer: Yes 9\n\nQuestion: Where?\nAnswer: ")
    assert asker.asked[2].text.endswith("Yes 9\n\nQuestion: Who?\nAnswer: ")


def test_verbmem_of_a_model_that_goes_on_as_the_text(corpus, tokenizer):
    asker = Reader(tokenizer, lambda prompt: " was dark. x")
    assert measures(corpus, asker)["verbmem/forget"].value == 100


def test_privleak_against_a_reference(corpus, tokenizer):
    reference = corpus.ask(Reader(tokenizer, probability=retrained))
    corpus.check_reference(reference)
    leak = {
        name: measures(corpus, Reader(tokenizer, probability=p), reference)["privleak"].value
        for name, p in [("before", untouched), ("retrained", retrained)]
    }
    assert leak == {"before": -100, "retrained": 0}
    with pytest.raises(UserError, match="got no min_k of privleak/forget/1, expected one; train"):
        corpus.check_reference([item for item in reference if item["id"] != "privleak/forget/1"])


def test_an_answer_that_cannot_be_scored_shows_before_a_model_is_asked(tmp_path):
    """MUSE's ROUGE sees the letters a to z alone, RWKU's what is not a full stop."""
    folder = write_muse(tmp_path / "muse")
    write_lines(folder / "knowmem/retain2_qa.json", [{"question": "Who?", "answer": "Цюрих"}])
    with pytest.raises(UserError, match=r"retain2_qa\.json\S*: reference: got 'Цюрих', which has"):
        Muse.read([folder], Draw())
    rows = [{"query": "Who?", "answer": "...", "level": "2", "type": "x"}]
    with pytest.raises(UserError, match=r"level2\.json\S*: answer: got '\.\.\.', which has no"):
        Rwku.read([write_lines(tmp_path / "level2.json", rows)], Draw())


def test_muse_without_a_part_or_without_solved_questions(tmp_path, tokenizer):
    with pytest.raises(UserError, match="got a folder without verbmem"):
        Muse.read([tmp_path], Draw())
    write_lines(tmp_path / "knowmem/forget_qa.json", [{"question": "a?", "answer": "b"}])
    with pytest.raises(UserError, match=r"got no forget_qa_icl.json beside it, expected MUSE's"):
        Muse.read([tmp_path], Draw())
    write_lines(tmp_path / "knowmem/forget_qa_icl.json", [{"question": "c?", "answer": "d"}])
    found = measures(Muse.read([tmp_path], Draw()), Reader(tokenizer))
    assert set(found) == {"knowmem/forget_qa", "privleak"}
    assert found["privleak"].summary()["note"] == "no texts in privleak"
    with pytest.raises(UserError, match="expected one folder with verbmem"):
        Muse.read([tmp_path / "knowmem" / "forget_qa.json"], Draw())


def probe(level, kind="simple question", **rest):
    return {"query": "Who rules?", "answer": "Basil", "level": level, "type": kind,
            "subject": "Zembla", **rest}  # fmt: skip


def test_rwku_words_its_prompts_by_level_and_type(tmp_path, tokenizer):
    rows = [probe("1", "cloze"), probe("2"), probe("3", "affirmative suffix"),
            probe("3", "incontext learning")]  # fmt: skip
    benchmark = Rwku.read([write_lines(tmp_path / "forget.json", rows)], Draw())
    brief = "Please briefly answer the following question.\n"
    assert [(p.prompt.text, p.prompt.prefill) for p in benchmark.probes] == [
        ("Please complete the blank in the following question.\nQuestion: Who rules?\n", "Answer:"),
        (f"{brief}Question: Who rules?\n", "Answer:"),
        (f"{brief}Question: Who rules?", ""),
        (f"{brief}Who rules?\n", "Answer:"),
    ]


@pytest.mark.parametrize(
    ("reply", "rouge", "refusal", "empty"),
    [
        (" Basil\nKinbote", 1, 0, 0),
        ("\nBasil", 0, 0, 1),  # RWKU stops at the line's end
        (" I don't know.", 0, 1, 0),
        ("", 0, 0, 1),
    ],
)
def test_rwku_scores_the_first_line(tmp_path, tokenizer, reply, rouge, refusal, empty):
    file = write_lines(tmp_path / "forget.json", [probe("2"), probe("1")])
    found = measures(Rwku.read([file], Draw()), Scripted(tokenizer, lambda prompt: reply))
    assert {key: m.value for key, m in found.items()} == {
        "forget/rouge": rouge, "forget/refusal": refusal, "forget/empty": empty,
        "forget/gibberish": 0,
    }  # fmt: skip


def test_rwku_fluency_of_instructions(tmp_path, tokenizer):
    rows = [{"instruction": "Write.", "input": "", "output": ""}]
    file = write_lines(tmp_path / "fluency.json", rows)
    asker = Scripted(tokenizer, lambda prompt: "a b a b")
    found = measures(Rwku.read([file], Draw()), asker)
    assert asker.asked[0].text == "Instruction: Write.\n"
    assert list(found) == ["fluency/fluency"]
    assert found["fluency/fluency"].value == pytest.approx(0.972765, abs=1e-6)


def test_their_kinds_are_guessed(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text(SEEN)
    file = write_lines(tmp_path / "forget.json", [probe("2")])
    given = [str(write_muse(tmp_path / "corpus")), str(file), str(story)]
    assert [benchmark.name for benchmark in read_all(given, Draw())] == ["muse", "rwku", "text"]
