"""What producers and workers agree on: settings, keys, messages, tiers, scripts, providers."""
