"""The data folder: what is stored so that sessions survive a restart, and how it is read back."""
