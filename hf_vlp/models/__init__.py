"""One folder an architecture; none imports another."""
