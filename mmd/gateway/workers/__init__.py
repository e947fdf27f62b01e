"""Workers: processes that relay beside the one that decides (gateway.workers)."""
