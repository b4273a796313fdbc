"""What stands in a page of HTML."""

from html.parser import HTMLParser

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts and styles, and whether all close."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.stack = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
