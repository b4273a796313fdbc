"""Published benchmarks, each from local files to scores of items and a summary.

Every module has a class with the same three methods:

* ``read(paths, limit, seed)``, a class method, reads the files, before any model is loaded;
* ``ask(asker)`` puts its questions to a model and returns items with their scores;
* ``measure(items, reference)`` makes the summary of items; ``reference`` are those of a retrained
  model, where a measure compares with one.

`kinds` has the table of them and guesses which one a file belongs to.
"""
