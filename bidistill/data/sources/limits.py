"""How much of a file is held at once: far above honest data, far below what hurts a machine."""

MIB = 2**20

LONGEST_LINE = 16 * MIB
"""Bytes of one line. A novel has 1 MiB; a line without end must not fill the memory."""

LONGEST_TEXT = 16 * MIB
"""Characters of one value: a cell, a string, a document of a list."""

LONGEST_LIST = MIB
"""Characters of a list that is written as text, which costs many times its size to parse."""

PIECE = 64 * 1024
"""Characters after which a text file is cut at the next blank line, into several documents."""

LARGEST_PAGE = 64 * MIB
"""Bytes of one unpacked Parquet page; writers aim at 1 MiB, and a page is held whole."""

LARGEST_BATCH = 64 * MIB
"""Bytes of the rows of a Parquet or Arrow file that are held as Python objects at once."""

MOST_UNPACKED = 1000
"""Times by which a Parquet page above 1 MiB may grow when unpacked; English text grows 3 to 10."""

MOST_VALUES = 64
"""Values of a Parquet column for each byte of its file: run lengths can claim any number of them
in a few bytes, but a column of distinct questions takes bytes for each."""
