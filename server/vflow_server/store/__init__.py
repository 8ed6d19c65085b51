"""The data folder: what is written down so that sessions outlive the process, and how it is read back."""
