"""Access: tokens, certificates and tenants, and the guard that lets nobody else in."""
