"""A model of fixed habits in place of a real one: its scores are known beforehand."""

import math

from bidistill.evaluation.asking import Reply
from bidistill.evaluation.generation import prompt_sha256
from bidistill.evaluation.scoring import Scored


class Scripted:
    """Says and finds probable what its functions say.

    Args:
        tokenizer: of the spans.
        reply: what is written after a prompt.
        probability: of each token of an answer, given its text; above 1/2 they are ranked first.
    """

    def __init__(self, tokenizer, reply=lambda prompt: "", probability=lambda answer: 0.5):
        self.tokenizer = tokenizer
        self._reply, self._probability = reply, probability
        self.asked = []

    def replies(self, prompts, max_new_tokens, name):
        self.asked += prompts
        return [
            Reply(self._reply(prompt), prompt_sha256(prompt.ids(self.tokenizer)))
            for prompt in prompts
        ]

    def scores(self, spans, name):
        scored = []
        for span in spans:
            p = self._probability(self.tokenizer.decode(span.answer_ids))
            target = span.answer_ids
            predicted = target if p > 0.5 else tuple(token + 1 for token in target)
            scored.append(Scored((math.log(p),) * len(target), predicted, target))
        return scored
