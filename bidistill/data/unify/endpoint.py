"""A model behind an OpenAI-compatible address, for :mod:`bidistill.data.unify.writer`."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bidistill.data.unify.writer import Chat, WriterConfig
from bidistill.errors import UserError

if TYPE_CHECKING:
    import httpx

FIRST_PAUSE_S = 0.5
"""Wait before the second try; it doubles with every further one."""
LONGEST_PAUSE_S = 30.0
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server that is busy, restarting or overloaded: worth another try."""


_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, as a server sends it that cuts within a character: cannot be written,
and means no more than the sign for what is missing, which local models give there."""


class Endpoint:
    """A server that is asked for one reply at a time, by several threads.

    Args:
        config: with the base address in ``endpoint`` and the model's ``name``.

    Raises:
        UserError: the address is none, holds a password, the name is missing, or the environment
            variable of the key is empty or holds what is no key.
    """

    def __init__(self, config: WriterConfig) -> None:
        """Check the address; nothing is sent."""
        address = (config.endpoint or "").rstrip("/")
        _check_address(address)
        if not config.name:
            raise UserError(
                "model.name: got nothing, expected the model's name at the endpoint; add it"
            )
        self.identity = {"name": config.name, "endpoint": address}
        self._config = config
        self._url = f"{address}/chat/completions"
        self._key = _key(config)

    def replies(
        self, chats: Sequence[Chat], wanted: frozenset[int], max_tokens: int
    ) -> Iterator[list[tuple[int, str]]]:
        """Yield each reply as it comes."""
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        pool = ThreadPoolExecutor(self._config.batch)
        with httpx.Client(timeout=self._config.timeout, headers=headers) as client:
            try:
                indices = {
                    pool.submit(self._reply, client, chats[i], max_tokens): i
                    for i in sorted(wanted)
                }
                for future in as_completed(indices):
                    yield [(indices[future], future.result())]
            finally:
                # after an error or Ctrl-C what has not begun is not sent any more
                pool.shutdown(cancel_futures=True)

    def _reply(self, client: "httpx.Client", chat: Chat, max_tokens: int) -> str:
        body: dict[str, Any] = {
            "model": self._config.name,
            "messages": list(chat),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if chat[-1]["role"] == "assistant":
            # servers that can continue a turn (vLLM, SGLang) must be told to
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return self._content(self._post(client, body))

    def _post(self, client: "httpx.Client", body: dict[str, Any]) -> "httpx.Response":
        """Send a request until it is answered, or tried often enough."""
        import httpx

        problem = ""
        for attempt in range(self._config.retries + 1):
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1) if attempt else 0.0
            try:
                if attempt:
                    time.sleep(min(pause, LONGEST_PAUSE_S))
                response = client.post(self._url, json=body)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return response
            problem = f"status {response.status_code} with {self._quoted(response.text)}"
            if response.status_code not in _PASSING:
                break
        shown = " ".join(self._without_key(problem).split())
        raise UserError(
            f"model.endpoint: got {shown} from {self._url}, expected a reply; check the address, "
            "model.name and model.key_env, and run again: replies so far are kept"
        )

    def _content(self, response: "httpx.Response") -> str:
        """The text in an answer of the server."""
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            content = 0
        if content is not None and not isinstance(content, str):
            raise UserError(
                f"model.endpoint: got {self._quoted(response.text)} from {self._url}, expected "
                "choices[0].message.content; use an OpenAI-compatible address"
            )
        return _HALF.sub("\ufffd", content or "")

    def _quoted(self, text: str) -> str:
        """The start of what a server says, which may well be the key that it was sent."""
        return repr(self._without_key(text)[:200])

    def _without_key(self, text: str) -> str:
        """A text for a message: the key, also as JSON and Python write it, is in none."""
        if self._key:
            for form in (self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1]):
                text = text.replace(form, "***")
        return text


def _check_address(address: str) -> None:
    """An address is http or https, and holds no password: the manifest shows it."""
    usable = _usable(address)
    hiding = "@" in address and (not usable or "@" in urlsplit(address).netloc)
    if hiding or "?" in address:  # in no message either
        raise UserError(
            "model.endpoint: got an address with a password or a query, expected one without; "
            "put the key into an environment variable and name it in model.key_env"
        )
    if not usable:
        raise UserError(
            f"model.endpoint: got {address!r}, expected an address such as "
            "http://localhost:8000/v1; mend it"
        )


def _usable(address: str) -> bool:
    """Whether a request can be sent there: a port is a number, a label of a host is not endless."""
    import httpx

    try:
        parts, url = urlsplit(address), httpx.URL(address)
        host = url.raw_host.decode("ascii").encode("idna")  # as it is looked up
        known = parts.scheme in ("http", "https") and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        return False
    return known and bool(parts.hostname) and bool(host) and not parts.fragment


def _key(config: WriterConfig) -> str | None:
    """The key, from the environment. It is shown nowhere, nor is what may be one by mistake."""
    name = config.key_env
    if name is None:
        return None
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(
            "model.key_env: got what is no name of a variable, expected one such as MY_KEY; put "
            "the key into an environment variable and give its name"
        )
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"model.key_env: got {name}, which is not set in the environment, expected "
            f"the endpoint's key in it; export {name}=..."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"model.key_env: got {name}, which holds other characters than printable ASCII, "
            f"expected the endpoint's key in it; export {name}=... again"
        )
    return key
