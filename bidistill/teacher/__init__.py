"""The teacher: who it is, its rows at the answer tokens, and where they are kept.

.. code-block:: text

    model    whose weights it has, and whether they fit the student
    compute  its rows, by a forward; kept in memory
    forms    what a store keeps of a row: hidden states, or best ids
    build    writing a store, by all ranks    store  reading it    cache  finding it
    rows     what the losses take
    kinds    what a step asks for rows: base, frozen, live or averaged teachers
    check    whether it refuses what is to be forgotten, before anything is trained
"""
