"""Checks of user-defined parts before step 0."""
