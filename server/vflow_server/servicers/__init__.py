"""The services of the contract: each checks a request, passes it to the packages below and fills in the response."""
