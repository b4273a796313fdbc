"""The fused losses in other people's trainers: one small file for each of them.

Nothing is imported here, so that the package of one trainer is not needed for another's.
"""
