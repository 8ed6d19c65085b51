"""Sessions and what they do: turns, pictures shown ahead of a question, forks; each a unit of work for the engine."""
