"""How training runs: ranks, checkpoints, the log, the parts of a loop, run folders, the plan of memory."""
