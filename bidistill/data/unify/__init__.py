"""From the files of a recipe to one form: questions and answers, one record each.

.. code-block:: text

    files --sources--> Item --reading--> Draft --deduplicate, split--> training | held out
                         |                                                  |
            documents and multiple choice                anchors, targets and prefills
            become questions (text, choices)             are made for training alone
                                                                            |
                         train.jsonl, held_out.jsonl, ... <--leaks-- is any of it evaluated?

``recipe`` says what a step is to do, ``run`` calls them in order, ``manifest`` says what came out
of which files. Nothing is imported here: the command line shows its help without waiting.
"""
