"""The writer: what a model says, asked once, in whatever pieces it is asked."""

import sqlite3

import pytest

from bidistill.data.unify import endpoint, local_model
from bidistill.data.unify.writer import CACHE_NAME, Writer, WriterConfig, chat
from bidistill.data.unify.writers import make_writer
from bidistill.errors import UserError
from bidistill.evaluation.generation import generate
from bidistill.loading import load_base, load_tokenizer
from tests.data.unify.fake_endpoint import FakeEndpoint
from tests.trainer.tiny import SHOTS, make_model, make_tokenizer

QUESTIONS = [f"What is the capital of {place}?" for place in ("Ur", "Zembla", "Thule", "Ophir")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def local(folder, cache, **settings):
    writer = make_writer(WriterConfig(path=str(folder), **settings), cache)
    assert writer is not None
    return writer


def served(address, cache, **settings):
    writer = make_writer(WriterConfig(endpoint=address, name="tiny", **settings), cache)
    assert writer is not None
    return writer


def test_a_folder_says_what_generation_says(folder, tmp_path):
    chats = [chat(question, prefill=start) for question in QUESTIONS for start in ("", "It is")]
    replies = local(folder, tmp_path, batch=3).write(chats, 6)
    model, tokenizer = load_base(folder), load_tokenizer(folder)
    prompts = [(question, start) for question in QUESTIONS for start in ("", "It is")]
    alone = [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert replies == alone
    assert len(set(replies)) > 4, "a model that says the same to all would prove nothing"


def test_contexts_are_told(folder, tmp_path):
    told, untold = local(folder, tmp_path).write(
        [chat(QUESTIONS[0], context=list(SHOTS)), chat(QUESTIONS[0])], 6
    )
    model, tokenizer = load_base(folder), load_tokenizer(folder)
    assert told == generate(model, tokenizer, [(QUESTIONS[0], "")], 6, context=list(SHOTS))[0]
    assert told != untold


def test_a_second_run_loads_no_model(folder, tmp_path, monkeypatch):
    chats = [chat(question) for question in QUESTIONS]
    first = local(folder, tmp_path).write(chats, 4)
    monkeypatch.setattr(local_model.LocalModel, "_load", lambda self: pytest.fail("loaded"))
    again = local(folder, tmp_path)
    assert again.write(list(reversed(chats)), 4) == list(reversed(first))
    assert again.asked == 0


def test_an_interrupted_run_goes_on_with_the_same_batches(folder, tmp_path, monkeypatch):
    chats = [chat(question + " " * (i % 3)) for i, question in enumerate(QUESTIONS * 2)]
    expected = local(folder, tmp_path / "whole", batch=2).write(chats, 4)
    batches = []
    real = local_model.LocalModel._generate

    def failing(self, context, prompts, max_tokens):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(prompts)
        return real(self, context, prompts, max_tokens)

    monkeypatch.setattr(local_model.LocalModel, "_generate", failing)
    with pytest.raises(KeyboardInterrupt):
        local(folder, tmp_path / "cut", batch=2).write(chats, 4)
    kept = list(batches)
    batches.append(None)  # the third call and all after it go through
    again = local(folder, tmp_path / "cut", batch=2)
    assert again.write(chats, 4) == expected
    assert again.asked == len({c[0]["content"] for c in chats}) - sum(map(len, kept))
    assert not any(batch in kept for batch in batches[3:])


def test_same_question_is_asked_once(folder, tmp_path):
    writer = local(folder, tmp_path)
    replies = writer.write([chat("Why?")] * 5, 4)
    assert len(replies) == 5
    assert writer.asked == 1


def test_replies_depend_on_length_model_and_dtype(folder, tmp_path):
    writer = local(folder, tmp_path)
    short, long = writer.write([chat("Why?")], 3)[0], writer.write([chat("Why?")], 9)[0]
    assert long.startswith(short)
    assert len(long) > len(short)
    halved = local(folder, tmp_path, dtype="bfloat16")
    halved.write([chat("Why?")], 3)
    assert halved.asked == 1
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert local(folder, tmp_path).identity != writer.identity


def test_identity_says_nothing_of_the_machine(folder, tmp_path):
    identity = local(folder, tmp_path, name="tiny llama").identity
    assert identity["name"] == "tiny llama"
    assert str(folder.parent) not in str(identity)


def test_endpoint_gets_chats_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEMBLA_KEY", "secret-of-zembla")
    fake = FakeEndpoint(lambda messages: messages[-1]["content"].upper())
    with fake.address() as address:
        writer = served(f"{address}/", tmp_path, key_env="ZEMBLA_KEY", batch=3)
        replies = writer.write([chat(question, SHOTS) for question in QUESTIONS], 5)
    assert replies == [question.upper() for question in QUESTIONS]
    assert set(fake.keys) == {"Bearer secret-of-zembla"}
    body = next(b for b in fake.bodies if "Thule" in b["messages"][-1]["content"])
    assert body["messages"] == chat(QUESTIONS[2], SHOTS)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 5)
    assert b"secret-of-zembla" not in (tmp_path / CACHE_NAME).read_bytes()
    assert "secret" not in str(writer.identity)


def test_endpoint_is_told_to_continue_a_prefill(tmp_path):
    fake = FakeEndpoint(lambda messages: " so")
    with fake.address() as address:
        served(address, tmp_path).write([chat("Why?", prefill="It is"), chat("Why?")])
    continuing = {body["messages"][-1]["role"]: body for body in fake.bodies}
    assert continuing["assistant"]["continue_final_message"] is True
    assert continuing["assistant"]["add_generation_prompt"] is False
    assert "continue_final_message" not in continuing["user"]


def test_endpoint_that_is_busy_is_asked_again(tmp_path):
    fake = FakeEndpoint(lambda messages: "done", failures=[503, 429, 500])
    with fake.address() as address:
        assert served(address, tmp_path, batch=1).write([chat("Why?")]) == ["done"]
    assert len(fake.bodies) == 4


def test_endpoint_that_refuses_is_not_asked_again_and_replies_are_kept(tmp_path):
    fake = FakeEndpoint(lambda messages: "done")
    with fake.address() as address:
        writer = served(address, tmp_path, batch=1)
        writer.write([chat("Why?")])
        fake._failures.append(401)
        with pytest.raises(UserError, match=r"model\.endpoint: got status 401 .*busy"):
            writer.write([chat("Why?"), chat("Where?")])
        assert len(fake.bodies) == 2
        assert writer.write([chat("Why?"), chat("Where?")]) == ["done", "done"]
    assert len(fake.bodies) == 3, "what was answered before the failure is not asked again"


@pytest.mark.parametrize(
    "body", [{}, {"choices": []}, {"choices": [{"message": {"content": ["x"]}}]}, [1], None]
)
def test_endpoint_that_speaks_otherwise(tmp_path, body):
    fake = FakeEndpoint(lambda messages: body)
    with fake.address() as address, pytest.raises(UserError, match="OpenAI-compatible"):
        served(address, tmp_path).write([chat("Why?")])


def test_a_reply_of_nothing_is_empty(tmp_path):
    body = {"choices": [{"message": {"content": None}}]}
    with FakeEndpoint(lambda messages: body).address() as address:
        assert served(address, tmp_path).write([chat("Why?")]) == [""]


def test_nobody_listens(tmp_path):
    with FakeEndpoint(str).address() as address:
        pass
    writer = served(address, tmp_path, retries=1)
    with pytest.raises(UserError, match=r"model\.endpoint: got ConnectError.* from http") as caught:
        writer.write([chat("Why?")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got neither of path and endpoint"),
        ({"path": "a", "endpoint": "http://b/v1"}, "got both of path and endpoint"),
        ({"path": "nowhere"}, r"model\.path: got nowhere"),
        ({"endpoint": "localhost:8000", "name": "x"}, r"model\.endpoint: got 'localhost:8000'"),
        ({"endpoint": "http://a:b@c/v1", "name": "x"}, "got an address with a password"),
        ({"endpoint": "http://c/v1?key=b", "name": "x"}, r"model\.endpoint: got"),
        ({"endpoint": "http://[c/v1", "name": "x"}, r"model\.endpoint: got"),
        ({"endpoint": "http://localhost:abc/v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": "http://localhost:99999/v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": "http://..../v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": f"http://{'x' * 64}.com/v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": f"http://{'ü' * 80}.com/v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": "http://x\ny/v1", "name": "x"}, r"model\.endpoint: got 'http"),
        ({"endpoint": "http://a:b@[c/v1", "name": "x"}, "got an address with a password"),
        ({"endpoint": "http://c/v1?key=a:b", "name": "x"}, "got an address with a password or a"),
        (
            {"endpoint": "http://c/v1", "name": "x", "key_env": "sk-a:b"},
            r"model\.key_env: got what is no name of a variable",
        ),
        ({"endpoint": "http://c/v1"}, r"model\.name: got nothing"),
        (
            {"endpoint": "http://c/v1", "name": "x", "key_env": "BIDISTILL_NOT_SET"},
            r"model\.key_env: got BIDISTILL_NOT_SET",
        ),
    ],
)
def test_mistakes(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make_writer(WriterConfig(**settings), tmp_path)
    assert "\n" not in str(caught.value)
    assert "a:b" not in str(caught.value)


def test_no_model_no_writer(tmp_path):
    assert make_writer(None, tmp_path) is None


def test_a_cache_that_is_none_is_refused(tmp_path):
    (tmp_path / CACHE_NAME).write_text("not a database, but long enough to be looked at" * 100)
    message = r"replies\.sqlite: got 'file is not a database'"
    with pytest.raises(UserError, match=message):
        served("http://localhost/v1", tmp_path).write([chat("Why?")])


def test_the_first_reply_stays(tmp_path):
    path = tmp_path / CACHE_NAME
    with FakeEndpoint(lambda messages: "first").address() as address:
        served(address, tmp_path).write([chat("Why?")])
    with sqlite3.connect(path) as connection:
        [(key, reply)] = connection.execute("select key, reply from replies").fetchall()
    connection.close()
    assert (len(key), reply) == (64, "first")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "I"}],
        [{"role": "user", "content": "  "}],
        [{"role": "usr", "content": "Why?"}, {"role": "user", "content": "Why?"}],
    ],
)
def test_chats_that_ask_nothing(tmp_path, messages):
    class Silent:
        identity = {"name": "silent"}  # noqa: RUF012

        def replies(self, chats, wanted, max_tokens):
            raise AssertionError("asked")

    with pytest.raises(UserError, match="chat: got"):
        Writer(Silent(), tmp_path / CACHE_NAME).write([messages])


@pytest.mark.parametrize(
    "key", ["zembla\nsecret", "zembla\tsecret", "zembla-клю-secret", "zembla\x7f"]
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("ZEMBLA_KEY", key)
    config = WriterConfig(endpoint="http://localhost/v1", name="x", key_env="ZEMBLA_KEY")
    with pytest.raises(UserError, match=r"model\.key_env: got ZEMBLA_KEY, .*ASCII") as caught:
        make_writer(config, tmp_path)
    assert "zembla" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["sk-secret", "sk'\\\"secret"])
@pytest.mark.parametrize("status", [200, 401])
def test_a_server_that_repeats_the_key_gives_nothing_away(tmp_path, monkeypatch, key, status):
    monkeypatch.setenv("ZEMBLA_KEY", key)
    fake = FakeEndpoint(lambda messages: {"error": f"{'x' * 150} wrong key {key} {'y' * 90}"})
    fake.answer = lambda body, given: (status, {"error": f"{'x' * 160} wrong key {key}"})
    with fake.address() as address, pytest.raises(UserError, match=r"wrong key \*\*\*") as caught:
        served(address, tmp_path, key_env="ZEMBLA_KEY").write([chat("Why?")])
    for error in (caught.value, caught.value.__cause__, caught.value.__context__):
        assert "secret" not in str(error)
        assert "sk" not in str(error).replace("ask", "")


def test_half_a_surrogate_is_kept_as_the_sign_for_what_is_missing(tmp_path):
    with FakeEndpoint(lambda messages: "So \ud83d\ude00, \ud83d").address() as address:
        writer = served(address, tmp_path)
        assert writer.write([chat("Why?")]) == ["So \U0001f600, \ufffd"]
        assert writer.write([chat("Why?")]) == ["So \U0001f600, \ufffd"]
    assert writer.asked == 1
