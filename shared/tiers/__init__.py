"""Where an answer may be found, nearest first."""
