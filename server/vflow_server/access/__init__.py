"""Access: tokens, certificates and tenants."""
