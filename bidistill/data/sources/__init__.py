"""From files in anybody's form to items, one by one, however large the file.

.. code-block:: text

    file --containers--> Row (where it stands, named values) --shapes--> Item
      JSON array, JSON lines, CSV, TSV,                  TOFU, MUSE, WMDP, RWKU, MMLU,
      Parquet, Arrow, text, datasets folder              KnowUnDo, XSTest, Alpaca, records, ...

A file is recognised by its content and suffix, its fields by their names in the first row. What is
not understood is refused with file and line; nothing in a file is ever run, and no value makes the
reader hold more than `limits` allows.
"""

from bidistill.data.sources.items import read_items
from bidistill.data.sources.shapes import FORMATS

__all__ = ["FORMATS", "read_items"]
