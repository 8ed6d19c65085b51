"""Parts that all methods share: errors, resource names, pages of lists, and the gRPC servers."""
