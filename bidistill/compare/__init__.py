"""Comparing methods: each trained on the same data with every seed, measured alike, in one table.

.. code-block:: text

    compare.yaml                                            recipe.py
      -> data and probes, shared by all                     demo.py, or files of the recipe
      -> a cell for each method and seed                    cells.py
      -> train, ask, attack; one process a cell             worker.py
      -> cells/<method>/<seed>/{items,attacks}.jsonl, metrics.json
      -> rates over items, seeds apart, with intervals      measures.py, estimate.py
      -> verdict, tables, plots                             results.py, markdown.py, plots.py
      -> compare.md, compare.json, compare.html             page.py
"""

from bidistill.compare.run import run

__all__ = ["run"]
