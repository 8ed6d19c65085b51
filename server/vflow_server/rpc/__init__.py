"""What all methods share: errors, resource names, pages; and the gRPC servers that they are called on."""
