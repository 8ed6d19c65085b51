"""Commands that administer a running service: `vflow strategies` and `vflow retune`."""
