"""The demo: a small real model forgets the capitals of twelve countries, and proves it.

.. code-block:: text

    places.csv, questions.csv                         bidistill/demo/facts.py
      -> what the model says about each of them       bidistill/demo/prepare.py
      -> training records, probes                     bidistill/demo/build.py
      -> train (as for any other recipe)              bidistill/train.py
      -> the same probes again                        bidistill/evaluation/
      -> metrics.json, report.html, report.md         runs/demo
"""

from bidistill.demo.run import run

__all__ = ["run"]
