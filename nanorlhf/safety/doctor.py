"""What is wrong with a run, read from its metrics and said in plain words."""
