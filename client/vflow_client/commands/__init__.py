"""Commands for people and scripts that administer a running service: `vflow strategies`, `vflow retune`."""
