"""`--check`: before its first step a run checks the mechanics that silently ruin results."""
