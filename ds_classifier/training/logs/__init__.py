"""The log and the screen of a run, the lists of what was lost, the check of the numbers."""
