"""Replay: put a file of requests to a running deployment and account for what became of every one."""
