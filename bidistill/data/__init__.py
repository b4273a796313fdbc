"""From files to packed batches.

.. code-block:: text

    JSON lines --readers--> Record --views--> Example --loader--> Batch --packing--> Packed
                                     |                                                 |
              student and teacher prompt around one answer            one token axis, no padding,
              whose token ids are the same in both                    shared prefixes computed once

Nothing is imported here: ``records`` is used where importing torch would be felt.
"""
