"""Published measures of forgetting, by their exact definitions: pure functions, no model.

They take what a model said about one item (log-probabilities of tokens, token ids, text) and give
that item's score. Averages over items and their intervals are made in `statistics`, so that each
mean can be shown with its spread. Logarithms are natural, so log-probabilities are in nats.

What cannot be scored is refused: an item without an answer, a score that is not a number, a measure
against a retrained model when there is none. None of them becomes 0, 0.5 or None.
"""
