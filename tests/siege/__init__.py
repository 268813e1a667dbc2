"""The siege: a server under everything at once, and one tenant who behaves and must not notice."""
