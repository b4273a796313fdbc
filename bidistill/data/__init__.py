"""From files to packed batches.

.. code-block:: text

    JSON lines --readers--> Record --views--> Example --loader--> Batch --packing--> Packed
                                     |    |                                            |
              student and teacher prompt  |                       one token axis, no padding,
              around one answer whose ids |                       shared prefixes computed once
              are the same in both        |
                                        store: built once, mapped into memory ever after

Nothing is imported here: ``records`` is used where importing torch would be felt.
"""
