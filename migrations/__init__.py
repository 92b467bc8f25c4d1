"""The schema of the durable tier, forward-only and numbered (empty until that tier exists)."""
