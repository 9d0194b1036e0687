"""Tables of results over runs."""
