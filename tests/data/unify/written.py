"""A writer whose replies a test decides."""

from bidistill.data.unify.writer import Writer


class Scripted:
    """A model that says what a function makes of each chat, and notes what it was asked."""

    def __init__(self, reply):
        self.identity = {"name": "scripted"}
        self.chats = []
        self._reply = reply

    def replies(self, chats, wanted, max_tokens):
        for index in sorted(wanted):
            self.chats.append(chats[index])
            yield [(index, self._reply(chats[index]))]


def scripted(tmp_path, reply):
    """A writer with a cache of its own, and its model."""
    model = Scripted(reply)
    return Writer(model, tmp_path / "replies.sqlite"), model
